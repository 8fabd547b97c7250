"""What a snapshot says of the steps since the one before it. A core."""

from __future__ import annotations

import random
from dataclasses import dataclass

from prelay.v1 import worker_pb2

from engine.latency import StepShape

MAX_STEPS = 4
"""Told of one snapshot to the next: enough to follow a drift, and few enough to cost nothing."""


@dataclass(frozen=True, slots=True)
class Step:
    """An engine step that was run, and how long it took."""

    shape: StepShape
    seconds: float


class StepLog:
    """The latest step, and of those before it a sample in which each is as likely as any other: what is
    learned from them must not depend on the rhythm of snapshots.

    dice: of its own.
    """

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._latest: Step | None = None
        self._sample: list[Step] = []
        self._num_passed = 0

    def add(self, step: Step) -> None:
        passed, self._latest = self._latest, step
        if passed is None:
            return
        self._num_passed += 1
        if len(self._sample) < MAX_STEPS - 1:
            self._sample.append(passed)
        # Vitter's reservoir (1985, algorithm R).
        elif (place := self._dice.randrange(self._num_passed)) < len(self._sample):
            self._sample[place] = passed

    def take(self) -> list[worker_pb2.StepTime]:
        """Those since the last call, the latest one last."""
        steps = [*self._sample, *([] if self._latest is None else [self._latest])]
        self._latest, self._sample, self._num_passed = None, [], 0
        return [_message(step) for step in steps]


def _message(step: Step) -> worker_pb2.StepTime:
    shape = step.shape
    return worker_pb2.StepTime(
        new_tokens=[new for new, _ in shape.prefill],
        cached_tokens=[cached for _, cached in shape.prefill],
        decode_requests=shape.decode_batch,
        decode_context=shape.decode_context,
        seconds=step.seconds,
    )
