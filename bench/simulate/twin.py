"""The simulated cluster that a configuration of `prelay serve` describes: same workers, same policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.simulate.kv import kv_bytes
from cluster.config import ServeConfig
from cluster.sections import PrefillSection, WritingSection
from cluster.simulator.cluster_spec import ClusterSpec, NetworkSpec, WorkerSpec
from cluster.workload.errors import BadInputError
from engine.config import ModelConfig
from engine.latency import LatencyModel
from router.pool_view import Role


@dataclass(frozen=True, slots=True)
class Correction:
    """reading, writing: how many times as long as in the profile the steps of workers last that read
    prompts, and that write answers. message_s: of a message one way."""

    reading: float = 1.0
    writing: float = 1.0
    message_s: float = 0.0005

    def to_json(self) -> dict[str, float]:
        return {"reading": self.reading, "writing": self.writing, "message_s": self.message_s}


@dataclass(frozen=True, slots=True)
class Twin:
    """config: of the real one. profile: of a worker alone."""

    config: ServeConfig
    profile: LatencyModel
    correction: Correction

    def cluster(self, timeout_s: float) -> ClusterSpec:
        """timeout_s: after which clients give up. Raises BadInputError if the configuration leaves open how
        much a worker holds, or if one profile cannot be that of all workers."""
        router = self.config.router
        used = [pool for pool in self.config.pools.values() if pool.replicas]
        if len({(pool.num_ranks, pool.threads) for pool in used}) > 1:
            raise BadInputError(
                "workers of different numbers of ranks or threads cannot be simulated with one profile"
            )
        return ClusterSpec(
            list(self._workers()),
            router.policy,
            NetworkSpec(message_s=self.correction.message_s),
            max_gated_requests=router.max_gated_requests,
            retry_after_s=router.retry_after_s,
            max_attempts=router.max_attempts,
            timeout_s=timeout_s,
        )

    def worker(self, role: Role) -> WorkerSpec:
        """One of that role, without a name. Raises BadInputError as `cluster`."""
        config, pool = self.config, self.config.pools[role.value]
        if pool.kv_cache_tokens is None:
            raise BadInputError(
                f"{role.value}.kv_cache_tokens is not given, so nobody knows what a simulated worker "
                "holds; give it in `common` of the experiment"
            )
        assert config.model.path is not None
        assert isinstance(pool, PrefillSection | WritingSection)
        kv = kv_bytes(ModelConfig.from_pretrained(config.model.path), config.model.dtype)
        factor = self.correction.reading if role is Role.PREFILL else self.correction.writing
        return WorkerSpec(
            "", role, self.profile.times(factor), pool.kv_cache_tokens, kv,
            pool.num_ranks * pool.threads, block_size=config.kv.block_size,
            max_batch_tokens=pool.max_batch_tokens,
            max_num_seqs=pool.max_num_seqs if isinstance(pool, WritingSection) else 1,
        )  # fmt: skip

    def _workers(self) -> Iterator[WorkerSpec]:
        for role in Role:
            replicas = self.config.pools[role.value].replicas
            spec = self.worker(role) if replicas else None
            for index in range(replicas):
                assert spec is not None
                yield replace(spec, worker_id=f"{role.value}-{index}")
