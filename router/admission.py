"""Whether a request is let in at all. A core: answers from what it is shown."""

from __future__ import annotations

from dataclasses import dataclass

from router.errors import NoPairError, NoWorkersError, OverloadedError, PromptTooLongError, RouterError
from router.pool_view import PoolView, Role
from router.requests import Request


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in.

    reason: for the metrics. counts: whether it is the deployment that falls short (outcome "rejected", which
    stays in the denominator of attainment) and not the request that asks for the impossible.
    """

    reason: str
    error: RouterError
    counts: bool


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why there is no pair of workers for any request. passes: whether it may well be over in a moment."""

    reason: str
    error: RouterError
    passes: bool


def shortage_of(pool: PoolView) -> Shortage | None:
    """None while two workers are linked; that they are loaded or suspected is no shortage."""
    missing = pool.missing_role()
    if missing is not None:
        return Shortage("no_worker", NoWorkersError(missing), passes=False)
    none = pool.why_no_pair()
    if none is None:
        return None
    never, why = none
    error = NoPairError(f"no prefill worker is linked to a decode worker ({why})")
    return Shortage("no_pair", error, passes=not never)


class Admission:
    """Refuses at once what would only wait in vain."""

    def __init__(self, max_gated_requests: int, retry_after_s: float) -> None:
        """max_gated_requests: more than these do not wait; they may come again after `retry_after_s`."""
        self._max_gated_requests = max_gated_requests
        self._retry_after_s = retry_after_s

    def refuse(
        self, request: Request, pool: PoolView, gated_requests: int, *, overdue: bool
    ) -> Refusal | None:
        """The refusal, or None when the request may wait at the gate. overdue: no pair has been linked for so
        long that it is no use to wait."""
        shortage = shortage_of(pool)
        if shortage is not None and (overdue or not shortage.passes):
            return Refusal(shortage.reason, shortage.error, counts=True)
        misfit = self.misfit(request, pool)
        if misfit is not None:
            return Refusal("never_fits", misfit, counts=False)
        if gated_requests >= self._max_gated_requests:
            message = f"{gated_requests} requests wait already; try again in {self._retry_after_s:g} s"
            return Refusal("gate_full", OverloadedError(message, self._retry_after_s), counts=True)
        return None

    def misfit(self, request: Request, pool: PoolView) -> PromptTooLongError | None:
        """The error of a request that no worker that is up could ever hold; there must be some of both
        roles."""
        prompt_tokens, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
        answered = f" and the {len(request.answered)} of the answer so far" if request.answered else ""
        for role, tokens, what in (
            (Role.PREFILL, request.num_tokens, f"the {prompt_tokens} tokens of the prompt{answered}"),
            (
                Role.DECODE,
                request.max_total_tokens,
                f"prompt ({prompt_tokens}) and max_tokens ({max_tokens})",
            ),
        ):
            largest = max((worker.capacity for worker in pool.up(role)), key=lambda one: one.num_tokens)
            needed = largest.blocks_for(tokens)
            if needed > largest.num_blocks:
                return PromptTooLongError(
                    f"{what} need {needed} KV blocks of {largest.block_size} tokens, but the largest {role} "
                    f"worker has {largest.num_blocks}: at most {largest.num_tokens} tokens",
                    "prompt" if role is Role.PREFILL else "max_tokens",
                )
        return None
