"""What becomes of a request that a worker reports as failed. A core."""

from __future__ import annotations

from enum import Enum

from prelay.v1 import worker_pb2

from router.errors import HandoffFailedError, InvalidRequestError, RouterError, WorkerFailedError

MAX_UNREACHABLE_PAIRS = 3
"""Pairs that one request may find unable to reach each other before it is given up."""


class Retry(Enum):
    """The request goes back to the gate."""

    WHEN_THERE_IS_ROOM = "when_there_is_room"
    ON_ANOTHER_PAIR = "on_another_pair"


def judge_failure(
    worker_id: str, failed: worker_pb2.Failed, *, num_emitted: int, num_unreachable: int
) -> Retry | RouterError:
    """Whether the request is tried again, or the error that ends it.

    num_emitted: tokens that the client has; with any, this attempt is the only one. num_unreachable: pairs of
    this request that did not reach each other, the one that failed now included.
    """
    message = f"worker {worker_id}: {failed.message or reason_name(failed)}"
    match failed.reason:
        case worker_pb2.FAILURE_REASON_NO_BLOCKS if num_emitted == 0:
            return Retry.WHEN_THERE_IS_ROOM
        case worker_pb2.FAILURE_REASON_PEER_UNREACHABLE if num_emitted == 0:
            if num_unreachable < MAX_UNREACHABLE_PAIRS:
                return Retry.ON_ANOTHER_PAIR
            return HandoffFailedError(
                f"{num_unreachable} pairs of workers do not reach each other; {message}"
            )
        case worker_pb2.FAILURE_REASON_INVALID:
            return InvalidRequestError(message)
        case worker_pb2.FAILURE_REASON_INTERNAL | worker_pb2.FAILURE_REASON_UNSPECIFIED:
            return WorkerFailedError(message)
        case _:
            return HandoffFailedError(message)


def reason_name(failed: worker_pb2.Failed) -> str:
    """The reason as a word for logs and messages; the number of one that is not known here."""
    if failed.reason not in worker_pb2.FailureReason.values():
        return f"reason {failed.reason}"
    return worker_pb2.FailureReason.Name(failed.reason).removeprefix("FAILURE_REASON_").lower()
