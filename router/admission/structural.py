"""What every policy refuses: requests that have no worker, that fit nowhere, or that are too many."""

from __future__ import annotations

from router.admission.base import Refusal
from router.admission.shortage import shortage_of
from router.errors import OverloadedError, PromptTooLongError
from router.gate.base import GateQueue
from router.pool_view import WRITERS, PoolView, Role, WorkerView
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
        self._known_largest: dict[tuple[Role, ...], WorkerView] = {}
        self._known_version = -1

    def judge(self, request: Request, now: float, ahead: int, *, overdue: bool) -> Request | Refusal:
        return self.impossible(request, overdue=overdue) or self.full(len(self._gate) + ahead) or request

    def impossible(self, request: Request, *, overdue: bool) -> Refusal | None:
        """Where the request has no worker, or none that it fits."""
        shortage = shortage_of(self._pool)
        if shortage is not None and (overdue or not shortage.passes):
            return Refusal(shortage.reason, shortage.error, counts=True)
        misfit = self.misfit(request)
        return None if misfit is None else Refusal("never_fits", misfit, counts=False)

    def full(self, gated_requests: int) -> Refusal | None:
        """Where so many requests wait that no other may."""
        if gated_requests < self._max_gated_requests:
            return None
        message = f"{gated_requests} requests wait already; try again in {self._retry_after_s:g} s"
        return Refusal("gate_full", OverloadedError(message, self._retry_after_s), counts=True)

    def misfit(self, request: Request) -> PromptTooLongError | None:
        prompt_tokens, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
        answered = f" and the {len(request.answered)} of the answer so far" if request.answered else ""
        prompt = f"the {prompt_tokens} tokens of the prompt{answered}"
        whole = f"prompt ({prompt_tokens}) and max_tokens ({max_tokens})"
        misfit = self._too_much(WRITERS, request.max_total_tokens, whole, "max_tokens")
        if misfit is None and self._pool.up(Role.MIXED):  # it writes what it reads
            misfit = self._too_much((Role.MIXED,), request.max_total_tokens, whole, "max_tokens")
            if misfit is None or not self._pool.up(Role.PREFILL):
                return misfit
            misfit = None
        return misfit or self._too_much((Role.PREFILL,), request.num_tokens, prompt, "prompt")

    def could_have_served(self, now: float) -> int:
        return 0  # nobody is refused for being late

    def _too_much(
        self, roles: tuple[Role, ...], tokens: int, what: str, param: str
    ) -> PromptTooLongError | None:
        """The error if `what`, so many tokens, is more than any worker of these roles holds."""
        worker = self._largest(roles)
        largest = worker.capacity
        if tokens <= largest.num_tokens:
            return None
        return PromptTooLongError(
            f"{what} need {largest.blocks_for(tokens)} KV blocks of {largest.block_size} tokens, but the "
            f"largest {worker.role} worker has {largest.num_blocks}: at most {largest.num_tokens} tokens",
            param,
        )

    def _largest(self, roles: tuple[Role, ...]) -> WorkerView:
        """Of those that are up; looked for only when the pool has changed, as there may be a thousand."""
        if self._known_version != self._pool.version:
            self._known_version = self._pool.version
            self._known_largest.clear()
        found = self._known_largest.get(roles)
        if found is None:
            found = max(self._pool.up(*roles), key=lambda one: one.capacity.num_tokens)
            self._known_largest[roles] = found
        return found
