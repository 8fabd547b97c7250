"""Workers on fake engines, each in a process of its own that can be killed.

Everything but the model is real. `python fake_worker.py` reads one order a line, forks for each (imports take
longer than all the rest), and ends with its standard input. A worker dials the order's `control`, says
{"address", "metrics", "pid"} when it serves, and then "ok" to each line that it is told there:

    hold        let the engine stand before its next step, and say {"held": tokens of that step} when it does
    pass N      let N steps go, and hold again
    go          never mind
    pace S      take S seconds for each step from now on

Whatever prelay logs as an error it tells as {"defect": text}. It ends with that connection.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import grpc.aio
from prelay.v1 import worker_pb2
from prometheus_client import CollectorRegistry, start_http_server

from decode_worker.servicer import DecodeService, DecodeSettings
from engine.fake import FAKE_VOCAB_SIZE, FakeRunner
from engine.layout import KvLayout
from engine.sequence import ScheduledChunk
from prefill_worker.servicer import PrefillService, PrefillSettings
from transfer.backends import make_backends
from transfer.base import KvMemory
from transfer.ipc import SharedSegment
from transfer.layout import WorkerLayout

PACKAGES = ("engine", "transfer", "prefill_worker", "decode_worker")


@dataclass(frozen=True)
class Spec:
    """port: 0 is any. peer_address: what peers are told to dial, "" is the worker's own."""

    worker_id: str
    role: str
    epoch: int = 1
    port: int = 0
    peer_address: str = ""
    num_blocks: int = 128
    block_size: int = 16
    head_dim: int = 8
    max_num_seqs: int = 16
    max_batch_tokens: int = 128
    heartbeat_s: float = 0.1
    lease_s: float = 3.0
    pace_s: float = 0.002
    backend: str = "ipc"

    def order(self, control: str) -> str:
        """For the nursery."""
        return json.dumps({"spec": asdict(self), "control": control})


class Throttle:
    """Stands in the engine thread before every step."""

    def __init__(self, pace_s: float, say: Callable[[object], None]) -> None:
        self._pace_s = pace_s
        self._say = say
        self._left: int | None = None  # steps that may go; None is all
        self._changed = threading.Condition()

    def before_step(self, chunks: Sequence[ScheduledChunk]) -> None:
        with self._changed:
            if self._left == 0:
                self._say({"held": sum(len(chunk.token_ids) for chunk in chunks)})
                self._changed.wait_for(lambda: self._left != 0)
            if self._left is not None:
                self._left -= 1
        time.sleep(self._pace_s)

    def obey(self, line: str) -> None:
        word, *values = line.split()
        with self._changed:
            match word, values:
                case "hold", []:
                    self._left = 0
                case "pass", [steps]:
                    self._left = int(steps)
                case "go", []:
                    self._left = None
                case "pace", [seconds]:
                    self._pace_s = float(seconds)
                case _:
                    raise ValueError(line)
            self._changed.notify_all()
        self._say("ok")


class Defects(logging.Handler):
    """Tells the test what a log would tell an operator."""

    def __init__(self, say: Callable[[object], None]) -> None:
        super().__init__(logging.ERROR)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in PACKAGES:
            self._say({"defect": self.format(record)})


def give_up(error: BaseException) -> None:
    traceback.print_exception(error)
    os._exit(1)


async def _bound(server: grpc.aio.Server, port: int) -> int:
    """A later life wants the port of the earlier one, which some connection may hold for a moment."""
    for _ in range(50):
        try:
            return server.add_insecure_port(f"127.0.0.1:{port}")
        except RuntimeError:
            await asyncio.sleep(0.1)
    return server.add_insecure_port(f"127.0.0.1:{port}")


async def serve(spec: Spec, control: socket.socket) -> None:
    sending = threading.Lock()

    def say(what: object) -> None:
        with sending:
            control.sendall(json.dumps(what).encode() + b"\n")

    logging.getLogger().addHandler(Defects(say))
    layout = KvLayout(
        num_layers=2, num_kv_heads=2, head_dim=spec.head_dim, block_size=spec.block_size, dtype="float32"
    )
    segment = SharedSegment.create(layout, spec.num_blocks, spec.epoch)
    throttle = Throttle(spec.pace_s, say)
    memory = KvMemory(WorkerLayout.of(layout), (segment.blocks,), segment.generations)
    backends = make_backends(
        spec.backend, memory, [segment], "127.0.0.1", f"{spec.worker_id}-{spec.epoch}-{os.getpid()}"
    )
    blocks = segment.blocks.numpy()
    runner = FakeRunner(blocks, layout.block_size, throttle.before_step, layout.num_layers)
    registry = CollectorRegistry()
    metrics, _ = start_http_server(0, addr="127.0.0.1", registry=registry)
    info = worker_pb2.WorkerInfo(
        worker_id=spec.worker_id, epoch=spec.epoch, pid=os.getpid(), model="fake", model_fingerprint="fake",
        role=worker_pb2.ROLE_PREFILL if spec.role == "prefill" else worker_pb2.ROLE_DECODE,
        max_model_len=1024, block_size=spec.block_size, num_blocks=spec.num_blocks,
        max_num_seqs=spec.max_num_seqs, max_batch_tokens=spec.max_batch_tokens, vocab_size=FAKE_VOCAB_SIZE,
        protocol_version=worker_pb2.PROTOCOL_VERSION_CURRENT,
    )  # fmt: skip
    service: PrefillService | DecodeService
    if spec.role == "prefill":
        prefill = PrefillSettings(spec.max_batch_tokens, spec.heartbeat_s, spec.lease_s, digest_share=1.0)
        service = PrefillService(info, runner, memory, backends, registry, prefill, on_fatal=give_up)
    else:
        decode = DecodeSettings(
            spec.max_num_seqs, spec.max_batch_tokens, spec.heartbeat_s, spec.lease_s, digest_share=1.0
        )
        service = DecodeService(info, runner, memory, backends, registry, decode, on_fatal=give_up)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service.add_to(server)
    address = f"127.0.0.1:{await _bound(server, spec.port)}"
    info.address = spec.peer_address or address
    await service.start()
    await server.start()
    say({"address": address, "metrics": f"127.0.0.1:{metrics.server_port}", "pid": os.getpid()})
    lines = control.makefile()
    while line := await asyncio.to_thread(lines.readline):
        throttle.obey(line)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                order = json.loads(line)
                host, _, port = order["control"].rpartition(":")
                with socket.create_connection((host, int(port))) as control:
                    asyncio.run(serve(Spec(**order["spec"]), control))
            except BaseException as error:
                give_up(error)
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
