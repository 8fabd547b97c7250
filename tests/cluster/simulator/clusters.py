"""Small clusters for tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.simulator.cluster_spec import ClusterSpec, Fault, NetworkSpec, WorkerSpec
from cluster.workload.datasets import Shape
from cluster.workload.drawing import Arrival
from engine.latency import LatencyModel
from router.pool_view import Role

CORE = LatencyModel(
    {
        "step": 0.0095, "rows": 0.00068, "decode_sequences": 0.0009, "decode_context": 4e-7,
        "prefill_attention": 1e-7, "prefill_context": 1e-7,
    }
)  # fmt: skip
"""About a CPU core with SmolLM2-135M's shape."""
COSTLY = LatencyModel({**CORE.coefficients, "prefill_chunks": 0.02})
"""Whose chunks cost as much as thirty tokens, whatever their size."""


def worker(
    role: Role,
    index: int = 0,
    *,
    kv_tokens: int = 32_768,
    max_num_seqs: int = 64,
    latency: LatencyModel = CORE,
) -> WorkerSpec:
    name = f"{role.value}-{index}"
    return WorkerSpec(name, role, latency, kv_tokens, kv_bytes=23_040, max_num_seqs=max_num_seqs)


def pools(
    prefill: int = 0,
    decode: int = 0,
    mixed: int = 0,
    *,
    policy: str = "goodput",
    kv_tokens: int = 32_768,
    max_num_seqs: int = 64,
    faults: Sequence[Fault] = (),
    network: NetworkSpec | None = None,
    noise: float = 0.0,
    latency: LatencyModel = CORE,
) -> ClusterSpec:
    roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode + [Role.MIXED] * mixed
    workers = [
        worker(role, index, kv_tokens=kv_tokens, max_num_seqs=max_num_seqs, latency=latency)
        for index, role in enumerate(roles)
    ]
    return ClusterSpec(workers, policy, network or NetworkSpec(), faults=faults, noise=noise, timeout_s=600.0)


def arrivals(*requests: tuple[float, int, int]) -> list[Arrival]:
    return [Arrival(at, Shape(prompt, output)) for at, prompt, output in requests]
