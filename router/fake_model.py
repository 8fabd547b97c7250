"""What fake workers answer: a function of the prompt, so that a test knows what a client must get."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from prelay.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class FakeModel:
    """What a fleet pretends to serve. Answers consist of token ids low .. high - 1.

    eos_token_id, answer_tokens: the answer to every prompt ends with EOS as its `answer_tokens`-th token, if
    EOS is among the request's stop tokens and min_tokens and max_tokens allow it.
    caches: workers say that they had all of a prompt but its last token in their cache.
    """

    low: int = 32
    high: int = 127
    eos_token_id: int = 0
    answer_tokens: int | None = None
    fingerprint: str = "fake"
    max_model_len: int = 1024
    vocab_size: int = 0
    caches: bool = False


def fake_answer(
    model: FakeModel, prompt: Sequence[int], sampling: worker_pb2.TokenSampling
) -> tuple[list[int], worker_pb2.StopReason]:
    """The whole answer to a prompt and why it ends."""
    seed = zlib.crc32(b"".join(token.to_bytes(4, "little") for token in prompt))
    answer: list[int] = []
    while True:
        num_tokens = len(answer) + 1
        at_end = model.answer_tokens is not None and num_tokens >= max(
            model.answer_tokens, sampling.min_tokens
        )
        if at_end and model.eos_token_id in sampling.stop_token_ids:
            return [*answer, model.eos_token_id], worker_pb2.STOP_REASON_STOP
        draw = zlib.crc32(num_tokens.to_bytes(4, "little"), seed)
        answer.append(model.low + draw % (model.high - model.low))
        if len(answer) >= sampling.max_tokens:
            return answer, worker_pb2.STOP_REASON_LENGTH


def fake_logprobs(token_id: int, index: int, num_top: int) -> worker_pb2.TokenLogprobs:
    """What fake workers say of a token of a prompt or an answer: less likely with every index, and second
    wherever the index is odd."""
    rank = 1 + index % 2
    top_ids = [token_id if at == rank else (token_id + at) % 128 for at in range(1, num_top + 1)]
    logprobs = [-(at + index / 8) for at in range(1, max(num_top, rank) + 1)]
    return worker_pb2.TokenLogprobs(
        token_id=token_id,
        logprob=logprobs[rank - 1],
        rank=rank,
        top_ids=top_ids,
        top_logprobs=logprobs[:num_top],
    )


@dataclass(frozen=True, slots=True)
class FakeJob:
    """A Reserve or a Prefill command as the fake model understands it."""

    prompt: tuple[int, ...]
    answered: tuple[int, ...]
    answer: tuple[int, ...]
    reason: worker_pb2.StopReason

    @classmethod
    def of(cls, model: FakeModel, command: worker_pb2.Reserve | worker_pb2.Prefill) -> FakeJob | None:
        """None if the tokens of the answer that the command brings are not those that this model gives: a
        router that goes on with an answer must have kept every one of them."""
        num_prompt = len(command.token_ids) - command.num_output_tokens
        prompt, answered = tuple(command.token_ids[:num_prompt]), tuple(command.token_ids[num_prompt:])
        answer, reason = fake_answer(model, prompt, command.sampling)
        if tuple(answer[: len(answered)]) != answered or len(answered) >= len(answer):
            return None
        return cls(prompt, answered, tuple(answer), reason)

    @property
    def ends_at_once(self) -> bool:
        """Whether the token that is drawn next is the last one."""
        return len(self.answer) == len(self.answered) + 1


def not_of_role(role: worker_pb2.Role, command: worker_pb2.Reserve | worker_pb2.Prefill) -> str | None:
    """Why a worker of that role does not take the command; None if it does."""
    reads = isinstance(command, worker_pb2.Prefill)
    if reads != (role == worker_pb2.ROLE_PREFILL):
        return "not what a worker of this role does"
    if isinstance(command, worker_pb2.Reserve):
        alone = not command.HasField("prefill")
        if alone and role != worker_pb2.ROLE_MIXED:
            return "a decode worker reads no prompts: name a prefill worker"
    return None
