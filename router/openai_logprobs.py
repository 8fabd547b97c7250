"""Log-probabilities as OpenAI's two endpoints write them, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.sequence import TokenLogprobs
from engine.tokenizer import Tokenizer
from router.text_alignment import ScoredToken

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that stands before its answers. starts: where each token's text begins in the prompt's; empty
    unless log-probabilities are wanted."""

    text: str
    token_ids: Sequence[int]
    starts: Sequence[int]


def chat_logprobs(scored: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """`logprobs` of a chat choice, or of a piece of it."""
    return {"content": [_chat_token(one.logprobs, tokenizer) for one in scored], "refusal": None}


def completion_logprobs(
    scored: Sequence[ScoredToken], tokenizer: Tokenizer, first_offset: int = 0
) -> dict[str, list[Any]]:
    """`logprobs` of a completions choice, or of a piece of it.

    first_offset: where the answer's text begins in the choice's (after the prompt, if that is echoed).
    """
    return {
        "tokens": [tokenizer.token_text(one.logprobs.token_id) for one in scored],
        "token_logprobs": [_number(one.logprobs.logprob) for one in scored],
        "top_logprobs": [_top(one.logprobs, tokenizer) for one in scored],
        "text_offset": [first_offset + one.start for one in scored],
    }


def echoed_logprobs(
    echo: Echo, prompt: Sequence[TokenLogprobs], answer: Sequence[ScoredToken], tokenizer: Tokenizer
) -> dict[str, list[Any]]:
    """The same of an answer with its prompt before it. prompt: from its second token on."""
    first: dict[str, Any] = {
        "tokens": tokenizer.token_text(echo.token_ids[0]),
        "token_logprobs": None,
        "top_logprobs": None,
        "text_offset": 0,
    }
    scored = [ScoredToken(one, start) for one, start in zip(prompt, echo.starts[1:], strict=True)]
    echoed = completion_logprobs(scored, tokenizer)
    own = completion_logprobs(answer, tokenizer, len(echo.text))
    return {name: [value, *echoed[name], *own[name]] for name, value in first.items()}


def with_top(logprobs: Sequence[TokenLogprobs], count: int) -> list[TokenLogprobs]:
    """With so many of the most likely tokens: one call may ask for two numbers of the same prompt's."""
    return [replace(one, top=one.top[:count]) for one in logprobs]


def prompt_logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` of a choice: for each token of the prompt but the first, by token id."""
    return [None, *(_by_id(one, tokenizer) for one in logprobs)]


def _by_id(one: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(one.top, start=1)}
    ranked.setdefault(one.token_id, (one.logprob, one.rank))
    return {
        str(token_id): {
            "logprob": _number(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, (logprob, rank) in ranked.items()
    }


def _chat_token(one: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    top = [_named(token_id, logprob, tokenizer) for token_id, logprob in one.top]
    return {**_named(one.token_id, one.logprob, tokenizer), "top_logprobs": top}


def _named(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token_id)
    return {
        "token": spelled.decode(errors="replace"),
        "logprob": _number(logprob),
        "bytes": list(spelled),
    }


def _top(one: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """By text, the token that is there always among them; of tokens of one text the most likely counts."""
    top: dict[str, float] = {}
    for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
        top.setdefault(tokenizer.token_text(token_id), _number(logprob))
    return top


def _number(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST
