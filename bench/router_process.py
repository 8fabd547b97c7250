"""The router process that is measured: `python -m router`, pinned to one core."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from prelay.v1 import admin_pb2, admin_pb2_grpc, worker_pb2

from bench.errors import MeasurementError
from router.settings import RouterSettings
from router.slo import SloClass

MODEL = "bench"
_STOP_S = 10.0
_REGISTER_S = 30.0


@dataclass(frozen=True, slots=True)
class RouterProcess:
    """pid, and where it listens."""

    pid: int
    http: str
    grpc: str
    admin: str

    def cpu_s(self) -> float:
        """Seconds of CPU that all its threads have taken so far. Raises MeasurementError if it has ended."""
        try:
            tasks = list(Path(f"/proc/{self.pid}/task").iterdir())
            return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        except OSError as error:
            raise MeasurementError("the router has ended; its last words are on standard error") from error

    def register(self, workers: Iterable[tuple[str, int, worker_pb2.Role, str]]) -> None:
        """Attaches workers: (worker id, epoch, role, address) each. Raises MeasurementError."""
        with grpc.insecure_channel(self.admin) as channel:
            stub = admin_pb2_grpc.RouterAdminStub(channel)
            for worker_id, epoch, role, address in workers:
                request = admin_pb2.RegisterWorkerRequest(
                    worker_id=worker_id, epoch=epoch, role=role, address=address
                )
                try:
                    stub.RegisterWorker(request, timeout=_REGISTER_S)
                except grpc.RpcError as error:
                    raise MeasurementError(f"the router does not take worker {worker_id}: {error}") from error


@contextmanager
def running_router(checkpoint: Path, core: int) -> Iterator[RouterProcess]:
    """One with the default policy, and limits that no machine is too slow for."""
    settings = RouterSettings(
        checkpoint=str(checkpoint),
        model_name=MODEL,
        http="127.0.0.1:0",
        grpc="127.0.0.1:0",
        metrics="127.0.0.1:0",
        admin="127.0.0.1:0",
        slo_classes={"default": SloClass(60.0, 60.0)},
        liveness_timeout_s=60.0,  # a router that has too much to do is not to be taken for a dead worker
        max_gated_requests=16384,
        log_level="ERROR",  # workers that leave first are no news
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "router", settings.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise MeasurementError(f"the router ended with exit code {process.wait()} when it was started")
        addresses = json.loads(line)
        yield RouterProcess(process.pid, addresses["http"], addresses["grpc"], addresses["admin"])
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
