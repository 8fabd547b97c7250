"""What the engine thread says to routers and hears from them: numbered commands in, one batch a turn out.

Routers number their commands; a snapshot tells a router up to which of them the figures take into account.
The engine thread says so itself, together with the figures, so a command that still waits in its inbox is
never counted as seen.

Several routers may be attached at once and may use the same request ids: inside a worker, and on the links
between workers, a request is therefore named `router_id/request_id`. A router_id names one life of one
router.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prelay.v1 import worker_pb2

from engine.block_changes import NO_CHANGES, BlockChanges
from engine.latency import StepShape
from engine.sequence import RequestKey, StopReason, TokenLogprobs, TokenSampling
from engine.step_log import Step
from engine.urgency import Urgency

_log = logging.getLogger(__name__)

_STOP_REASONS = {
    None: worker_pb2.STOP_REASON_UNSPECIFIED,
    StopReason.STOP: worker_pb2.STOP_REASON_STOP,
    StopReason.LENGTH: worker_pb2.STOP_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Owner:
    """The router stream that a request came from. stream: counted by this worker, never used twice."""

    stream: int
    router_id: str

    def key(self, request_id: str, attempt: int) -> RequestKey:
        """The request's name inside the worker and on links."""
        return RequestKey(f"{self.router_id}/{request_id}", attempt)

    def request_id(self, key: RequestKey) -> str:
        """The name by which the router knows the request."""
        return key.request_id[len(self.router_id) + 1 :]


@dataclass(frozen=True, slots=True)
class Command:
    """One numbered message of a router (not its hello).

    arrived_s: when it came, by the worker's clock; the engine may get to it much later.
    """

    owner: Owner
    message: worker_pb2.RouterMessage
    arrived_s: float


@dataclass(frozen=True, slots=True)
class RouterGone:
    """The stream ended: what came over it is cancelled."""

    owner: Owner


RouterEvent: TypeAlias = Command | RouterGone


@dataclass(frozen=True, slots=True)
class Load:
    """The figures of a snapshot.

    queue_requests: accepted but not in the batch. queue_tokens: prompt tokens not yet computed.
    free_blocks: what a new request can have, cached_blocks of them held by the prefix cache.
    decoding_requests: of running_requests, those that decode; decode_context: their tokens together.
    least_tpot_s: the tightest of what they can still afford for each token to come; 0 if none has a limit.
    ahead_s: how far that one is ahead of its limit, which is spent once.
    """

    running_requests: int
    queue_requests: int
    queue_tokens: int
    free_blocks: int
    owned_blocks: int
    leased_blocks: int
    cached_blocks: int = 0
    decoding_requests: int = 0
    decode_context: int = 0
    least_tpot_s: float = 0.0
    ahead_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RouterBatch:
    """What one turn of the engine has to say to its routers; all of it took effect together.

    messages, commands_seen: by stream. push: tell the load now instead of on the next beat. steps: that were
    run, in order. blocks: what has changed in the prefix cache.
    """

    messages: dict[int, list[worker_pb2.WorkerMessage]]
    commands_seen: dict[int, int]
    load: Load
    push: bool
    steps: Sequence[Step] = ()
    blocks: BlockChanges = NO_CHANGES


class Outbox:
    """Collects, in the engine thread, what a turn has to say to the routers: the tokens of all sequences of
    a router in one message, after what else there is for it."""

    def __init__(self) -> None:
        self._messages: dict[int, list[worker_pb2.WorkerMessage]] = {}
        self._tokens: dict[int, worker_pb2.StepTokens] = {}
        self._seen: dict[int, int] = {}
        self._push = False
        self._steps: list[Step] = []

    def seen(self, command: Command) -> None:
        self._seen[command.owner.stream] = command.message.seq

    def stepped(self, shape: StepShape, seconds: float) -> None:
        """A step was run: routers learn from it how long the next ones will take."""
        self._steps.append(Step(shape, seconds))

    def reserved(self, owner: Owner, key: RequestKey, cached_tokens: int) -> None:
        message = worker_pb2.Reserved(
            request_id=owner.request_id(key), attempt=key.attempt, cached_tokens=cached_tokens
        )
        self._add(owner, worker_pb2.WorkerMessage(reserved=message))

    def pair(self, owner: Owner, state: worker_pb2.PairState) -> None:
        self._add(owner, worker_pb2.WorkerMessage(pair=state))

    def failed(self, owner: Owner, key: RequestKey, reason: worker_pb2.FailureReason, message: str) -> None:
        request_id = owner.request_id(key)
        _log.info(
            "event=request_failed request=%s attempt=%d reason=%s why=%r",
            request_id,
            key.attempt,
            worker_pb2.FailureReason.Name(reason),
            message,
        )
        failed = worker_pb2.Failed(request_id=request_id, attempt=key.attempt, reason=reason, message=message)
        self._add(owner, worker_pb2.WorkerMessage(failed=failed))
        self._push = True

    def token(
        self,
        owner: Owner,
        key: RequestKey,
        index: int,
        token_id: int,
        stop_reason: StopReason | None,
        times: worker_pb2.StageTimes | None,
        *,
        logprobs: TokenLogprobs | None = None,
        prompt_logprobs: Sequence[TokenLogprobs] = (),
        cached_tokens: int = 0,
    ) -> None:
        """The token with this index in the answer. prompt_logprobs, cached_tokens: of the prefill worker."""
        step = self._tokens.setdefault(owner.stream, worker_pb2.StepTokens())
        step.sequences.append(
            worker_pb2.SequenceTokens(
                request_id=owner.request_id(key),
                attempt=key.attempt,
                first_index=index,
                token_ids=[token_id],
                stop_reason=_STOP_REASONS[stop_reason],
                times=times,
                logprobs=[] if logprobs is None else [_logprobs_message(logprobs)],
                prompt_logprobs=map(_logprobs_message, prompt_logprobs),
                cached_tokens=cached_tokens,
            )
        )
        self._push = self._push or stop_reason is not None

    def take(self, load: Load, blocks: BlockChanges = NO_CHANGES) -> RouterBatch:
        """Everything since the last call, and the load after it. blocks: PrefixCache.take_changes()."""
        for stream, step in self._tokens.items():
            self._messages.setdefault(stream, []).append(worker_pb2.WorkerMessage(step=step))
        batch = RouterBatch(self._messages, self._seen, load, self._push, self._steps, blocks)
        self._messages, self._tokens, self._seen, self._push, self._steps = {}, {}, {}, False, []
        return batch

    def _add(self, owner: Owner, message: worker_pb2.WorkerMessage) -> None:
        self._messages.setdefault(owner.stream, []).append(message)


def sampling_of(message: worker_pb2.TokenSampling) -> TokenSampling:
    """As the engine takes it."""
    return TokenSampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        # 0, which would divide by nothing, is what a message without the field says.
        repetition_penalty=message.repetition_penalty or 1.0,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def urgency_of(message: worker_pb2.Prefill | worker_pb2.Reserve, arrived_s: float) -> Urgency | None:
    """As schedulers take it; None if the router does not tell. arrived_s: when the message came."""
    if not message.HasField("urgency"):
        return None
    told = message.urgency
    return Urgency(
        arrived_s + told.ttft_left_s if told.HasField("ttft_left_s") else None,
        told.tpot_s if told.HasField("tpot_s") else math.inf,
        told.priority,
    )


def _logprobs_message(logprobs: TokenLogprobs) -> worker_pb2.TokenLogprobs:
    return worker_pb2.TokenLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )
