"""The admission of the goodput policy: who would be late is told so at once.

    own limits that an idle cluster cannot keep      refused as wrong; the message says what is possible
    would almost certainly be late                   downgraded, if the client allows it, else refused
    limits of its class cannot be kept for it        let in: it is served soon, and counts as a miss

"Almost certainly" is judged by the side of the prediction that favours the request. It is let in if it would
be in time with `OPTIMISM` times its limit, or with a larger one given up for it. To let in one too many costs
the others little, as the gate puts those that turn out late after all others, while rejecting by a prediction
that is biased costs as much as the bias. But those that wait although they are late are the proof that too
many were let in: the more they are, the less is it enough that others could be given up, but for those whom
fairness guards. As an overload goes on for minutes they begin to fill the gate: then whoever comes has to be
surer to be in time, the surer the more they are, or soon nobody could be let in.
"""

from __future__ import annotations

from dataclasses import replace

from router.admission.audit import RefusalAudit
from router.admission.base import Refusal
from router.admission.structural import StructuralAdmission
from router.admission.writers import Writers
from router.errors import LateError, RouterError, SloImpossibleError
from router.estimates import Estimates
from router.gate.goodput import GoodputGateQueue, Outlook
from router.pool_view import PoolView
from router.requests import Request

OPTIMISM = 1.25
_MANY_LATE_LIMITS = 4.0
"""Late ones are many if serving them took so many times the TTFT limit ..."""
_MANY_LATE_SHARE = 0.25
"""... or if they are such a share of all that may wait."""
_IMPOSSIBLE = 0.9
"""Own limits below this share of the least possible are refused; what is between may be luck."""


class GoodputAdmission:
    """On top of what every policy refuses."""

    def __init__(
        self,
        pool: PoolView,
        gate: GoodputGateQueue,
        estimates: Estimates,
        max_gated_requests: int,
        retry_after_s: float,
    ) -> None:
        """max_gated_requests: of those that may be in time; twice as many with the late ones. retry_after_s:
        when one who finds the gate full may come again."""
        self._gate = gate
        self._estimates = estimates
        self._structural = StructuralAdmission(pool, gate, max_gated_requests, retry_after_s)
        self._writers = Writers(pool, estimates)
        self._audit = RefusalAudit(gate, gate.readers, self._writers)
        self._max_gated_requests = max_gated_requests
        self._retry_after_s = retry_after_s

    def judge(self, request: Request, now: float, ahead: int, *, overdue: bool) -> Request | Refusal:
        waiting, late = len(self._gate), self._gate.num_late
        refusal = (
            self._structural.impossible(request, overdue=overdue)
            or self._asks_too_much(request, now)
            or self._structural.full(max(waiting - late, waiting // 2) + ahead)
        )
        if refusal is not None:
            return refusal
        error = self._late(request, now, ahead)
        if error is None:
            return request
        instead = request
        while instead.slo.downgraded is not None:
            instead = replace(instead, slo=instead.slo.downgraded)
            if self._late(instead, now, ahead) is None:
                return instead
        self._gate.refused(request)
        self._audit.refused(request)
        return Refusal("late", error, counts=True)

    def misfit(self, request: Request) -> RouterError | None:
        return self._structural.misfit(request)

    def could_have_served(self, now: float) -> int:
        return self._audit.in_vain(now)

    def _asks_too_much(self, request: Request, now: float) -> Refusal | None:
        """The client's own limits are judged by what an idle cluster could do."""
        slo, limits = request.slo, request.slo.limits
        idle = self._estimates.idle(request) if slo.own_ttft or slo.own_tpot else None
        if idle is None:
            return None
        # What an idle cluster would have to read, it may have in a cache.
        least_ttft_s = min(idle[0], self._gate.readers.ttft_s(request, now))
        for what, is_own, limit_s, least_s in (
            ("TTFT", slo.own_ttft, limits.ttft_s, least_ttft_s),
            ("TPOT", slo.own_tpot, limits.tpot_s, idle[1]),
        ):
            if is_own and limit_s < _IMPOSSIBLE * least_s:
                message = (
                    f"a {what} of {limit_s:.4g} s is not possible here: with nothing else to do, one of "
                    f"{request.num_tokens} tokens takes {least_ttft_s:.4g} s to its first token and "
                    f"{idle[1]:.4g} s for each one after it; ask for at least that"
                )
                return Refusal("slo_impossible", SloImpossibleError(message), counts=False)
        return None

    def _late(self, request: Request, now: float, ahead: int) -> LateError | None:
        """The error of a request that would almost certainly be late."""
        limits, idle = request.slo.limits, self._estimates.idle(request)
        if idle is None or idle[0] > limits.ttft_s or idle[1] > limits.tpot_s:
            return None  # nothing is known, or nobody could ever keep the limits of its class
        outlook = self._gate.outlook(request, now, ahead)
        crowd = self._crowd(limits.ttft_s)
        hopeful_s = outlook.ttft_s * self._crush / OPTIMISM
        least_s = outlook.kept_ttft_s - (1 - crowd) * outlook.larger_s
        if not outlook.guarded:
            least_s += crowd * (hopeful_s - least_s)
        if min(least_s, hopeful_s) > limits.ttft_s:
            return self._ttft_error(request, outlook)
        most_s = OPTIMISM * limits.tpot_s
        tpot_s = self._writers.tpot_s(request, min(outlook.ttft_s, limits.ttft_s), now)
        if tpot_s > most_s:  # perhaps there are fewer when its time to first token is up
            tpot_s = min(tpot_s, self._writers.tpot_s(request, limits.ttft_s, now))
        if tpot_s > most_s:
            return self._tpot_error(request, outlook, tpot_s)
        return None

    def _crowd(self, ttft_limit_s: float) -> float:
        """How many late ones wait: 0 for none, 1 for many."""
        by_time = self._gate.late_s / (_MANY_LATE_LIMITS * ttft_limit_s)
        return min(1.0, max(by_time, self._gate.num_late / (_MANY_LATE_SHARE * self._max_gated_requests)))

    @property
    def _crush(self) -> float:
        """How much surer one has to be to be in time: 1, and more as late ones begin to fill the gate."""
        return max(1.0, (self._gate.num_late / self._max_gated_requests) ** 2)

    def _ttft_error(self, request: Request, outlook: Outlook) -> LateError:
        limit_s = request.slo.limits.ttft_s
        retry_after_s = max(self._retry_after_s, outlook.ttft_s - limit_s)
        message = (
            f"the request would be late: with {outlook.ahead} others before it, its time to first token is "
            f"predicted to be {outlook.ttft_s:.3g} s, and its limit is {limit_s:g} s; try again in "
            f"{retry_after_s:.3g} s, or allow more time"
        )
        return LateError(message, retry_after_s, outlook.ttft_s)

    def _tpot_error(self, request: Request, outlook: Outlook, tpot_s: float) -> LateError:
        message = (
            f"the request would be late: each token of its answer is predicted to take {tpot_s:.3g} s, for "
            f"many are written, and its limit is {request.slo.limits.tpot_s:g} s; its time to first token "
            f"is predicted to be {outlook.ttft_s:.3g} s; try again in {self._retry_after_s:.3g} s, or allow "
            "more time"
        )
        return LateError(message, self._retry_after_s, outlook.ttft_s)
