"""Values of this package to messages of worker.proto, and back."""

from __future__ import annotations

from prelay.v1 import worker_pb2

from engine.latency import LatencyModel, StepShape
from engine.sequence import RequestKey, StopReason, TokenLogprobs, TokenSampling
from router.pair_table import LinkState, PairLink
from router.pool_view import Load, WorkerCapacity
from router.prefix_index import cache_salt
from router.record import TokenBatch
from router.requests import Request, Stage
from router.urgency import Urgency

_STOP_REASONS = {
    worker_pb2.STOP_REASON_STOP: StopReason.STOP,
    worker_pb2.STOP_REASON_LENGTH: StopReason.LENGTH,
}


def reserve(
    key: RequestKey, request: Request, prefill: worker_pb2.PeerRef | None, urgency: Urgency | None
) -> worker_pb2.RouterMessage:
    """To the decode worker, before anything else.

    prefill: None if it is a mixed one that reads the prompt itself. urgency: None if it is not told.
    """
    return worker_pb2.RouterMessage(
        reserve=worker_pb2.Reserve(
            request_id=key.request_id,
            attempt=key.attempt,
            token_ids=request.prompt_token_ids + request.answered,
            num_output_tokens=len(request.answered),
            sampling=_sampling(request.sampling),
            prefill=prefill,
            cache_salt=cache_salt(request),
            urgency=_urgency(urgency),
        )
    )


def prefill(
    key: RequestKey, request: Request, decode: worker_pb2.PeerRef, urgency: Urgency | None
) -> worker_pb2.RouterMessage:
    """To the prefill worker, once the decode worker is ready."""
    return worker_pb2.RouterMessage(
        prefill=worker_pb2.Prefill(
            request_id=key.request_id,
            attempt=key.attempt,
            token_ids=request.prompt_token_ids + request.answered,
            num_output_tokens=len(request.answered),
            sampling=_sampling(request.sampling),
            decode=decode,
            cache_salt=cache_salt(request),
            urgency=_urgency(urgency),
        )
    )


def cancel(key: RequestKey) -> worker_pb2.RouterMessage:
    """To either, at any time."""
    return worker_pb2.RouterMessage(cancel=worker_pb2.Cancel(request_id=key.request_id, attempt=key.attempt))


def pause(key: RequestKey) -> worker_pb2.RouterMessage:
    """To the decode worker that has the request: its reader is slow."""
    return worker_pb2.RouterMessage(pause=worker_pb2.Pause(request_id=key.request_id, attempt=key.attempt))


def resume(key: RequestKey) -> worker_pb2.RouterMessage:
    """To the decode worker that was told to pause."""
    return worker_pb2.RouterMessage(resume=worker_pb2.Resume(request_id=key.request_id, attempt=key.attempt))


def pair(prefill: worker_pb2.WorkerInfo) -> worker_pb2.RouterMessage:
    """To a decode worker: be linked to that prefill worker, and say how it stands."""
    return worker_pb2.RouterMessage(pair=worker_pb2.Pair(prefill=peer(prefill)))


def unpair(prefill: worker_pb2.WorkerInfo) -> worker_pb2.RouterMessage:
    """To a decode worker: that life of the prefill worker is over."""
    return worker_pb2.RouterMessage(unpair=worker_pb2.Unpair(prefill=peer(prefill)))


def pair_link(state: worker_pb2.PairState) -> PairLink:
    """What a decode worker says of a pair."""
    if state.linked:
        return PairLink(LinkState.LINKED)
    mismatched = state.reason == worker_pb2.FAILURE_REASON_PEER_MISMATCH
    return PairLink(LinkState.MISMATCHED if mismatched else LinkState.UNREACHABLE, state.message)


def peer(info: worker_pb2.WorkerInfo) -> worker_pb2.PeerRef:
    """How one worker of a pair is named to the other."""
    return worker_pb2.PeerRef(worker_id=info.worker_id, epoch=info.epoch, address=info.address)


def token_batch(sequence: worker_pb2.SequenceTokens, *, from_reader: bool) -> TokenBatch:
    """What one engine step produced for one request. from_reader: on the worker that has read its prompt."""
    stage_times: tuple[tuple[Stage, float], ...] = ()
    kv_bytes = 0
    if sequence.HasField("times"):
        times = sequence.times
        kv_bytes = times.kv_bytes
        if from_reader:
            stage_times = (Stage.PREFILL_QUEUE, times.prefill_queue_s), (Stage.PREFILL, times.prefill_s)
        else:
            stage_times = (Stage.TRANSFER, times.transfer_s), (Stage.DECODE_QUEUE, times.decode_queue_s)
    return TokenBatch(
        sequence.first_index,
        sequence.token_ids,
        _STOP_REASONS.get(sequence.stop_reason),
        stage_times,
        kv_bytes,
        [*map(_logprobs, sequence.logprobs)],
        [*map(_logprobs, sequence.prompt_logprobs)],
        sequence.cached_tokens,
    )


def is_one_token(sequence: worker_pb2.SequenceTokens) -> bool:
    """Whether it is one token in the middle of an answer, with nothing else."""
    return (
        len(sequence.token_ids) == 1
        and sequence.stop_reason == worker_pb2.STOP_REASON_UNSPECIFIED
        and not sequence.HasField("times")
        and not sequence.logprobs
        and not sequence.prompt_logprobs
        and sequence.first_index > 0
    )


def ends(sequence: worker_pb2.SequenceTokens) -> bool:
    """Whether the worker says that the answer ends here."""
    return sequence.stop_reason != worker_pb2.STOP_REASON_UNSPECIFIED


def load(snapshot: worker_pb2.Snapshot) -> Load:
    """A worker's own figures."""
    return Load(
        commands_seen=snapshot.commands_seen,
        requests=snapshot.running_requests + snapshot.queue_requests,
        queue_tokens=snapshot.queue_tokens,
        free_blocks=snapshot.free_blocks,
        seq=snapshot.seq,
        decoding_requests=snapshot.decoding_requests,
        decode_context=snapshot.decode_context,
        least_tpot_s=snapshot.least_tpot_s,
        ahead_s=snapshot.ahead_s,
    )


def step_shape(step: worker_pb2.StepTime) -> StepShape:
    """What a step was made of. What a newer worker says in another form counts as far as it is understood."""
    chunks = tuple(zip(step.new_tokens, step.cached_tokens, strict=False))
    return StepShape(chunks, step.decode_requests, step.decode_context)


def latency_model(info: worker_pb2.WorkerInfo) -> LatencyModel:
    """How long the worker's steps take. Raises engine.latency.ProfileError for what is not a time."""
    return LatencyModel.from_coefficients(info.latency)


def capacity(info: worker_pb2.WorkerInfo) -> WorkerCapacity:
    """What placement needs of a hello."""
    return WorkerCapacity(
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        max_num_seqs=info.max_num_seqs,
        max_batch_tokens=info.max_batch_tokens,
        fingerprint=info.model_fingerprint,
    )


def _urgency(urgency: Urgency | None) -> worker_pb2.Urgency | None:
    if urgency is None:
        return None
    return worker_pb2.Urgency(
        ttft_left_s=urgency.ttft_left_s, tpot_s=urgency.tpot_s, priority=urgency.priority
    )


def _sampling(sampling: TokenSampling) -> worker_pb2.TokenSampling:
    return worker_pb2.TokenSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sorted(sampling.stop_token_ids),
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def _logprobs(message: worker_pb2.TokenLogprobs) -> TokenLogprobs:
    top = zip(message.top_ids, message.top_logprobs, strict=True)
    return TokenLogprobs(message.token_id, message.logprob, message.rank, tuple(top))
