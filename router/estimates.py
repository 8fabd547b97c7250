"""What the router expects: how long a request would wait, be read, travel and be written, on which worker.

Everything is seconds from `now` on, predicted from what the pool view knows: the latency model of each worker
as corrected by the steps that it reports, the ledger of what is placed there, the prefix index, and how long
answers have been. A worker that has not said how long its steps take is taken to need no time at all, so
policies that compare times fall back on the loads that they break ties by.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.lengths import OutputLengths
from router.pool_view import PoolView, WorkerView
from router.prefix_index import PrefixIndex
from router.requests import Request


@dataclass(frozen=True, slots=True)
class PrefillEstimate:
    """On a prefill worker. wait_s: until what is there before it is read; with urgency told, only what goes
    before it. compute_s: of its own tokens that are not cached."""

    wait_s: float
    compute_s: float
    cached_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.compute_s


@dataclass(frozen=True, slots=True)
class LocalEstimate:
    """On a mixed worker that reads the prompt itself, in chunks beside its decoding. step_s: of the steps
    that hold a chunk. slack_tokens: the most prompt tokens that a step takes without
    harm to who decodes there."""

    ttft_s: float
    step_s: float
    slack_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeEstimate:
    """On a decode or mixed worker, when the request is handed over. step_s: expected, with the request in the
    batch (its TPOT); promise_s: at most, in most cases. limit_s: the tightest TPOT that must still be kept
    there, the request's own included. batch, context: sequences and their tokens then, with the request."""

    step_s: float
    promise_s: float
    limit_s: float
    batch: int
    context: int

    @property
    def is_feasible(self) -> bool:
        return self.promise_s <= self.limit_s


class Estimates:
    """A core. Everything costs microseconds: no method looks at more than one worker, but the idle ones."""

    def __init__(self, pool: PoolView, prefixes: PrefixIndex, lengths: OutputLengths) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._lengths = lengths

    def cached_tokens(self, worker: WorkerView, request: Request) -> int:
        """Tokens at the request's beginning whose KV the worker holds; at most all but the last."""
        raise NotImplementedError

    def prefill(self, worker: WorkerView, request: Request, now: float) -> PrefillEstimate:
        """Of a prefill worker."""
        raise NotImplementedError

    def local(self, worker: WorkerView, request: Request, now: float) -> LocalEstimate:
        """Of a mixed worker."""
        raise NotImplementedError

    def decode(self, worker: WorkerView, request: Request, in_s: float, now: float) -> DecodeEstimate:
        """Of a decode or mixed worker, if the request joins its batch `in_s` from now."""
        raise NotImplementedError

    def transfer_s(self, prefill: WorkerView, decode: WorkerView, num_tokens: int) -> float:
        """How long after its first token a request of which so many tokens travel can decode at the earliest:
        what of the hand-off is not hidden behind the prefill."""
        raise NotImplementedError

    def read_s(self, request: Request) -> float:
        """Compute time of the request's prefill on the fastest reader that is up, with nothing cached: what
        the gate goes by."""
        raise NotImplementedError

    def idle(self, request: Request) -> tuple[float, float] | None:
        """The least TTFT and TPOT that any pair could give the request if nothing else were there; None
        while no worker has said how long its steps take."""
        raise NotImplementedError
