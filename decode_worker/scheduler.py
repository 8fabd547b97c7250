"""Which tokens the next step computes: continuous batching that grows, preempts and recomputes. A core.

A sequence comes with blocks for its prompt and a little more, and takes a block whenever its next token needs
one. When there is none, the sequence that arrived last gives up all of its own (last in, first out): it is
preempted, waits, and is computed again from its tokens, in chunks beside the others. What it drew stays, and
what it draws then is what it would have drawn, for draws depend on nothing but tokens and position.

Nobody waits for ever:
  - The oldest sequence that holds blocks takes what it needs from all the younger ones, and fits into the
    pool alone; so it ends, then the next does. The youngest, which has nobody to take from, pauses with
    what it holds until a block is free or an older one takes its.
  - Blocks that are leased to hand-offs cannot be taken. But each lease ends: the sequence arrives here,
    where it is the youngest, or its blocks are freed (transfer/handoff.py, guarantee 4).
  - While anybody is preempted or paused no new reservations are accepted (`lacks_blocks`), so those who
    can overtake a preempted sequence are the few that are on their way; then it has the pool to itself.
The oldest preempted sequence comes back first, and takes nothing from those who run.

A sequence whose reader is slow can be held: it computes nothing and keeps its blocks, but is the first to
give them up, whatever its age, and is not waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engine.block_pool import BlockPool, Holder
from engine.prefix_cache import PrefixCache
from engine.reservation import HEADROOM_BLOCKS
from engine.sequence import (
    ChunkResult,
    RequestKey,
    ScheduledChunk,
    StopReason,
    TokenHistory,
    TokenLogprobs,
    TokenSampling,
)


@dataclass(frozen=True, slots=True)
class Decoded:
    """One new token. index: its place in the answer. decode_queue_s: set with the first one drawn here."""

    key: RequestKey
    index: int
    token_id: int
    stop_reason: StopReason | None
    decode_queue_s: float | None
    logprobs: TokenLogprobs | None


@dataclass(slots=True)
class _Sequence:
    """token_ids: prompt and answer. num_computed: how many of them have their KV in `blocks`. digests: of
    all tokens but the last, which is always computed; set while it is preempted. num_given: tokens of the
    answer that it came with. is_held: it is to wait, whatever there is to compute."""

    key: RequestKey
    arrival: int
    token_ids: list[int]
    prompt_tokens: int
    sampling: TokenSampling
    salt: str
    history: TokenHistory | None
    blocks: list[int]
    num_computed: int
    num_given: int
    is_held: bool
    ready_s: float
    joined_s: float | None = None
    digests: Sequence[bytes] = ()

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def most_tokens(self) -> int:
        return self.prompt_tokens + self.sampling.max_tokens


class DecodeScheduler:
    """Call `schedule`, run the chunks, call `complete` (or `abandon` if they failed); cancel only in between.

    It owns the SEQUENCE references of the sequences that are added and drops them when they end.
    max_batch_tokens: at least max_num_seqs.
    """

    def __init__(self, pool: BlockPool, cache: PrefixCache, max_num_seqs: int, max_batch_tokens: int) -> None:
        if max_batch_tokens < max_num_seqs:
            raise ValueError(
                f"{max_batch_tokens} tokens a step for {max_num_seqs} sequences: one each, or more"
            )
        self._pool = pool
        self._cache = cache
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._num_arrived = 0
        # All three in order of arrival; the first two hold blocks.
        self._running: dict[RequestKey, _Sequence] = {}
        self._ready: deque[_Sequence] = deque()
        self._preempted: list[_Sequence] = []
        self._num_paused = 0
        # Of the step under way: the sequence and the number of tokens of each chunk.
        self._batch: list[tuple[_Sequence, int]] = []
        self._num_preemptions = self._num_cached_tokens = 0

    @property
    def num_ready(self) -> int:
        """Sequences that wait for a place, preempted ones included."""
        return len(self._ready) + len(self._preempted)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_blocks(self) -> int:
        """SEQUENCE references of ours."""
        return sum(len(sequence.blocks) for sequence in (*self._ready, *self._running.values()))

    @property
    def lacks_blocks(self) -> bool:
        """Somebody waits for blocks: they must not go to new requests."""
        return any(not sequence.is_held for sequence in self._preempted) or self._num_paused > 0

    def add(
        self,
        key: RequestKey,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        sampling: TokenSampling,
        salt: str,
        blocks: Sequence[int],
        digests: Sequence[bytes],
        is_held: bool,
        now: float,
    ) -> None:
        """A sequence that fits into the pool; the KV of all its tokens but the last lies in `blocks`.

        It joins the batch as soon as there is a place, unless it is held. output_ids: the answer so far, at
        least one token. digests: of the full ones of `blocks`, so that others find what they hold. A key must
        not be added again while it is here.
        """
        self._num_arrived += 1
        self._ready.append(
            _Sequence(
                key,
                self._num_arrived,
                [*prompt_ids, *output_ids],
                len(prompt_ids),
                sampling,
                salt,
                TokenHistory(prompt_ids, output_ids) if sampling.needs_history else None,
                self._cache.insert(digests, blocks),
                len(prompt_ids) + len(output_ids) - 1,
                len(output_ids),
                is_held,
                now,
            )
        )

    def hold(self, key: RequestKey, *, is_held: bool) -> None:
        """Whether the sequence is to wait where it is; one that is not here is ignored. It keeps its blocks
        until somebody else needs them."""
        if (sequence := self._running.get(key)) is not None and is_held:
            del self._running[key]
            self._ready.append(sequence)
            self._ready = deque(sorted(self._ready, key=_arrival))
        for sequence in (*self._ready, *self._preempted):
            if sequence.key == key:
                sequence.is_held = is_held

    def cancel(self, key: RequestKey) -> bool:
        """Forget the sequence and free its blocks; False if it is not here."""
        sequence = self._running.pop(key, None)
        if sequence is None:
            waiting: list[_Sequence] | deque[_Sequence]
            for waiting in (self._ready, self._preempted):
                sequence = next((each for each in waiting if each.key == key), None)
                if sequence is not None:
                    waiting.remove(sequence)
                    break
            else:
                return False
        self._pool.drop(sequence.blocks, Holder.SEQUENCE)
        return True

    def schedule(self, now: float) -> list[ScheduledChunk]:
        """One token of every running sequence that has room for it, and what the budget leaves of those that
        are computed again; empty if there is nothing that can be done now."""
        self._fill_places(now)
        self._num_paused = 0
        decoding: list[_Sequence] = []
        recomputing: list[_Sequence] = []
        for sequence in list(self._running.values()):
            if sequence.key not in self._running:
                continue  # preempted for an older one
            if not self._grow(sequence):
                self._num_paused += 1
            elif sequence.num_left == 1:
                decoding.append(sequence)
            else:
                recomputing.append(sequence)
        self._batch = [(sequence, 1) for sequence in decoding]
        budget = self._max_batch_tokens - len(decoding)
        for sequence in recomputing:
            count = min(budget, sequence.num_left)
            if count:
                self._batch.append((sequence, count))
            budget -= count
        return [_chunk(sequence, count) for sequence, count in self._batch]

    def complete(self, results: Sequence[ChunkResult]) -> list[Decoded]:
        """Take the step's results (one a chunk) into account; sequences that end free their blocks."""
        decoded: list[Decoded] = []
        for (sequence, count), result in zip(self._batch, results, strict=True):
            if (result.token_id is None) != (count < sequence.num_left):
                raise ValueError(f"the runner drew {result.token_id} after {count} tokens of {sequence.key}")
        for (sequence, count), result in zip(self._batch, results, strict=True):
            sequence.num_computed += count
            token = result.token_id
            if token is None:
                continue
            index = sequence.num_output_tokens
            sequence.token_ids.append(token)
            if sequence.history is not None:
                sequence.history.append(token)
            stop_reason = sequence.sampling.stop_reason(token, index + 1)
            joined_s = sequence.joined_s if index == sequence.num_given else None
            queue_s = None if joined_s is None else joined_s - sequence.ready_s
            decoded.append(Decoded(sequence.key, index, token, stop_reason, queue_s, result.logprobs))
            if stop_reason is not None:
                self._retire(sequence)
        self._batch = []
        return decoded

    def abandon(self) -> list[RequestKey]:
        """The step failed: its sequences are forgotten and their blocks freed."""
        keys = [sequence.key for sequence, _ in self._batch]
        self._batch = []
        for key in keys:
            self.cancel(key)
        return keys

    def take_counts(self) -> tuple[int, int]:
        """Preemptions, and tokens found in the cache when sequences came back, since the last call."""
        counts = self._num_preemptions, self._num_cached_tokens
        self._num_preemptions = self._num_cached_tokens = 0
        return counts

    def _fill_places(self, now: float) -> None:
        for sequence in [each for each in self._preempted if not each.is_held]:
            if len(self._running) >= self._max_num_seqs or not self._resume(sequence):
                break
            self._preempted.remove(sequence)
            self._join(sequence, now)
        # Those who hold blocks already are in nobody's way: the sooner they run, the sooner they end.
        for sequence in [each for each in self._ready if not each.is_held]:
            if len(self._running) >= self._max_num_seqs:
                break
            self._ready.remove(sequence)
            self._join(sequence, now)

    def _join(self, sequence: _Sequence, now: float) -> None:
        if sequence.joined_s is None:
            sequence.joined_s = now
        overtakes = bool(self._running) and next(reversed(self._running.values())).arrival > sequence.arrival
        self._running[sequence.key] = sequence
        if overtakes:
            self._running = {each.key: each for each in sorted(self._running.values(), key=_arrival)}

    def _resume(self, sequence: _Sequence) -> bool:
        """Give a preempted sequence blocks for all it has, and a new one's headroom, if there are enough."""
        size = self._pool.block_size
        cached = self._cache.match(sequence.digests)
        most = self._pool.num_blocks_for(sequence.most_tokens)
        wanted = min(most, self._pool.num_blocks_for(len(sequence.token_ids)) + HEADROOM_BLOCKS)
        self._pool.add(cached, Holder.SEQUENCE)  # first, so that the rest is not taken from them
        if not self._take_from_held(wanted - len(cached)):
            self._pool.drop(cached, Holder.SEQUENCE)
            return False
        sequence.blocks = cached + self._pool.allocate(wanted - len(cached), Holder.SEQUENCE)
        sequence.num_computed = len(cached) * size
        self._num_cached_tokens += sequence.num_computed
        return True

    def _take_from_held(self, num_blocks: int) -> bool:
        """Whether so many blocks can be had, if need be from those who are held, the youngest first."""
        held = [sequence for sequence in self._ready if sequence.is_held]
        while held and not self._pool.can_allocate(num_blocks):
            self._preempt(held.pop())
        return self._pool.can_allocate(num_blocks)

    def _grow(self, sequence: _Sequence) -> bool:
        """Room for all tokens of a running sequence, if need be at the expense of younger ones."""
        missing = self._pool.num_blocks_for(len(sequence.token_ids)) - len(sequence.blocks)
        if missing <= 0:
            return True
        while not self._pool.can_allocate(missing):
            # Those who are held first: they do not end by themselves, and the others shall.
            least = max((*self._running.values(), *self._ready), key=lambda one: (one.is_held, one.arrival))
            if least is sequence:
                return False
            self._preempt(least)
        sequence.blocks += self._pool.allocate(missing, Holder.SEQUENCE)
        return True

    def _retire(self, sequence: _Sequence) -> None:
        """Its answer is complete. What it holds serves the next turn of the same conversation."""
        sequence.digests = self._cache.digests(sequence.token_ids[:-1], sequence.salt)
        self._remember(sequence)
        self.cancel(sequence.key)

    def _remember(self, sequence: _Sequence) -> None:
        """Let others find the full blocks of a sequence whose digests are set."""
        known = sequence.digests[: sequence.num_computed // self._pool.block_size]
        sequence.blocks = self._cache.insert(known, sequence.blocks)

    def _preempt(self, sequence: _Sequence) -> None:
        if self._running.pop(sequence.key, None) is None:
            self._ready.remove(sequence)
        # What nobody needs until then is still there when it comes back.
        sequence.digests = self._cache.digests(sequence.token_ids[:-1], sequence.salt)
        self._remember(sequence)
        self._pool.drop(sequence.blocks, Holder.SEQUENCE)
        sequence.blocks, sequence.num_computed = [], 0
        self._preempted.append(sequence)
        self._preempted.sort(key=_arrival)
        self._num_preemptions += 1


def _arrival(sequence: _Sequence) -> int:
    return sequence.arrival


def _chunk(sequence: _Sequence, count: int) -> ScheduledChunk:
    start = sequence.num_computed
    return ScheduledChunk(
        token_ids=sequence.token_ids[start : start + count],
        start=start,
        block_table=sequence.blocks,
        sampling=sequence.sampling if count == sequence.num_left else None,
        num_output_tokens=sequence.num_output_tokens,
        history=sequence.history,
    )
