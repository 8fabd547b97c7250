"""Watches what comes and what the workers are, and changes their roles, or says when it would.

Every tick: what the router has seen lately (rate, lengths of prompts and answers) is simulated with the shape
that there is and, unless that is good enough, with those that a few changes of role lead to, by the workers'
own step times; role_decider.py decides. All that a decision was made from is a line of JSON in the log.
Simulations run in a process of their own that gives way to everybody else. What goes wrong with them is said,
and nothing else is the worse for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from cluster.config import ServeConfig
from cluster.errors import ClusterError
from cluster.planner.errors import PlanError
from cluster.planner.live import Live
from cluster.planner.question import Question
from cluster.reporter import Reporter
from cluster.reshape import Reshape
from cluster.role_decider import Decision, RoleDecider, Shape, SizeDecider, Verdict
from cluster.role_forecast import forecast, foresee, question_about
from cluster.roles import ROLE_NAMES
from cluster.router_admin import Routers
from cluster.simulator.errors import SimulationError
from engine.latency import ProfileError
from router.pool_view import Role

TICK_S = 10.0
DRAIN_S = 30.0
_NICE = 19


class RoleController:
    """acts: whether it changes roles, or only says that it would. sizes: decides how many workers there are;
    None leaves them as many."""

    def __init__(
        self,
        router: Routers,
        reshape: Reshape,
        reporter: Reporter,
        *,
        acts: bool,
        sizes: SizeDecider | None = None,
        tick_s: float = TICK_S,
    ) -> None:
        self._router = router
        self._reshape = reshape
        self._reporter = reporter
        self._acts = acts
        self._tick_s = tick_s
        self._decider = RoleDecider()
        self._sizes = sizes

    async def keep(self) -> None:
        """For ever."""
        while True:
            executor = ProcessPoolExecutor(1, get_context("spawn"), os.nice, (_NICE,))
            try:
                while True:
                    await asyncio.sleep(self._tick_s)
                    if not self._reshape.changing.locked():
                        await self._look(executor)
            except BrokenExecutor as error:
                self._reporter.event(f"controller: its process has ended ({error}); another one is started")
            finally:
                executor.shutdown(wait=False, cancel_futures=True)

    async def _look(self, executor: ProcessPoolExecutor) -> None:
        try:
            status, workload = await self._router.status(), await self._router.workload()
            live = Live.of("the router", status, workload)
            asked, kinds = question_of(live), live.kinds()
            _, rate = live.latest
        except (ClusterError, PlanError, ProfileError):
            return  # too little has come yet, or the router is gone, which is seen elsewhere
        present = shape_of(live)
        if not present.can_serve or rate <= 0 or not self._reshape.is_settled:
            return
        run = partial(asyncio.get_running_loop().run_in_executor, executor)
        try:
            forecasts = await run(foresee, asked, kinds, present, rate, self._decider.delta)
            decision = self._decider.look(time.monotonic(), present, forecasts)
            if self._sizes is not None and decision.verdict is not Verdict.STAY:
                self._sizes.stay(time.monotonic())
            elif self._sizes is not None:
                share = forecasts[present]
                others = self._sizes.candidates(present, share)
                shares = await run(forecast, asked, kinds, others, rate) if others else []
                forecasts = {present: share, **dict(zip(others, shares, strict=True))}
                decision = self._sizes.look(time.monotonic(), present, forecasts)
        except SimulationError as error:
            self._reporter.event(f"controller: what came cannot be simulated: {error}")
            return
        if decision.verdict is not Verdict.STAY:
            self._reporter.event(said(decision, present, forecasts, live, acts=self._acts))
        if decision.verdict is Verdict.CHANGE and self._acts and not self._reshape.changing.locked():
            await self._change(present, decision.best)

    async def _change(self, present: Shape, best: Shape) -> None:
        wanted = {role: getattr(best, name) for role, name in ROLE_NAMES.items()}
        more = [role for role, name in ROLE_NAMES.items() if wanted[role] > getattr(present, name)]
        if best.size > present.size and not await self._reshape.has_room(more[0]):
            self._reporter.event(
                f"controller: Ray has no room for another {ROLE_NAMES[more[0]]} worker: add a node, or lower "
                "controller.max_workers"
            )
            return
        async with self._reshape.changing:
            try:
                async for line in self._reshape.set_pools(wanted, DRAIN_S):
                    self._reporter.event(f"controller: {line}")
            except ClusterError as error:
                self._reporter.event(f"controller: {error}")


def size_decider(config: ServeConfig) -> SizeDecider | None:
    """None if the configuration wants no other number of workers than it begins with."""
    section, there = config.controller, sum(pool.replicas for pool in config.pools.values())
    least, most = section.min_workers or there, section.max_workers or there
    return None if least == most else SizeDecider(least, most, section.target)


def question_of(live: Live) -> Question:
    """What comes, within the limits of the busiest class. Raises PlanError if too little has come."""
    dataset, _ = live.latest
    return question_about(dataset, live.slo, live.hardware)


def shape_of(live: Live) -> Shape:
    """Of the workers that are up."""
    counts = Counter(ROLE_NAMES.get(worker.role) for worker in live.workers)
    return Shape(*(counts[role.value] for role in Role))


def said(decision: Decision, present: Shape, forecasts: dict[Shape, float], live: Live, *, acts: bool) -> str:
    """A line for the log, with all that the decision was made from."""
    dataset, rate = live.latest
    shapes = dataset.pool
    numbers = {
        "verdict": decision.verdict.value,
        "acts": acts,
        "why": decision.why,
        "present": str(present),
        "best": str(decision.best),
        "gain": round(decision.gain, 3),
        "forecasts": {str(shape): round(share, 3) for shape, share in forecasts.items()},
        "rate": round(rate, 3),
        "prompt_tokens": round(sum(one.prompt_tokens for one in shapes) / max(1, len(shapes))),
        "answer_tokens": round(sum(one.output_tokens for one in shapes) / max(1, len(shapes))),
    }
    return f"controller: {json.dumps(numbers)}"
