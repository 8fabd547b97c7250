"""What every policy refuses: requests that have no worker, that fit nowhere, or that are too many."""

from __future__ import annotations

from router.admission.base import Refusal
from router.admission.shortage import shortage_of
from router.errors import OverloadedError, PromptTooLongError
from router.gate.base import GateQueue
from router.pool_view import PoolView, Role
from router.requests import Request


class StructuralAdmission:
    """Refuses at once what would only wait in vain."""

    def __init__(
        self, pool: PoolView, gate: GateQueue, max_gated_requests: int, retry_after_s: float
    ) -> None:
        """max_gated_requests: more than these do not wait; they may come again after `retry_after_s`."""
        self._pool = pool
        self._gate = gate
        self._max_gated_requests = max_gated_requests
        self._retry_after_s = retry_after_s

    def judge(self, request: Request, now: float, ahead: int, *, overdue: bool) -> Request | Refusal:
        shortage = shortage_of(self._pool)
        if shortage is not None and (overdue or not shortage.passes):
            return Refusal(shortage.reason, shortage.error, counts=True)
        misfit = self.misfit(request)
        if misfit is not None:
            return Refusal("never_fits", misfit, counts=False)
        gated_requests = len(self._gate) + ahead
        if gated_requests >= self._max_gated_requests:
            message = f"{gated_requests} requests wait already; try again in {self._retry_after_s:g} s"
            return Refusal("gate_full", OverloadedError(message, self._retry_after_s), counts=True)
        return request

    def misfit(self, request: Request) -> PromptTooLongError | None:
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
            largest = max((worker.capacity for worker in self._pool.up(role)), key=lambda one: one.num_tokens)
            needed = largest.blocks_for(tokens)
            if needed > largest.num_blocks:
                return PromptTooLongError(
                    f"{what} need {needed} KV blocks of {largest.block_size} tokens, but the largest {role} "
                    f"worker has {largest.num_blocks}: at most {largest.num_tokens} tokens",
                    "prompt" if role is Role.PREFILL else "max_tokens",
                )
        return None

    def could_have_served(self, now: float) -> int:
        return 0  # nobody is refused for being late
