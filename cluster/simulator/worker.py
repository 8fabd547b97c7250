"""What readers and writers have in common: commands between steps, steps as long as there is work, beats.

The shell of a worker in virtual time, as engine/loop.py and engine/router_stream.py are in the real one: what
has come is taken into account between steps, and a worker says how it is when an answer has ended or
heartbeat_s after it did last.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from cluster.simulator.clock import Clock
from cluster.simulator.cluster_spec import ClusterSpec, WorkerSpec
from engine.block_pool import BlockPool
from engine.latency import LatencyModel, OnlineLatency, StepShape
from engine.prefix_cache import PrefixCache
from engine.step_log import MAX_STEPS
from router.pool_view import Load, WorkerCapacity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.simulator.router import Router

_GOLDEN = 0.618034
_FINGERPRINT = "simulated"


class KnownLatency(OnlineLatency):
    """Of steps that take exactly what their model says: there is nothing to learn from them."""

    __slots__ = ()

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Nothing: rounding errors are no news."""

    def observe_run(self, batch: int, context: int, seconds: Iterable[float]) -> None:
        """Nothing, too."""


class UnsharedCache(PrefixCache):
    """Of workloads in which no prompt begins like another: nothing is known, so nothing is found."""

    def digests(self, token_ids: Sequence[int], salt: str) -> list[bytes]:
        return []


class Machine:
    """How long steps really take."""

    def __init__(self, model: LatencyModel, noise: float, seed: str) -> None:
        self.model = model
        self.noise = noise
        self._rng = random.Random(seed)

    def online(self) -> OnlineLatency:
        """What is known of it."""
        return OnlineLatency(self.model) if self.noise else KnownLatency(self.model)

    def step_s(self, shape: StepShape) -> float:
        return self._spread(self.model.step_s(shape))

    def decode_run_s(self, batch: int, context: int, count: int) -> list[float]:
        """Steps one after the other, a token longer each."""
        found = self.model.decode_run_s(batch, context, count)
        return [self._spread(seconds) for seconds in found] if self.noise else found

    def _spread(self, seconds: float) -> float:
        return seconds * self._rng.lognormvariate(0.0, self.noise) if self.noise else seconds


class Worker(ABC):
    """One life of a worker. index: among all, which spreads their beats over time."""

    def __init__(
        self, spec: WorkerSpec, cluster: ClusterSpec, clock: Clock, router: Router, index: int, shares: bool
    ) -> None:
        self.spec = spec
        self.clock = clock
        self.router = router
        self.machine = Machine(spec.latency, cluster.noise, f"{spec.worker_id}/{index}")
        self.pool = BlockPool(spec.num_blocks, spec.block_size, [0] * spec.num_blocks)
        self.cache = (PrefixCache if shares else UnsharedCache)(self.pool, _FINGERPRINT)
        self.is_up = True
        self._message_s = cluster.network.message_s
        self._heartbeat_s = cluster.heartbeat_s
        self._inbox: list[Callable[[], None]] = []
        # Since it said how it is, each with its number; some of a run are only counted.
        self._steps: list[tuple[int, StepShape, float]] = []
        self._num_steps = 0
        self._is_busy = False
        self._commands_seen = 0
        self._is_beating = False
        self._has_news = False
        self._beat_at = (index * _GOLDEN % 1.0) * cluster.heartbeat_s

    @property
    def worker_id(self) -> str:
        return self.spec.worker_id

    @property
    def capacity(self) -> WorkerCapacity:
        spec = self.spec
        blocks = spec.block_size, spec.num_blocks
        return WorkerCapacity(*blocks, spec.max_num_seqs, spec.max_batch_tokens, _FINGERPRINT)

    def command(self, number: int, what: Callable[[], None]) -> None:
        """Of the router, which counts them."""

        def heard() -> None:
            self._commands_seen = number
            what()

        self.tell(heard)

    def tell(self, what: Callable[[], None]) -> None:
        """Something has come: it takes effect when the step under way is over."""
        if not self.is_up:
            return
        self._inbox.append(what)
        if self._is_busy:
            self._interrupt()
        else:
            self._go_on()

    def die(self) -> None:
        """With all that it holds. What it said before is still on its way."""
        self.is_up = False
        self._inbox.clear()

    @abstractmethod
    def load(self) -> Load:
        """How it is."""

    @abstractmethod
    def _begin(self) -> bool:
        """Begins a step at whose end `_step_over` is called; False if there is nothing to do."""

    @abstractmethod
    def _interrupt(self) -> None:
        """Something waits for the end of the step under way."""

    def _step_over(self, shape: StepShape, seconds: float) -> None:
        self._num_steps += 1
        self._steps = [*self._steps[1 - MAX_STEPS :], (self._num_steps, shape, seconds)]
        self._is_busy = False
        self._go_on()

    def _go_on(self) -> None:
        for what in self._inbox:
            what()
        self._inbox.clear()
        self._is_busy = self._begin()
        self._has_news = True
        self._tell_blocks()
        if not self._is_beating:
            self._is_beating = True
            periods = math.ceil(max(0.0, self.clock.now - self._beat_at) / self._heartbeat_s)
            self._beat_at += periods * self._heartbeat_s
            self.clock.at(self._beat_at, self._beat)

    def push(self) -> None:
        """Says how it is now."""
        self._beat_at = self.clock.now + self._heartbeat_s
        self._has_news = self._is_busy
        load = self.load()
        steps = [
            (shape, seconds) for number, shape, seconds in self._steps if number > self._num_steps - MAX_STEPS
        ]
        self._steps = []
        self.router.after_message(lambda: self.router.snapshot(self.worker_id, load, steps))

    def _tell_blocks(self) -> None:
        """What has changed in the prefix cache."""
        changes = self.cache.take_changes()
        if changes:
            self.router.after_message(
                lambda: self.router.blocks(self.worker_id, changes.stored, changes.removed)
            )

    def _beat(self) -> None:
        if not self.is_up:
            return
        if self.clock.now < self._beat_at:  # it was pushed meanwhile
            self.clock.at(self._beat_at, self._beat)
        elif self._has_news:
            self.push()
            self.clock.at(self._beat_at, self._beat)
        else:
            self._is_beating = False
