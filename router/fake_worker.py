"""Workers without an engine: real `Worker.Attach` servers in this process, every stage of which can be held.

They hand requests over to each other in memory (`fake_fleet.py` starts them). Answers are a function of the
prompt (`fake_model.py`), so a test knows what a client must get, and a request that goes on after a loss must
bring exactly the tokens that it had. Requests pass these places (`fake_holds.py`), all open until one is
closed:

    decode, mixed   RESERVE, then after the hand-off TRANSFER and for every later token DECODE
    prefill         PREFILL, the hand-off, FIRST_TOKEN
    mixed           PREFILL, FIRST_TOKEN and for every later token DECODE, if it reads the prompt itself

Workers misbehave on demand: `kill`, `break_stream`, `fall_silent`, `freeze` (a stopped process), `fail_next`,
`fail_handoffs`, `refuse_pairs`. They say on demand how long steps took and what came into their caches:
`say_steps`, `say_blocks`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing

import grpc
import grpc.aio
from prelay.v1 import worker_pb2, worker_pb2_grpc

from engine.reservation import has_room, reserved_blocks
from engine.sequence import RequestKey
from router.fake_holds import Hold, Holds
from router.fake_model import FakeJob, FakeModel, not_of_role
from router.fake_sequence import FakeSequence, snapshot_of
from router.fake_stream import FakeStream, PairRefusal


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """One fake worker; `info.address` is set once it is started."""

    def __init__(
        self,
        model: FakeModel,
        peers: Mapping[str, FakeWorker],
        info: worker_pb2.WorkerInfo,
        heartbeat_s: float,
    ) -> None:
        """peers: all fake workers, by address."""
        self.info = info
        self.received: Counter[str] = Counter()
        """Commands by kind."""
        self.commands: list[worker_pb2.RouterMessage] = []
        """All commands, in order."""
        self._model = model
        self._peers = peers
        self._heartbeat_s = heartbeat_s
        self._holds = Holds()
        self._streams: list[FakeStream] = []
        self._cached: dict[int, None] = {}
        self._sequences: dict[RequestKey, FakeSequence] = {}
        self._failures: list[worker_pb2.FailureReason] = []
        self._handoff_failures: list[worker_pb2.FailureReason] = []
        self._pair_refusal: PairRefusal | None = None
        self._beating = True
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))

    @property
    def reserves(self) -> list[worker_pb2.Reserve]:
        """The Reserve commands, in order."""
        return [command.reserve for command in self.commands if command.HasField("reserve")]

    @property
    def prefills(self) -> list[worker_pb2.Prefill]:
        """The Prefill commands, in order."""
        return [command.prefill for command in self.commands if command.HasField("prefill")]

    @property
    def live_requests(self) -> int:
        """Requests that hold something here."""
        return len(self._sequences)

    @property
    def paused_requests(self) -> int:
        """Of these, those that are paused."""
        return sum(not sequence.running.is_set() for sequence in self._sequences.values())

    @property
    def paired(self) -> set[tuple[str, int]]:
        """(worker id, epoch) of the prefill workers that it was told to pair with, and not to leave."""
        return {(peer.worker_id, peer.epoch) for stream in self._streams for peer in stream.pairs.values()}

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
        self.break_stream()
        self._thawed.set()
        self._drop_all(self._sequences.values())
        await self._server.stop(None)

    def hold(self, hold: Hold) -> None:
        """Requests that come to this place wait there."""
        self._holds.hold(hold)

    def let_go(self, hold: Hold) -> None:
        """Requests pass this place again."""
        self._holds.let_go(hold)

    async def waiting_at(self, hold: Hold, count: int = 1) -> None:
        """Returns when `count` requests wait at this place."""
        await self.until(lambda: self._holds.waiting(hold) >= count)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Returns when `holds()` is true of this worker."""
        await self._holds.until(holds)

    def break_stream(self) -> None:
        """Ends the streams to all routers, which counts as the worker's death."""
        for stream in self._streams:
            stream.break_off()

    def fall_silent(self) -> None:
        """No more snapshots; everything else goes on."""
        self._beating = False

    def speak_again(self) -> None:
        """Snapshots as before."""
        self._beating = True

    def freeze(self) -> None:
        """Nothing at all until `thaw`, as if the process was stopped; its connections stay."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Goes on where it was."""
        self._thawed.set()

    def fail_next(self, *reasons: worker_pb2.FailureReason) -> None:
        """The next commands (Reserve or Prefill) fail, for these reasons in turn."""
        self._failures.extend(reasons)

    def fail_handoffs(self, *reasons: worker_pb2.FailureReason) -> None:
        """The next hand-offs to this decode worker fail, for these reasons in turn."""
        self._handoff_failures.extend(reasons)

    async def fail_running(self, reason: worker_pb2.FailureReason) -> None:
        """All requests that are here now fail."""
        for sequence in list(self._sequences.values()):
            self._drop(sequence)
            sequence.stream.fail(sequence.key, reason)
        await self._holds.notify()

    def refuse_pairs(self, reason: worker_pb2.FailureReason, message: str) -> None:
        """From now on no pair is linked; the router is told."""
        self.refuse_pairs_silently(reason, message)
        for stream in self._streams:
            stream.say_pairs(self._pair_refusal)

    def refuse_pairs_silently(self, reason: worker_pb2.FailureReason, message: str) -> None:
        """The same, but the router is told only when it asks."""
        self._pair_refusal = (reason, message)

    def accept_pairs(self) -> None:
        """All pairs are linked again; the router is told."""
        self._pair_refusal = None
        for stream in self._streams:
            stream.say_pairs(None)

    def say_steps(self, *steps: worker_pb2.StepTime) -> None:
        """The next snapshot says that these steps were run."""
        for stream in self._streams:
            stream.steps.extend(steps)

    def beat_now(self) -> None:
        """A snapshot out of turn."""
        for stream in self._streams:
            self._say_load(stream)

    def say_blocks(self, stored: Iterable[int] = (), removed: Iterable[int] = ()) -> None:
        """Blocks came into the prefix cache, and others left it; a router that attaches later is told what is
        there."""
        event = worker_pb2.BlockEvent(stored=stored, removed=removed)
        self._cached.update(dict.fromkeys(event.stored))
        for digest in event.removed:
            self._cached.pop(digest, None)
        for stream in self._streams:
            stream.put(blocks=worker_pb2.BlockEvents(events=[event]))

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
        stream = FakeStream()
        self._streams.append(stream)
        stream.put(hello=self.info)
        if self._cached:
            event = worker_pb2.BlockEvent(stored=self._cached)
            stream.put(blocks=worker_pb2.BlockEvents(events=[event]))
        obeying = asyncio.create_task(self._obey(stream, request_iterator))
        beating = asyncio.create_task(self._beat(stream))
        try:
            async with aclosing(stream.messages(self._thawed)) as messages:
                async for message in messages:
                    yield message
        finally:
            obeying.cancel()
            beating.cancel()
            self._streams.remove(stream)
            self._drop_all(one for one in self._sequences.values() if one.stream is stream)

    async def _obey(
        self, stream: FakeStream, request_iterator: AsyncIterator[worker_pb2.RouterMessage]
    ) -> None:
        async for message in request_iterator:
            await self._thawed.wait()
            stream.seen = message.seq
            kind = message.WhichOneof("message")
            match kind:
                case "reserve":
                    num_blocks = reserved_blocks(
                        self.info.block_size,
                        len(message.reserve.token_ids),
                        message.reserve.sampling.max_tokens - message.reserve.num_output_tokens,
                    )
                    room = has_room(num_blocks, self.free_blocks, len(self._sequences))
                    self._begin(stream, message.reserve, num_blocks, room)
                case "prefill":
                    num_blocks = -(-len(message.prefill.token_ids) // self.info.block_size)
                    self._begin(stream, message.prefill, num_blocks, num_blocks <= self.free_blocks)
                case "cancel" | "pause" | "resume":
                    named = getattr(message, kind)
                    sequence = self._sequences.get(RequestKey(named.request_id, named.attempt))
                    if sequence is not None:
                        self._steer(sequence, kind)
                case "pair":
                    stream.pair(message.pair.prefill, self._pair_refusal)
                case "unpair":
                    stream.unpair(message.unpair.prefill)
            self.received[str(kind)] += 1
            self.commands.append(message)
            await self._holds.notify()

    def _begin(
        self,
        stream: FakeStream,
        command: worker_pb2.Reserve | worker_pb2.Prefill,
        num_blocks: int,
        room: bool,
    ) -> None:
        key = RequestKey(command.request_id, command.attempt)
        job = FakeJob.of(self._model, command)
        if not room:
            stream.fail(key, worker_pb2.FAILURE_REASON_NO_BLOCKS)
        elif self._failures:
            stream.fail(key, self._failures.pop(0))
        elif job is None:
            stream.fail(key, worker_pb2.FAILURE_REASON_INVALID, "these are not the tokens of the answer")
        elif (why := not_of_role(self.info.role, command)) is not None:
            stream.fail(key, worker_pb2.FAILURE_REASON_INVALID, why)
        else:
            sequence = FakeSequence(stream, key, command.sampling, command.urgency, num_blocks, job)
            sequence.running.set()
            self._sequences[key] = sequence
            if isinstance(command, worker_pb2.Prefill):
                life = self._prefill(sequence, command.decode.address)
            elif command.HasField("prefill"):
                life = self._decode(sequence)
            else:
                life = self._serve_alone(sequence)
            sequence.task = asyncio.create_task(life)

    def _steer(self, sequence: FakeSequence, kind: str) -> None:
        match kind:
            case "cancel":
                self._drop(sequence)
            case "pause":
                sequence.running.clear()
            case "resume":
                sequence.running.set()

    async def _prefill(self, sequence: FakeSequence, decode_address: str) -> None:
        await self._read(sequence)
        peer = self._peers.get(decode_address)
        if not sequence.job.ends_at_once and peer is not None:
            peer.take_over(sequence.key)
        await self._first_token(sequence)
        self._drop(sequence)
        await self._holds.notify()

    async def _read(self, sequence: FakeSequence) -> None:
        sequence.unread = sequence.context
        await self._pass(sequence, Hold.PREFILL)
        sequence.unread = 0

    async def _first_token(self, sequence: FakeSequence) -> None:
        await self._pass(sequence, Hold.FIRST_TOKEN)
        times = worker_pb2.StageTimes(prefill_queue_s=1e-6, prefill_s=1e-6)
        self._send(sequence, len(sequence.job.answered), times, prefilled=True)

    def take_over(self, key: RequestKey) -> None:
        """The hand-off; a request that is not (or no longer) expected is ignored."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return
        if self._handoff_failures:
            self._drop(sequence)
            sequence.stream.fail(key, self._handoff_failures.pop(0))
        else:
            sequence.arrived.set()

    async def _decode(self, sequence: FakeSequence) -> None:
        await self._pass(sequence, Hold.RESERVE)
        cached = max(0, len(sequence.job.prompt) - 1) if self._model.caches else 0
        key = sequence.key
        reserved = worker_pb2.Reserved(request_id=key.request_id, attempt=key.attempt, cached_tokens=cached)
        sequence.stream.put(reserved=reserved)
        await sequence.arrived.wait()
        await self._write(sequence, handed_over=True)

    async def _serve_alone(self, sequence: FakeSequence) -> None:
        await self._read(sequence)
        await self._first_token(sequence)
        await self._write(sequence, handed_over=False)

    async def _write(self, sequence: FakeSequence, *, handed_over: bool) -> None:
        """All tokens but the first."""
        job = sequence.job
        first = len(job.answered) + 1
        for index in range(first, len(job.answer)):
            after_transfer = handed_over and index == first
            await self._pass(sequence, Hold.TRANSFER if after_transfer else Hold.DECODE)
            await sequence.running.wait()
            times = worker_pb2.StageTimes(transfer_s=1e-6, decode_queue_s=1e-6, kv_bytes=len(job.prompt))
            self._send(sequence, index, times if after_transfer else None)
        self._drop(sequence)
        await self._holds.notify()

    async def _pass(self, sequence: FakeSequence, hold: Hold) -> None:
        await self._holds.pass_by(hold)
        await asyncio.sleep(0)  # each token is a step of its own
        await sequence.stream.all_out()  # and no step is faster than the stream
        await self._thawed.wait()

    def _send(
        self,
        sequence: FakeSequence,
        index: int,
        times: worker_pb2.StageTimes | None,
        *,
        prefilled: bool = False,
    ) -> None:
        tokens = sequence.token(index, times, prefilled=prefilled, caches=self._model.caches)
        sequence.stream.put(step=worker_pb2.StepTokens(sequences=[tokens]))

    def _drop(self, sequence: FakeSequence) -> None:
        self._sequences.pop(sequence.key, None)
        if sequence.task is not None and sequence.task is not asyncio.current_task():
            sequence.task.cancel()

    def _drop_all(self, sequences: Iterable[FakeSequence]) -> None:
        for sequence in list(sequences):
            self._drop(sequence)

    async def _beat(self, stream: FakeStream) -> None:
        while True:
            await self._thawed.wait()
            if self._beating:
                self._say_load(stream)
            await asyncio.sleep(self._heartbeat_s)

    def _say_load(self, stream: FakeStream) -> None:
        mine = list(self._sequences.values())
        stream.put(snapshot=snapshot_of(self.info, stream, mine, self.free_blocks))
