"""Which prompt tokens the next step computes, up to a number of tokens. A core.

Of what nothing is told: first come, first served. The oldest prompt takes what it needs of the step, the next
what is left, so at most one prompt is ever half done at the end of a step.

Of prompts whose urgency is told, the most urgent goes first (engine/urgency.py: by priority, who can be on
time by deadline, then the late ones, the shortest first), also in front of prompts that are half done: they
wait, with what they have, at the border of a chunk. How large chunks are then, says chunk_size.py.

A prompt gets blocks for all its tokens when it starts: those that the prefix cache has for its beginning, and
new ones for the rest, which alone is computed. So nobody waits for ever:
  - Who has started lacks nothing but time. In every FAIR_STEPS-th step the oldest of all prompts goes first,
    whatever its urgency; so the oldest ends, then the next is the oldest.
  - When the one whose turn it is lacks blocks, nobody else starts: it waits for blocks, never for its luck.
    Those who have started go on meanwhile, and end; their blocks go to hand-offs, and each of these ends.
    Half-done prompts lack no blocks, so they never wait for each other's.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.block_pool import BlockPool, Holder
from engine.latency import OnlineLatency
from engine.prefix_cache import PrefixCache
from engine.sequence import ChunkResult, RequestKey, ScheduledChunk, TokenHistory, TokenSampling
from engine.urgency import FAIR_STEPS, Rank, Urgency, rank
from prefill_worker.chunk_size import ChunkSizes, StepSize, Waiting
from prefill_worker.prompts import ComputedPart, Prefilled, Prompt


class PrefillScheduler:
    """Call `schedule`, run the chunks, call `complete`, or `abandon` if they failed; cancel in between.

    latency: of this worker's steps.
    """

    def __init__(
        self, pool: BlockPool, cache: PrefixCache, max_batch_tokens: int, latency: OnlineLatency
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._max_batch_tokens = max_batch_tokens
        self._sizes = ChunkSizes(latency, max_batch_tokens)
        # In order of arrival.
        self._prompts: dict[RequestKey, Prompt] = {}
        # Of the step under way: the prompt and the number of tokens of each chunk.
        self._batch: list[tuple[Prompt, int]] = []
        self._num_steps = 0
        # Prompts that have started, with the part that the cache had of them.
        self._found: list[ComputedPart] = []

    @property
    def num_waiting(self) -> int:
        return len(self._prompts) - self.num_running

    @property
    def num_running(self) -> int:
        """Prompts that have started, those included that others have overtaken."""
        return sum(prompt.is_started for prompt in self._prompts.values())

    @property
    def num_blocks(self) -> int:
        """SEQUENCE references of ours."""
        return sum(len(prompt.blocks) for prompt in self._prompts.values())

    @property
    def queue_tokens(self) -> int:
        """Prompt tokens not yet computed."""
        return sum(prompt.num_left for prompt in self._prompts.values())

    def add(
        self,
        key: RequestKey,
        token_ids: Sequence[int],
        num_output_tokens: int,
        sampling: TokenSampling,
        salt: str,
        urgency: Urgency | None,
        now: float,
    ) -> None:
        """Queue a prompt that fits into the pool. A key must not be added again while it is here.

        num_output_tokens: so many of token_ids, the last ones, were drawn before, as a request's first
        answer tokens. salt: prompts share cached KV only with prompts of the same salt. urgency: None if
        nothing was told of it.
        """
        digests = self._cache.digests(token_ids, salt)
        history = None
        if sampling.needs_history:
            prompt_tokens = len(token_ids) - num_output_tokens
            history = TokenHistory(token_ids[:prompt_tokens], token_ids[prompt_tokens:])
        self._prompts[key] = Prompt(
            key, token_ids, num_output_tokens, sampling, digests, history, urgency, now
        )

    def cancel(self, key: RequestKey) -> bool:
        """Forget the prompt and free its blocks; False if it is not here."""
        prompt = self._prompts.pop(key, None)
        if prompt is None:
            return False
        self._pool.drop(prompt.blocks, Holder.SEQUENCE)
        return True

    def schedule(self, now: float) -> list[ScheduledChunk]:
        """The chunks of the next step, at most max_batch_tokens tokens together; none if there is nothing."""
        order = self._in_order(now)
        size: StepSize | None = None
        num_tokens = 0
        lacks_blocks = False
        for at, prompt in enumerate(order):
            if size is not None and not size.has_room(num_tokens, self._waiting(prompt).num_left):
                break
            if not prompt.is_started:
                if lacks_blocks or not self._place(prompt):
                    lacks_blocks = True
                    continue
                prompt.started_s = now
            if size is None:
                size = self._size(prompt, order[at + 1 :], now)
                count = min(size.first, prompt.num_left)
            else:
                count = min(size.together - num_tokens, prompt.num_left)
            self._batch.append((prompt, count))
            num_tokens += count
        self._num_steps += bool(self._batch)
        return [prompt.chunk(count) for prompt, count in self._batch]

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
            del self._prompts[prompt.key]
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

    def _in_order(self, now: float) -> list[Prompt]:
        prompts = list(self._prompts.values())
        if all(prompt.urgency is None for prompt in prompts):
            return prompts

        def place(prompt: Prompt) -> Rank:
            return rank(prompt.urgency, prompt.arrived_s, self._waiting(prompt).needs_s, now)

        if self._num_steps % FAIR_STEPS == FAIR_STEPS - 1:
            return [*prompts[:1], *sorted(prompts[1:], key=place)]
        return sorted(prompts, key=place)

    def _size(self, first: Prompt, others: Sequence[Prompt], now: float) -> StepSize:
        if first.urgency is None and all(prompt.urgency is None for prompt in others):
            return StepSize(self._max_batch_tokens, self._max_batch_tokens, in_parts=True)
        return self._sizes.step(self._waiting(first), map(self._waiting, others), now)

    def _waiting(self, prompt: Prompt) -> Waiting:
        num_before = prompt.num_computed
        if not prompt.is_started:
            num_before = len(self._cached(prompt)) * self._pool.block_size
        num_left = len(prompt.token_ids) - num_before
        return Waiting(prompt.urgency, num_left, num_before, self._sizes.needs_s(num_left, num_before))

    def _cached(self, prompt: Prompt) -> list[int]:
        """Blocks of what need not be computed of a prompt that has not started."""
        if prompt.sampling.prompt_logprobs is not None:  # only computed tokens have log-probabilities
            return []
        # The last token is always computed: what follows it is drawn from its logits.
        return self._cache.match(prompt.digests[: (len(prompt.token_ids) - 1) // self._pool.block_size])

    def _place(self, prompt: Prompt) -> bool:
        """Give the prompt blocks for all its tokens, if there are enough."""
        cached = self._cached(prompt)
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
