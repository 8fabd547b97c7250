"""What becomes of a request whose placement came to nothing. A core.

    Failed, or worker lost --> no_room (NO_BLOCKS)             to the gate, whenever there is room
                           --> error  (INVALID)                ends: no other worker would take it either
                           --> Loss   (everything else)        to the gate, as long as both limits allow it

A request that is placed again brings its prompt and the tokens that its client has, and goes on from there.
Two limits turn that into a clean error in the end: the attempts of one request that may end in a loss (a
request that kills workers must not kill them all), and a budget for the router as a whole (a cluster that
collapses must not be given its whole load again and again). Guaranteed: never more retries than `burst` plus
`share` times the requests that were let in.

Where workers that are up fail a request again and again, time passes between its attempts, so that a link
that one of them still believes in has been found dead before the attempts are used up.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

from prelay.v1 import worker_pb2

from router.errors import (
    HandoffFailedError,
    InvalidRequestError,
    RouterError,
    WorkerFailedError,
    WorkerLostError,
)


class Cause(StrEnum):
    """Why a placement was lost: a label of `prelay_recoveries_total`."""

    WORKER_LOST = "worker_lost"
    PEER_UNREACHABLE = "peer_unreachable"
    PEER_MISMATCH = "peer_mismatch"
    TRANSFER_FAILED = "transfer_failed"
    LEASE_EXPIRED = "lease_expired"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Loss:
    """A placement that came to nothing. message: with the worker and what it said."""

    cause: Cause
    message: str

    def error(self, why_not_again: str) -> RouterError:
        """The error of a request that is not placed again."""
        message = f"{self.message}; {why_not_again}"
        match self.cause:
            case Cause.WORKER_LOST:
                return WorkerLostError(message)
            case Cause.INTERNAL:
                return WorkerFailedError(message)
            case _:
                return HandoffFailedError(message)


class Verdict(Enum):
    """What to do with a request that does not end."""

    WAIT_FOR_ROOM = "wait_for_room"
    PLACE_AGAIN = "place_again"


_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0

_CAUSES = {
    worker_pb2.FAILURE_REASON_PEER_UNREACHABLE: Cause.PEER_UNREACHABLE,
    worker_pb2.FAILURE_REASON_PEER_MISMATCH: Cause.PEER_MISMATCH,
    worker_pb2.FAILURE_REASON_TRANSFER_FAILED: Cause.TRANSFER_FAILED,
    worker_pb2.FAILURE_REASON_LEASE_EXPIRED: Cause.LEASE_EXPIRED,
}


def worker_lost(worker_id: str, reason: str) -> Loss:
    """The worker is gone."""
    return Loss(Cause.WORKER_LOST, f"worker {worker_id} was lost while it served this request ({reason})")


def judge_failed(worker_id: str, failed: worker_pb2.Failed) -> Loss | Verdict | RouterError:
    """What a worker's Failed means; a reason that is not known here counts as the worker's own error."""
    message = f"worker {worker_id}: {failed.message or reason_name(failed)}"
    match failed.reason:
        case worker_pb2.FAILURE_REASON_NO_BLOCKS:
            return Verdict.WAIT_FOR_ROOM
        case worker_pb2.FAILURE_REASON_INVALID:
            return InvalidRequestError(message)
        case reason:
            return Loss(_CAUSES.get(reason, Cause.INTERNAL), message)


def reason_name(failed: worker_pb2.Failed) -> str:
    """The reason as a word for logs and messages; the number of one that is not known here."""
    if failed.reason not in worker_pb2.FailureReason.values():
        return f"reason {failed.reason}"
    return worker_pb2.FailureReason.Name(failed.reason).removeprefix("FAILURE_REASON_").lower()


def pause_s(loss: Loss, lost_attempts: int) -> float:
    """How long a request waits until it is placed again. lost_attempts: with this one."""
    if loss.cause is Cause.WORKER_LOST or lost_attempts < 2:
        return 0.0  # what failed is out of the way, or there may be another pair
    pause: float = _FIRST_PAUSE_S * 2 ** (lost_attempts - 2)
    return min(_LONGEST_PAUSE_S, pause)


class RetryBudget:
    """A token bucket that fills with every request that is let in, and from which every retry takes one."""

    def __init__(self, share: float, burst: float) -> None:
        """share: retries that each request brings. burst: retries that there are beyond those of the requests
        that live now."""
        self._share = share
        self._burst = burst
        self._live = 0
        self._tokens = burst

    def admitted(self) -> None:
        """A request was let in."""
        self._live += 1
        self._tokens += self._share

    def ended(self) -> None:
        """A request that was let in has ended; quiet times are not saved up beyond the burst."""
        self._live -= 1
        self._tokens = min(self._tokens, self._burst + self._share * self._live)

    def take(self) -> bool:
        """Whether there may be another retry now; it is taken off."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Recovery:
    """Decides whether a request that lost its placement gets another one."""

    def __init__(self, max_attempts: int, budget: RetryBudget) -> None:
        """max_attempts: placements of one request that may be lost; with the last of them it ends."""
        self._max_attempts = max_attempts
        self.budget = budget

    def judge(self, loss: Loss, lost_attempts: int) -> Verdict | RouterError:
        """lost_attempts: of this request, this loss included."""
        if lost_attempts >= self._max_attempts:
            return loss.error(
                f"failed attempts of this request: {lost_attempts}, the limit (router.max_attempts)"
            )
        if not self.budget.take():
            return loss.error(
                "too many requests have lost their workers (router.retry_budget); send it again later"
            )
        return Verdict.PLACE_AGAIN
