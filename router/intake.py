"""From what a client wrote to an internal `Request`, the same for every front end."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from engine.config import ModelConfig
from engine.errors import TokenizerError
from engine.sequence import TokenSampling
from engine.tokenizer import Tokenizer
from router.errors import InvalidRequestError, ModelNotFoundError, PromptTooLongError, SettingsError
from router.requests import Request
from router.slo import Slo

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

_Text = TypeVar("_Text")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model that is served: its name to clients, its limits, its tokenizer."""

    name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer

    @classmethod
    def load(cls, name: str, checkpoint: Path, max_model_len: int | None) -> ServedModel:
        """Reads config and tokenizer, no weights. Raises engine.errors.EngineError, SettingsError."""
        config = ModelConfig.from_pretrained(checkpoint)
        longest = config.max_position_embeddings
        if max_model_len is not None and max_model_len > longest:
            raise SettingsError(
                f"max_model_len is {max_model_len}, but {checkpoint} was made for {longest} tokens"
            )
        return cls(
            name=name,
            max_model_len=longest if max_model_len is None else max_model_len,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            tokenizer=Tokenizer.from_pretrained(checkpoint),
        )


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


class Intake:
    """Validates, tokenises (in `executor`, off the event loop) and resolves defaults."""

    def __init__(
        self,
        model: ServedModel,
        executor: Executor,
        clock: Callable[[], float],
        random_seed: Callable[[], int],
        request_timeout_s: float,
        largest_pool_tokens: Callable[[], int | None],
    ) -> None:
        """random_seed: where none is given. largest_pool_tokens: what the largest decode worker holds."""
        self.model = model
        self._executor = executor
        self._clock = clock
        self._random_seed = random_seed
        self._request_timeout_s = request_timeout_s
        self._largest_pool_tokens = largest_pool_tokens

    def now(self) -> float:
        """For stamping an arrival, before anything else is done with a request."""
        return self._clock()

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError unless `name` is the served model; nothing given means the served one."""
        if name and name != self.model.name:
            raise ModelNotFoundError(name, self.model.name)

    async def tokenize_prompt(self, text: str) -> list[int]:
        """Tokens of a prompt to be answered. Raises InvalidRequestError, also where there is no text."""
        if not text:  # the tokenizer may add a token of its own, so the number of tokens does not tell
            raise InvalidRequestError("the prompt is empty; give at least one character", "prompt")
        self._check_length([text], "prompt")
        return await self.tokenize(text)

    async def tokenize(self, text: str) -> list[int]:
        """Tokens of a text. Raises InvalidRequestError."""
        return await self._in_thread(self.model.tokenizer.encode, text, "prompt")

    async def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Prompt tokens of a chat ({"role", "content"} each). Raises InvalidRequestError."""
        self._check_length([message["content"] for message in messages], "messages")
        return await self._in_thread(self.model.tokenizer.encode_chat, messages, "messages")

    async def detokenize(self, token_ids: Sequence[int], param: str) -> str:
        """The text of tokens. Raises InvalidRequestError for ids beyond the vocabulary."""
        self._check_token_ids(token_ids, param)
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, self.model.tokenizer.decode, token_ids
        )

    async def token_starts(self, token_ids: Sequence[int]) -> list[int]:
        """The character at which each token's text begins in the text of them all."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, _token_starts, self.model.tokenizer, token_ids
        )

    def request(
        self,
        prompt_token_ids: Sequence[int],
        wish: SamplingWish,
        slo: Slo,
        *,
        request_id: str,
        tenant: str,
        arrived_at: float,
        timeout_s: float | None = None,
    ) -> Request:
        """The request to submit. Raises InvalidRequestError naming what is wrong.

        request_id: the client's, or empty; what it becomes is unique, so that a client that uses one twice
        cannot have its second request mixed up with late messages about the first.
        timeout_s: the caller's own deadline, from arrival; the router's limit holds beside it.
        """
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty; give at least one token", "prompt")
        self._check_token_ids(prompt_token_ids, "prompt")
        unique = uuid.uuid4().hex
        limit_s = self._request_timeout_s if timeout_s is None else min(timeout_s, self._request_timeout_s)
        return Request(
            request_id=f"{request_id}-{unique[:12]}" if request_id else unique,
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=self._sampling(len(prompt_token_ids), wish),
            stop=_checked_stop(wish.stop),
            slo=slo,
            tenant=tenant,
            arrived_at=arrived_at,
            deadline=arrived_at + limit_s,
        )

    def _sampling(self, prompt_tokens: int, wish: SamplingWish) -> TokenSampling:
        max_tokens = self._max_tokens(prompt_tokens, wish.max_tokens)
        min_tokens = 0 if wish.min_tokens is None else wish.min_tokens
        _require(
            0 <= min_tokens <= max_tokens,
            "min_tokens",
            min_tokens,
            f"between 0 and max_tokens ({max_tokens})",
        )
        temperature = DEFAULT_TEMPERATURE if wish.temperature is None else wish.temperature
        in_range = math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE
        _require(in_range, "temperature", temperature, f"between 0 and {MAX_TEMPERATURE:g}")
        top_p = 1.0 if wish.top_p is None else wish.top_p
        _require(0 < top_p <= 1, "top_p", top_p, "greater than 0 and at most 1")
        top_k = 0 if wish.top_k is None or wish.top_k == -1 else wish.top_k
        _require(0 <= top_k < 2**32, "top_k", top_k, "-1, 0 (all) or a positive number")
        _require(
            len(wish.stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", len(wish.stop_token_ids),
            f"a list of at most {MAX_STOP_TOKEN_IDS}",
        )  # fmt: skip
        self._check_token_ids(wish.stop_token_ids, "stop_token_ids")
        self._check_logprobs(prompt_tokens, wish)
        return TokenSampling(
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_k=top_k,
            top_p=top_p,
            seed=(self._random_seed() if wish.seed is None else wish.seed) % 2**64,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=frozenset(
                (() if wish.ignore_eos else self.model.eos_token_ids) + wish.stop_token_ids
            ),
            min_p=_between(wish.min_p, "min_p", 0, 1, default=0.0),
            presence_penalty=_between(wish.presence_penalty, "presence_penalty", -2, 2, default=0.0),
            frequency_penalty=_between(wish.frequency_penalty, "frequency_penalty", -2, 2, default=0.0),
            repetition_penalty=_between(
                wish.repetition_penalty, "repetition_penalty", 0.01, 100, default=1.0
            ),
            logit_bias=self._logit_bias(wish.logit_bias),
            logprobs=wish.logprobs,
            prompt_logprobs=wish.prompt_logprobs,
        )

    def _logit_bias(self, bias: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        _require(
            len(bias) <= MAX_LOGIT_BIASES,
            "logit_bias",
            len(bias),
            f"a map of at most {MAX_LOGIT_BIASES} tokens",
        )
        self._check_token_ids([token_id for token_id, _ in bias], "logit_bias")
        return tuple(
            (token_id, _between(value, "logit_bias", -100, 100, default=0.0)) for token_id, value in bias
        )

    def _check_logprobs(self, prompt_tokens: int, wish: SamplingWish) -> None:
        for name, value in (("logprobs", wish.logprobs), ("prompt_logprobs", wish.prompt_logprobs)):
            _require(
                value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"between 0 and {MAX_LOGPROBS}"
            )
        if wish.prompt_logprobs is not None:
            count = prompt_tokens * (1 + wish.prompt_logprobs)
            _require(
                count <= MAX_PROMPT_LOGPROBS, "prompt_logprobs", wish.prompt_logprobs,
                f"small enough for this prompt (its {prompt_tokens} tokens would have {count} "
                f"log-probabilities; at most {MAX_PROMPT_LOGPROBS} are reported)",
            )  # fmt: skip

    def _max_tokens(self, prompt_tokens: int, asked: int | None) -> int:
        longest = self.model.max_model_len
        if prompt_tokens >= longest:
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens} tokens, but the model takes at most {longest} tokens of "
                "prompt and answer; shorten the prompt",
                "prompt",
            )
        if asked is None:
            room = min(longest, self._largest_pool_tokens() or longest)
            return max(1, room - prompt_tokens)
        _require(asked >= 1, "max_tokens", asked, "at least 1")
        if prompt_tokens + asked > longest:
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens} tokens and max_tokens is {asked}, but the model takes "
                f"at most {longest} tokens of both; ask for at most {longest - prompt_tokens}",
                "max_tokens",
            )
        return asked

    def _check_length(self, texts: Sequence[str], param: str) -> None:
        """A text that cannot fit, however it is cut, is refused without the work of tokenising it."""
        longest = self.model.tokenizer.longest_token_bytes
        num_chars = sum(map(len, texts))  # each is a byte at least
        if longest is not None and num_chars > longest * self.model.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {num_chars} characters, which are more than the {self.model.max_model_len} "
                "tokens of prompt and answer that the model takes; shorten the prompt",
                param,
            )

    def _check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.model.vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < self.model.vocab_size)
            raise InvalidRequestError(
                f"{param} holds token id {str(wrong)[:40]}; "
                f"this model's ids are 0 to {self.model.vocab_size - 1}",
                param,
            )

    async def _in_thread(self, encode: Callable[[_Text], list[int]], value: _Text, param: str) -> list[int]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, encode, value)
        except TokenizerError as error:
            raise InvalidRequestError(str(error), param) from error


def _checked_stop(stop: tuple[str, ...]) -> tuple[str, ...]:
    _require(
        len(stop) <= MAX_STOP_STRINGS, "stop", len(stop), f"a list of at most {MAX_STOP_STRINGS} strings"
    )
    for text in stop:
        _require(
            0 < len(text) <= MAX_STOP_CHARS, "stop", text[:40], f"strings of 1 to {MAX_STOP_CHARS} characters"
        )
    return stop


def _token_starts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    detokenizer = tokenizer.detokenizer()
    starts = [0]
    for token_id in token_ids[:-1]:
        starts.append(starts[-1] + len(detokenizer.push(token_id)))
    return starts


def _between(value: float | None, param: str, lowest: float, highest: float, *, default: float) -> float:
    """The value, or what stands for one that is not given. Raises InvalidRequestError."""
    if value is None:
        return default
    in_range = math.isfinite(value) and lowest <= value <= highest
    _require(in_range, param, value, f"between {lowest:g} and {highest:g}")
    return float(value)


def _require(holds: bool, param: str, value: object, wanted: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{param} must be {wanted}, got {repr(value)[:80]}", param)
