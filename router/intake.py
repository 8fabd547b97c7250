"""From what a client wrote to an internal `Request`, the same for every front end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from engine.config import ModelConfig
from engine.errors import TokenizerError
from engine.tokenizer import Tokenizer
from router.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    PromptTooLongError,
    SettingsError,
)
from router.requests import Request
from router.sampling import SamplingWish, check_token_ids, checked_stop, require, resolve
from router.slo import Slo

SHORT_CHARS = 256
"""A prompt of so many is tokenised at once: to hand it to a thread and back takes longer."""

TOKENIZE_LIMIT_S = 20.0
"""For which a request may be rendered and tokenised: a checkpoint's chat template is somebody's code."""

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
        at_once = len(text) <= SHORT_CHARS
        return await self._tokens(self.model.tokenizer.encode, text, "prompt", at_once=at_once)

    async def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Prompt tokens of a chat ({"role", "content"} each). Raises InvalidRequestError."""
        self._check_length([message["content"] for message in messages], "messages")
        return await self._tokens(self.model.tokenizer.encode_chat, messages, "messages")

    async def detokenize(self, token_ids: Sequence[int], param: str) -> str:
        """The text of tokens. Raises InvalidRequestError for ids beyond the vocabulary."""
        check_token_ids(token_ids, self.model.vocab_size, param)
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
        check_token_ids(prompt_token_ids, self.model.vocab_size, "prompt")
        unique = uuid.uuid4().hex
        limit_s = self._request_timeout_s if timeout_s is None else min(timeout_s, self._request_timeout_s)
        return Request(
            request_id=f"{request_id}-{unique[:12]}" if request_id else unique,
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=resolve(
                wish,
                max_tokens=self._max_tokens(len(prompt_token_ids), wish.max_tokens),
                prompt_tokens=len(prompt_token_ids),
                random_seed=self._random_seed(),
                vocab_size=self.model.vocab_size,
                eos_token_ids=self.model.eos_token_ids,
            ),
            stop=checked_stop(wish.stop),
            slo=slo,
            tenant=tenant,
            arrived_at=arrived_at,
            deadline=arrived_at + limit_s,
        )

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
        require(asked >= 1, "max_tokens", asked, "at least 1")
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

    async def _tokens(
        self, encode: Callable[[_Text], list[int]], value: _Text, param: str, *, at_once: bool = False
    ) -> list[int]:
        try:
            if at_once:
                return encode(value)
            async with asyncio.timeout(TOKENIZE_LIMIT_S):
                return await asyncio.get_running_loop().run_in_executor(self._executor, encode, value)
        except TokenizerError as error:
            raise InvalidRequestError(str(error), param) from error
        except TimeoutError:
            raise DeadlineExceededError(
                f"{param} could not be turned into tokens within {TOKENIZE_LIMIT_S:g} s"
            ) from None


def _token_starts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    detokenizer = tokenizer.detokenizer()
    starts = [0]
    for token_id in token_ids[:-1]:
        starts.append(starts[-1] + len(detokenizer.push(token_id)))
    return starts
