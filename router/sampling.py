"""How a client wants its answer drawn, the ranges that hold, and what stands for what is not given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.sequence import TokenSampling
from router.errors import InvalidRequestError

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 65_536
"""Log-probabilities of one prompt in one answer: they come in one message."""
MAX_TEMPERATURE = 100.0
DEFAULT_TEMPERATURE = 1.0
GREEDY_BELOW = 1e-5
"""Temperatures below this are 0 (greedy): logits divided by them would overflow."""


@dataclass(frozen=True, slots=True)
class SamplingWish:
    """Sampling as a client may give it; None is "not given". top_k: 0 and -1 both mean all."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def for_choice(self, index: int) -> SamplingWish:
        """The same wish for the `index`-th of several answers to one prompt."""
        return self if self.seed is None else replace(self, seed=self.seed + index)


def resolve(
    wish: SamplingWish,
    *,
    max_tokens: int,
    prompt_tokens: int,
    random_seed: int,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
) -> TokenSampling:
    """What the workers are told. Raises InvalidRequestError naming the field that is wrong.

    max_tokens: settled already. random_seed: where the client gives none.
    """
    min_tokens = 0 if wish.min_tokens is None else wish.min_tokens
    require(
        0 <= min_tokens <= max_tokens, "min_tokens", min_tokens, f"between 0 and max_tokens ({max_tokens})"
    )
    temperature = _between(wish.temperature, "temperature", 0, MAX_TEMPERATURE, default=DEFAULT_TEMPERATURE)
    top_p = 1.0 if wish.top_p is None else wish.top_p
    require(0 < top_p <= 1, "top_p", top_p, "greater than 0 and at most 1")
    top_k = 0 if wish.top_k is None or wish.top_k == -1 else wish.top_k
    require(0 <= top_k < 2**32, "top_k", top_k, "-1, 0 (all) or a positive number")
    _check_stop_token_ids(wish.stop_token_ids, vocab_size)
    _check_logprobs(wish, prompt_tokens)
    return TokenSampling(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=(random_seed if wish.seed is None else wish.seed) % 2**64,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=frozenset((() if wish.ignore_eos else eos_token_ids) + wish.stop_token_ids),
        min_p=_between(wish.min_p, "min_p", 0, 1, default=0.0),
        presence_penalty=_between(wish.presence_penalty, "presence_penalty", -2, 2, default=0.0),
        frequency_penalty=_between(wish.frequency_penalty, "frequency_penalty", -2, 2, default=0.0),
        repetition_penalty=_between(wish.repetition_penalty, "repetition_penalty", 0.01, 100, default=1.0),
        logit_bias=_checked_bias(wish.logit_bias, vocab_size),
        logprobs=wish.logprobs,
        prompt_logprobs=wish.prompt_logprobs,
    )


def checked_stop(stop: tuple[str, ...]) -> tuple[str, ...]:
    """The stop strings as they are. Raises InvalidRequestError."""
    require(len(stop) <= MAX_STOP_STRINGS, "stop", len(stop), f"a list of at most {MAX_STOP_STRINGS} strings")
    for text in stop:
        require(
            0 < len(text) <= MAX_STOP_CHARS, "stop", text[:40], f"strings of 1 to {MAX_STOP_CHARS} characters"
        )
    return stop


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequestError for ids that the model does not have."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise InvalidRequestError(
            f"{param} holds token id {str(wrong)[:40]}; this model's ids are 0 to {vocab_size - 1}", param
        )


def require(holds: bool, param: str, value: object, wanted: str) -> None:
    """Raises InvalidRequestError that says what `param` must be, unless it is."""
    if not holds:
        raise InvalidRequestError(f"{param} must be {wanted}, got {repr(value)[:80]}", param)


def _between(value: float | None, param: str, lowest: float, highest: float, *, default: float) -> float:
    if value is None:
        return default
    in_range = math.isfinite(value) and lowest <= value <= highest
    require(in_range, param, value, f"between {lowest:g} and {highest:g}")
    return float(value)


def _check_stop_token_ids(token_ids: tuple[int, ...], vocab_size: int) -> None:
    wanted = f"a list of at most {MAX_STOP_TOKEN_IDS}"
    require(len(token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", len(token_ids), wanted)
    check_token_ids(token_ids, vocab_size, "stop_token_ids")


def _checked_bias(bias: tuple[tuple[int, float], ...], vocab_size: int) -> tuple[tuple[int, float], ...]:
    wanted = f"a map of at most {MAX_LOGIT_BIASES} tokens"
    require(len(bias) <= MAX_LOGIT_BIASES, "logit_bias", len(bias), wanted)
    check_token_ids([token_id for token_id, _ in bias], vocab_size, "logit_bias")
    return tuple(
        (token_id, _between(value, "logit_bias", -100, 100, default=0.0)) for token_id, value in bias
    )


def _check_logprobs(wish: SamplingWish, prompt_tokens: int) -> None:
    for name, value in (("logprobs", wish.logprobs), ("prompt_logprobs", wish.prompt_logprobs)):
        require(value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"between 0 and {MAX_LOGPROBS}")
    if wish.prompt_logprobs is not None:
        count = prompt_tokens * (1 + wish.prompt_logprobs)
        require(
            count <= MAX_PROMPT_LOGPROBS, "prompt_logprobs", wish.prompt_logprobs,
            f"small enough for this prompt (its {prompt_tokens} tokens would have {count} "
            f"log-probabilities; at most {MAX_PROMPT_LOGPROBS} are reported)",
        )  # fmt: skip
