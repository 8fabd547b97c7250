"""Which sequences the next step advances by one token: continuous batching, first come first served. A core.

A sequence comes with blocks for its whole answer, so once it runs nothing can stop it for lack of memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engine.block_pool import BlockPool, Holder
from engine.sequence import ChunkResult, RequestKey, ScheduledChunk, StopReason, TokenSampling


@dataclass(frozen=True, slots=True)
class Decoded:
    """One new token. index: its place in the answer. decode_queue_s: set with the first one drawn here."""

    key: RequestKey
    index: int
    token_id: int
    stop_reason: StopReason | None
    decode_queue_s: float | None


@dataclass(slots=True)
class _Sequence:
    key: RequestKey
    prompt_tokens: int
    sampling: TokenSampling
    blocks: Sequence[int]
    last_token: int
    ready_s: float
    num_output_tokens: int = 1
    joined_s: float = 0.0


class DecodeScheduler:
    """Call `schedule`, run the chunks, call `complete` (or `abandon` if they failed); cancel only in between.

    It owns the SEQUENCE references of the sequences that are added and drops them when they end.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._ready: deque[_Sequence] = deque()
        self._running: dict[RequestKey, _Sequence] = {}

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_blocks(self) -> int:
        """Blocks that carry a SEQUENCE reference of ours."""
        return sum(len(sequence.blocks) for sequence in (*self._ready, *self._running.values()))

    def add(
        self,
        key: RequestKey,
        prompt_tokens: int,
        first_token: int,
        sampling: TokenSampling,
        blocks: Sequence[int],
        now: float,
    ) -> None:
        """A sequence whose prompt's KV lies in `blocks`, which have room for the whole answer. It joins the
        batch as soon as there is a place. A key must not be added again while it is here."""
        self._ready.append(_Sequence(key, prompt_tokens, sampling, blocks, first_token, now))

    def cancel(self, key: RequestKey) -> bool:
        """Forget the sequence and free its blocks; False if it is not here."""
        sequence = self._running.pop(key, None)
        if sequence is None:
            sequence = next((ready for ready in self._ready if ready.key == key), None)
            if sequence is None:
                return False
            self._ready.remove(sequence)
        self._pool.drop(sequence.blocks, Holder.SEQUENCE)
        return True

    def schedule(self, now: float) -> list[ScheduledChunk]:
        """One token of every running sequence; empty if there is none."""
        while self._ready and len(self._running) < self._max_num_seqs:
            sequence = self._ready.popleft()
            sequence.joined_s = now
            self._running[sequence.key] = sequence
        return [
            ScheduledChunk(
                token_ids=[sequence.last_token],
                # Answer token i lies at position prompt_tokens + i.
                start=sequence.prompt_tokens + sequence.num_output_tokens - 1,
                block_table=sequence.blocks,
                sampling=sequence.sampling,
                num_output_tokens=sequence.num_output_tokens,
            )
            for sequence in self._running.values()
        ]

    def complete(self, results: Sequence[ChunkResult]) -> list[Decoded]:
        """Take the step's results (one a chunk) into account; sequences that end free their blocks."""
        decoded: list[Decoded] = []
        drawn = [result.token_id for result in results if result.token_id is not None]
        if len(drawn) != len(self._running):
            raise ValueError(f"the runner drew {len(drawn)} tokens for {len(self._running)} sequences")
        for sequence, token in zip(list(self._running.values()), drawn, strict=True):
            index = sequence.num_output_tokens
            sequence.num_output_tokens += 1
            sequence.last_token = token
            stop_reason = sequence.sampling.stop_reason(token, sequence.num_output_tokens)
            queue_s = sequence.joined_s - sequence.ready_s if index == 1 else None
            decoded.append(Decoded(sequence.key, index, token, stop_reason, queue_s))
            if stop_reason is not None:
                self.cancel(sequence.key)
        return decoded

    def abandon(self) -> list[RequestKey]:
        """The step failed: its sequences are forgotten and their blocks freed."""
        keys = list(self._running)
        for key in keys:
            self.cancel(key)
        return keys
