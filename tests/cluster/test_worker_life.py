"""The lives of one worker: epochs, restarts, and when to give up. Ray and the router are stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from prelay.v1 import worker_pb2
from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import ClusterError, ModelError, WorkerError
from cluster.host import Progress, StartReport
from cluster.host_spec import HostSpec
from cluster.ray_cluster import Left, Place, RayCluster
from cluster.router_process import RouterProcess
from cluster.worker_life import RestartPolicy, WorkerLife, life_of, next_epoch
from engine.errors import CheckpointError

TEMPLATE = HostSpec(
    worker_id="decode-0",
    epoch=0,
    role=worker_pb2.ROLE_DECODE,
    checkpoint=Path("model"),
    model_name="model",
    max_model_len=64,
    dtype="float32",
    load="weights",
    block_size=16,
    num_blocks=4,
    tp_size=2,
    pp_size=3,
    threads=4,
    first_slot=0,
    slots=1,
    max_batch_tokens=4,
    max_num_seqs=4,
    most_batch_tokens=4,
    heartbeat_s=0.25,
    lease_s=10.0,
    digest_share=0.0,
    backend="auto",
    latency={},
)
MEASURED = {"step": 0.25}
POLICY = RestartPolicy(backoff_s=0.0, max_backoff_s=0.0, max_failures=2, steady_s=60.0)


class FakeMethod:
    """Like the method of an actor's handle."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class FakeActor:
    """One life: it starts at once, or fails with `start_error`, and serves until `died` is set."""

    def __init__(self, spec: HostSpec, start_error: Exception | None) -> None:
        self.spec = spec
        self.died = asyncio.Event()
        self._start_error = start_error
        self.start = FakeMethod(self._start)
        self.progress = FakeMethod(self._progress)
        self.serving = FakeMethod(self._serving)
        self.become = FakeMethod(self._become)
        self.read_prompts = FakeMethod(self._read_prompts)
        self.life = FakeMethod(self._life)
        self.life_answer: Callable[[], Any] = lambda: (self.spec.to_wire(), self._report())
        self.become_error: Exception | None = None
        self.reads: list[bool] = []
        self.stop: FakeMethod

    async def _life(self) -> Any:
        return self.life_answer()

    async def _become(self, wire: dict[str, Any]) -> StartReport:
        self.spec = HostSpec.from_wire(wire)
        if self.become_error is not None:
            raise self.become_error
        return self._report()

    async def _read_prompts(self, *, reads: bool) -> None:
        self.reads.append(reads)

    async def _start(self) -> StartReport:
        if self._start_error is not None:
            raise self._start_error
        return self._report()

    def _report(self) -> StartReport:
        info = worker_pb2.WorkerInfo(
            worker_id=self.spec.worker_id,
            epoch=self.spec.epoch,
            pid=1,
            latency=MEASURED,
            role=self.spec.role,
        )
        return StartReport(info.SerializeToString(), kv_bytes=0, cores=(0,), cores_shared=False)

    async def _progress(self) -> Progress:
        return Progress("reading weights", 0.5)

    async def _serving(self) -> None:
        await self.died.wait()
        raise RayActorError


class FakeWorld:
    """RayCluster, RouterProcess and Reporter at once; what they are told is kept in order."""

    def __init__(self) -> None:
        self.on_register: Callable[[], Awaitable[None]] | None = None
        self.log: list[str] = []
        self.lives: asyncio.Queue[FakeActor] = asyncio.Queue()
        self.start_errors: list[Exception] = []
        self.unreachable = False

    async def place(self, spec: HostSpec) -> Place:
        assert spec.num_cpus == 2 * 3 * 4, "each of a worker's ranks needs CPUs for its threads"
        return Place(cast(Any, "group"), "node", None)

    async def where(self, group: object, spec: HostSpec) -> Place:
        return Place(cast(Any, group), "node", None)

    def held(self, group: object, node_id: str, spec: HostSpec) -> Place:
        return Place(cast(Any, group), node_id, spec.first_slot)

    async def spawn(
        self, actor_class: type, group: object, name: str, threads: int, wire: dict[str, Any]
    ) -> FakeActor:
        assert threads == 2 * 3 * 4
        spec = HostSpec.from_wire(wire)
        actor = FakeActor(spec, self.start_errors.pop(0) if self.start_errors else None)
        actor.stop = FakeMethod(self._stop)
        self.lives.put_nowait(actor)
        return actor

    async def _stop(self) -> bool:
        self.log.append("stop")
        return True

    async def kill(self, actor: FakeActor) -> None:
        self.log.append(f"kill {actor.spec.epoch}")

    async def end(self, actor: FakeActor, pid: int) -> None:
        self.log.append(f"end {actor.spec.epoch}")

    def log_of(self, pid: int) -> None:
        return None

    async def register(self, info: worker_pb2.WorkerInfo, secret: str) -> None:
        if self.on_register is not None:
            await self.on_register()
        if self.unreachable:
            raise WorkerError("the worker does not answer")
        self.log.append(f"register {info.epoch}")

    async def lost(self, worker_id: str, epoch: int) -> None:
        self.log.append(f"lost {epoch}")

    async def forget(self, worker_id: str, epoch: int) -> None:
        self.log.append(f"forget {epoch}")

    async def give_back(self, group: object, worker_id: str) -> None:
        self.log.append("give back")

    def progress(self, what: str, stage: str, fraction: float | None) -> None:
        pass

    def event(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass

    def life(self, now_ms: int, clock: Callable[[], float] = lambda: 0.0) -> WorkerLife:
        return WorkerLife(
            TEMPLATE,
            cast(RayCluster, self),
            cast(RouterProcess, self),
            self,
            POLICY,
            wall_clock_ns=lambda: now_ms * 1_000_000,
            clock=clock,
        )


def raised_in_actor(cause: Exception) -> Exception:
    """As Ray raises it in the caller: an instance of the cause's class, too."""
    error: Exception = RayTaskError("start", "", cause).as_instanceof_cause()  # type: ignore[no-untyped-call]
    return error


def test_epochs_grow_even_if_the_clock_does_not() -> None:
    assert next_epoch(0, 5_999_999) == 5
    assert next_epoch(5, 5_999_999) == 6
    assert next_epoch(9, 5_999_999) == 10


def test_delays_double_up_to_a_limit() -> None:
    policy = RestartPolicy(backoff_s=0.5, max_backoff_s=3.0)
    assert [policy.delay_s(failures) for failures in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


async def test_a_dead_worker_is_reported_and_lives_again_under_a_greater_epoch() -> None:
    world = FakeWorld()
    life = world.life(now_ms=7)
    live = await life.start()
    assert live.info.epoch == 7
    keeping = asyncio.create_task(life.keep_alive())
    (await world.lives.get()).died.set()
    second = await world.lives.get()
    second.died.set()
    third = await world.lives.get()
    assert third.spec.epoch == 9
    keeping.cancel()
    await asyncio.wait([keeping])
    assert world.log[:6] == ["register 7", "lost 7", "kill 7", "register 8", "lost 8", "kill 8"]


async def test_steps_are_measured_in_the_first_life_only() -> None:
    world = FakeWorld()
    life = world.life(now_ms=7)
    await life.start()
    keeping = asyncio.create_task(life.keep_alive())
    first = await world.lives.get()
    first.died.set()
    second = await world.lives.get()
    keeping.cancel()
    await asyncio.wait([keeping])
    assert (first.spec.latency, second.spec.latency) == ({}, MEASURED)


async def test_a_worker_that_the_router_lost_is_attached_again_in_the_same_life() -> None:
    world = FakeWorld()
    life = world.life(now_ms=7)
    await life.start()
    await life.attach_again()
    assert world.log == ["register 7", "register 7"]


async def test_a_worker_that_stays_lost_is_ended() -> None:
    world, now = FakeWorld(), [0.0]
    life = world.life(now_ms=7, clock=lambda: now[0])
    await life.start()
    world.unreachable = True
    for now[0] in (1.0, 1.0 + POLICY.unresponsive_s - 0.1):
        await life.attach_again()
    assert "end 7" not in world.log
    now[0] = 1.0 + POLICY.unresponsive_s
    await life.attach_again()
    assert world.log[-1] == "end 7"


async def test_a_worker_that_was_found_again_has_its_full_time_when_it_is_lost_again() -> None:
    world, now = FakeWorld(), [0.0]
    life = world.life(now_ms=7, clock=lambda: now[0])
    await life.start()
    for world.unreachable, now[0] in ((True, 0.0), (False, 5.0), (True, 11.0)):
        await life.attach_again()
    assert "end 7" not in world.log


@pytest.mark.parametrize("unreachable", [True, False])
async def test_a_lost_worker_that_dies_while_it_is_attached_again_is_left_to_its_next_life(
    unreachable: bool,
) -> None:
    world, now = FakeWorld(), [0.0]
    life = world.life(now_ms=7, clock=lambda: now[0])
    await life.start()
    keeping = asyncio.create_task(life.keep_alive())
    first = await world.lives.get()

    async def die_and_live_again() -> None:
        world.on_register = None
        first.died.set()
        await world.lives.get()
        while life.live is None or life.live.info.epoch == 7:  # noqa: ASYNC110 (it ends with no event)
            await asyncio.sleep(0)
        world.unreachable, now[0] = unreachable, POLICY.unresponsive_s

    world.on_register = die_and_live_again
    await life.attach_again()
    keeping.cancel()
    await asyncio.wait([keeping])
    assert not [line for line in world.log if line.startswith("end")]
    assert life.live is not None
    assert life.live.info.epoch == 8


async def test_a_life_of_another_role_follows_in_the_same_process() -> None:
    world = FakeWorld()
    life = world.life(now_ms=7)
    await life.start()
    keeping = asyncio.create_task(life.keep_alive())
    actor = await world.lives.get()
    live = await life.become(replace(life.template, role=worker_pb2.ROLE_PREFILL, latency={}))
    assert (live.info.epoch, live.info.role) == (8, worker_pb2.ROLE_PREFILL)
    assert world.log == ["register 7", "lost 7", "register 8"]
    assert actor.spec.latency == {}, "it is to measure its steps"
    assert life.live is live
    actor.died.set()
    second = await world.lives.get()
    assert (second.spec.role, second.spec.latency) == (worker_pb2.ROLE_PREFILL, MEASURED)
    keeping.cancel()
    await asyncio.wait([keeping])


@pytest.mark.parametrize("error", [WorkerError("a step is still running"), RayActorError()])
async def test_a_process_that_cannot_change_is_replaced_by_one_of_the_new_role(error: Exception) -> None:
    world = FakeWorld()
    life = world.life(now_ms=7)
    await life.start()
    keeping = asyncio.create_task(life.keep_alive())
    actor = await world.lives.get()
    actor.become_error = raised_in_actor(error) if isinstance(error, WorkerError) else error
    with pytest.raises(WorkerError, match="it is started anew in that role"):
        await life.become(replace(life.template, role=worker_pb2.ROLE_PREFILL))
    assert world.log[-1] == "kill 8", "the actor has had its new epoch"
    assert life.live is None
    with pytest.raises(WorkerError, match="is down"):
        await life.become(life.template)
    actor.died.set()
    second = await world.lives.get()
    assert (second.spec.role, second.spec.epoch) == (worker_pb2.ROLE_PREFILL, 9)
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_between_writers_a_life_goes_on() -> None:
    world = FakeWorld()
    life = world.life(now_ms=7)
    await life.start()
    actor = await world.lives.get()
    live = await life.read_prompts(replace(life.template, role=worker_pb2.ROLE_MIXED))
    assert actor.reads == [True]
    assert (live.info.epoch, live.info.role, life.role) == (7, worker_pb2.ROLE_MIXED, worker_pb2.ROLE_MIXED)
    await life.read_prompts(replace(life.template, role=worker_pb2.ROLE_DECODE))
    assert actor.reads == [True, False]
    assert world.log == ["register 7"] * 3


async def test_a_new_process_takes_the_place_of_one_that_serves() -> None:
    world = FakeWorld()
    life = world.life(now_ms=7)
    await life.start()
    keeping = asyncio.create_task(life.keep_alive())
    actor = await world.lives.get()
    renewing = asyncio.create_task(life.renew(replace(life.template, latency={})))
    while "kill 7" not in world.log:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert world.log == ["register 7", "lost 7", "stop", "kill 7"], "it may end its streams first"
    with pytest.raises(WorkerError, match="is down"):
        await life.renew(life.template)
    actor.died.set()
    live = await renewing
    assert (live.info.epoch, life.live) == (8, live)
    assert (await world.lives.get()).spec.latency == {}, "what is installed now may take another time"
    assert not [line for line in world.log if "died" in line], "nobody has died"
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_a_new_process_that_does_not_start_is_told_and_tried_again() -> None:
    world = FakeWorld()
    life = world.life(now_ms=7)
    await life.start()
    keeping = asyncio.create_task(life.keep_alive())
    actor = await world.lives.get()
    world.start_errors = [RayActorError()]
    renewing = asyncio.create_task(life.renew(life.template))
    while "kill 7" not in world.log:  # noqa: ASYNC110
        await asyncio.sleep(0)
    actor.died.set()
    with pytest.raises(WorkerError, match=r"decode-0 does not start anew: .*; it is tried again"):
        await renewing
    while life.live is None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert life.live.info.epoch == 9
    keeping.cancel()
    await asyncio.wait([keeping])


LEFT_SPEC = replace(TEMPLATE, epoch=5, role=worker_pb2.ROLE_MIXED, secret="of the first", first_slot=3)


def left_with(actor: FakeActor | None) -> Left:
    return Left(cast(Any, "group"), "node", actor)


async def test_what_another_launcher_has_left_goes_on_in_the_same_life() -> None:
    world = FakeWorld()
    actor = FakeActor(LEFT_SPEC, None)
    found = await life_of(actor)
    assert found is not None
    assert found.spec == LEFT_SPEC
    life = world.life(now_ms=2)
    live = await life.resume(left_with(actor), found)
    assert (live.info.epoch, live.info.role, life.role) == (5, worker_pb2.ROLE_MIXED, worker_pb2.ROLE_MIXED)
    assert world.log == ["register 5"]
    keeping = asyncio.create_task(life.keep_alive())
    actor.died.set()
    second = await world.lives.get()
    assert (second.spec.epoch, second.spec.role) == (6, worker_pb2.ROLE_MIXED), "its clock may be behind"
    assert (second.spec.secret, second.spec.latency) == ("of the first", MEASURED)
    keeping.cancel()
    await asyncio.wait([keeping])


def _raises(error: Exception) -> Callable[[], Any]:
    def answer() -> None:
        raise error

    return answer


@pytest.mark.parametrize("answer", [lambda: None, _raises(RayActorError())])
async def test_what_was_left_half_started_begins_again_in_its_place(answer: Callable[[], Any]) -> None:
    world = FakeWorld()
    actor = FakeActor(LEFT_SPEC, None)
    actor.life_answer = answer
    assert await life_of(actor) is None
    live = await world.life(now_ms=7).resume(left_with(actor), None)
    assert live.info.epoch == 7
    assert world.log == ["kill 5", "register 7"]


async def test_a_place_that_was_left_without_a_life_gets_one() -> None:
    world = FakeWorld()
    assert await life_of(None) is None
    await world.life(now_ms=7).resume(left_with(None), None)
    assert world.log == ["register 7"]


def test_a_spec_is_read_by_other_versions() -> None:
    spec = replace(TEMPLATE, secret="s", tls=Path("/tls"))
    wire = spec.to_wire()
    assert HostSpec.from_wire(wire) == spec
    del wire["tls"]  # of an older launcher
    wire["what_comes_next"] = 1  # of a newer one
    assert HostSpec.from_wire(wire) == replace(spec, tls=None)


async def test_what_is_no_longer_wanted_leaves_nothing() -> None:
    world = FakeWorld()
    life = world.life(now_ms=7)
    await life.start()
    await life.end()
    assert world.log == ["register 7", "forget 7", "stop", "kill 7", "give back"]


async def test_a_worker_that_keeps_dying_is_given_up() -> None:
    world = FakeWorld()
    life = world.life(now_ms=1)
    await life.start()
    world.start_errors = [RayActorError(), RayActorError()]
    (await world.lives.get()).died.set()
    with pytest.raises(WorkerError, match="decode-0 died 3 times in a row"):
        await life.keep_alive()
    assert world.lives.qsize() == POLICY.max_failures
    assert life.live is None


async def test_a_long_life_makes_up_for_earlier_failures() -> None:
    world = FakeWorld()
    times = iter(range(0, 10_000, 100))
    life = world.life(now_ms=1, clock=lambda: float(next(times)))
    await life.start()
    keeping = asyncio.create_task(life.keep_alive())
    for _ in range(3 * POLICY.max_failures):
        (await world.lives.get()).died.set()
    await world.lives.get()
    assert not keeping.done()
    keeping.cancel()
    await asyncio.wait([keeping])


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            raised_in_actor(CheckpointError("x is missing")),
            ModelError,
            "x is missing",
        ),
        (
            raised_in_actor(OSError("no memory")),
            WorkerError,
            "OSError: no memory",
        ),
        (RayActorError(), WorkerError, "decode-0 died while starting"),
    ],
)
async def test_a_first_start_that_fails_says_why(
    raised: Exception, expected: type[ClusterError], message: str
) -> None:
    world = FakeWorld()
    world.start_errors = [raised]
    with pytest.raises(expected, match=message):
        await world.life(now_ms=1).start()
