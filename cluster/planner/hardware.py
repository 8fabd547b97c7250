"""Devices, nodes and links.

Figures are those of the makers' data sheets (dense bfloat16, one direction of a link); prices differ from one
provider to the next and from month to month, so there are none unless somebody gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from cluster.planner.errors import HardwareError


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory_bytes; flops and bytes_per_s of arithmetic and memory at best; link_bytes_per_s: to the others
    of its node. watts, price: None if not known; of an hour."""

    name: str
    memory_bytes: float
    flops: float
    bytes_per_s: float
    link_bytes_per_s: float
    watts: float | None = None
    price: float | None = None


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("a100-40g", 40e9, 312e12, 1.555e12, 300e9, 400),
            Gpu("a100-80g", 80e9, 312e12, 2.039e12, 300e9, 400),
            Gpu("h100-80g", 80e9, 989e12, 3.35e12, 450e9, 700),
            # Held to half of its power; of a machine with eight of them that leaves seven tenths (Splitwise).
            Gpu("h100-80g-capped", 80e9, 989e12, 3.35e12, 450e9, 490),
            Gpu("h200-141g", 141e9, 989e12, 4.8e12, 450e9, 700),
            Gpu("l40s-48g", 48e9, 362e12, 0.864e12, 32e9, 350),
            Gpu("a10g-24g", 24e9, 70e12, 0.6e12, 32e9, 300),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Devices:
    """So many devices of one kind."""

    gpu: Gpu
    count: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """devices: of each kind. per_node: devices of a node. inter_bytes_per_s: of a device to those of other
    nodes."""

    devices: Sequence[Devices]
    per_node: int = 8
    inter_bytes_per_s: float = 25e9

    def __post_init__(self) -> None:
        if not self.devices or any(one.count < 1 for one in self.devices):
            raise HardwareError("there must be a device at least; write it as a100-80g:8")
        if not self.inter_bytes_per_s > 0 or math.isinf(self.inter_bytes_per_s):
            raise HardwareError("the bandwidth between nodes must be a number above 0")
        if self.per_node < 1:
            raise HardwareError(f"{self.per_node} devices in a node: there must be one at least")

    @property
    def count(self) -> int:
        return sum(one.count for one in self.devices)


def parse_devices(text: str, *, unknown_link: float | None = None) -> list[Devices]:
    """`a100-80g:16,h100-80g:8`, where a kind may be followed by a price an hour, as in `a100-80g:16:1.8`.
    unknown_link: bytes/s of links between devices of which nothing is known but how long steps take, whatever
    they are called; None refuses these. Raises HardwareError."""
    found: list[Devices] = []
    for part in text.split(","):
        name, _, rest = part.strip().partition(":")
        count, _, price = rest.partition(":")
        gpu = GPUS.get(name)
        if gpu is None and name and unknown_link is not None:
            gpu = Gpu(name, 0.0, 0.0, 0.0, unknown_link)
        if gpu is None:
            raise HardwareError(
                f"--gpus {text!r}: nothing is known of {name!r}; there are {', '.join(sorted(GPUS))}"
            )
        if not (count.isascii() and count.isdigit() and int(count) > 0):
            raise HardwareError(f"--gpus {text!r}: how many of {name}? Write it as {name}:8")
        if price:
            gpu = replace(gpu, price=_price(text, price))
        found.append(Devices(gpu, int(count)))
    return found


def _price(text: str, price: str) -> float:
    try:
        value = float(price)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise HardwareError(f"--gpus {text!r}: {price!r} is not a price an hour, a number above 0")
    return value
