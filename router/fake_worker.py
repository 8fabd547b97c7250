"""Workers without an engine: real `Worker.Attach` servers in this process, every stage of which can be held.

A `FakeFleet` is a set of them that hand requests over to each other in memory. Answers are a function of the
prompt (`fake_answer`), so a test knows what a client must get. Requests wait at gates, which are open until
somebody closes them:

    decode    RESERVE: before Reserved; TRANSFER: before the second token; DECODE: before each later token
    prefill   PREFILL: before the prompt is read; FIRST_TOKEN: before index 0 is sent, after the hand-off
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import grpc
import grpc.aio
from prelay.v1 import worker_pb2, worker_pb2_grpc

from engine.reservation import has_room, reserved_blocks
from engine.sequence import RequestKey

_GOES_ON = worker_pb2.STOP_REASON_UNSPECIFIED


class Hold(Enum):
    """The places at which a fake worker can be made to wait."""

    RESERVE = "reserve"
    PREFILL = "prefill"
    FIRST_TOKEN = "first_token"
    TRANSFER = "transfer"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class FakeModel:
    """What a fleet pretends to serve. Answers consist of token ids low .. high - 1.

    eos_token_id, answer_tokens: the answer to every prompt ends with EOS as its `answer_tokens`-th token, if
    EOS is among the request's stop tokens and min_tokens and max_tokens allow it.
    caches: prefill workers say that they had all of a prompt but its last token in their cache.
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


@dataclass(slots=True)
class _Sequence:
    """A request on one worker."""

    key: RequestKey
    sampling: worker_pb2.TokenSampling
    num_blocks: int
    prompt: asyncio.Future[Sequence[int]]  # for a decode worker: what the hand-off brings
    task: asyncio.Task[None] | None = None


class FakeFleet:
    """Fake workers that know each other by address."""

    def __init__(self, model: FakeModel | None = None) -> None:
        self.model = model or FakeModel()
        self.workers: dict[str, FakeWorker] = {}

    async def start(
        self,
        role: worker_pb2.Role,
        worker_id: str,
        *,
        epoch: int = 1,
        num_blocks: int = 256,
        max_batch_tokens: int = 256,
        max_num_seqs: int = 64,
        heartbeat_s: float = 0.02,
        fingerprint: str | None = None,
        vocab_size: int | None = None,
    ) -> FakeWorker:
        """Starts a worker on a port of its own."""
        info = worker_pb2.WorkerInfo(
            worker_id=worker_id,
            epoch=epoch,
            role=role,
            metrics_address="127.0.0.1:1",
            model="fake",
            model_fingerprint=fingerprint or self.model.fingerprint,
            max_model_len=self.model.max_model_len,
            vocab_size=vocab_size or self.model.vocab_size,
            block_size=16,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            protocol_version=worker_pb2.PROTOCOL_VERSION_CURRENT,
        )
        worker = FakeWorker(self, info, heartbeat_s)
        await worker.start()
        self.workers[info.address] = worker
        return worker

    async def stop(self) -> None:
        """Stops all of them."""
        await asyncio.gather(*(worker.kill() for worker in self.workers.values()))


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """One fake worker; `info.address` is set once it is started."""

    def __init__(self, fleet: FakeFleet, info: worker_pb2.WorkerInfo, heartbeat_s: float) -> None:
        self.info = info
        self.received: Counter[str] = Counter()
        """Commands by kind."""
        self.reserves: list[worker_pb2.Reserve] = []
        """The Reserve commands, in order."""
        self._fleet = fleet
        self._heartbeat_s = heartbeat_s
        self._gates = {hold: asyncio.Event() for hold in Hold}
        for gate in self._gates.values():
            gate.set()
        self._waiting: Counter[Hold] = Counter()
        self._changed = asyncio.Condition()
        self._sequences: dict[RequestKey, _Sequence] = {}
        self._failures: list[worker_pb2.FailureReason] = []
        self._beating = True
        self._broken = asyncio.Event()
        self._outgoing: asyncio.Queue[worker_pb2.WorkerMessage] = asyncio.Queue()
        self._seen = 0
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))

    @property
    def live_requests(self) -> int:
        """Requests that hold something here."""
        return len(self._sequences)

    @property
    def free_blocks(self) -> int:
        """Blocks not held by any request."""
        return self.info.num_blocks - sum(sequence.num_blocks for sequence in self._sequences.values())

    async def start(self) -> None:
        """Listens."""
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self.info.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def kill(self) -> None:
        """Ends at once, as a killed process does."""
        self._broken.set()
        for sequence in list(self._sequences.values()):
            self._drop(sequence)
        await self._server.stop(None)

    def hold(self, hold: Hold) -> None:
        """Requests that come to this place wait there."""
        self._gates[hold].clear()

    def let_go(self, hold: Hold) -> None:
        """Requests pass this place again."""
        self._gates[hold].set()

    async def waiting_at(self, hold: Hold, count: int = 1) -> None:
        """Returns when `count` requests wait at this place."""
        await self.until(lambda: self._waiting[hold] >= count)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Returns when `holds()` is true of this worker."""
        async with self._changed:
            await self._changed.wait_for(holds)

    def break_stream(self) -> None:
        """Ends the stream to the router, which counts as the worker's death."""
        self._broken.set()

    def fall_silent(self) -> None:
        """No more snapshots; everything else goes on."""
        self._beating = False

    def fail_next(self, *reasons: worker_pb2.FailureReason) -> None:
        """The next commands (Reserve or Prefill) fail, for these reasons in turn."""
        self._failures.extend(reasons)

    async def Attach(  # the name that the interface gives it
        self,
        request_iterator: AsyncIterator[worker_pb2.RouterMessage],
        context: grpc.aio.ServicerContext[worker_pb2.RouterMessage, worker_pb2.WorkerMessage],
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """The stream of worker.proto."""
        hello = await anext(request_iterator)
        if hello.hello.epoch != self.info.epoch:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this is epoch {self.info.epoch}, not {hello.hello.epoch}",
            )
        self._broken.clear()
        self._outgoing = asyncio.Queue()
        yield worker_pb2.WorkerMessage(hello=self.info)
        tasks = [asyncio.create_task(self._obey(request_iterator)), asyncio.create_task(self._beat())]
        broken = asyncio.create_task(self._broken.wait())
        try:
            while not self._broken.is_set():
                getting = asyncio.create_task(self._outgoing.get())
                await asyncio.wait((getting, broken), return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    getting.cancel()
                    break
                yield getting.result()
        finally:
            for task in (*tasks, broken):
                task.cancel()
            for sequence in list(self._sequences.values()):
                self._drop(sequence)

    async def _obey(self, request_iterator: AsyncIterator[worker_pb2.RouterMessage]) -> None:
        async for message in request_iterator:
            self._seen = message.seq
            kind = message.WhichOneof("message")
            match kind:
                case "reserve":
                    self.reserves.append(message.reserve)
                    num_tokens, max_tokens = (
                        len(message.reserve.token_ids),
                        message.reserve.sampling.max_tokens,
                    )
                    num_blocks = reserved_blocks(self.info.block_size, num_tokens, max_tokens)
                    room = has_room(num_blocks, self.free_blocks, len(self._sequences))
                    self._begin(message.reserve, num_blocks, room)
                case "prefill":
                    num_blocks = -(-len(message.prefill.token_ids) // self.info.block_size)
                    self._begin(message.prefill, num_blocks, num_blocks <= self.free_blocks)
                case "cancel":
                    sequence = self._sequences.get(
                        RequestKey(message.cancel.request_id, message.cancel.attempt)
                    )
                    if sequence is not None:
                        self._drop(sequence)
            self.received[str(kind)] += 1
            await self._notify()

    def _begin(self, command: worker_pb2.Reserve | worker_pb2.Prefill, num_blocks: int, room: bool) -> None:
        key = RequestKey(command.request_id, command.attempt)
        if not room:
            self._fail(key, worker_pb2.FAILURE_REASON_NO_BLOCKS)
        elif self._failures:
            self._fail(key, self._failures.pop(0))
        else:
            prompt: asyncio.Future[Sequence[int]] = asyncio.get_running_loop().create_future()
            sequence = _Sequence(key, command.sampling, num_blocks, prompt)
            self._sequences[key] = sequence
            if isinstance(command, worker_pb2.Reserve):
                sequence.task = asyncio.create_task(self._decode(sequence))
            else:
                sequence.task = asyncio.create_task(self._prefill(sequence, command))

    async def _prefill(self, sequence: _Sequence, command: worker_pb2.Prefill) -> None:
        await self._pass(Hold.PREFILL)
        answer, reason = fake_answer(self._fleet.model, command.token_ids, command.sampling)
        only = len(answer) == 1
        peer = self._fleet.workers.get(command.decode.address)
        if not only and peer is not None:
            peer.take_over(sequence.key, command.token_ids)
        await self._pass(Hold.FIRST_TOKEN)
        times = worker_pb2.StageTimes(prefill_queue_s=1e-6, prefill_s=1e-6)
        self._send(sequence, 0, answer[0], reason if only else _GOES_ON, times, command.token_ids)
        self._drop(sequence)
        await self._notify()

    def take_over(self, key: RequestKey, prompt: Sequence[int]) -> None:
        """The hand-off; a request that is not (or no longer) expected is ignored."""
        sequence = self._sequences.get(key)
        if sequence is not None and not sequence.prompt.done():
            sequence.prompt.set_result(tuple(prompt))

    async def _decode(self, sequence: _Sequence) -> None:
        await self._pass(Hold.RESERVE)
        reserved = worker_pb2.Reserved(request_id=sequence.key.request_id, attempt=sequence.key.attempt)
        self._outgoing.put_nowait(worker_pb2.WorkerMessage(reserved=reserved))
        prompt = await sequence.prompt
        answer, reason = fake_answer(self._fleet.model, prompt, sequence.sampling)
        for index in range(1, len(answer)):
            await self._pass(Hold.TRANSFER if index == 1 else Hold.DECODE)
            times = worker_pb2.StageTimes(transfer_s=1e-6, decode_queue_s=1e-6, kv_bytes=len(prompt))
            last = index == len(answer) - 1
            self._send(
                sequence, index, answer[index], reason if last else _GOES_ON, times if index == 1 else None
            )
        self._drop(sequence)
        await self._notify()

    async def _pass(self, hold: Hold) -> None:
        if not self._gates[hold].is_set():
            self._waiting[hold] += 1
            try:
                await self._notify()
                await self._gates[hold].wait()
            finally:
                self._waiting[hold] -= 1
        await asyncio.sleep(0)  # each token is a step of its own

    def _send(
        self,
        sequence: _Sequence,
        index: int,
        token_id: int,
        reason: worker_pb2.StopReason,
        times: worker_pb2.StageTimes | None,
        prompt: Sequence[int] = (),
    ) -> None:
        sampling, logprobs, prompt_logprobs = sequence.sampling, [], []
        if sampling.HasField("logprobs"):
            logprobs = [fake_logprobs(token_id, index, sampling.logprobs)]
        if sampling.HasField("prompt_logprobs"):
            scored = list(enumerate(prompt))[1:]
            prompt_logprobs = [fake_logprobs(token, at, sampling.prompt_logprobs) for at, token in scored]
        tokens = worker_pb2.SequenceTokens(
            request_id=sequence.key.request_id,
            attempt=sequence.key.attempt,
            first_index=index,
            token_ids=[token_id],
            stop_reason=reason,
            times=times,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            # As if all of a prompt but its last token had been cached.
            cached_tokens=max(0, len(prompt) - 1) if self._fleet.model.caches else 0,
        )
        self._outgoing.put_nowait(worker_pb2.WorkerMessage(step=worker_pb2.StepTokens(sequences=[tokens])))

    def _fail(self, key: RequestKey, reason: worker_pb2.FailureReason) -> None:
        failed = worker_pb2.Failed(request_id=key.request_id, attempt=key.attempt, reason=reason)
        self._outgoing.put_nowait(worker_pb2.WorkerMessage(failed=failed))

    def _drop(self, sequence: _Sequence) -> None:
        self._sequences.pop(sequence.key, None)
        if sequence.task is not None and sequence.task is not asyncio.current_task():
            sequence.task.cancel()

    async def _beat(self) -> None:
        beat = 0
        while True:
            beat += 1
            if self._beating:
                snapshot = worker_pb2.Snapshot(
                    seq=beat,
                    commands_seen=self._seen,
                    running_requests=len(self._sequences),
                    free_blocks=self.free_blocks,
                    owned_blocks=self.info.num_blocks - self.free_blocks,
                )
                self._outgoing.put_nowait(worker_pb2.WorkerMessage(snapshot=snapshot))
            await asyncio.sleep(self._heartbeat_s)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
