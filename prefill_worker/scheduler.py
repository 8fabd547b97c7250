"""Which prompt tokens the next step computes: first come first served, up to a token budget. A core.

The oldest prompt takes what it needs of the budget, the next what is left, so at most one prompt is ever
half done at the end of a step. A prompt gets blocks for all its tokens when it starts; one that has to wait
for blocks lets nobody pass, so it waits for blocks that are held by hand-offs, never for its luck.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.block_pool import BlockPool, Holder
from engine.sequence import ChunkResult, RequestKey, ScheduledChunk, StopReason, TokenSampling


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt whose KV is computed. The SEQUENCE reference of its blocks is the receiver's from now on."""

    key: RequestKey
    num_tokens: int
    blocks: tuple[int, ...]
    first_token: int
    stop_reason: StopReason | None
    prefill_queue_s: float
    prefill_s: float


@dataclass(slots=True)
class _Prompt:
    key: RequestKey
    token_ids: Sequence[int]
    sampling: TokenSampling
    arrived_s: float
    started_s: float = 0.0
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed


class PrefillScheduler:
    """Call `schedule`, run the chunks, call `complete`, or `abandon` if they failed; cancel in between."""

    def __init__(self, pool: BlockPool, max_batch_tokens: int) -> None:
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[_Prompt] = deque()
        # Started, oldest first.
        self._running: list[_Prompt] = []
        # Of the step under way: the prompt and the number of tokens of each chunk.
        self._batch: list[tuple[_Prompt, int]] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_blocks(self) -> int:
        """Blocks that carry a SEQUENCE reference of ours."""
        return sum(len(prompt.blocks) for prompt in self._running)

    @property
    def queue_tokens(self) -> int:
        """Prompt tokens not yet computed."""
        return sum(prompt.num_left for prompt in (*self._waiting, *self._running))

    def add(self, key: RequestKey, token_ids: Sequence[int], sampling: TokenSampling, now: float) -> None:
        """Queue a prompt that fits into the pool. A key must not be added again while it is here."""
        self._waiting.append(_Prompt(key, token_ids, sampling, now))

    def cancel(self, key: RequestKey) -> bool:
        """Forget the prompt and free its blocks; False if it is not here."""
        for prompt in self._running:
            if prompt.key == key:
                self._running.remove(prompt)
                self._pool.drop(prompt.blocks, Holder.SEQUENCE)
                return True
        for prompt in self._waiting:
            if prompt.key == key:
                self._waiting.remove(prompt)
                return True
        return False

    def schedule(self, now: float) -> list[ScheduledChunk]:
        """The chunks of the next step, at most max_batch_tokens tokens together; none if there is nothing."""
        budget = self._max_batch_tokens
        for prompt in self._running:
            budget -= self._take(prompt, budget)
        while budget > 0 and self._waiting:
            num_blocks = self._pool.num_blocks_for(len(self._waiting[0].token_ids))
            if not self._pool.can_allocate(num_blocks):
                break
            prompt = self._waiting.popleft()
            prompt.blocks = self._pool.allocate(num_blocks, Holder.SEQUENCE)
            prompt.started_s = now
            self._running.append(prompt)
            budget -= self._take(prompt, budget)
        return [_chunk(prompt, count) for prompt, count in self._batch]

    def complete(self, results: Sequence[ChunkResult], now: float) -> list[Prefilled]:
        """Take the step's results (one a chunk) into account; returns the prompts that are done."""
        done: list[Prefilled] = []
        tokens = [result.token_id for result in results]
        for (prompt, count), token in zip(self._batch, tokens, strict=True):
            if (token is None) != (count < prompt.num_left):
                raise ValueError(f"the runner drew {token} after {count} tokens of {prompt.key}")
        for (prompt, count), token in zip(self._batch, tokens, strict=True):
            prompt.num_computed += count
            if token is None:
                continue
            self._running.remove(prompt)
            done.append(
                Prefilled(
                    prompt.key,
                    len(prompt.token_ids),
                    tuple(prompt.blocks),
                    token,
                    prompt.sampling.stop_reason(token, 1),
                    prompt.started_s - prompt.arrived_s,
                    now - prompt.started_s,
                )
            )
        self._batch = []
        return done

    def abandon(self) -> list[RequestKey]:
        """The step failed: its prompts are forgotten and their blocks freed."""
        keys = [prompt.key for prompt, _ in self._batch]
        self._batch = []
        for key in keys:
            self.cancel(key)
        return keys

    def _take(self, prompt: _Prompt, budget: int) -> int:
        count = min(budget, prompt.num_left)
        if count:
            self._batch.append((prompt, count))
        return count


def _chunk(prompt: _Prompt, count: int) -> ScheduledChunk:
    start = prompt.num_computed
    return ScheduledChunk(
        token_ids=prompt.token_ids[start : start + count],
        start=start,
        block_table=prompt.blocks,
        sampling=prompt.sampling if count == prompt.num_left else None,
        num_output_tokens=0,
    )
