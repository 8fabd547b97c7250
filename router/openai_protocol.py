"""OpenAI's request bodies, as far as they are served, and what they mean inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from router.errors import InvalidRequestError
from router.openai_fields import FieldWatch
from router.sampling import MAX_LOGPROBS, SamplingWish

MAX_COMPLETION_LOGPROBS = 5

_Int = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Model = TypeVar("_Model", bound=BaseModel)

# What `parse_prompts` and `_content` take, for whoever reads the OpenAPI document.
_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer"}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _TOKENS_SCHEMA,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKENS_SCHEMA]}},
    ]
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}


class _Body(BaseModel):
    # Unknown fields are kept, to be judged by FieldWatch.
    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(_Body):
    """`stream_options`."""

    include_usage: bool | None = None


class _Generate(_Body):
    """What both endpoints share."""

    model: str | None = None
    max_tokens: _Int | None = None
    max_completion_tokens: _Int | None = None
    min_tokens: _Int | None = None
    ignore_eos: bool | None = None
    temperature: _Number | None = None
    top_p: _Number | None = None
    top_k: _Int | None = None
    min_p: _Number | None = None
    presence_penalty: _Number | None = None
    frequency_penalty: _Number | None = None
    repetition_penalty: _Number | None = None
    logit_bias: dict[str, _Number] | None = None
    prompt_logprobs: _Int | None = None
    seed: _Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[_Int] | None = None
    n: _Int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def wish(self) -> SamplingWish:
        """The sampling that is asked for; clients that send both max_tokens mean the same by both."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingWish(
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=bool(self.ignore_eos),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_parse_logit_bias(self.logit_bias or {}),
            prompt_logprobs=self.prompt_logprobs,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(_Generate):
    """POST /v1/completions."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)] = None
    echo: bool | None = None
    logprobs: _Int | None = None

    def wish(self) -> SamplingWish:
        """As `_Generate.wish`; to echo the prompt with log-probabilities is to ask for the prompt's."""
        if self.logprobs is None:
            return super().wish()
        if not 0 <= self.logprobs <= MAX_COMPLETION_LOGPROBS:
            raise InvalidRequestError(
                f"logprobs must be between 0 and {MAX_COMPLETION_LOGPROBS}, got {self.logprobs}", "logprobs"
            )
        of_prompt = [
            count
            for count in (self.prompt_logprobs, self.logprobs if self.echo else None)
            if count is not None
        ]
        return replace(super().wish(), logprobs=self.logprobs, prompt_logprobs=max(of_prompt, default=None))


class ChatMessage(_Body):
    """One message; content is text, or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)] = None


class ChatBody(_Generate):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: _Int | None = None

    def wish(self) -> SamplingWish:
        """As `_Generate.wish`, with `top_logprobs` as the number of log-probabilities."""
        count = self.top_logprobs or 0
        if not 0 <= count <= MAX_LOGPROBS:
            raise InvalidRequestError(
                f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {count}", "top_logprobs"
            )
        if not self.logprobs:
            if count:
                raise InvalidRequestError("top_logprobs needs logprobs to be true", "top_logprobs")
            return super().wish()
        return replace(super().wish(), logprobs=count)


class TokenizeBody(_Body):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None


class DetokenizeBody(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[_Int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a completions call: text, or token ids."""

    text: str | None
    token_ids: tuple[int, ...] | None


def parse(kind: type[_Model], data: Any, watch: FieldWatch | None = None) -> _Model:
    """The request in a JSON value. Raises InvalidRequestError naming the field at fault."""
    if not isinstance(data, dict):
        raise InvalidRequestError(f"the body must be a JSON object, not {_json_type(data)}")
    try:
        body = kind.model_validate(data)
    except pydantic.ValidationError as error:
        # Where a field may be of several types, the deepest complaint is about the one that was meant.
        first = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
        # Members of a union are part of pydantic's location, not of the client's document.
        location = [part for part in first["loc"] if isinstance(part, int) or not _is_type_name(part)]
        param = _path(location)
        raise InvalidRequestError(f"{param}: {first['msg']}", param) from error
    if watch is not None:
        watch.check(body.model_extra or {})
    if isinstance(body, _Generate):
        if body.stream_options is not None and not body.stream:
            raise InvalidRequestError("stream_options is only allowed when stream is true", "stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise InvalidRequestError(
                "prompt_logprobs is not possible when stream is true", "prompt_logprobs"
            )
    return body


def parse_prompts(value: Any) -> list[Prompt]:
    """`prompt`: a text, token ids, or a list of either. Raises InvalidRequestError."""
    if isinstance(value, str):
        return [Prompt(value, None)]
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"prompt must be a text, a list of token ids, or a list of either, not {_json_type(value)}",
            "prompt",
        )
    if not value:
        raise InvalidRequestError("prompt is an empty list; give at least one prompt", "prompt")
    if all(_is_int(entry) for entry in value):
        return [Prompt(None, tuple(value))]
    return [_one_prompt(entry, f"prompt[{index}]") for index, entry in enumerate(value)]


def parse_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages as chat templates take them. Raises InvalidRequestError, also for what is not text."""
    if not messages:
        raise InvalidRequestError("messages is empty; give at least one message", "messages")
    parsed = []
    for index, message in enumerate(messages):
        extra = message.model_extra or {}
        for name in ("tool_calls", "function_call", "audio"):
            if extra.get(name):
                param = f"messages[{index}].{name}"
                raise InvalidRequestError(f"{param} is not supported by this server", param)
        # "developer" is what newer clients call "system"; templates know the older name.
        role = "system" if message.role == "developer" else message.role
        parsed.append({"role": role, "content": _content(message.content, f"messages[{index}].content")})
    return parsed


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(
            f"{where} must be a text or a list of text parts, not {_json_type(content)}", where
        )
    texts = []
    for index, part in enumerate(content):
        here = f"{where}[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InvalidRequestError(f"{here} must be an object with a type", here)
        if part["type"] != "text":
            raise InvalidRequestError(
                f"{here} is of type {part['type'][:40]!r}; this server takes only text", f"{here}.type"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"{here}.text must be a text, not {_json_type(part.get('text'))}", f"{here}.text"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _one_prompt(entry: Any, where: str) -> Prompt:
    if isinstance(entry, str):
        return Prompt(entry, None)
    if isinstance(entry, list) and all(_is_int(token) for token in entry):
        return Prompt(None, tuple(entry))
    raise InvalidRequestError(
        f"{where} must be a text or a list of token ids, not {_json_type(entry)}", where
    )


def _parse_logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdecimal() and len(key) < 20):
            raise InvalidRequestError(
                f"logit_bias has the key {key[:40]!r}; keys are token ids", "logit_bias"
            )
    return tuple({int(key): value for key, value in bias.items()}.items())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_type_name(part: str) -> bool:
    return part in ("str", "int", "float", "bool") or part.startswith(("list[", "constrained-"))


def _path(location: Sequence[int | str]) -> str:
    """("messages", 0, "role") as messages[0].role."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:200]


def _json_type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")
