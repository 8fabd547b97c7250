"""A request on a fake worker, and what the worker says of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from prelay.v1 import worker_pb2

from engine.sequence import RequestKey
from router.fake_model import FakeJob, fake_logprobs
from router.fake_stream import FakeStream


@dataclass(slots=True)
class FakeSequence:
    """stream: to the router that placed it. urgency: as it was told. unread: tokens of the prompt that are
    still to be read here. emitted: tokens of the answer that are out, from here. arrived: at a decode worker,
    that the hand-off is over. running: not paused.
    """

    stream: FakeStream
    key: RequestKey
    sampling: worker_pb2.TokenSampling
    urgency: worker_pb2.Urgency
    num_blocks: int
    job: FakeJob
    unread: int = 0
    emitted: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    running: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that there are."""
        return len(self.job.prompt) + len(self.job.answered) + self.emitted

    @property
    def decodes(self) -> bool:
        """Whether a worker that writes answers has this one in its batch."""
        return self.emitted > 0 or self.arrived.is_set()

    def token(
        self, index: int, times: worker_pb2.StageTimes | None, *, prefilled: bool, caches: bool
    ) -> worker_pb2.SequenceTokens:
        """The token of that index goes out. prefilled: it is the one that follows what was read. caches: as
        if all of a prompt but its last token had been cached."""
        self.emitted += 1
        job, wanted = self.job, self.sampling
        logprobs, prompt_logprobs = [], []
        if wanted.HasField("logprobs"):
            logprobs = [fake_logprobs(job.answer[index], index, wanted.logprobs)]
        if prefilled and wanted.HasField("prompt_logprobs"):
            scored = list(enumerate(job.prompt))[1:]
            prompt_logprobs = [fake_logprobs(token, at, wanted.prompt_logprobs) for at, token in scored]
        ends = index == len(job.answer) - 1
        return worker_pb2.SequenceTokens(
            request_id=self.key.request_id,
            attempt=self.key.attempt,
            first_index=index,
            token_ids=[job.answer[index]],
            stop_reason=job.reason if ends else worker_pb2.STOP_REASON_UNSPECIFIED,
            times=times,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            cached_tokens=max(0, len(job.prompt) - 1) if prefilled and caches else 0,
        )


def snapshot_of(
    info: worker_pb2.WorkerInfo, stream: FakeStream, sequences: Sequence[FakeSequence], free_blocks: int
) -> worker_pb2.Snapshot:
    """The next snapshot on a stream. sequences: all that are on the worker, other routers' included."""
    writes = info.role != worker_pb2.ROLE_PREFILL
    decoding = [one for one in sequences if writes and one.decodes]
    limits = [one.urgency.tpot_s for one in decoding if one.urgency.HasField("tpot_s")]
    steps, stream.steps = stream.steps, []
    stream.snapshots += 1
    return worker_pb2.Snapshot(
        seq=stream.snapshots,
        commands_seen=stream.seen,
        running_requests=len(sequences),
        queue_tokens=sum(one.unread for one in sequences),
        free_blocks=free_blocks,
        owned_blocks=info.num_blocks - free_blocks,
        decoding_requests=len(decoding),
        decode_context=sum(one.context for one in decoding),
        least_tpot_s=min(limits, default=0.0),
        steps=steps,
    )
