"""A set of fake workers that know each other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prelay.v1 import worker_pb2

from router.fake_model import FakeModel
from router.fake_worker import FakeWorker


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
        latency: Mapping[str, float] | None = None,
        num_devices: int = 1,
        protocol: tuple[int, int] = (
            worker_pb2.PROTOCOL_VERSION_CURRENT,
            worker_pb2.PROTOCOL_MINOR_CURRENT,
        ),
    ) -> FakeWorker:
        """Starts a worker on a port of its own.

        latency: how long it says that its steps take (`LatencyModel.coefficients`); nothing, if not given.
        protocol: version and minor version that it says.
        """
        info = worker_pb2.WorkerInfo(
            worker_id=worker_id,
            epoch=epoch,
            role=role,
            metrics_address="127.0.0.1:1",
            model="fake",
            num_devices=num_devices,
            model_fingerprint=fingerprint or self.model.fingerprint,
            max_model_len=self.model.max_model_len,
            vocab_size=vocab_size or self.model.vocab_size,
            block_size=16,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            protocol_version=protocol[0],
            protocol_minor=protocol[1],
            latency=latency,
        )
        worker = FakeWorker(self.model, self.workers, info, heartbeat_s)
        await worker.start()
        self.workers[info.address] = worker
        return worker

    async def stop(self) -> None:
        """Stops all of them."""
        await asyncio.gather(*(worker.kill() for worker in self.workers.values()))
