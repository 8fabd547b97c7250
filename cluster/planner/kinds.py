"""Kinds of workers that a plan can be made of: which devices, how split, and what that gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.planner.errors import NoPlanError
from cluster.planner.hardware import Gpu, Hardware
from cluster.planner.memory import footprint
from cluster.planner.roofline import Roofline
from cluster.simulator.distserve_profile import StepTimes
from engine.config import ModelConfig
from engine.errors import UnsupportedModelError
from engine.latency import LatencyModel

_TP = (1, 2, 4, 8, 16)
_PP = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class Kind:
    """A worker. latency: of its steps. kv_tokens: room of its KV cache. kv_bytes: of a token as it travels.
    times: its step times as DistServe's simulator has them, if they are known. is_measured: or reckoned.
    batch_tokens, num_seqs: most tokens and sequences of a step; None leaves them to the planner."""

    gpu: Gpu
    tp: int
    pp: int
    latency: LatencyModel = field(compare=False)
    kv_tokens: int
    kv_bytes: int
    is_measured: bool
    times: StepTimes | None = field(default=None, compare=False)
    batch_tokens: int | None = None
    num_seqs: int | None = None

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"{self.gpu.name} TP{self.tp}" + (f" PP{self.pp}" if self.pp > 1 else "")


class Kinds(Protocol):
    """All that a plan may use."""

    def kinds(self, longest: int) -> Sequence[Kind]:
        """Those that hold a sequence of so many tokens. Raises NoPlanError if there is none."""


@dataclass(frozen=True, slots=True)
class ReckonedKinds:
    """Of a model on hardware, from first principles."""

    model: ModelConfig
    hardware: Hardware
    dtype: str = "bfloat16"

    def kinds(self, longest: int) -> Sequence[Kind]:
        found: list[Kind] = []
        most = 0
        for devices in self.hardware.devices:
            gpu = devices.gpu
            for tp in _TP:
                for pp in _PP:
                    if tp > self.hardware.per_node or tp * pp > devices.count:
                        continue
                    kv_tokens = self._kv_tokens(gpu, tp, pp)
                    most = max(most, kv_tokens or 0)
                    if kv_tokens is not None and kv_tokens >= longest:
                        found.append(self._kind(gpu, tp, pp))
        if not found:
            raise NoPlanError(self._why_none(longest, most))
        return found

    def _kv_tokens(self, gpu: Gpu, tp: int, pp: int) -> int | None:
        try:
            return footprint(self.model, tp, pp, gpu.memory_bytes, self.dtype).kv_tokens
        except UnsupportedModelError:
            return None

    def _kind(self, gpu: Gpu, tp: int, pp: int) -> Kind:
        size = footprint(self.model, tp, pp, gpu.memory_bytes, self.dtype)
        in_node = tp * pp <= self.hardware.per_node
        link = gpu.link_bytes_per_s if in_node else self.hardware.inter_bytes_per_s
        latency = Roofline(self.model, gpu, tp, pp, link, self.dtype).latency()
        return Kind(gpu, tp, pp, latency, size.kv_tokens, size.kv_bytes, is_measured=False)

    def _why_none(self, longest: int, most: int) -> str:
        whole = footprint(self.model, 1, 1, 1e18, self.dtype)
        needed = (whole.weight_bytes + longest * whole.kv_bytes) / 1e9
        largest = max(one.gpu.memory_bytes for one in self.hardware.devices) / 1e9
        together = sum(one.gpu.memory_bytes * one.count for one in self.hardware.devices) / 1e9
        return (
            f"the model fits on no plan: with a sequence of {longest} tokens it needs {needed:.1f} GB, and "
            f"these {self.hardware.count} devices have {together:.0f} GB, {largest:.0f} GB each at most, "
            f"nine tenths of it for that; the best way to split it leaves room for {most} tokens. Give more "
            "or larger devices, or leave long requests out (--max-tokens)"
        )
