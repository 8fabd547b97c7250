"""OpenAI's response bodies and stream chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from router.requests import Details, Finish


@dataclass(frozen=True, slots=True)
class Part:
    """A choice, or a piece of one. logprobs, prompt_logprobs: as the endpoint writes them; None if there are
    none."""

    text: str
    finish: Finish | None
    logprobs: dict[str, Any] | None
    prompt_logprobs: list[Any] | None


@dataclass(frozen=True, slots=True)
class Reply:
    """What all parts of one response share. created: Unix time, seconds. frames: of `text_event`, by
    choice."""

    response_id: str
    model: str
    created: int
    chat: bool
    frames: dict[int, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def whole(self, parts: Sequence[Part], usage: dict[str, Any], details: bool) -> dict[str, Any]:
        """The body of a response that is not streamed; one finished part for each choice."""
        choices = []
        for index, part in enumerate(parts):
            assert part.finish is not None
            text = part.text
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            reason = part.finish.reason.value
            choice: dict[str, Any] = {
                "index": index, **content, "logprobs": part.logprobs, "finish_reason": reason,
            }  # fmt: skip
            if part.prompt_logprobs is not None and not self.chat:
                choice["prompt_logprobs"] = part.prompt_logprobs
            if details and len(parts) > 1:
                choice["prelay"] = details_object(part.finish.details)
            choices.append(choice)
        body = self._envelope("chat.completion" if self.chat else "text_completion", choices)
        body["usage"] = usage
        if parts[0].prompt_logprobs is not None and self.chat:  # the choices of a chat have one prompt
            body["prompt_logprobs"] = parts[0].prompt_logprobs
        if details and len(parts) == 1 and parts[0].finish is not None:
            body["prelay"] = details_object(parts[0].finish.details)
        return body

    def role_chunk(self, index: int) -> dict[str, Any]:
        """The first chunk of a streamed chat choice."""
        return self._chunk([self._delta(index, {"role": "assistant", "content": ""}, None, None)])

    def part_chunk(self, index: int, part: Part, details: bool) -> dict[str, Any]:
        """A piece of one choice; the last one carries the finish reason."""
        reason = None if part.finish is None else part.finish.reason.value
        if self.chat:
            choice = self._delta(index, {"content": part.text} if part.text else {}, part.logprobs, reason)
        else:
            choice = {"index": index, "text": part.text, "logprobs": part.logprobs, "finish_reason": reason}
        chunk = self._chunk([choice])
        if details and part.finish is not None:
            chunk["prelay"] = details_object(part.finish.details)
        return chunk

    def text_event(self, index: int, text: str) -> bytes:
        """The same as an event, of a piece that is nothing but text: all but the first and the last are."""
        before, after = self._around_text(index)
        return f"{before}{encode_basestring(text)}{after}".encode()

    def _around_text(self, index: int) -> tuple[str, str]:
        """What stands before and after the text of such an event."""
        known = self.frames.get(index)
        if known is None:
            mark = "\N{OBJECT REPLACEMENT CHARACTER}"  # in no id, and in no model's name
            whole = event(self.part_chunk(index, Part(mark, None, None, None), False)).decode()
            before, _, after = whole.rpartition(f'"{mark}"')
            known = self.frames[index] = (before, after)
        return known

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk before [DONE] of a stream that asked for usage."""
        return {**self._chunk([]), "usage": usage}

    def _delta(
        self, index: int, delta: dict[str, str], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", choices)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def event(data: dict[str, Any]) -> bytes:
    """A chunk, as it is sent."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object. cached_tokens: of the prompt tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def details_object(details: Details) -> dict[str, Any]:
    """How the request was served, for clients that send `x-prelay-details: 1`. Times in seconds."""
    return {
        "request_id": details.request_id,
        "prefill_worker": details.prefill_worker,
        "decode_worker": details.decode_worker,
        "attempt": details.attempt,
        "kv_bytes": details.kv_bytes,
        "ttft_s": details.ttft_s,
        "tpot_s": details.tpot_s,
        "duration_s": details.duration_s,
        "stages": {stage.value: seconds for stage, seconds in details.stages.items()},
        "outcome": details.outcome.value,
        "slo_class": details.slo_class,
        "ttft_limit_s": details.limits.ttft_s,
        "tpot_limit_s": details.limits.tpot_s,
        "placement": details.placement,
    }
