"""Which prompt tokens the next step computes: first come first served, up to a token budget. A core.

The oldest prompt takes what it needs of the budget, the next what is left, so at most one prompt is ever
half done at the end of a step. A prompt gets blocks for all its tokens when it starts: those that the prefix
cache has for its beginning, and new ones for the rest, which alone is computed. One that has to wait for
blocks lets nobody pass, so it waits for blocks that are held by hand-offs, never for its luck.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.block_pool import BlockPool, Holder
from engine.prefix_cache import PrefixCache
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
class Prefilled:
    """A prompt whose KV is computed. The SEQUENCE reference of its blocks is the receiver's from now on.

    first_token: the one drawn, which has this index in the answer. prompt_logprobs: of the prompt's second
    token up to its last, if asked for. cached_tokens: of the prompt's tokens, those whose KV was cached.
    """

    key: RequestKey
    num_tokens: int
    blocks: tuple[int, ...]
    first_token: int
    index: int
    stop_reason: StopReason | None
    prefill_queue_s: float
    prefill_s: float
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class ComputedPart:
    """Tokens [start_token, end_token) of a prompt, which lie in `blocks`: whole blocks, but for the last."""

    key: RequestKey
    start_token: int
    end_token: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class _Prompt:
    """num_output_tokens: of token_ids, those at the end that are of an answer. num_shown: tokens that were
    part of a ComputedPart."""

    key: RequestKey
    token_ids: Sequence[int]
    num_output_tokens: int
    sampling: TokenSampling
    digests: Sequence[bytes]
    history: TokenHistory | None
    arrived_s: float
    started_s: float = 0.0
    blocks: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    num_computed: int = 0
    num_shown: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def goes_on(self) -> bool:
        """Whether the answer may be longer than the token drawn here: only then somebody wants the KV."""
        return self.sampling.max_tokens > self.num_output_tokens + 1


class PrefillScheduler:
    """Call `schedule`, run the chunks, call `complete`, or `abandon` if they failed; cancel in between."""

    def __init__(self, pool: BlockPool, cache: PrefixCache, max_batch_tokens: int) -> None:
        self._pool = pool
        self._cache = cache
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[_Prompt] = deque()
        # Started, oldest first.
        self._running: list[_Prompt] = []
        # Of the step under way: the prompt and the number of tokens of each chunk.
        self._batch: list[tuple[_Prompt, int]] = []
        # Prompts that have started, with the part that the cache had of them.
        self._found: list[ComputedPart] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_blocks(self) -> int:
        """SEQUENCE references of ours."""
        return sum(len(prompt.blocks) for prompt in self._running)

    @property
    def queue_tokens(self) -> int:
        """Prompt tokens not yet computed."""
        return sum(prompt.num_left for prompt in (*self._waiting, *self._running))

    def add(
        self,
        key: RequestKey,
        token_ids: Sequence[int],
        num_output_tokens: int,
        sampling: TokenSampling,
        salt: str,
        now: float,
    ) -> None:
        """Queue a prompt that fits into the pool. A key must not be added again while it is here.

        num_output_tokens: so many of token_ids, the last ones, were drawn before, as a request's first
        answer tokens. salt: prompts share cached KV only with prompts of the same salt.
        """
        digests = self._cache.digests(token_ids, salt)
        history = None
        if sampling.needs_history:
            prompt_tokens = len(token_ids) - num_output_tokens
            history = TokenHistory(token_ids[:prompt_tokens], token_ids[prompt_tokens:])
        self._waiting.append(_Prompt(key, token_ids, num_output_tokens, sampling, digests, history, now))

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
        while budget > 0 and self._waiting and self._place(self._waiting[0]):
            prompt = self._waiting.popleft()
            prompt.started_s = now
            self._running.append(prompt)
            budget -= self._take(prompt, budget)
        return [_chunk(prompt, count) for prompt, count in self._batch]

    def take_found(self) -> list[ComputedPart]:
        """Parts of prompts that have started since the last call, whose KV the cache had."""
        found, self._found = self._found, []
        return found

    def parts(self) -> list[ComputedPart]:
        """What will be computed when the step under way is over, and was not shown before."""
        size = self._pool.block_size
        parts: list[ComputedPart] = []
        for prompt, count in self._batch:
            end = prompt.num_computed + count
            if count < prompt.num_left:
                end -= end % size
            if prompt.goes_on and end > prompt.num_shown:
                blocks = prompt.blocks[prompt.num_shown // size : -(-end // size)]
                parts.append(ComputedPart(prompt.key, prompt.num_shown, end, tuple(blocks)))
        return parts

    def complete(self, results: Sequence[ChunkResult], now: float) -> list[Prefilled]:
        """Take the step's results (one a chunk) into account; returns the prompts that are done."""
        done: list[Prefilled] = []
        for (prompt, count), result in zip(self._batch, results, strict=True):
            if (result.token_id is None) != (count < prompt.num_left):
                raise ValueError(f"the runner drew {result.token_id} after {count} tokens of {prompt.key}")
        shown = {part.key: part.end_token for part in self.parts()}
        for (prompt, count), result in zip(self._batch, results, strict=True):
            prompt.num_computed += count
            prompt.num_shown = shown.get(prompt.key, prompt.num_shown)
            prompt.logprobs += result.prompt_logprobs
            token = result.token_id
            if token is None:
                continue
            self._running.remove(prompt)
            done.append(
                Prefilled(
                    prompt.key,
                    len(prompt.token_ids),
                    tuple(self._cache.insert(prompt.digests, prompt.blocks)),
                    token,
                    prompt.num_output_tokens,
                    prompt.sampling.stop_reason(token, prompt.num_output_tokens + 1),
                    prompt.started_s - prompt.arrived_s,
                    now - prompt.started_s,
                    result.logprobs,
                    tuple(prompt.logprobs),
                    prompt.cached_tokens,
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

    def _place(self, prompt: _Prompt) -> bool:
        """Give the prompt blocks for all its tokens, if there are enough."""
        cached: list[int] = []
        if prompt.sampling.prompt_logprobs is None:  # only computed tokens have log-probabilities
            # The last token is always computed: what follows it is drawn from its logits.
            cached = self._cache.match(prompt.digests[: (len(prompt.token_ids) - 1) // self._pool.block_size])
        num_new = self._pool.num_blocks_for(len(prompt.token_ids)) - len(cached)
        self._pool.add(cached, Holder.SEQUENCE)  # first, so that the rest is not taken from them
        if not self._pool.can_allocate(num_new):
            self._pool.drop(cached, Holder.SEQUENCE)
            return False
        prompt.blocks = cached + self._pool.allocate(num_new, Holder.SEQUENCE)
        prompt.num_computed = prompt.cached_tokens = len(cached) * self._pool.block_size
        if cached and prompt.goes_on:
            prompt.num_shown = prompt.cached_tokens
            self._found.append(ComputedPart(prompt.key, 0, prompt.cached_tokens, tuple(cached)))
        return True

    def _take(self, prompt: _Prompt, budget: int) -> int:
        count = min(budget, prompt.num_left)
        if count:
            self._batch.append((prompt, count))
        return count


def _chunk(prompt: _Prompt, count: int) -> ScheduledChunk:
    start, end = prompt.num_computed, prompt.num_computed + count
    last = count == prompt.num_left
    return ScheduledChunk(
        token_ids=prompt.token_ids[start:end],
        start=start,
        block_table=prompt.blocks,
        sampling=prompt.sampling if last else None,
        num_output_tokens=prompt.num_output_tokens,
        history=prompt.history,
        prompt_logprobs=prompt.sampling.prompt_logprobs,
        next_token=None if last else prompt.token_ids[end],
    )
