"""Which tokens the next step computes: everybody who decodes, then chunks of prompts. A core.

Stall-free batching (Sarathi-Serve, Agrawal et al. 2024): each step holds one token of every sequence that
decodes, and no prompt ever takes the place of one. Beside them, up to a number of tokens (chunk_budget.py),
chunks of those who have more to compute:

  1. sequences that were preempted and came back (places.py), the oldest first: their answers have begun;
  2. prompts that are read here, in the order of engine/urgency.py; first come first served, if nothing is
     known of their limits.

Such an order can keep somebody behind others for ever. So in every FAIR_STEPS-th step with chunks it is the
oldest of all these that goes first, whatever its limits. As there is a chunk every few steps while anybody
wants one, the oldest gets through; then the next is the oldest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from decode_worker.chunk_budget import ChunkBudget, Pace
from decode_worker.places import Places
from decode_worker.sequences import Decoded, DecodeSequence, DecodeTask
from engine.block_pool import BlockPool
from engine.latency import OnlineLatency, StepShape
from engine.prefix_cache import PrefixCache
from engine.sequence import ChunkResult, RequestKey, ScheduledChunk
from engine.urgency import FAIR_STEPS, Rank, rank


class DecodeScheduler:
    """Call `schedule`, run the chunks, call `complete` (or `abandon` if they failed); cancel only in between.

    It owns the SEQUENCE references of the sequences that are added and drops them when they end.
    max_batch_tokens: at least max_num_seqs. latency: of this worker's steps; learns from them.
    """

    def __init__(
        self,
        pool: BlockPool,
        cache: PrefixCache,
        max_num_seqs: int,
        max_batch_tokens: int,
        latency: OnlineLatency,
    ) -> None:
        if max_batch_tokens < max_num_seqs:
            raise ValueError(
                f"{max_batch_tokens} tokens a step for {max_num_seqs} sequences: one each, or more"
            )
        self._cache = cache
        self._latency = latency
        self._places = Places(pool, cache, max_num_seqs)
        self._budget = ChunkBudget(latency, max_batch_tokens)
        self._num_arrived = 0
        self._num_paused = 0
        self._num_chunked_steps = 0
        self._all_decode = False
        # When a step last began or ended, and what could be afforded then (for each token to come, and once):
        # None until somebody asks.
        self._seen_at = 0.0
        self._affordable: tuple[float, float] | None = None
        # Prompt tokens a step as of the last one that had any, and the steps that wanted some since.
        self._chunk_tokens = max_batch_tokens
        self._num_without = 0
        # Of the step under way: the sequence and the number of tokens of each chunk.
        self._batch: list[tuple[DecodeSequence, int]] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place, for blocks, or for their first chunk."""
        waiting = len(self._places.waiting)
        return waiting + sum(1 for each in self._places.running if _is_unread(each))

    @property
    def num_running(self) -> int:
        return sum(1 for each in self._places.running if not _is_unread(each))

    @property
    def queue_tokens(self) -> int:
        """Tokens of prompts that are read here, not yet computed."""
        everybody = (*self._places.running, *self._places.waiting)
        return sum(each.num_left for each in everybody if each.reading is not None)

    @property
    def decoding(self) -> tuple[int, int]:
        """How many decode, and the tokens of context that they have together."""
        contexts = [len(each.token_ids) for each in self._places.running if each.decodes]
        return len(contexts), sum(contexts)

    @property
    def least_tpot_s(self) -> float | None:
        """What the tightest of those who decode can afford for each token to come, as of the last step that
        began or ended; None if none has a limit that it can keep. What one is ahead is not counted: it is
        spent once."""
        least_tpot_s, _ = self._afford()
        return None if math.isinf(least_tpot_s) else least_tpot_s

    @property
    def ahead_s(self) -> float:
        """How far the same one is ahead of its limit: a part of it is spent on each step that reads."""
        return self._afford()[1]

    def _afford(self) -> tuple[float, float]:
        if self._affordable is None:
            decoding = [sequence for sequence in self._places.running if sequence.decodes]
            tightest = self._tightest(decoding, self._seen_at)
            if tightest is None:
                self._affordable = math.inf, 0.0
            else:
                self._affordable = tightest.sustained_s, max(0.0, tightest.ahead_s)
        return self._affordable

    @property
    def num_blocks(self) -> int:
        """SEQUENCE references of ours."""
        return self._places.num_blocks

    @property
    def lacks_blocks(self) -> bool:
        """Somebody waits for blocks: they must not go to new requests."""
        return self._places.lacks_blocks or self._num_paused > 0

    def add(self, task: DecodeTask, first_token: int, blocks: Sequence[int], ready_s: float) -> None:
        """A sequence that fits into the pool, and whose KV lies in `blocks`: a hand-off has ended.

        It joins the batch as soon as there is a place, unless it is held. first_token: follows what the task
        has. A key must not be added again while it is here.
        """
        self._num_arrived += 1
        blocks = self._cache.insert(task.digests, blocks)
        self._places.add(DecodeSequence.handed_over(task, self._num_arrived, first_token, blocks, ready_s))

    def read(self, task: DecodeTask, blocks: Sequence[int], num_computed: int, arrived_s: float) -> None:
        """A sequence that is to be read here: there are `blocks` for all that the task has.

        num_computed: of its tokens, those whose KV the cache had; not all.
        """
        self._num_arrived += 1
        self._places.add(DecodeSequence.to_read(task, self._num_arrived, blocks, num_computed, arrived_s))

    def hold(self, key: RequestKey, *, is_held: bool, now: float) -> None:
        """Whether the sequence is to wait where it is; one that is not here is ignored. It keeps its blocks
        until somebody else needs them."""
        self._places.hold(key, is_held=is_held, now=now)

    def cancel(self, key: RequestKey) -> bool:
        """Forget the sequence and free its blocks; False if it is not here."""
        return self._places.cancel(key)

    def schedule(self, now: float) -> list[ScheduledChunk]:
        """The chunks of the next step; empty if there is nothing that can be done now."""
        self.plan(now)
        return self.chunks()

    def plan(self, now: float) -> bool:
        """Decides on the next step; False if there is nothing that can be done now."""
        self._seen_at, self._affordable = now, None
        self._places.fill(now)
        self._num_paused = 0
        decoding: list[DecodeSequence] = []
        others: list[DecodeSequence] = []
        preempted = self._places.num_preemptions
        for sequence in self._places.running:
            if self._places.num_preemptions > preempted and not self._places.has(sequence):
                continue  # for an older one
            if not self._places.grow(sequence):
                self._num_paused += 1
            else:
                (decoding if sequence.decodes else others).append(sequence)
        self._batch = [(sequence, 1) for sequence in decoding]
        self._all_decode = not others
        if others:
            tightest = self._tightest(decoding, now)
            limit_s = None if tightest is None else tightest.effective_s
            self._fill(self._in_order(others, now), limit_s, now)
        return bool(self._batch)

    def chunks(self) -> list[ScheduledChunk]:
        """Of the step that was planned."""
        return [sequence.chunk(count) for sequence, count in self._batch]

    @property
    def shape(self) -> StepShape:
        """Of the step under way."""
        if self._all_decode:
            return StepShape((), len(self._batch), sum(len(one.token_ids) for one, _ in self._batch))
        return _shape(self._batch)

    @property
    def batch_keys(self) -> list[RequestKey]:
        """Who is in the step under way."""
        return [sequence.key for sequence, _ in self._batch]

    def complete(self, results: Sequence[ChunkResult], began_s: float, now: float) -> list[Decoded]:
        """Take the step's results (one a chunk) into account; sequences that end free their blocks."""
        for (sequence, count), result in zip(self._batch, results, strict=True):
            if (result.token_id is None) != (count < sequence.num_left):
                raise ValueError(f"the runner drew {result.token_id} after {count} tokens of {sequence.key}")
        self._latency.observe(self.shape, now - began_s)
        self._seen_at, self._affordable = now, None
        batch, self._batch = self._batch, []
        decoded: list[Decoded] = []
        for (sequence, count), result in zip(batch, results, strict=True):
            sequence.num_computed += count
            if sequence.reading is not None:
                sequence.reading.logprobs += result.prompt_logprobs
            if result.token_id is not None:
                decoded.append(self._drawn(sequence, result, result.token_id, now))
        return decoded

    def num_alike(self, most: int) -> int:
        """How many steps, the one under way included, are like it if nothing comes from outside: all decode,
        and nobody ends before the last of them or lacks blocks. At most `most`; 1 if it is alone, or somebody
        has its first token here in it.

        For simulations, which need not take them one by one.
        """
        if self._num_paused or not self._all_decode:
            return 1
        left = most
        for sequence, _ in self._batch:
            sampling, drawn = sequence.sampling, sequence.num_output_tokens
            if sampling.stop_token_ids or drawn == sequence.num_given:
                return 1
            left = min(left, sampling.max_tokens - drawn)
        return self._places.num_growing([one for one, _ in self._batch], left)

    def coast(self, steps: Sequence[tuple[float, float]], *, is_last: bool) -> list[Decoded]:
        """So many steps are over as if each but the last had been completed and the next one scheduled at its
        end; the last one, too, or it is completed only (is_last). No more than num_alike. Nobody looks at the
        tokens that were drawn, which are all 0.

        steps: when each began and ended. Returns of the last step what is not like all others: the tokens
        that end an answer, and the first ones after a hand-off, if there is but one step.
        """
        shape = self.shape
        self._latency.observe_run(
            shape.decode_batch, shape.decode_context, (ended_s - began_s for began_s, ended_s in steps)
        )
        now, count, decoded = steps[-1][1], len(steps), []
        self._seen_at, self._affordable = now, None
        for sequence, _ in self._batch:
            is_first = count == 1 and sequence.num_output_tokens == sequence.num_given
            sequence.append_drawn(count)
            if not is_last:
                self._places.grow(sequence)
            elif is_first or sequence.num_output_tokens >= sequence.sampling.max_tokens:
                decoded.append(self._coasted(sequence, is_first=is_first))
        if is_last:
            self._batch = []
        return decoded

    def _coasted(self, sequence: DecodeSequence, *, is_first: bool) -> Decoded:
        index, queue_s = sequence.num_output_tokens - 1, None
        if is_first and sequence.joined_s is not None:
            queue_s = sequence.joined_s - sequence.ready_s
        stop_reason = sequence.sampling.stop_reason(0, index + 1)
        if stop_reason is not None:
            self._places.retire(sequence)
        return Decoded(sequence.key, index, 0, stop_reason, None, queue_s, None)

    def abandon(self) -> list[RequestKey]:
        """The step failed: its sequences are forgotten and their blocks freed."""
        keys = [sequence.key for sequence, _ in self._batch]
        self._batch = []
        for key in keys:
            self.cancel(key)
        return keys

    def take_counts(self) -> tuple[int, int]:
        """Preemptions, and tokens found in the cache by those who read or came back, since the last call."""
        places = self._places
        counts = places.num_preemptions, places.num_cached_tokens
        places.num_preemptions = places.num_cached_tokens = 0
        return counts

    def _tightest(self, decoding: Sequence[DecodeSequence], now: float) -> Pace | None:
        """Of those who decode, who can afford least of those that can still keep their limit."""
        paces = (sequence.pace(now) for sequence in decoding)
        return self._budget.tightest(pace for pace in paces if pace is not None)

    def _fill(self, others: Sequence[DecodeSequence], limit_s: float | None, now: float) -> None:
        """Chunks of `others`, in this order, beside those who decode."""
        shape = self.shape
        wanted = [(sequence.num_left, sequence.num_computed) for sequence in others]
        left = self._budget.num_tokens(shape.decode_batch, shape.decode_context, limit_s, wanted)
        if left == 0:
            self._num_without += 1
            return
        self._num_chunked_steps += 1
        self._chunk_tokens = max(1, left // (1 + self._num_without))
        self._num_without = 0
        for sequence in others:
            if left == 0:
                break
            self._places.start(sequence, now)
            count = min(left, sequence.num_left)
            self._batch.append((sequence, count))
            left -= count

    def _in_order(self, others: list[DecodeSequence], now: float) -> list[DecodeSequence]:
        if (self._num_chunked_steps + 1) % FAIR_STEPS == 0:
            return others[:1] + self._by_urgency(others[1:], now)
        return self._by_urgency(others, now)

    def _by_urgency(self, others: Sequence[DecodeSequence], now: float) -> list[DecodeSequence]:
        answers = [sequence for sequence in others if sequence.reading is None]
        prompts = [sequence for sequence in others if sequence.reading is not None]
        latency, decode_s = self._latency, self._latency.expect_s(StepShape((), *self.decoding))

        def place(sequence: DecodeSequence) -> Rank:
            # Its chunks will be like those of the last step, and each shares a step with those who decode.
            num_left = sequence.num_left
            needs_s = latency.expect_s(StepShape(((num_left, sequence.num_computed),)))
            needs_s += -(-num_left // self._chunk_tokens) * decode_s
            return rank(sequence.urgency, sequence.ready_s, needs_s, now)

        return answers + sorted(prompts, key=place)

    def _drawn(self, sequence: DecodeSequence, result: ChunkResult, token: int, now: float) -> Decoded:
        index, queue_s, read = sequence.num_output_tokens, None, None
        if sequence.reading is not None:
            read = self._places.finish_reading(sequence, now)
        elif index == sequence.num_given and sequence.joined_s is not None:
            queue_s = sequence.joined_s - sequence.ready_s
        sequence.append(token)
        stop_reason = sequence.sampling.stop_reason(token, index + 1)
        if stop_reason is not None:
            self._places.retire(sequence)
        return Decoded(sequence.key, index, token, stop_reason, result.logprobs, queue_s, read)


def _is_unread(sequence: DecodeSequence) -> bool:
    """Whether it is a prompt of which nothing was computed yet."""
    return sequence.reading is not None and sequence.reading.started_s is None


def _shape(batch: Sequence[tuple[DecodeSequence, int]]) -> StepShape:
    decoding = [len(sequence.token_ids) for sequence, _ in batch if sequence.decodes]
    chunks = tuple((count, sequence.num_computed) for sequence, count in batch if not sequence.decodes)
    return StepShape(chunks, len(decoding), sum(decoding))
