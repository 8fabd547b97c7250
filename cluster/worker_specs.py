"""From a configuration to the specs of workers: those that are started, those that join later, and what a
worker is in another role."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from prelay.v1 import worker_pb2

from cluster.config import ServeConfig
from cluster.host_spec import HostSpec
from cluster.latency_profile import read_profile
from cluster.roles import ROLE_NAMES
from cluster.sections import PoolSection, WritingSection

_BEATS_PER_TIMEOUT = 6
"""Snapshots that may be lost or late before a worker counts as dead."""


def worker_specs(config: ServeConfig) -> list[HostSpec]:
    """Every worker of a checked configuration, pool by pool, with the slots of cores in that order.

    Raises ConfigError if model.profile cannot be used.
    """
    specs: list[HostSpec] = []
    for role, name in ROLE_NAMES.items():
        for index in range(config.pools[name].replicas):
            slot = sum(spec.num_cpus for spec in specs)
            specs.append(worker_spec(config, role, f"{name}-{index}", slot))
    return specs


def another_worker(config: ServeConfig, role: worker_pb2.Role, others: Collection[HostSpec]) -> HostSpec:
    """One more, beside those that there are. It gets the first slots that are nobody's, and as much room for
    KV as its pool has, or another if that one has never been sized. Raises ConfigError."""
    names = {spec.worker_id for spec in others}
    taken = {slot for spec in others for slot in range(spec.first_slot, spec.first_slot + spec.num_cpus)}
    index = next(i for i in range(len(others) + 1) if f"{ROLE_NAMES[role]}-{i}" not in names)
    spec = worker_spec(config, role, f"{ROLE_NAMES[role]}-{index}", 0)
    slot = next(i for i in range(max(taken, default=-1) + 2) if not taken & set(range(i, i + spec.num_cpus)))
    return replace(spec, first_slot=slot, slots=max([slot + spec.num_cpus, *(one.slots for one in others)]))


def named_worker(config: ServeConfig, worker_id: str) -> HostSpec:
    """One that the configuration names, or that has joined since. Raises ConfigError."""
    for spec in worker_specs(config):
        if spec.worker_id == worker_id:
            return spec
    role = next(role for role, name in ROLE_NAMES.items() if name == worker_id.rpartition("-")[0])
    return worker_spec(config, role, worker_id, 0)


def worker_spec(config: ServeConfig, role: worker_pb2.Role, worker_id: str, slot: int) -> HostSpec:
    """Of one worker of a pool. slot: its first."""
    model, pool, block_size = config.model, config.pools[ROLE_NAMES[role]], config.kv.block_size
    assert model.path is not None
    assert model.name is not None
    assert model.max_model_len is not None
    sized = (pool.kv_cache_tokens, *(other.kv_cache_tokens for other in config.pools.values()))
    kv_cache_tokens = next(tokens for tokens in sized if tokens is not None)
    return HostSpec(
        worker_id=worker_id,
        epoch=0,
        role=role,
        checkpoint=model.path,
        model_name=model.name,
        max_model_len=model.max_model_len,
        dtype=model.dtype,
        load=model.load,
        block_size=block_size,
        num_blocks=-(-kv_cache_tokens // block_size),
        tp_size=pool.tensor_parallel,
        pp_size=pool.pipeline_parallel,
        threads=pool.threads,
        first_slot=slot,
        slots=config.num_cpus,
        max_batch_tokens=_max_batch_tokens(config, role),
        max_num_seqs=_max_num_seqs(pool),
        most_batch_tokens=max(_max_batch_tokens(config, other) for other in ROLE_NAMES),
        heartbeat_s=config.router.liveness_timeout_s / _BEATS_PER_TIMEOUT,
        lease_s=config.transfer.lease_s,
        digest_share=config.transfer.digest_share,
        backend=config.transfer.backend,
        latency={} if model.profile is None else dict(read_profile(model.profile).coefficients),
        resources=pool.resources,
        labels=pool.labels,
    )


def unmeasured(config: ServeConfig, spec: HostSpec) -> HostSpec:
    """The same worker, whose steps may take another time from now on: its next life measures them, unless
    there is a profile."""
    profile = config.model.profile
    return replace(spec, latency={} if profile is None else dict(read_profile(profile).coefficients))


def in_role(config: ServeConfig, spec: HostSpec, role: worker_pb2.Role) -> HostSpec:
    """The same worker in another role: with the limits of that pool, its own ranks and room for KV.

    A prefill worker has not measured how long decode steps take, so it measures again.
    """
    measures = spec.role == worker_pb2.ROLE_PREFILL and config.model.profile is None
    return replace(
        spec,
        role=role,
        max_batch_tokens=_max_batch_tokens(config, role),
        max_num_seqs=_max_num_seqs(config.pools[ROLE_NAMES[role]]),
        latency={} if measures else spec.latency,
    )


def _max_batch_tokens(config: ServeConfig, role: worker_pb2.Role) -> int:
    if role == worker_pb2.ROLE_PREFILL:
        return config.prefill.max_batch_tokens
    return (config.mixed if role == worker_pb2.ROLE_MIXED else config.decode).max_batch_tokens


def _max_num_seqs(pool: PoolSection) -> int:
    return pool.max_num_seqs if isinstance(pool, WritingSection) else 0
