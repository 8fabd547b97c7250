"""The gRPC front end: `prelay.v1.Inference`. A client that hangs up cancels its request."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import grpc.aio
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from prelay.v1 import inference_pb2

from engine.sequence import TokenLogprobs
from engine.tokenizer import Tokenizer
from router.errors import InvalidRequestError, RouterError
from router.grpc_errors import abort
from router.intake import Intake
from router.live_requests import LiveRequests
from router.requests import Delta, Details, FinishReason, Request
from router.sampling import SamplingWish
from router.slo import Slo, SloPolicy, SloWish
from router.tenants import Tenants

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
MAX_REQUEST_ID_CHARS = 128

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_ROLES = frozenset({"system", "user", "assistant"})

_log = logging.getLogger(__name__)
_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceApi:
    """The servicer.

    Registered with `add_to` and not with the generated function, which answers bytes that are not a message
    (text that is not UTF-8, say) with INTERNAL instead of INVALID_ARGUMENT.
    """

    def __init__(self, intake: Intake, slo: SloPolicy, live: LiveRequests, tenants: Tenants) -> None:
        self._tenants = tenants
        self._intake = intake
        self._slo = slo
        self._live = live

    def add_to(self, server: grpc.aio.Server) -> None:
        """Before the server is started."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.generate,
                request_deserializer=_parse_generate,
                response_serializer=inference_pb2.GenerateResponse.SerializeToString,
            ),
            "GetModelInfo": grpc.unary_unary_rpc_method_handler(
                self.get_model_info,
                request_deserializer=inference_pb2.GetModelInfoRequest.FromString,
                response_serializer=inference_pb2.GetModelInfoResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def get_model_info(
        self, request: inference_pb2.GetModelInfoRequest, context: _Context
    ) -> inference_pb2.GetModelInfoResponse:
        """What is served."""
        if not self._tenants.is_open:
            try:
                self._tenants.who(_authorization(context))
            except RouterError as error:
                await abort(context, error)
        model = self._intake.model
        return inference_pb2.GetModelInfoResponse(
            model=model.name,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
        )

    async def generate(self, message: inference_pb2.GenerateRequest | DecodeError, context: _Context) -> None:
        """Streams one answer."""
        # With context.write: a generator that is cancelled while it is suspended at a `yield` would leave its
        # request to the garbage collector.
        arrived_at = self._intake.now()
        try:
            if isinstance(message, DecodeError):
                raise InvalidRequestError(f"the message is not a GenerateRequest: {message}")
            tenant = self._tenant(message, context)
            request = await self._request(message, tenant, context.time_remaining(), arrived_at)
            public_id = message.request_id or request.request_id
            async with self._live.submit(request) as answer:
                async for delta in answer:
                    await context.write(_response(public_id, delta, self._intake.model.tokenizer))
        except RouterError as error:
            await abort(context, error)
        except grpc.aio.InternalError:
            return  # the client left while a message to it was on its way
        except Exception:
            _log.exception("event=defect method=Generate")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error of the router; its log says more")

    async def _request(
        self,
        message: inference_pb2.GenerateRequest,
        tenant: str,
        timeout_s: float | None,
        arrived_at: float,
    ) -> Request:
        self._intake.check_model(message.model)
        if len(message.request_id) > MAX_REQUEST_ID_CHARS or not message.request_id.isprintable():
            raise InvalidRequestError(
                f"request_id must be at most {MAX_REQUEST_ID_CHARS} printable characters", "request_id"
            )
        token_ids = await self._prompt(message)
        return self._intake.request(
            token_ids,
            _wish(message.sampling),
            self._slo_of(message.slo),
            request_id=message.request_id,
            tenant=tenant,
            arrived_at=arrived_at,
            timeout_s=timeout_s,
        )

    def _tenant(self, message: inference_pb2.GenerateRequest, context: _Context) -> str:
        """As router.http_request.tenant_of, with the key in the metadata. Raises UnauthenticatedError."""
        if self._tenants.is_open:
            return message.tenant[:128]
        return self._tenants.who(_authorization(context))

    async def _prompt(self, message: inference_pb2.GenerateRequest) -> list[int]:
        match message.WhichOneof("prompt"):
            case "text":
                return await self._intake.tokenize_prompt(message.text)
            case "token_ids":
                return list(message.token_ids.ids)
            case "chat":
                return await self._intake.tokenize_chat(_messages(message.chat))
            case _:
                raise InvalidRequestError("no prompt is given; set text, token_ids or chat", "prompt")

    def _slo_of(self, slo: inference_pb2.Slo) -> Slo:
        wish = SloWish(
            slo_class=slo.slo_class or None,
            ttft_s=_seconds(slo.ttft) if slo.HasField("ttft") else None,
            tpot_s=_seconds(slo.tpot) if slo.HasField("tpot") else None,
            priority=slo.priority if slo.HasField("priority") else None,
            may_downgrade=slo.allow_downgrade,
        )
        return self._slo.resolve(wish)


def _authorization(context: _Context) -> str | None:
    given = dict(context.invocation_metadata() or ()).get("authorization")
    return given if isinstance(given, str) else None


def _parse_generate(data: bytes) -> inference_pb2.GenerateRequest | DecodeError:
    try:
        return inference_pb2.GenerateRequest.FromString(data)
    except DecodeError as error:
        return error


def _messages(chat: inference_pb2.Chat) -> list[dict[str, str]]:
    if not chat.messages:
        raise InvalidRequestError("chat has no messages; give at least one", "chat.messages")
    for index, message in enumerate(chat.messages):
        if message.role not in _ROLES:
            field = f"chat.messages[{index}].role"
            raise InvalidRequestError(
                f"{field} is {message.role[:40]!r}; known: {', '.join(sorted(_ROLES))}", field
            )
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def _wish(sampling: inference_pb2.SamplingParams) -> SamplingWish:
    def given(field: str) -> Any:
        return getattr(sampling, field) if sampling.HasField(field) else None

    return SamplingWish(
        max_tokens=given("max_tokens"),
        min_tokens=given("min_tokens"),
        ignore_eos=sampling.ignore_eos,
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=given("top_k"),
        seed=given("seed"),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        min_p=given("min_p"),
        presence_penalty=given("presence_penalty"),
        frequency_penalty=given("frequency_penalty"),
        repetition_penalty=given("repetition_penalty"),
        logit_bias=tuple(sampling.logit_bias.items()),
        logprobs=given("logprobs"),
        prompt_logprobs=given("prompt_logprobs"),
    )


def _response(request_id: str, delta: Delta, tokenizer: Tokenizer) -> inference_pb2.GenerateResponse:
    finish = None
    if delta.finish is not None:
        finish = inference_pb2.Finish(
            reason=_FINISH_REASONS[delta.finish.reason],
            usage=inference_pb2.Usage(
                prompt_tokens=delta.finish.prompt_tokens,
                completion_tokens=delta.finish.completion_tokens,
                cached_tokens=delta.finish.cached_tokens,
            ),
            details=_details(delta.finish.details),
        )
    return inference_pb2.GenerateResponse(
        request_id=request_id,
        token_ids=delta.token_ids,
        text=delta.text,
        finish=finish,
        logprobs=[_logprob(one, tokenizer) for one in delta.logprobs],
        prompt_logprobs=[_logprob(one, tokenizer) for one in delta.prompt_logprobs],
    )


def _logprob(one: TokenLogprobs, tokenizer: Tokenizer) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=one.token_id,
        text=tokenizer.token_text(one.token_id),
        logprob=one.logprob,
        rank=one.rank,
        top=[
            inference_pb2.TopLogprob(token_id=token_id, text=tokenizer.token_text(token_id), logprob=logprob)
            for token_id, logprob in one.top
        ],
    )


def _details(details: Details) -> inference_pb2.RequestDetails:
    return inference_pb2.RequestDetails(
        prefill_worker=details.prefill_worker,
        decode_worker=details.decode_worker,
        attempt=details.attempt,
        kv_bytes=details.kv_bytes,
        ttft=None if details.ttft_s is None else _duration(details.ttft_s),
        tpot=_duration(details.tpot_s),
        duration=_duration(details.duration_s),
        stages={stage.value: _duration(seconds) for stage, seconds in details.stages.items()},
        outcome=details.outcome.value,
        slo_class=details.slo_class,
        ttft_limit=_duration(details.limits.ttft_s),
        tpot_limit=_duration(details.limits.tpot_s),
        placement=details.placement,
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
