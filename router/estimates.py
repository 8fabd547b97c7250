"""What the router expects: how long a request would wait, be read, travel and be written, on which worker.

Everything is seconds from `now` on, predicted from what the pool view knows: the latency model of each worker
as corrected by the steps that it reports, the ledger of what is placed there, the prefix index, and how long
answers have been. A worker that has not said how long its steps take is taken to need no time at all, so
policies that compare times fall back on the loads that they break ties by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from engine.sequence import RequestKey
from engine.urgency import SPEND_TOKENS
from router.kv_growth import room_tokens
from router.lengths import OutputLengths
from router.pair_table import Pair
from router.placed_work import PlacedWork
from router.placement.base import Decision
from router.pool_view import READERS, WRITERS, PoolView, Role, WorkerView
from router.prefix_index import PrefixIndex
from router.reading_time import reading_s, slack_tokens, spending_chunk
from router.requests import Request
from router.transfer_times import TransferTimes
from router.write_ledger import Batch

MIN_CHUNK = 4
"""A mixed worker is taken to read at least so many tokens in a step while a prompt waits. It may read as few
as one beside those who can afford no more (decode_worker/chunk_budget.py), but not for long: what they get
ahead, it spends."""

PROMPTS_BESIDE = 1.1
"""How many times as long the steps of a mixed worker are taken to last for the prompts that it reads beside:
its TPOT limits are that much tighter for whoever would join."""

_LEAST_S = 1e-9
_USUAL_PROMPT = 1024
_ASKED_ANEW = 1000


@dataclass(frozen=True, slots=True)
class PrefillEstimate:
    """On a prefill worker. wait_s: until what is there before it is read; with urgency told, only what goes
    before it. compute_s: of its own tokens that are not cached. spare_s: by how much those that it would go
    before can be delayed without any of them being late that is not; inf if it goes before nobody."""

    wait_s: float
    compute_s: float
    cached_tokens: int
    spare_s: float = math.inf

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.compute_s


@dataclass(frozen=True, slots=True)
class LocalEstimate:
    """On a mixed worker that reads the prompt itself, in chunks beside its decoding. wait_s, spare_s: as in
    PrefillEstimate. compute_s: of the steps that hold its chunks, each of which takes step_s. slack_tokens:
    the most prompt tokens that a step takes without harm to who decodes there."""

    wait_s: float
    compute_s: float
    step_s: float
    slack_tokens: int
    cached_tokens: int
    spare_s: float = math.inf

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.compute_s


@dataclass(frozen=True, slots=True)
class DecodeEstimate:
    """On a decode or mixed worker, when the request is handed over. step_s: expected, with the request in the
    batch (its TPOT). limit_s: the tightest TPOT that must still be kept there, the request's own included.
    batch, context: sequences and their tokens then, with the request and half of its answer."""

    step_s: float
    limit_s: float
    batch: int
    context: int

    @property
    def is_feasible(self) -> bool:
        return self.step_s <= self.limit_s


class Estimates:
    """A core. Everything costs microseconds: no method looks at more than one worker, but the idle ones.

    told: whether workers are told how urgent requests are (`Policy.tells_urgency`). Else they read prompts
    first come first served, in steps of full size.
    """

    def __init__(self, pool: PoolView, prefixes: PrefixIndex, lengths: OutputLengths) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self.lengths = lengths
        self.transfers = TransferTimes()
        self._best: dict[bool, _Fastest] = {
            True: _Fastest(pool, READERS, _reading_alone_s), False: _Fastest(pool, WRITERS, _writing_alone_s)
        }  # fmt: skip

    def cached_tokens(self, worker: WorkerView, request: Request) -> int:
        """Tokens at the request's beginning whose KV the worker holds; at most all but the last."""
        return self._prefixes.cached_tokens(worker.worker_id, request)

    def prefill(
        self, worker: WorkerView, request: Request, now: float, *, told: bool = True
    ) -> PrefillEstimate:
        """Of a prefill worker."""
        cached = self._need_not_be_read(worker, request)
        chunk = worker.capacity.max_batch_tokens
        compute_s, _ = reading_s(worker.latency, request.num_tokens - cached, cached, chunk)
        wait_s, spare_s = _wait(worker, request, now, compute_s, told)
        return PrefillEstimate(wait_s, compute_s, cached, spare_s)

    def local(self, worker: WorkerView, request: Request, now: float, *, told: bool = True) -> LocalEstimate:
        """Of a mixed worker."""
        cached = self._need_not_be_read(worker, request)
        batch, latency = worker.writing.now, worker.latency
        most = max(1, worker.capacity.max_batch_tokens - batch.size)
        slack = most
        if batch.size > 0:
            alone_s = latency.corrected_s(latency.model.decode_s(1, batch.context // batch.size))
            slack = slack_tokens(latency, batch, cached, worker.writing.limit_s(alone_s), most)
        chunk = max(slack, min(MIN_CHUNK, most)) if told else most
        unread = request.num_tokens - cached
        if chunk < min(most, unread) and not len(worker.reading):  # or who is before it has spent that
            chunk = min(most, self._spending(worker, batch, unread, chunk))
        read_s, steps = reading_s(latency, unread, cached, chunk, batch)
        wait_s, spare_s = _wait(worker, request, now, read_s, told)
        if batch.size > 0 and wait_s == 0.0:  # the step under way
            wait_s = latency.corrected_s(latency.model.decode_s(batch.size, batch.context)) / 2
        return LocalEstimate(wait_s, read_s, read_s / steps, slack, cached, spare_s)

    def _spending(self, worker: WorkerView, batch: Batch, tokens: int, chunk: int) -> int:
        """The average chunk if steps also take of what those who decode are ahead of their limits."""
        ahead_s = worker.writing.ahead_s
        if ahead_s <= 0:
            return chunk
        model, latency = worker.latency.model, worker.latency
        least_s, most_s = (
            latency.corrected_s(model.mixed_s(batch.size, batch.context, new, 0)) for new in (chunk, tokens)
        )
        token_s = max(_LEAST_S, (most_s - least_s) / (tokens - chunk))
        return spending_chunk(tokens, chunk, ahead_s / token_s, 1 / SPEND_TOKENS)

    def decode(self, worker: WorkerView, request: Request, in_s: float, now: float) -> DecodeEstimate:
        """Of a decode or mixed worker, if the request joins its batch `in_s` from now. Of the prompts that a
        mixed one reads beside, as they are what gives way, only PROMPTS_BESIDE is known."""
        latency, writing = worker.latency, worker.writing
        today = writing.now
        step_s = latency.corrected_s(latency.model.decode_s(max(1, today.size), today.context))
        then = writing.after(in_s, step_s, now)
        _, answer_tokens, _ = self.lengths.quantiles(request)
        own_context = request.num_tokens + answer_tokens // 2 + 1
        batch, context = then.size + 1, then.context + own_context
        expected_s = latency.corrected_s(latency.model.decode_s(batch, context))
        alone_s = latency.corrected_s(latency.model.decode_s(1, context // batch))
        limit_s = min(writing.limit_s(alone_s), request.slo.limits.tpot_s)
        if worker.role is Role.MIXED:
            limit_s /= PROMPTS_BESIDE
        return DecodeEstimate(expected_s, limit_s, batch, context)

    def outgrows(self, writer: WorkerView, request: Request) -> bool:
        """Whether the answers of a decode or mixed worker are expected to need more blocks than there are if
        the request's is written there, too: somebody would have to give way, and be computed again. While
        nothing is known of lengths nothing is expected."""
        if not len(writer.writing) or not self.lengths.knows(request):
            return False
        capacity = writer.capacity
        reserved = capacity.reserved_blocks(request.num_tokens, request.tokens_left)
        free_tokens = (writer.free_blocks - reserved) * capacity.block_size
        tokens = room_tokens(self.lengths.quantiles(request))
        return writer.writing.outgrows(free_tokens, request.num_tokens, tokens)

    def transfer_s(self, prefill: WorkerView, decode: WorkerView, num_tokens: int) -> float:
        """How long after its first token a request of which so many tokens travel can decode at the earliest:
        what of the hand-off is not hidden behind the prefill. `transfers` learns it."""
        return self.transfers.expect_s(Pair(prefill.worker_id, decode.worker_id), num_tokens)

    def read_s(self, request: Request) -> float:
        """Compute time of the request's prefill on the fastest reader that is up, with nothing cached: what
        the gate goes by."""
        worker = self._best[True].worker()
        return 0.0 if worker is None else _reading_alone_s(worker, request.num_tokens)

    def idle(self, request: Request) -> tuple[float, float] | None:
        """The least TTFT and TPOT that any pair could give the request if nothing else were there; None
        while no worker has said how long its steps take."""
        return self.idle_of(request.num_tokens)

    def idle_of(self, num_tokens: int) -> tuple[float, float] | None:
        """`idle` of any request of so many tokens."""
        reader, writer = self._best[True].worker(), self._best[False].worker()
        if reader is None or writer is None:
            return None
        return _reading_alone_s(reader, num_tokens), _writing_alone_s(writer, num_tokens)

    def credit(self, key: RequestKey, request: Request, decision: Decision, now: float) -> None:
        """Puts a request that is placed now into the ledgers of its workers, and what is expected of it."""
        writer = self._pool[decision.decode]
        blocks = writer.capacity.reserved_blocks(request.num_tokens, request.tokens_left)
        if decision.prefill is None:
            local = self.local(writer, request, now)
            work = self._work(request, now, local.compute_s, now + local.ttft_s, is_local=True)
            writer.credit(key, request.num_tokens, blocks, placed=work)
            return
        reader = self._pool[decision.prefill]
        prefill = self.prefill(reader, request, now)
        travelling = request.num_tokens - self.cached_tokens(writer, request)
        self.transfers.placed(Pair(reader.worker_id, writer.worker_id))
        joins_at = now + prefill.ttft_s + self.transfer_s(reader, writer, travelling)
        work = self._work(request, now, prefill.compute_s, joins_at, is_local=False)
        reader.credit(key, request.num_tokens, 0, placed=work)
        writer.credit(key, 0, blocks, placed=work)

    def _work(
        self, request: Request, now: float, read_s: float, joins_at: float, *, is_local: bool
    ) -> PlacedWork:
        return PlacedWork(
            at=now,
            read_s=read_s,
            deadline=_deadline(request, now, read_s),
            priority=request.slo.priority,
            joins_at=joins_at,
            is_local=is_local,
            context=request.num_tokens,
            outputs=self.lengths.quantiles(request),
            most_outputs=request.tokens_left,
            tpot_s=request.slo.limits.tpot_s,
            are_learned=self.lengths.knows(request),
        )

    def _need_not_be_read(self, worker: WorkerView, request: Request) -> int:
        """Tokens whose KV is there; only those that are computed have log-probabilities."""
        return 0 if request.sampling.prompt_logprobs is not None else self.cached_tokens(worker, request)


class _Fastest:
    """The worker that is up, of some roles and known speed, for which `seconds` is least for a usual prompt.

    Looked for when the pool has changed, and now and then, as what is known of their speeds changes."""

    def __init__(
        self, pool: PoolView, roles: tuple[Role, ...], seconds: Callable[[WorkerView, int], float]
    ) -> None:
        self._pool = pool
        self._roles = roles
        self._seconds = seconds
        self._version = -1
        self._asked = 0
        self._worker: WorkerView | None = None

    def worker(self) -> WorkerView | None:
        self._asked += 1
        if self._version != self._pool.version or self._asked >= _ASKED_ANEW:
            self._version, self._asked = self._pool.version, 0
            known = (one for one in self._pool.up(*self._roles) if one.latency.model.is_known)
            self._worker = min(known, key=lambda one: self._seconds(one, _USUAL_PROMPT), default=None)
        return self._worker


def _reading_alone_s(worker: WorkerView, tokens: int) -> float:
    return reading_s(worker.latency, tokens, 0, worker.capacity.max_batch_tokens)[0]


def _writing_alone_s(worker: WorkerView, tokens: int) -> float:
    return worker.latency.corrected_s(worker.latency.model.decode_s(1, tokens + 1))


def _wait(
    worker: WorkerView, request: Request, now: float, compute_s: float, told: bool
) -> tuple[float, float]:
    """How long the prompt waits on that worker, and how long those that it passes can."""
    capacity, latency = worker.capacity, worker.latency
    step_s = latency.corrected_s(latency.model.prefill_s(capacity.max_batch_tokens))
    if not told:
        return worker.reading.backlog_s(now, step_s), math.inf
    deadline = _deadline(request, now, compute_s)
    return worker.reading.ahead(request.slo.priority, deadline, now, step_s)


def _deadline(request: Request, now: float, compute_s: float) -> float:
    """By when the first token has to be there, for the order in which a worker reads (engine/urgency.py). An
    answer that has begun and waits for its next token goes first, and a prompt that is too late even if it is
    read at once goes last."""
    if request.answered:
        return -math.inf
    deadline = request.arrived_at + request.slo.limits.ttft_s
    return deadline if now + compute_s <= deadline else math.inf
