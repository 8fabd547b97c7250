"""What one life of one worker is made from; it travels from the launcher to the worker's process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from prelay.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class HostSpec:
    """Everything that one life of one worker needs to know.

    threads: of each rank. first_slot, slots: which of its node's cores are its own (`cores.share_cores`).
    max_batch_tokens, max_num_seqs: of a step, in this role (max_num_seqs: 0 for prefill). most_batch_tokens:
    in any role that it may be given. backend: see transfer.backends.make_backends. latency: coefficients of
    engine.latency.LatencyModel; empty if it is to measure its steps itself. resources, labels: of the nodes
    that it may be on. secret: without which nobody may dial it, and with which it dials others; none if it is
    empty. tls: directory of the certificates for the same (engine.tls); None is without TLS.
    """

    worker_id: str
    epoch: int
    role: worker_pb2.Role
    checkpoint: Path
    model_name: str
    max_model_len: int
    dtype: str
    load: str
    block_size: int
    num_blocks: int
    tp_size: int
    pp_size: int
    threads: int
    first_slot: int
    slots: int
    max_batch_tokens: int
    max_num_seqs: int
    most_batch_tokens: int
    heartbeat_s: float
    lease_s: float
    digest_share: float
    backend: str
    latency: Mapping[str, float]
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    secret: str = field(default="", repr=False)
    tls: Path | None = None

    def to_wire(self) -> dict[str, Any]:
        """What any version of prelay can read: those that it does not know it leaves out."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> HostSpec:
        """Of what another version of prelay has written, perhaps."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in wire.items() if name in known})

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def num_cpus(self) -> int:
        return self.num_ranks * self.threads

    @property
    def is_simulated(self) -> bool:
        """Whether its steps only take their time."""
        return self.load == "simulated"
