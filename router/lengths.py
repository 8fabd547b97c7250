"""How long answers will be, learned from those that have ended. A core."""

from __future__ import annotations

from router.requests import Request


class OutputLengths:
    """Running quantiles of the tokens of complete answers, by tenant and bin of the prompt's length; what is
    known of all tenants stands in until a tenant has had enough of them. Bounded in memory."""

    def observe(self, request: Request, num_tokens: int) -> None:
        """An answer is complete, and had so many tokens."""
        raise NotImplementedError

    def quantiles(self, request: Request) -> tuple[int, int, int]:
        """p10, p50 and p90 of the tokens that are still to come of the request's answer: at least 1 each, at
        most its tokens_left. With nothing known: its tokens_left thrice."""
        raise NotImplementedError
