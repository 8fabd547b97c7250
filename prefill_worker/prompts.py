"""What a prefill worker keeps of each prompt, and what it tells of one that is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.sequence import (
    RequestKey,
    ScheduledChunk,
    StopReason,
    TokenHistory,
    TokenLogprobs,
    TokenSampling,
)
from engine.urgency import Urgency


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
class Prompt:
    """num_output_tokens: of token_ids, those at the end that are of an answer. urgency: None if nothing was
    told of it. blocks: for all its tokens, from its start on; none before. num_shown: tokens that were part
    of a ComputedPart."""

    key: RequestKey
    token_ids: Sequence[int]
    num_output_tokens: int
    sampling: TokenSampling
    digests: Sequence[bytes]
    history: TokenHistory | None
    urgency: Urgency | None
    arrived_s: float
    started_s: float = 0.0
    blocks: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    num_computed: int = 0
    num_shown: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def is_started(self) -> bool:
        return bool(self.blocks)

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def goes_on(self) -> bool:
        """Whether the answer may be longer than the token drawn here: only then somebody wants the KV."""
        return self.sampling.max_tokens > self.num_output_tokens + 1

    def chunk(self, count: int) -> ScheduledChunk:
        """Its next `count` tokens; with the last one the token that follows is drawn."""
        start, end = self.num_computed, self.num_computed + count
        last = count == self.num_left
        return ScheduledChunk(
            token_ids=self.token_ids[start:end],
            start=start,
            block_table=self.blocks,
            sampling=self.sampling if last else None,
            num_output_tokens=self.num_output_tokens,
            history=self.history,
            prompt_logprobs=self.sampling.prompt_logprobs,
            next_token=None if last else self.token_ids[end],
        )
