"""Early rejection: a request that is predicted to miss a limit is refused when it arrives.

Mooncake (Qin et al. 2024, arXiv:2407.00079, Algorithm 1 and "early rejection based on prediction"): if the
best placement's TTFT, or its time per token when the request gets to the decode instance, is beyond the
limit, the request is refused, before anything is computed for it.
"""

from __future__ import annotations

from router.admission.base import Refusal
from router.admission.structural import StructuralAdmission
from router.errors import LateError, RouterError
from router.placement.cache_aware import CacheAwarePlacement
from router.requests import Request


class MooncakeAdmission:
    """Believes the placement's predictions, without any margin."""

    def __init__(
        self, structural: StructuralAdmission, placement: CacheAwarePlacement, retry_after_s: float
    ) -> None:
        """retry_after_s: when those who are refused may come again, at the earliest."""
        self._structural = structural
        self._placement = placement
        self._retry_after_s = retry_after_s

    def judge(self, request: Request, now: float, ahead: int, *, overdue: bool) -> Request | Refusal:
        verdict = self._structural.judge(request, now, ahead, overdue=overdue)
        if isinstance(verdict, Refusal):
            return verdict
        decision = self._placement.choose(verdict, (), now)
        if decision is None or decision.expected is None:
            return verdict  # nothing is known of a place that is not there yet
        limits, expected = verdict.slo.limits, decision.expected
        if expected.ttft_s <= limits.ttft_s and expected.tpot_s <= limits.tpot_s:
            return verdict
        message = (
            f"the request would be late: predicted TTFT {expected.ttft_s:.3g} s (limit {limits.ttft_s:g} s), "
            f"predicted TPOT {expected.tpot_s:.3g} s (limit {limits.tpot_s:g} s)"
        )
        retry_after_s = max(self._retry_after_s, expected.ttft_s - limits.ttft_s)
        return Refusal("late", LateError(message, retry_after_s, expected.ttft_s), counts=True)

    def misfit(self, request: Request) -> RouterError | None:
        return self._structural.misfit(request)

    def could_have_served(self, now: float) -> int:
        return 0  # the baseline has no audit
