"""A prelay server's gRPC interface (`prelay.v1.Inference`)."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from prelay.v1 import inference_pb2, inference_pb2_grpc

from bench.load.answer import Answer
from bench.load.errors import NotAServerError
from bench.load.target import Call, ServerInfo
from cluster.workload.jobs import Job, Status
from cluster.workload.slo import Limits

_CHECK_S = 20.0
_REASONS = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}


class GrpcTarget:
    """One server; close the channel that it is given."""

    def __init__(self, channel: grpc.aio.Channel, address: str, headers: Mapping[str, str]) -> None:
        """headers: sent as metadata; `x-tenant` also as the request's tenant."""
        self._channel = channel
        self._address = address
        self._metadata = tuple((name.lower(), value) for name, value in headers.items())
        self._tenant = dict(self._metadata).get("x-tenant", "")
        # Requests are serialised before the clock runs.
        self._generate = channel.unary_stream(
            "/prelay.v1.Inference/Generate",
            request_serializer=lambda serialised: serialised,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )

    async def check(self) -> ServerInfo:
        """See Target."""
        stub = inference_pb2_grpc.InferenceStub(self._channel)
        try:
            info = await stub.GetModelInfo(
                inference_pb2.GetModelInfoRequest(), timeout=_CHECK_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise NotAServerError(f"grpc://{self._address} is no prelay server: {_said(error)}") from error
        return ServerInfo(info.model, info.max_model_len, info.vocab_size, "prelay.v1 gRPC, token ids")

    def prepare(self, job: Job, limits: Limits | None) -> Call:
        """See Target."""
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=job.prompt_token_ids),
            sampling=inference_pb2.SamplingParams(
                max_tokens=job.output_tokens, ignore_eos=True, temperature=0.0
            ),
            tenant=self._tenant,
        )
        if limits is not None:
            request.slo.ttft.FromNanoseconds(round(limits.ttft_s * 1e9))
            request.slo.tpot.FromNanoseconds(round(limits.tpot_s * 1e9))
        serialised = request.SerializeToString()

        async def call(answer: Answer) -> None:
            try:
                async for response in self._generate(serialised, metadata=self._metadata):
                    _note(response, answer)
            except grpc.aio.AioRpcError as error:
                refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not answer.has_begun
                answer.fail(_said(error), Status.REJECTED if refused else Status.FAILED)

        return call


def _note(response: inference_pb2.GenerateResponse, answer: Answer) -> None:
    if response.token_ids:
        answer.tokens(len(response.token_ids))
    if response.HasField("finish"):
        finish = response.finish
        answer.finish(_REASONS.get(finish.reason, "unspecified"))
        answer.usage(finish.usage.prompt_tokens, finish.usage.completion_tokens)
        answer.stages({stage: _seconds(spent) for stage, spent in finish.details.stages.items()})


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _said(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {' '.join((error.details() or '').split())[:200]}"
