"""What is simulated: workers, the network between them, the router's settings, and what breaks when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.latency import LatencyModel
from router.pool_view import Role
from router.pump import RETRY_S


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker, which may hold several devices.

    latency: of its steps, all its devices together. kv_tokens: room of its KV cache. kv_bytes: of a token, as
    they travel. max_num_seqs: of who decodes; at least 1. The names are those of `prelay serve`.
    """

    worker_id: str
    role: Role
    latency: LatencyModel
    kv_tokens: int
    kv_bytes: int
    devices: int = 1
    block_size: int = 16
    max_batch_tokens: int = 512
    max_num_seqs: int = 64

    @property
    def num_blocks(self) -> int:
        return max(1, self.kv_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """message_s: of a message one way, between a router and a worker or between two workers. bytes_per_s: of
    KV that a worker sends, and that a worker receives; whoever shares them waits. part_s: of each part of a
    hand-off, however small."""

    message_s: float = 0.0005
    bytes_per_s: float = 10e9
    part_s: float = 0.0002


@dataclass(frozen=True, slots=True)
class Fault:
    """A worker dies at at_s, with all that it holds, and is back down_s later."""

    worker_id: str
    at_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """policy, max_gated_requests, retry_after_s, max_attempts: as of `prelay serve`. heartbeat_s: after which
    a worker says how it is, if it has not. retry_s: after which the router looks again at those that wait, if
    nothing has happened; the real one's by default, and what takes most of a simulation's time in overload.
    timeout_s: after which a client gives up. noise: standard
    deviation of the logarithm of a step's time over what its latency model says."""

    workers: Sequence[WorkerSpec]
    policy: str = "goodput"
    network: NetworkSpec = field(default_factory=NetworkSpec)
    heartbeat_s: float = 0.25
    retry_s: float = RETRY_S
    max_gated_requests: int = 1024
    retry_after_s: float = 1.0
    max_attempts: int = 6
    timeout_s: float = 120.0
    noise: float = 0.0
    faults: Sequence[Fault] = ()

    @property
    def devices(self) -> int:
        return sum(worker.devices for worker in self.workers)
