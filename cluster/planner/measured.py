"""Kinds of workers of which somebody has measured how long their steps take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planner.errors import NoPlanError
from cluster.planner.hardware import Hardware
from cluster.planner.kinds import Kind
from cluster.simulator.distserve_profile import DistServeProfile, StepTimes
from engine.latency import LatencyModel, StepShape
from engine.latency_fit import Sample, fit

_PREFILLS = (64, 128, 256, 512, 1024, 2048, 4096)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 94, 95, 128, 192, 256)
_CONTEXTS = (64, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class MeasuredKinds:
    """Of a model of DistServe's profiles; all devices are of the one kind that was measured. kv_bytes: of a
    token, which the profile does not say."""

    profile: DistServeProfile
    model: str
    hardware: Hardware
    kv_bytes: int

    def kinds(self, longest: int) -> Sequence[Kind]:
        """Raises NoPlanError."""
        gpu = self.hardware.devices[0].gpu
        splits = self.profile.splits(self.model)
        found = []
        for tp, pp in splits:
            if tp <= self.hardware.per_node and tp * pp <= self.hardware.count:
                times = self.profile.step_times(self.model, tp, pp)
                if times.capacity >= longest:
                    latency = latency_of(times)
                    found.append(Kind(gpu, tp, pp, latency, times.capacity, self.kv_bytes, True, times))
        if not found:
            measured = ", ".join(f"TP{tp} PP{pp}" for tp, pp in splits)
            raise NoPlanError(
                f"{self.model}: no measured split ({measured}) fits on {self.hardware.count} devices with a "
                f"sequence of {longest} tokens; give more devices, or leave long requests out (--max-tokens)"
            )
        return found


@dataclass(frozen=True, slots=True)
class WorkerKinds:
    """The one kind that prelay has measured itself: a worker as it is, which counts as one device."""

    latency: LatencyModel
    kv_tokens: int
    kv_bytes: int
    hardware: Hardware

    def kinds(self, longest: int) -> Sequence[Kind]:
        """Raises NoPlanError."""
        if self.kv_tokens < longest:
            raise NoPlanError(
                f"a worker holds {self.kv_tokens} tokens, and the longest sequence has {longest}: give "
                "it more room (--kv-tokens), or leave long requests out (--max-tokens)"
            )
        gpu = self.hardware.devices[0].gpu
        return [Kind(gpu, 1, 1, self.latency, self.kv_tokens, self.kv_bytes, is_measured=True)]


def latency_of(times: StepTimes) -> LatencyModel:
    """The same step times as a model that production's cores take. A step passes all stages one after the
    other; what the first one costs more for Ray, it does not cost here.

    Of two lines by the size of the batch it makes one that bends, and so is off where they do not meet.
    """
    samples = [
        Sample(StepShape(((length, 0),)), times.pp * times.prefill_s([length], is_first=False))
        for length in _PREFILLS
    ]
    for batch, each in itertools.product(_BATCHES, _CONTEXTS):
        seconds = times.pp * times.decode_s(batch, batch * each, is_first=False)
        samples.append(Sample(StepShape((), batch, batch * each), seconds))
    return fit(samples)
