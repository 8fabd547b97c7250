"""OpenAI's response bodies and stream chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router.requests import Details, Finish


@dataclass(frozen=True, slots=True)
class Reply:
    """What all parts of one response share. created: Unix time, seconds."""

    response_id: str
    model: str
    created: int
    chat: bool

    def whole(
        self, texts: Sequence[str], finishes: Sequence[Finish], usage: dict[str, int], details: bool
    ) -> dict[str, Any]:
        """The body of a response that is not streamed; one text and finish for each choice."""
        choices = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append(
                {"index": index, **content, "logprobs": None, "finish_reason": finish.reason.value}
            )
            if details and len(finishes) > 1:
                choices[-1]["prelay"] = details_object(finish.details)
        body = self._envelope("chat.completion" if self.chat else "text_completion", choices)
        body["usage"] = usage
        if details and len(finishes) == 1:
            body["prelay"] = details_object(finishes[0].details)
        return body

    def role_chunk(self, index: int) -> dict[str, Any]:
        """The first chunk of a streamed chat choice."""
        return self._chunk([self._delta(index, {"role": "assistant", "content": ""}, None)])

    def text_chunk(self, index: int, text: str, finish: Finish | None, details: bool) -> dict[str, Any]:
        """A piece of one choice; the last one carries the finish reason."""
        reason = None if finish is None else finish.reason.value
        if self.chat:
            choice = self._delta(index, {"content": text} if text else {}, reason)
        else:
            choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        chunk = self._chunk([choice])
        if details and finish is not None:
            chunk["prelay"] = details_object(finish.details)
        return chunk

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk before [DONE] of a stream that asked for usage."""
        return {**self._chunk([]), "usage": usage}

    def _delta(self, index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

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


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
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
    }
