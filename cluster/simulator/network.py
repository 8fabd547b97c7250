"""How long KV travels: every worker sends and receives one part at a time. A core."""

from __future__ import annotations

from cluster.simulator.cluster_spec import NetworkSpec


class Network:
    """When what is sent has arrived. Parts are booked in the order of the calls."""

    def __init__(self, spec: NetworkSpec) -> None:
        self._spec = spec
        self._sends_until: dict[str, float] = {}
        self._receives_until: dict[str, float] = {}

    def send(self, sender: str, receiver: str, num_bytes: int, at: float) -> float:
        """When the last byte is there of a part that is ready `at`."""
        begins = max(at, self._sends_until.get(sender, 0.0), self._receives_until.get(receiver, 0.0))
        ends = begins + self._spec.part_s + num_bytes / self._spec.bytes_per_s
        self._sends_until[sender] = self._receives_until[receiver] = ends
        return ends
