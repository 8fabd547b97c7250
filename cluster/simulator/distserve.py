"""A cluster by the rules of DistServe's own simulator (Zhong et al., OSDI 2024), request by request.

What it leaves out, and why it is not how plans are made here: a hand-off takes no time, decode workers have
room for everybody, and nobody is ever refused.

    prefill   first come, first served: a batch takes whole prompts as long as they fit into the KV of the
              worker together. The next one begins when the first stage is free.
    decode    a step takes requests from the head of the queue while sum(context + 1) <= MOST_CONTEXT. When
              it ends they are put back behind all that have come meanwhile. An answer of n tokens takes n
              steps after its prefill, and its TPOT is the time that these take over n.
    stages    PP of them, each with a queue of its own; a batch of prompts stays together, decode steps take
              what they find.
    replicas  a request goes to the one with the shortest queue.

Colocated, a worker has both queues, and reads whenever a prompt waits.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

from cluster.simulator.clock import Clock
from cluster.simulator.errors import SimulationError
from cluster.workload.drawing import Arrival
from cluster.workload.jobs import Row, Status

MOST_CONTEXT = 50_000


class Times(Protocol):
    """How long the steps of one stage take, seconds. capacity: most prompt tokens of a batch."""

    @property
    def pp(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    def prefill_s(self, lengths: Sequence[int], *, is_first: bool) -> float: ...

    def decode_s(self, batch: int, context: int, *, is_first: bool) -> float: ...


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas of one phase, alike. most_context: of a decode step, tokens."""

    times: Times
    replicas: int = 1
    most_context: int = MOST_CONTEXT


@dataclass(slots=True)
class _Request:
    """num_steps: decode steps that are behind it, as of when it was last counted for itself."""

    arrival: Arrival
    num_steps: int = 0
    first_at: float = 0.0
    ended_at: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return self.arrival.shape.prompt_tokens

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.num_steps

    @property
    def is_done(self) -> bool:
        return self.num_steps >= self.arrival.shape.output_tokens

    def end(self, now: float) -> None:
        self.num_steps, self.ended_at = self.arrival.shape.output_tokens, now

    def row(self) -> Row:
        """With a token more than was asked for: of n tokens each takes a step after the first one's, and the
        rule of judging divides by the tokens after the first."""
        shape, sent_s = self.arrival.shape, self.arrival.arrival_s
        first_s, last_s = self.first_at - sent_s, self.ended_at - sent_s
        num_tokens = shape.output_tokens + 1
        return Row(sent_s, sent_s, shape.prompt_tokens, num_tokens, Status.COMPLETE, first_s, last_s)


class _Stage:
    """One of the PP stages of a worker, with what waits for it.

    prefill, decode: None of a phase that it does not serve. read: called with prompts that have passed the
    last stage.
    """

    def __init__(
        self,
        clock: Clock,
        prefill: Pool | None,
        decode: Pool | None,
        read: Callable[[list[_Request]], None],
        *,
        is_first: bool,
        is_last: bool,
    ) -> None:
        self._clock = clock
        self._prefill, self._decode = prefill, decode
        self._read = read
        self._is_first, self._is_last = is_first, is_last
        self.next: _Stage = self
        self.prompts: deque[_Request] = deque()
        self._batches: deque[list[_Request]] = deque()  # from the stage before
        self._queue = _DecodeQueue(MOST_CONTEXT if decode is None else decode.most_context)
        self._is_busy = self._is_woken = False
        self.num_reading = 0

    @property
    def num_prompts(self) -> int:
        return len(self.prompts) + self.num_reading

    @property
    def num_answers(self) -> int:
        return self.num_reading + len(self._queue)

    def add_prompt(self, request: _Request) -> None:
        self.prompts.append(request)
        self._wake()

    def add_batch(self, batch: list[_Request]) -> None:
        self._batches.append(batch)
        self._wake()

    def add_answers(self, requests: Sequence[_Request]) -> None:
        self._queue.add(requests)
        self._wake()

    def _wake(self) -> None:
        """After all else that happens at this moment, so that what comes together is served together."""
        if not self._is_busy and not self._is_woken:
            self._is_woken = True
            self._clock.at(self._clock.now, self._begin)

    def _begin(self) -> None:
        self._is_woken = False
        if self.prompts or self._batches:
            self._begin_prefill()
        elif len(self._queue):
            self._begin_decode()

    def _begin_prefill(self) -> None:
        assert self._prefill is not None
        batch = self._batches.popleft() if self._batches else self._take_prompts(self._prefill.times.capacity)
        lengths = [one.prompt_tokens for one in batch]
        self._is_busy, self.num_reading = True, len(batch)
        seconds = self._prefill.times.prefill_s(lengths, is_first=self._is_first)
        self._clock.at(self._clock.now + seconds, lambda: self._end_prefill(batch))

    def _take_prompts(self, room: int) -> list[_Request]:
        batch = []
        while self.prompts and self.prompts[0].prompt_tokens <= room:
            batch.append(self.prompts.popleft())
            room -= batch[-1].prompt_tokens
        return batch

    def _end_prefill(self, batch: list[_Request]) -> None:
        self._is_busy, self.num_reading = False, 0
        if not self._is_last:
            self.next.add_batch(batch)
        else:
            for one in batch:
                one.first_at = self._clock.now
            self._read(batch)
        self._wake()

    def _begin_decode(self) -> None:
        assert self._decode is not None
        size, context = self._queue.begin()
        self._is_busy = True
        seconds = self._decode.times.decode_s(size, context, is_first=self._is_first)
        self._clock.at(self._clock.now + seconds, self._end_decode)

    def _end_decode(self) -> None:
        self._is_busy = False
        if self._is_last:
            self._queue.count(self._clock.now)
        if self.next is self:
            self._queue.put_back()
        else:
            self.next.add_answers(self._queue.take())
        self._wake()


class _DecodeQueue:
    """Requests in their order, and the step under way.

    While all fit into a step, what is behind each is counted for all together: those of `_whole` are part of
    every step, and a step costs the same however many they are. most_context: of a step.
    """

    def __init__(self, most_context: int) -> None:
        self._most_context = most_context
        self._waiting: deque[_Request] = deque()
        self._context = 0  # of those that wait
        # Behind those that wait: in their order, and as a heap by the step that is the last.
        self._whole: deque[_Request] = deque()
        self._ends: list[tuple[int, int, _Request]] = []
        self._whole_context = 0
        self._num_steps = 0
        self._numbers = count()
        # Of the step under way: all of `_whole`, or some.
        self._runs_whole = False
        self._batch: list[_Request] = []

    def __len__(self) -> int:
        """That wait, those of the step under way not included."""
        return len(self._waiting) + (0 if self._runs_whole else len(self._ends))

    def add(self, requests: Sequence[_Request]) -> None:
        """Behind all that wait; in front of those of the step under way."""
        context = sum(one.context for one in requests)
        if self._runs_whole or not self._ends:
            self._waiting.extend(requests)
            self._context += context
            return
        self._whole.extend(requests)
        self._whole_context += context
        self._join(requests)

    def begin(self) -> tuple[int, int]:
        """How many the step takes, and their tokens of context."""
        size = len(self._waiting) + len(self._ends)
        if self._context + self._whole_context + size <= self._most_context:
            self._join(self._waiting)
            self._whole.extendleft(reversed(self._waiting))
            self._whole_context += self._context
            self._waiting.clear()
            self._context, self._runs_whole = 0, True
            return size, self._whole_context
        self.add(self._split())
        room = self._most_context
        while self._waiting and self._waiting[0].context + 1 <= room:
            one = self._waiting.popleft()
            room -= one.context + 1
            self._context -= one.context
            self._batch.append(one)
        return len(self._batch), sum(one.context for one in self._batch)

    def count(self, now: float) -> None:
        """The step is over, and was the last stage's: who has had all of them leaves."""
        if self._runs_whole:
            self._num_steps += 1
            self._whole_context += len(self._ends)
            while self._ends and self._ends[0][0] <= self._num_steps:
                _, _, one = heapq.heappop(self._ends)
                one.end(now)
                self._whole_context -= one.context
            return
        for one in self._batch:
            one.num_steps += 1
            if one.is_done:
                one.end(now)
        self._batch = [one for one in self._batch if not one.is_done]

    def put_back(self) -> None:
        """Those of the step, behind all that have come meanwhile."""
        self._runs_whole = False
        batch, self._batch = self._batch, []
        self.add(batch)

    def take(self) -> list[_Request]:
        """Those of the step, for the next stage."""
        batch, self._batch = self._batch, []
        if self._runs_whole:
            self._runs_whole = False
            batch = self._split()
        return batch

    def _join(self, requests: Iterable[_Request]) -> None:
        for one in requests:
            last = self._num_steps + one.arrival.shape.output_tokens - one.num_steps
            heapq.heappush(self._ends, (last, next(self._numbers), one))

    def _split(self) -> list[_Request]:
        """Those of `_whole`, each counted for itself again."""
        for last, _, one in self._ends:
            one.num_steps = one.arrival.shape.output_tokens - (last - self._num_steps)
        found = [one for one in self._whole if not one.is_done]
        self._whole.clear()
        self._ends.clear()
        self._whole_context = 0
        return found


def simulate_distserve(arrivals: Sequence[Arrival], prefill: Pool, decode: Pool) -> list[Row]:
    """Separate workers for the phases; a row for each of `arrivals`. Raises SimulationError for a prompt that
    fits no worker."""
    clock = Clock()

    def hand_over(batch: list[_Request]) -> None:
        for one in batch:
            min(writers, key=lambda stage: stage.num_answers).add_answers([one])

    writers = [_stages(clock, None, decode, hand_over) for _ in range(decode.replicas)]
    readers = [_stages(clock, prefill, None, hand_over) for _ in range(prefill.replicas)]
    return _run(clock, _checked(arrivals, prefill, decode), _arrive_at(readers))


def simulate_distserve_colocated(arrivals: Sequence[Arrival], both: Pool) -> list[Row]:
    """Each worker serves both phases, and reads first. Otherwise as `simulate_distserve`."""
    clock = Clock()
    workers: list[_Stage] = []
    for _ in range(both.replicas):

        def stay(batch: list[_Request], mine: int = len(workers)) -> None:
            workers[mine].add_answers(batch)

        workers.append(_stages(clock, both, both, stay))
    return _run(clock, _checked(arrivals, both, both), _arrive_at(workers))


def _stages(
    clock: Clock,
    prefill: Pool | None,
    decode: Pool | None,
    read: Callable[[list[_Request]], None],
) -> _Stage:
    """The first of a worker's stages, which form a ring."""
    pool = prefill or decode
    assert pool is not None
    stages = [
        _Stage(clock, prefill, decode, read, is_first=place == 0, is_last=place == pool.times.pp - 1)
        for place in range(pool.times.pp)
    ]
    for stage, after in zip(stages, [*stages[1:], stages[0]], strict=True):
        stage.next = after
    return stages[0]


def simulate_prefill(arrivals: Sequence[Arrival], prefill: Pool) -> list[Row]:
    """Prompts are read, and nothing else: a request ends with its first token. Raises SimulationError."""
    clock = Clock()

    def end(batch: list[_Request]) -> None:
        for one in batch:
            one.end(clock.now)

    readers = [_stages(clock, prefill, None, end) for _ in range(prefill.replicas)]
    return _run(clock, _checked(arrivals, prefill, None), _arrive_at(readers))


def simulate_decode(arrivals: Sequence[Arrival], decode: Pool) -> list[Row]:
    """Answers are written, of prompts that are read as they come. Raises SimulationError."""
    clock = Clock()
    writers = [_stages(clock, None, decode, lambda batch: None) for _ in range(decode.replicas)]

    def arrive(request: _Request) -> None:
        request.first_at = clock.now
        min(writers, key=lambda stage: stage.num_answers).add_answers([request])

    return _run(clock, _checked(arrivals, None, decode), arrive)


def _arrive_at(readers: Sequence[_Stage]) -> Callable[[_Request], None]:
    def arrive(request: _Request) -> None:
        min(readers, key=lambda stage: stage.num_prompts).add_prompt(request)

    return arrive


def _checked(arrivals: Sequence[Arrival], prefill: Pool | None, decode: Pool | None) -> Sequence[Arrival]:
    """Raises SimulationError for what fits nowhere."""
    for number, arrival in enumerate(arrivals):
        prompt_tokens, output_tokens = arrival.shape.prompt_tokens, arrival.shape.output_tokens
        if prefill is not None and prompt_tokens > prefill.times.capacity:
            raise SimulationError(
                f"request {number}: its prompt has {prompt_tokens} tokens, but only "
                f"{prefill.times.capacity} fit into a prefill worker; split it over more devices, or leave "
                "such requests out (--max-tokens)"
            )
        if decode is not None and prompt_tokens + output_tokens > decode.most_context:
            raise SimulationError(
                f"request {number}: prompt and answer have more than the {decode.most_context} tokens of a "
                "decode step; leave such requests out (--max-tokens)"
            )
    return arrivals


def _run(clock: Clock, arrivals: Sequence[Arrival], arrive: Callable[[_Request], None]) -> list[Row]:
    requests = [_Request(one) for one in arrivals]
    for request in requests:
        clock.at(request.arrival.arrival_s, partial(arrive, request))
    clock.run()
    return [request.row() for request in requests]
