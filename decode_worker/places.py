"""Who has a place in the batch, and who has blocks: sequences grow, are preempted and come back. A core.

A sequence comes with blocks for the tokens that it has and a little more, and takes a block whenever its next
token needs one. When there is none, the sequence that arrived last gives up all of its own (last in, first
out): it is preempted, waits, and is computed again from its tokens. What it drew stays, and what it draws
then is what it would have drawn, for draws depend on nothing but tokens and position. A prompt that is read
here is a sequence like any other: only its answer is still to begin.

Nobody waits for ever:
  - The oldest sequence that holds blocks takes what it needs from all the younger ones, and fits into the
    pool alone; so it ends, then the next does. The youngest, which has nobody to take from, pauses with
    what it holds until a block is free or an older one takes its. A prompt has blocks for all its tokens
    from the beginning and waits for none; for its share of the steps see scheduler.py.
  - Blocks that are leased to hand-offs cannot be taken. But each lease ends: the sequence arrives here,
    where it is the youngest, or its blocks are freed (transfer/handoff.py, guarantee 4).
  - While anybody is preempted or paused no new requests are accepted (`lacks_blocks`), so those who can
    overtake a preempted sequence are the few that are on their way; then it has the pool to itself.
The oldest preempted sequence comes back first, and takes nothing from those who run.

A sequence whose reader is slow can be held: it computes nothing and keeps its blocks, but is the first to
give them up, whatever its age, and is not waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

from decode_worker.sequences import DecodeSequence, PromptRead
from engine.block_pool import BlockPool, Holder
from engine.prefix_cache import PrefixCache
from engine.reservation import HEADROOM_BLOCKS
from engine.sequence import RequestKey


class Places:
    """All sequences of the worker, and the SEQUENCE references of their blocks.

    max_num_seqs: places in the batch; prompts that are read have one, too.
    """

    def __init__(self, pool: BlockPool, cache: PrefixCache, max_num_seqs: int) -> None:
        self._pool = pool
        self._cache = cache
        self._max_num_seqs = max_num_seqs
        # All three in order of arrival; the first two hold blocks.
        self._running: dict[RequestKey, DecodeSequence] = {}
        self._ready: list[DecodeSequence] = []
        self._preempted: list[DecodeSequence] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def running(self) -> list[DecodeSequence]:
        """Those that have a place, the oldest first."""
        return list(self._running.values())

    @property
    def waiting(self) -> list[DecodeSequence]:
        """Those that wait for one, or for blocks."""
        return [*self._ready, *self._preempted]

    @property
    def num_blocks(self) -> int:
        """SEQUENCE references of ours."""
        return sum(len(sequence.blocks) for sequence in (*self._ready, *self._running.values()))

    @property
    def lacks_blocks(self) -> bool:
        """Somebody that was preempted waits for blocks."""
        return any(not sequence.is_held for sequence in self._preempted)

    def has(self, sequence: DecodeSequence) -> bool:
        """Whether it has a place; preempted ones have lost it."""
        return sequence.key in self._running

    def add(self, sequence: DecodeSequence) -> None:
        """Whose blocks are ours from now on; it takes a place as soon as there is one, unless it is held."""
        self._ready.append(sequence)

    def hold(self, key: RequestKey, *, is_held: bool, now: float) -> None:
        """Whether the sequence is to wait where it is; one that is not here is ignored. It keeps its blocks
        until somebody else needs them."""
        if is_held and (running := self._running.pop(key, None)) is not None:
            self._ready.append(running)
            self._ready.sort(key=_arrival)
        sequence = next((each for each in self.waiting if each.key == key), None)
        if sequence is None or sequence.is_held == is_held:
            return
        sequence.is_held = is_held
        if is_held:
            sequence.held_s = now
        else:
            # That its reader was slow is not to be made up for at the expense of others.
            sequence.paced_since_s += now - sequence.held_s

    def cancel(self, key: RequestKey) -> bool:
        """Forget the sequence and free its blocks; False if it is not here."""
        sequence = self._running.pop(key, None)
        if sequence is None:
            for waiting in (self._ready, self._preempted):
                sequence = next((each for each in waiting if each.key == key), None)
                if sequence is not None:
                    waiting.remove(sequence)
                    break
            else:
                return False
        self._pool.drop(sequence.blocks, Holder.SEQUENCE)
        return True

    def fill(self, now: float) -> None:
        """Give free places to those who wait for them."""
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

    def grow(self, sequence: DecodeSequence) -> bool:
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

    def num_growing(self, sequences: Sequence[DecodeSequence], most: int) -> int:
        """Of the next steps, how many there are blocks for if each gives each of these a token: the tokens
        that they have now count as the first one's. At most `most`, at least 1."""
        steps = most
        while steps > 1:
            # Whoever needs most needs these, and one for what does not fill a block now.
            if self._pool.can_allocate(len(sequences) * (self._pool.num_blocks_for(steps) + 1)):
                break
            needed = sum(
                max(0, self._pool.num_blocks_for(len(one.token_ids) + steps - 1) - len(one.blocks))
                for one in sequences
            )
            if self._pool.can_allocate(needed):
                break
            steps //= 2
        return max(1, steps)

    def start(self, sequence: DecodeSequence, now: float) -> None:
        """The first chunk of a prompt is about to be computed: what others have computed of it since it came
        need not be."""
        reading = sequence.reading
        if reading is None or reading.started_s is not None:
            return
        reading.started_s = now
        size = self._pool.block_size
        have = sequence.num_computed // size
        cached = self._cache.match(reading.task.usable_digests(size))
        if len(cached) > have:
            self._pool.add(cached[have:], Holder.SEQUENCE)
            self._pool.drop(sequence.blocks[have : len(cached)], Holder.SEQUENCE)
            sequence.blocks[have : len(cached)] = cached[have:]
            sequence.num_computed = len(cached) * size
        reading.cached_tokens = sequence.num_computed
        self.num_cached_tokens += sequence.num_computed

    def finish_reading(self, sequence: DecodeSequence, now: float) -> PromptRead | None:
        """The last chunk of a prompt is computed: let others find it. From now on the sequence decodes."""
        reading, sequence.reading = sequence.reading, None
        if reading is None or reading.started_s is None:
            return None
        sequence.digests = reading.task.digests
        self._remember(sequence)
        sequence.paced_since_s, sequence.paced_from = now, sequence.num_given + 1
        return PromptRead(
            reading.started_s - reading.arrived_s,
            now - reading.started_s,
            reading.cached_tokens,
            tuple(reading.logprobs),
        )

    def retire(self, sequence: DecodeSequence) -> None:
        """Its answer is complete. What it holds serves the next turn of the same conversation."""
        sequence.digests = self._cache.digests(sequence.token_ids[:-1], sequence.salt)
        self._remember(sequence)
        self.cancel(sequence.key)

    def _join(self, sequence: DecodeSequence, now: float) -> None:
        if sequence.joined_s is None:
            sequence.joined_s = now
        overtakes = bool(self._running) and next(reversed(self._running.values())).arrival > sequence.arrival
        self._running[sequence.key] = sequence
        if overtakes:
            self._running = {each.key: each for each in sorted(self._running.values(), key=_arrival)}

    def _resume(self, sequence: DecodeSequence) -> bool:
        """Give a preempted sequence blocks for all it has, and a new one's headroom, if there are enough."""
        size = self._pool.block_size
        cached = [] if sequence.needs_prompt_logprobs else self._cache.match(sequence.digests)
        most = self._pool.num_blocks_for(sequence.most_tokens)
        wanted = min(most, self._pool.num_blocks_for(len(sequence.token_ids)) + HEADROOM_BLOCKS)
        self._pool.add(cached, Holder.SEQUENCE)  # first, so that the rest is not taken from them
        if not self._take_from_held(wanted - len(cached)):
            self._pool.drop(cached, Holder.SEQUENCE)
            return False
        sequence.blocks = cached + self._pool.allocate(wanted - len(cached), Holder.SEQUENCE)
        sequence.num_computed = len(cached) * size
        if sequence.reading is None or sequence.reading.started_s is not None:
            self.num_cached_tokens += sequence.num_computed
        return True

    def _take_from_held(self, num_blocks: int) -> bool:
        """Whether so many blocks can be had, if need be from those who are held, the youngest first."""
        held = [sequence for sequence in self._ready if sequence.is_held]
        while held and not self._pool.can_allocate(num_blocks):
            self._preempt(held.pop())
        return self._pool.can_allocate(num_blocks)

    def _remember(self, sequence: DecodeSequence) -> None:
        """Let others find the full blocks of a sequence whose digests are set."""
        known = sequence.digests[: sequence.num_computed // self._pool.block_size]
        sequence.blocks = self._cache.insert(known, sequence.blocks)

    def _preempt(self, sequence: DecodeSequence) -> None:
        if self._running.pop(sequence.key, None) is None:
            self._ready.remove(sequence)
        # What nobody needs until then is still there when it comes back.
        sequence.digests = self._cache.digests(sequence.token_ids[:-1], sequence.salt)
        self._remember(sequence)
        self._pool.drop(sequence.blocks, Holder.SEQUENCE)
        sequence.blocks, sequence.num_computed = [], 0
        if sequence.reading is not None:
            sequence.reading.logprobs.clear()
        self._preempted.append(sequence)
        self._preempted.sort(key=_arrival)
        self.num_preemptions += 1


def _arrival(sequence: DecodeSequence) -> int:
    return sequence.arrival
