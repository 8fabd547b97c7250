"""Workers without engines for a router that is measured: real `Worker.Attach` servers, but lean.

A prompt is read at once, and all tokens of one decode step travel in one message, as those of real workers
do. `serve` runs in a process of its own (`bench/processes.py`).

    Reserve --> Reserved;  Prefill --> first token, hand-off in memory --> a token every step
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
from prelay.v1 import worker_pb2, worker_pb2_grpc

from bench.router_stamp import MAX_MODEL_LEN, VOCAB_SIZE, now_ticks, token_of

BLOCK_SIZE = 16
NUM_BLOCKS = 1 << 20
MAX_NUM_SEQS = 256
LATENCY = {"step": 2e-4, "rows": 2e-6, "decode_sequences": 1e-5, "decode_context": 1e-9}
"""So little that no prediction keeps a request waiting: it is the router that is measured."""
_SNAPSHOT_EVERY_S = 0.1
_FINGERPRINT = "bench"
_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Pace:
    """interval_s: between the steps of each decode worker from now on. They step in turn: real engines seldom
    end their steps in the same instant, either."""

    interval_s: float


@dataclass(frozen=True, slots=True)
class Sent:
    """Since the process began: tokens that were sent, seconds of CPU that all this took. at: on the monotonic
    clock."""

    at: float
    tokens: int
    cpu_s: float


@dataclass(slots=True)
class _Answer:
    max_tokens: int
    message: worker_pb2.SequenceTokens
    paused: bool = False


class LeanWorker(worker_pb2_grpc.WorkerServicer):
    """One worker, of one router."""

    def __init__(self, info: worker_pb2.WorkerInfo, peers: Mapping[str, LeanWorker]) -> None:
        """peers: all workers, by address."""
        self.info = info
        self.sent_tokens = 0
        self._interval_s = 0.02
        self._due = time.monotonic()  # the last step
        self._peers = peers
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._out: list[worker_pb2.WorkerMessage] = []
        self._read: list[worker_pb2.SequenceTokens] = []  # first tokens: those of one turn go out together
        self._ready = asyncio.Event()
        self._writes = False
        self._answers: dict[str, _Answer] = {}
        self._limits: dict[str, int] = {}  # max_tokens of requests that wait for their hand-off
        self._commands_seen = 0

    async def start(self) -> None:
        """Listens, on a port of the system's choice."""
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self.info.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    def pace(self, interval_s: float, first_due: float) -> None:
        """From now on there is a step every `interval_s`, the first at `first_due` (monotonic clock)."""
        self._interval_s = interval_s
        self._due = first_due - interval_s

    async def Attach(self, commands: Any, context: _Context) -> None:  # the name that the interface gives it
        await context.read()
        await context.write(worker_pb2.WorkerMessage(hello=self.info))
        decodes = self.info.role != worker_pb2.ROLE_PREFILL
        tasks = [asyncio.create_task(self._write(context)), asyncio.create_task(self._beat())]
        if decodes:
            tasks.append(asyncio.create_task(self._decode()))
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self._commands_seen = message.seq
                self.take(message)
        finally:
            for task in tasks:
                task.cancel()

    def take(self, message: worker_pb2.RouterMessage) -> None:
        """A command."""
        match message.WhichOneof("message"):
            case "reserve":
                command = message.reserve
                self._limits[command.request_id] = command.sampling.max_tokens
                reserved = worker_pb2.Reserved(request_id=command.request_id, attempt=command.attempt)
                self._put(reserved=reserved)
            case "prefill":
                self._prefill(message.prefill)
            case "cancel":
                self._answers.pop(message.cancel.request_id, None)
                self._limits.pop(message.cancel.request_id, None)
            case "pair":
                peer = message.pair.prefill
                state = worker_pb2.PairState(
                    worker_id=peer.worker_id, epoch=peer.epoch, linked=True, backend="bench"
                )
                self._put(pair=state)
            case "pause" | "resume" as kind:
                answer = self._answers.get(getattr(message, kind).request_id)
                if answer is not None:
                    answer.paused = kind == "pause"

    def _prefill(self, command: worker_pb2.Prefill) -> None:
        first = worker_pb2.SequenceTokens(
            request_id=command.request_id,
            attempt=command.attempt,
            token_ids=[token_of(now_ticks())],
            times=worker_pb2.StageTimes(prefill_s=1e-4),
        )
        if command.sampling.max_tokens == 1:
            first.stop_reason = worker_pb2.STOP_REASON_LENGTH
        else:
            self._peers[command.decode.address].hand_over(command.request_id, command.attempt)
        self.sent_tokens += 1
        self._read.append(first)
        self._ready.set()

    def hand_over(self, request_id: str, attempt: int) -> None:
        """A prompt is read: the rest of the answer is for this worker to write."""
        max_tokens = self._limits.pop(request_id, None)
        if max_tokens is None:
            return  # cancelled
        message = worker_pb2.SequenceTokens(request_id=request_id, attempt=attempt, first_index=0)
        message.token_ids.append(0)
        self._answers[request_id] = _Answer(max_tokens, message)

    async def _decode(self) -> None:
        while True:
            self._due = max(self._due + self._interval_s, time.monotonic() - self._interval_s)
            await asyncio.sleep(self._due - time.monotonic())
            if not self._out and not self._writes:  # no step runs ahead of a router that takes no more
                self.step()

    def step(self) -> None:
        """A token for each answer that is not paused."""
        token = token_of(now_ticks())
        ended, running = [], []
        for request_id, answer in self._answers.items():
            if answer.paused:
                continue
            message = answer.message
            message.first_index += 1
            message.token_ids[0] = token
            if message.first_index == 1:
                message.times.transfer_s = 1e-4
            elif message.first_index == 2:
                message.ClearField("times")
            if message.first_index + 1 >= answer.max_tokens:
                message.stop_reason = worker_pb2.STOP_REASON_LENGTH
                ended.append(request_id)
            running.append(message)
        if running:
            self.sent_tokens += len(running)
            self._put(step=worker_pb2.StepTokens(sequences=running))
        for request_id in ended:
            del self._answers[request_id]

    async def _beat(self) -> None:
        number = 0
        while True:
            await asyncio.sleep(_SNAPSHOT_EVERY_S)
            number += 1
            batch = len(self._answers)
            context = sum(answer.message.first_index + BLOCK_SIZE for answer in self._answers.values())
            step = worker_pb2.StepTime(
                decode_requests=batch,
                decode_context=context,
                seconds=LATENCY["step"] + (LATENCY["rows"] + LATENCY["decode_sequences"]) * batch,
            )
            self._put(
                snapshot=worker_pb2.Snapshot(
                    seq=number,
                    commands_seen=self._commands_seen,
                    running_requests=batch + len(self._limits),
                    free_blocks=NUM_BLOCKS,
                    decoding_requests=batch,
                    decode_context=context,
                    steps=[step] if batch else [],
                )
            )

    def _put(self, **message: Any) -> None:
        self._out.append(worker_pb2.WorkerMessage(**message))
        self._ready.set()

    def unsent(self) -> list[worker_pb2.WorkerMessage]:
        """What is to be sent, once."""
        if self._read:
            read, self._read = self._read, []
            self._put(step=worker_pb2.StepTokens(sequences=read))
        out, self._out = self._out, []
        return out

    async def _write(self, context: _Context) -> None:
        while True:
            await self._ready.wait()
            self._ready.clear()
            self._writes = True
            for message in self.unsent():
                await context.write(message)
            self._writes = False


def serve(
    connection: Connection, num_prefill: int, num_decode: int, max_num_seqs: int = MAX_NUM_SEQS
) -> None:
    """Sends (worker id, epoch, role, address) of all workers; answers a Pace with None, and anything else
    with what was sent so far."""
    asyncio.run(_serve(connection, num_prefill, num_decode, max_num_seqs))


async def _serve(connection: Connection, num_prefill: int, num_decode: int, max_num_seqs: int) -> None:
    workers: dict[str, LeanWorker] = {}
    for role, count in ((worker_pb2.ROLE_PREFILL, num_prefill), (worker_pb2.ROLE_DECODE, num_decode)):
        for index in range(count):
            worker = LeanWorker(worker_info(role, index, max_num_seqs), workers)
            await worker.start()
            workers[worker.info.address] = worker
    infos = [worker.info for worker in workers.values()]
    writers = [worker for worker in workers.values() if worker.info.role != worker_pb2.ROLE_PREFILL]
    connection.send([(info.worker_id, info.epoch, info.role, info.address) for info in infos])
    loop = asyncio.get_running_loop()
    while (question := await loop.run_in_executor(None, connection.recv)) is not None:
        if isinstance(question, Pace):
            now = time.monotonic()
            for index, worker in enumerate(writers):
                worker.pace(question.interval_s, now + question.interval_s * index / len(writers))
            connection.send(None)
        else:
            tokens = sum(worker.sent_tokens for worker in workers.values())
            connection.send(Sent(time.monotonic(), tokens, time.process_time()))
    await asyncio.gather(*(worker.stop() for worker in workers.values()))


def worker_info(role: worker_pb2.Role, index: int, max_num_seqs: int = MAX_NUM_SEQS) -> worker_pb2.WorkerInfo:
    """The hello of a worker. A role's workers are alike."""
    name = "p" if role == worker_pb2.ROLE_PREFILL else "d"
    return worker_pb2.WorkerInfo(
        worker_id=f"{name}{index}",
        epoch=1,
        role=role,
        metrics_address="127.0.0.1:1",
        model="bench",
        model_fingerprint=_FINGERPRINT,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=512,
        protocol_version=worker_pb2.PROTOCOL_VERSION_CURRENT,
        protocol_minor=worker_pb2.PROTOCOL_MINOR_CURRENT,
        latency=LATENCY,
    )
