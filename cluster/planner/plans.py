"""A plan: pools of workers, what they cost, and how it is written down for `prelay serve`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from cluster.planner.errors import PlanError
from cluster.planner.hardware import Gpu
from cluster.planner.kinds import Kind
from cluster.simulator.cluster_spec import ClusterSpec, NetworkSpec, WorkerSpec
from router.pool_view import Role

BATCH_TOKENS = 2048
"""Most prompt tokens of a step of a prefill worker: as many as fill a GPU, and few enough to interrupt."""
CHUNK_TOKENS = 512
"""Of a mixed worker beside its answers (Sarathi-Serve)."""
NUM_SEQS = 256
RETRY_S = 0.05
"""Of the simulated router, for speed: five times as long as the real one's."""


class Objective(StrEnum):
    """What goodput is divided by."""

    DEVICE = "device"
    COST = "cost"
    WATT = "watt"

    def of(self, kind: Kind) -> float:
        """Of one worker. Raises PlanError if it is not known."""
        return self.of_gpu(kind.gpu) * kind.devices

    def of_gpu(self, gpu: Gpu) -> float:
        """Of one device. Raises PlanError if it is not known."""
        value = {Objective.DEVICE: 1.0, Objective.COST: gpu.price, Objective.WATT: gpu.watts}[self]
        if value is None:
            remedy = f"give it as {gpu.name}:COUNT:PRICE" if self is Objective.COST else "choose another"
            raise PlanError(f"--objective {self}: nothing is known of the {self} of {gpu.name}; {remedy}")
        return value


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers of one role, alike."""

    role: Role
    kind: Kind
    replicas: int

    @property
    def devices(self) -> int:
        return self.kind.devices * self.replicas

    @property
    def batch_tokens(self) -> int:
        """Most of a step."""
        return self.kind.batch_tokens or (BATCH_TOKENS if self.role is Role.PREFILL else CHUNK_TOKENS)

    @property
    def num_seqs(self) -> int:
        """Most of a step that writes."""
        return min(self.kind.num_seqs or NUM_SEQS, self.batch_tokens)

    def __str__(self) -> str:
        return f"{self.replicas} x {self.role} ({self.kind})"


@dataclass(frozen=True, slots=True)
class Plan:
    """pools: of different roles. is_near: prefill and decode workers that hand over to each other share nodes
    (DistServe, Algorithm 2)."""

    pools: tuple[Pool, ...]
    is_near: bool = False

    @property
    def devices(self) -> int:
        return sum(pool.devices for pool in self.pools)

    @property
    def is_disaggregated(self) -> bool:
        return any(pool.role is Role.PREFILL for pool in self.pools)

    @property
    def policy(self) -> str:
        return "goodput"

    def cost(self, objective: Objective) -> float:
        return sum(objective.of(pool.kind) * pool.replicas for pool in self.pools)

    def unit(self) -> tuple[Plan, int]:
        """The smallest plan of the same proportions, and how many of it this one is."""
        times = math.gcd(*(pool.replicas for pool in self.pools))
        pools = tuple(replace(pool, replicas=pool.replicas // times) for pool in self.pools)
        return replace(self, pools=pools), times

    def pool(self, role: Role) -> Pool | None:
        return next((pool for pool in self.pools if pool.role is role), None)

    def cluster(self, bytes_per_s: float) -> ClusterSpec:
        """As it is simulated. bytes_per_s: that a device sends of KV; a worker's devices send together."""
        workers: list[WorkerSpec] = []
        for pool in self.pools:
            kind = pool.kind
            spec = WorkerSpec(
                "", pool.role, kind.latency, kind.kv_tokens, kind.kv_bytes, kind.devices,
                max_batch_tokens=pool.batch_tokens, max_num_seqs=pool.num_seqs,
            )  # fmt: skip
            workers += [
                replace(spec, worker_id=f"{pool.role.value}-{index}") for index in range(pool.replicas)
            ]
        together = min(pool.kind.devices for pool in self.pools)
        network = NetworkSpec(bytes_per_s=bytes_per_s * together)
        return ClusterSpec(workers, self.policy, network, retry_s=RETRY_S)

    def to_json(self) -> dict[str, Any]:
        """By role: tp, pp, replicas, gpu."""
        return {
            pool.role.value: {
                "tp": pool.kind.tp,
                "pp": pool.kind.pp,
                "replicas": pool.replicas,
                "gpu": pool.kind.gpu.name,
            }
            for pool in self.pools
        }

    def __str__(self) -> str:
        return " + ".join(map(str, self.pools))


def serve_config(plan: Plan, model: Mapping[str, Any], slo: Mapping[str, float]) -> dict[str, Any]:
    """The configuration of `prelay serve` that the plan is. model: what is known of its section. slo: ttft_s
    and tpot_s."""
    config: dict[str, Any] = {"model": dict(model)} if model else {}
    for role in Role:
        pool = plan.pool(role)
        config[role.value] = {"replicas": 0}
        if pool is not None:
            config[role.value] = {
                "replicas": pool.replicas,
                "tensor_parallel": pool.kind.tp,
                "pipeline_parallel": pool.kind.pp,
                "max_batch_tokens": pool.batch_tokens,
                "kv_cache_tokens": pool.kind.kv_tokens,
                **({"max_num_seqs": pool.num_seqs} if role.writes else {}),
            }
    config["router"] = {"policy": plan.policy}
    config["slo"] = {"default": "planned", "classes": {"planned": dict(slo)}}
    return config
