"""What a worker's process holds whatever its role is: KV memory, ways to move it, and an engine over it.

Loading takes seconds and belongs into a thread. The engine is a model, whole or spread over ranks, or a
simulation, which needs no weights and has its latency model given.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.cores import CoreShare
from cluster.host_spec import HostSpec

if TYPE_CHECKING:
    # At run time torch is imported by `load_engine`: it takes seconds.
    from engine.config import EngineConfig
    from engine.runner import StepRunner
    from transfer.base import Backend, KvMemory
    from transfer.ipc import SharedSegment

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, float], None]
"""Told what is being done, for a person, and how far the start has come, 0 to 1."""

_FRACTION_IMPORTED = 0.4
_FRACTION_ALLOCATED = 0.5
_FRACTION_LOADED = 0.8
"""In time on the demo model."""


@dataclass(frozen=True, slots=True)
class HostEngine:
    """segments: of `memory`, open for peers as that of one life. make_backends: over them, for a life with
    that epoch. latency: coefficients of engine.latency.LatencyModel, as given or as measured."""

    runner: StepRunner
    memory: KvMemory
    segments: Sequence[SharedSegment]
    make_backends: Callable[[int], Sequence[Backend]]
    fingerprint: str
    vocab_size: int
    latency: Mapping[str, float]

    def reopen(self, epoch: int) -> None:
        """For another life, when nobody of the earlier one works on the memory any more."""
        for segment in self.segments:
            segment.reopen(epoch)


def load_engine(
    spec: HostSpec,
    shares: Sequence[CoreShare],
    node_address: str,
    on_progress: OnProgress,
    on_fatal: Callable[[BaseException], None],
) -> HostEngine:
    """shares: the cores of each rank. on_fatal: told when a rank has ended. Raises EngineError or
    TransferError."""
    if spec.is_simulated:
        on_progress("allocating KV cache", 0.0)
        return _simulated(spec)
    on_progress("importing torch", 0.0)
    importlib.import_module("torch")
    from engine.config import EngineConfig, ModelConfig
    from engine.layout import KvLayout
    from transfer.backends import make_backends
    from transfer.base import KvMemory
    from transfer.ipc import SharedSegment
    from transfer.layout import WorkerLayout

    config = EngineConfig(
        num_blocks=spec.num_blocks,
        block_size=spec.block_size,
        max_batch_tokens=spec.most_batch_tokens,
        dtype=spec.dtype,
        load=spec.load,
        threads=spec.threads,
    )
    model = ModelConfig.from_pretrained(spec.checkpoint)
    layout = WorkerLayout.of(KvLayout.of(model, config), spec.tp_size, spec.pp_size)
    layouts = [layout.rank(rank) for rank in range(layout.num_ranks)]
    mib = spec.num_blocks * sum(each.block_nbytes for each in layouts) / 2**20
    on_progress(f"allocating {mib:.0f} MiB of KV cache", _FRACTION_IMPORTED)
    logger.info(
        "event=kv_cache worker=%s tokens=%d gib=%.2f",
        spec.worker_id,
        spec.num_blocks * spec.block_size,
        mib / 1024,
    )
    segments = [SharedSegment.create(each, spec.num_blocks, spec.epoch) for each in layouts]
    memory = KvMemory(layout, tuple(each.blocks for each in segments), segments[0].generations)

    def backends_of(epoch: int) -> Sequence[Backend]:
        return make_backends(spec.backend, memory, segments, node_address, f"{spec.worker_id}-{epoch}")

    def weights_read(fraction: float) -> None:
        whole_way = _FRACTION_ALLOCATED + (_FRACTION_LOADED - _FRACTION_ALLOCATED) * fraction
        on_progress("reading weights", whole_way)

    weights_read(0.0)
    runner, fingerprint = _loaded(spec, config, shares, segments, weights_read, on_fatal)
    latency = spec.latency or measured(spec, runner, on_progress)
    return HostEngine(runner, memory, segments, backends_of, fingerprint, model.vocab_size, latency)


def _simulated(spec: HostSpec) -> HostEngine:
    """Without torch, so that many of them start in a short time."""
    from engine.config import ModelConfig
    from engine.latency import LatencyModel
    from engine.simulated import SimulatedRunner, simulated_fingerprint, simulated_layout
    from transfer.base import KvMemory
    from transfer.ipc import IpcBackend, SharedSegment
    from transfer.layout import WorkerLayout

    layout = simulated_layout(spec.block_size)
    segment = SharedSegment.create(layout, spec.num_blocks, spec.epoch)
    memory = KvMemory(WorkerLayout.of(layout), (segment.array,), segment.generations)
    runner = SimulatedRunner(
        segment.array,
        spec.block_size,
        layout.num_layers,
        LatencyModel(spec.latency),
        time.perf_counter,
        time.sleep,
    )
    return HostEngine(
        runner,
        memory,
        [segment],
        lambda epoch: [IpcBackend(memory, [segment])],
        simulated_fingerprint(spec.checkpoint),
        ModelConfig.from_pretrained(spec.checkpoint).vocab_size,
        spec.latency,
    )


def _loaded(
    spec: HostSpec,
    config: EngineConfig,
    shares: Sequence[CoreShare],
    segments: Sequence[SharedSegment],
    weights_read: Callable[[float], None],
    on_fatal: Callable[[BaseException], None],
) -> tuple[StepRunner, str]:
    """A runner on the memory of `segments`, and the model's fingerprint."""
    from engine.engine import Engine
    from engine.parallel.ranks import load_parallel
    from engine.parallel.shared_memory import SharedMemory

    if len(segments) == 1:
        engine = Engine.load(spec.checkpoint, config, segments[0].data_buffer, weights_read)
    else:
        engine, _ = load_parallel(
            spec.checkpoint,
            config,
            spec.tp_size,
            spec.pp_size,
            [share.cores for share in shares],
            [
                SharedMemory(
                    each.ref.fd, each.ref.num_bytes - each.data_buffer.nbytes, each.data_buffer.nbytes
                )
                for each in segments
            ],
            weights_read,
            on_fatal,
        )
    return engine.runner, engine.fingerprint


def measured(spec: HostSpec, runner: StepRunner, on_progress: OnProgress) -> Mapping[str, float]:
    """Coefficients of steps in the role of `spec`. To be called while nothing is served, as then nobody minds
    what the steps write into the KV memory."""
    from engine.calibration import BUDGET_S, calibrate
    from engine.profiler import Limits

    on_progress("measuring steps", _FRACTION_LOADED)
    limits = Limits(
        spec.max_batch_tokens, spec.max_num_seqs, spec.max_model_len, spec.num_blocks * spec.block_size
    )
    model = calibrate(runner, limits, spec.block_size, BUDGET_S, time.perf_counter)
    logger.info("event=calibrated worker=%s latency=%s", spec.worker_id, dict(model.coefficients))
    return model.coefficients
