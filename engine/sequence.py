"""The values that a step is made of: sampling parameters, scheduled chunks, stop reasons. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class RequestKey:
    """One placement of one request: a retry has a new attempt, and what names an old attempt is ignored."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"


class StopReason(Enum):
    """Why an answer ended by itself (errors and cancellation are not stop reasons)."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """How the tokens of one answer are drawn and when they end.

    temperature: 0 is greedy. top_k: 0 means all. top_p: 1.0 means all.
    seed: with the token's position in the sequence the only source of randomness, so that a resumed or re-run
    request draws what it would have drawn.
    max_tokens, min_tokens: answer tokens, the first one (sampled by prefill) included.
    stop_token_ids: end the answer; never drawn before min_tokens.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]

    def stop_reason(self, token_id: int, num_output_tokens: int) -> StopReason | None:
        """Why the answer ends with `token_id`, its `num_output_tokens`-th (from 1); None if it goes on."""
        if token_id in self.stop_token_ids:
            return StopReason.STOP
        if num_output_tokens >= self.max_tokens:
            return StopReason.LENGTH
        return None


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """A run of tokens of one sequence in one step: a prefill chunk, or the last token of a decoding sequence.

    token_ids: the tokens whose KV this step computes, at positions start .. start + len - 1.
    block_table: KV blocks of the sequence in order of position, covering at least start + len tokens.
    sampling: how to draw the token that follows, or None when none is wanted (not the prompt's last chunk).
    num_output_tokens: answer tokens drawn before this step.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sampling: TokenSampling | None
    num_output_tokens: int
