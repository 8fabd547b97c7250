"""What a decode worker keeps of each sequence: its tokens, where their KV lies, and how it is paced.

A sequence is of one of three kinds, and passes from the left to the right, never back:

    read here   its prompt is computed here, and no token of its answer was drawn here yet
    computed    it decodes: of its tokens all but the last have their KV, and each step draws the next
    preempted   it has lost its blocks, and is computed again from its tokens; then it decodes
                (or goes on being read)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from decode_worker.chunk_budget import Pace
from engine.sequence import (
    RequestKey,
    ScheduledChunk,
    StopReason,
    TokenHistory,
    TokenLogprobs,
    TokenSampling,
)
from engine.urgency import Urgency


@dataclass(slots=True)
class DecodeTask:
    """A request as it came. token_ids: the prompt, and num_output_tokens of the answer. digests: of their
    full blocks. is_held: it is to wait when its KV is here. transfer_s: what its hand-off cost it."""

    key: RequestKey
    token_ids: Sequence[int]
    num_output_tokens: int
    sampling: TokenSampling
    salt: str
    urgency: Urgency | None
    digests: Sequence[bytes]
    is_held: bool = False
    transfer_s: float = 0.0

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self.token_ids[: len(self.token_ids) - self.num_output_tokens]

    @property
    def output_ids(self) -> Sequence[int]:
        return self.token_ids[len(self.token_ids) - self.num_output_tokens :]

    def usable_digests(self, block_size: int) -> Sequence[bytes]:
        """Of blocks that need not be computed, if the cache has them, when the task is read here: not the one
        with its last token, from whose logits the next is drawn. Where its prompt's log-probabilities are
        asked for, none: only computed tokens have them."""
        if self.sampling.prompt_logprobs is not None:
            return ()
        return self.digests[: (len(self.token_ids) - 1) // block_size]


@dataclass(frozen=True, slots=True)
class PromptRead:
    """How it went with a prompt that was read here. cached_tokens: of its tokens, those whose KV was cached.
    prompt_logprobs: of its second token up to its last, if asked for."""

    queue_s: float
    read_s: float
    cached_tokens: int
    prompt_logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Decoded:
    """One new token. index: its place in the answer. With the first one drawn here comes either
    decode_queue_s, after a hand-off, or `read`, of a prompt that was read here."""

    key: RequestKey
    index: int
    token_id: int
    stop_reason: StopReason | None
    logprobs: TokenLogprobs | None
    decode_queue_s: float | None
    read: PromptRead | None


@dataclass(slots=True)
class Reading:
    """Of a sequence that is read here."""

    task: DecodeTask
    arrived_s: float
    started_s: float | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class DecodeSequence:
    """token_ids: prompt and answer. num_given: tokens of the answer that it came with. num_computed: how many
    of token_ids have their KV in `blocks`. digests: of all of them but the last, which is always computed;
    set while it is preempted. is_held, held_s: whether it is to wait, whatever there is to compute, and since
    when. ready_s, joined_s: when it could begin here, and when it got a place.

    paced_since_s: the first paced_from tokens of the answer were there then; its TPOT counts from it.
    """

    key: RequestKey
    arrival: int
    token_ids: list[int]
    prompt_tokens: int
    sampling: TokenSampling
    salt: str
    urgency: Urgency | None
    history: TokenHistory | None
    blocks: list[int]
    num_given: int
    num_computed: int
    reading: Reading | None
    is_held: bool
    held_s: float
    ready_s: float
    paced_since_s: float
    paced_from: int
    joined_s: float | None = None
    digests: Sequence[bytes] = ()

    @classmethod
    def handed_over(
        cls, task: DecodeTask, arrival: int, first_token: int, blocks: Sequence[int], ready_s: float
    ) -> DecodeSequence:
        """The KV of all that `task` has lies in `blocks`; somebody else has drawn the token that follows."""
        return cls._of(task, arrival, [*task.output_ids, first_token], blocks, len(task.token_ids), ready_s)

    @classmethod
    def to_read(
        cls, task: DecodeTask, arrival: int, blocks: Sequence[int], num_computed: int, arrived_s: float
    ) -> DecodeSequence:
        """There are `blocks` for all that `task` has; they hold the KV of its first num_computed tokens."""
        sequence = cls._of(task, arrival, task.output_ids, blocks, num_computed, arrived_s)
        sequence.reading = Reading(task, arrived_s)
        return sequence

    @classmethod
    def _of(
        cls,
        task: DecodeTask,
        arrival: int,
        output_ids: Sequence[int],
        blocks: Sequence[int],
        num_computed: int,
        ready_s: float,
    ) -> DecodeSequence:
        prompt_ids, sampling = task.prompt_ids, task.sampling
        return cls(
            key=task.key,
            arrival=arrival,
            token_ids=[*prompt_ids, *output_ids],
            prompt_tokens=len(prompt_ids),
            sampling=sampling,
            salt=task.salt,
            urgency=task.urgency,
            history=TokenHistory(prompt_ids, output_ids) if sampling.needs_history else None,
            blocks=list(blocks),
            num_given=len(output_ids),
            num_computed=num_computed,
            reading=None,
            is_held=task.is_held,
            held_s=ready_s,
            ready_s=ready_s,
            paced_since_s=ready_s - task.transfer_s,
            paced_from=len(output_ids),
        )

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def most_tokens(self) -> int:
        return self.prompt_tokens + self.sampling.max_tokens

    @property
    def decodes(self) -> bool:
        """Whether its next step is one token that draws the next."""
        return self.reading is None and self.num_left == 1

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Only computed tokens have log-probabilities: nothing of it may come from the cache."""
        return self.reading is not None and self.sampling.prompt_logprobs is not None

    def append(self, token: int) -> None:
        """The answer goes on with `token`."""
        self.token_ids.append(token)
        if self.history is not None:
            self.history.append(token)

    def append_drawn(self, count: int) -> None:
        """So many steps of one token each are over; the tokens are 0."""
        if self.history is not None:
            for _ in range(count):
                self.history.append(0)
        self.token_ids.extend([0] * count)
        self.num_computed += count

    def pace(self, now: float) -> Pace | None:
        """How it stands with its TPOT limit, if it has one and decodes."""
        if self.urgency is None or math.isinf(self.urgency.tpot_s):
            return None
        drawn = self.num_output_tokens
        return Pace(
            self.urgency.tpot_s,
            now - self.paced_since_s,
            drawn - self.paced_from,
            self.sampling.max_tokens - drawn,
            len(self.token_ids),
        )

    def chunk(self, count: int) -> ScheduledChunk:
        """Its next `count` tokens."""
        start, end = self.num_computed, self.num_computed + count
        is_last = count == self.num_left
        asked = self.sampling.prompt_logprobs if self.reading is not None else None
        return ScheduledChunk(
            token_ids=self.token_ids[start:end],
            start=start,
            block_table=self.blocks,
            sampling=self.sampling if is_last else None,
            num_output_tokens=self.num_output_tokens,
            history=self.history,
            prompt_logprobs=asked,
            next_token=None if is_last or asked is None else self.token_ids[end],
        )
