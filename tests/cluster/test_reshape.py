"""Changes of a deployment whose workers and router are stand-ins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prelay.v1 import admin_pb2, worker_pb2

from cluster.config import ServeConfig
from cluster.config_file import load_config, parse_assignment
from cluster.cover import Cover
from cluster.errors import ConfigError, UnknownWorkerError, WorkerError
from cluster.host_spec import HostSpec
from cluster.preflight import check_model
from cluster.reshape import Reshape
from cluster.router_process import RouterProcess
from cluster.worker_life import LiveWorker
from cluster.worker_specs import another_worker, in_role, worker_specs

P, D, M = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED


def configured(*assignments: str) -> ServeConfig:
    return check_model(load_config(None, [parse_assignment(text) for text in assignments]).resolved())


class Life:
    def __init__(self, template: HostSpec, log: list[str]) -> None:
        self.template = template
        self.worker_id = template.worker_id
        self.live: Any = LiveWorker(worker_pb2.WorkerInfo(epoch=1), cast(Any, None))
        self.error: Exception | None = None
        self._log = log

    @property
    def role(self) -> worker_pb2.Role:
        return self.template.role

    async def become(self, template: HostSpec) -> LiveWorker:
        self._log.append(f"{self.worker_id} becomes {template.role}")
        self.template = template
        if self.error is not None:
            raise self.error
        self.live = LiveWorker(worker_pb2.WorkerInfo(epoch=2), cast(Any, None))
        return cast(LiveWorker, self.live)

    async def read_prompts(self, template: HostSpec) -> LiveWorker:
        self._log.append(f"{self.worker_id} is {template.role} from now on")
        self.template = template
        return cast(LiveWorker, self.live)

    async def renew(self, template: HostSpec) -> LiveWorker:
        assert template.latency == {}, "it measures again"
        self._log.append(f"{self.worker_id} is replaced")
        if self.error is not None:
            raise self.error
        self.live = LiveWorker(worker_pb2.WorkerInfo(epoch=2, pid=7, version="9.9"), cast(Any, None))
        return cast(LiveWorker, self.live)


class World:
    """Deployment and router. left: what the router says that a drained worker still has, in turn."""

    def __init__(self, *assignments: str) -> None:
        self.config = configured(*assignments)
        self.log: list[str] = []
        self.lives = [Life(spec, self.log) for spec in worker_specs(self.config)]
        self.left = [0]
        self.is_free = True
        self.reshape = Reshape(self.config, cast(Any, self), cast(RouterProcess, self))

    async def has_room(self, spec: HostSpec) -> bool:
        return self.is_free

    async def add(self, spec: HostSpec) -> LiveWorker:
        self.log.append(f"add {spec.worker_id}")
        self.lives.append(Life(spec, self.log))
        return cast(LiveWorker, self.lives[-1].live)

    async def remove(self, life: Life) -> None:
        self.log.append(f"remove {life.worker_id}")
        self.lives.remove(life)

    async def drain(self, worker_id: str, epoch: int, *, draining: bool) -> int:
        self.log.append(f"{'drain' if draining else 'undrain'} {worker_id}")
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


async def all_of(lines: AsyncIterator[str]) -> list[str]:
    return [line async for line in lines]


async def test_a_role_is_taken_after_draining() -> None:
    world = World("prefill.replicas=2")
    world.left = [3, 2, 1, 0]
    lines = await all_of(world.reshape.set_role("prefill-1", D, 30.0))
    assert world.log == ["drain prefill-1"] * 4 + [f"prefill-1 becomes {D}"]
    assert lines[0] == "prefill-1 gets nothing new; it has 3 requests"
    assert lines[-2] == "prefill-1 is empty"
    assert lines[-1].startswith("prefill-1 is a decode worker now (epoch 2)")
    assert world.lives[1].template.max_num_seqs == world.config.decode.max_num_seqs


async def test_what_does_not_end_in_time_goes_on_elsewhere() -> None:
    world = World("prefill.replicas=2")
    world.left = [2]
    lines = await all_of(world.reshape.set_role("prefill-0", D, 0.1))
    assert "prefill-0 still has 2 requests after 0.1 s, which go on at other workers" in lines
    assert world.log[-1] == f"prefill-0 becomes {D}"


async def test_between_writers_nothing_is_drained() -> None:
    world = World()
    lines = await all_of(world.reshape.set_role("decode-0", M, 30.0))
    assert world.log == [f"decode-0 is {M} from now on"]
    assert lines == ["decode-0 is a mixed worker now, in the same life"]
    assert await all_of(world.reshape.set_role("decode-0", M, 30.0)) == ["decode-0 is a mixed worker already"]


@pytest.mark.parametrize(
    ("worker_id", "role", "message"),
    [
        ("prefill-0", D, "prefill.replicas and mixed.replicas are both 0"),
        ("decode-0", P, "decode.replicas and mixed.replicas are both 0"),
        ("prefill-0", M, "while prefill-0 changes its role nobody could read prompts|prefill.replicas is 0"),
    ],
)
async def test_nobody_is_left_unserved(worker_id: str, role: worker_pb2.Role, message: str) -> None:
    world = World()
    with pytest.raises(ConfigError, match=message):
        await all_of(world.reshape.set_role(worker_id, role, 30.0))
    with pytest.raises(ConfigError, match="nobody could"):
        await all_of(world.reshape.drain(worker_id, 30.0))
    assert world.log == []


async def test_an_unknown_worker_and_one_that_is_down() -> None:
    world = World("prefill.replicas=2")
    with pytest.raises(UnknownWorkerError, match="there are prefill-0, prefill-1, decode-0"):
        await all_of(world.reshape.set_role("nobody", D, 30.0))
    world.lives[0].live = None
    with pytest.raises(WorkerError, match="down"):
        await all_of(world.reshape.drain("prefill-0", 30.0))


async def test_whoever_hangs_up_while_a_worker_is_drained_undoes_that() -> None:
    world = World("prefill.replicas=2")
    world.left = [5]
    lines = world.reshape.set_role("prefill-0", D, 30.0)
    assert (await anext(lines)).startswith("prefill-0 gets nothing new")
    await cast(Any, lines).aclose()
    for _ in range(5):
        if world.log[-1] == "undrain prefill-0":
            break
        await _turn()
    assert world.log[-1] == "undrain prefill-0"
    assert world.lives[0].role == P


async def _turn() -> None:
    import asyncio
    import gc

    gc.collect()
    await asyncio.sleep(0)


async def test_who_was_drained_before_stays_so() -> None:
    world = World("decode.replicas=2")
    workers = [
        admin_pb2.WorkerStatus(
            info=worker_pb2.WorkerInfo(worker_id=life.worker_id, epoch=1),
            draining=life.worker_id == "decode-1",
        )
        for life in world.lives
    ]

    async def status() -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(workers=workers)

    world.status = status  # type: ignore[attr-defined]
    assert await world.reshape.take_over_drains() == ["decode-1"]
    assert world.log == ["drain decode-1"]
    assert not world.reshape.is_settled
    with pytest.raises(ConfigError, match="without decode-0 nobody could write answers"):
        await all_of(world.reshape.drain("decode-0", 1.0))
    await all_of(world.reshape.drain("decode-1", 1.0, undo=True))
    assert world.log[-1] == "undrain decode-1"
    assert world.reshape.is_settled


async def test_drain_stays_until_it_is_undone() -> None:
    world = World("decode.replicas=2")
    world.left = [1, 0]
    assert (await all_of(world.reshape.drain("decode-1", 30.0)))[-1] == "decode-1 is empty"
    assert "undrain decode-1" not in world.log
    assert await all_of(world.reshape.drain("decode-1", 30.0, undo=True)) == [
        "decode-1 gets new requests again"
    ]
    assert world.log[-1] == "undrain decode-1"


async def test_who_is_drained_or_down_does_not_count() -> None:
    world = World("prefill.replicas=2")
    await all_of(world.reshape.drain("prefill-0", 30.0))
    assert not world.reshape.is_settled
    for refused in (world.reshape.drain("prefill-1", 30.0), world.reshape.set_role("prefill-1", D, 30.0)):
        with pytest.raises(ConfigError, match="nobody could read prompts"):
            await all_of(refused)
    await all_of(world.reshape.drain("prefill-0", 30.0, undo=True))
    assert world.reshape.is_settled
    world.lives[0].live = None
    with pytest.raises(ConfigError, match="nobody could read prompts"):
        await all_of(world.reshape.set_role("prefill-1", D, 30.0))
    with pytest.raises(WorkerError, match="prefill-0 is down"):
        await all_of(world.reshape.set_role("prefill-0", D, 30.0))
    with pytest.raises(ConfigError, match="without prefill-1 nobody could read prompts now"):
        await all_of(world.reshape.set_pools({P: 1, D: 2}, 30.0))


async def test_pools_are_left_alone_while_somebody_stands_in() -> None:
    world = World()
    world.reshape.standing_in = frozenset({"decode-0"})
    with pytest.raises(ConfigError, match="decode-0 stand in for a role whose workers are gone"):
        await all_of(world.reshape.set_pools({D: 2}, 30.0))


async def test_pools_are_brought_to_size() -> None:
    world = World()
    shown = await all_of(world.reshape.set_pools({P: 0, D: 0, M: 2}, 30.0, dry_run=True))
    assert shown == ["1 of 2: make decode-0 a mixed worker", "2 of 2: make prefill-0 a mixed worker"]
    assert world.log == []
    await all_of(world.reshape.set_pools({P: 0, D: 0, M: 2}, 30.0))
    assert world.log == [f"decode-0 is {M} from now on", "drain prefill-0", f"prefill-0 becomes {M}"]
    assert await all_of(world.reshape.set_pools({M: 2}, 30.0)) == ["nothing to change"]
    await all_of(world.reshape.set_pools({M: 3}, 30.0))
    assert world.log[-1] == "add mixed-0"
    await all_of(world.reshape.set_pools({M: 1}, 30.0))
    assert world.log[-4:] == ["drain decode-0", "remove decode-0", "drain mixed-0", "remove mixed-0"]
    with pytest.raises(ConfigError, match="these pools cannot serve"):
        await all_of(world.reshape.set_pools({M: 0}, 30.0))


async def test_processes_are_replaced_one_after_the_other() -> None:
    world = World("decode.replicas=2")
    world.left = [1, 0]
    lines = await all_of(world.reshape.renew(["decode-1", "decode-0"], 30.0))
    assert world.log == [
        "drain decode-1", "drain decode-1", "decode-1 is replaced", "drain decode-0", "decode-0 is replaced"
    ]  # fmt: skip
    assert lines[0] == "1 of 2: replace decode-1"
    assert "decode-1 serves with version 9.9 (epoch 2, pid 7): away for 0.0 s" in lines


async def test_where_nobody_can_do_without_a_worker_another_stands_in() -> None:
    world = World()
    shown = await all_of(world.reshape.renew([], 30.0, dry_run=True))
    assert len(shown) == 10
    assert shown[1] == "2 of 10: replace prefill-0"
    assert world.log == []
    await all_of(world.reshape.renew(["prefill-0"], 30.0))
    assert world.log == [
        f"decode-0 is {M} from now on", "drain prefill-0", "prefill-0 is replaced",
        f"decode-0 is {D} from now on",
    ]  # fmt: skip


async def test_who_stood_in_is_not_forgotten_when_an_upgrade_breaks_off() -> None:
    world = World()
    world.lives[1].error = WorkerError("does not start anew")
    with pytest.raises(WorkerError, match="does not start anew"):
        await all_of(world.reshape.renew(["decode-0"], 30.0))
    assert world.lives[0].role == M
    assert world.reshape.left_mixed == {"prefill-0": P}
    cover = Cover(cast(Any, world), world.reshape, cast(Any, SimpleNamespace(event=world.log.append)))
    world.lives[1].error = None
    await cover.look(0.0)
    assert world.lives[0].role == P, "it goes back to its own role when the others can serve"


async def test_a_process_that_does_not_start_ends_the_replacement() -> None:
    world = World("decode.replicas=2")
    world.lives[1].error = WorkerError("does not start anew")
    with pytest.raises(WorkerError, match="does not start anew"):
        await all_of(world.reshape.renew(["decode-0", "decode-1"], 30.0))
    assert world.log[-1] == "decode-0 is replaced", "the others were left alone"
    assert world.reshape.left_mixed == {}
    with pytest.raises(UnknownWorkerError, match="no worker 'decode-7'"):
        await all_of(world.reshape.renew(["decode-7"], 30.0))
    world.lives[0].live = None
    with pytest.raises(ConfigError, match="prefill-0 is down"):
        await all_of(world.reshape.renew([], 30.0))


async def test_a_failed_change_says_so_and_leaves_what_is_done() -> None:
    world = World("prefill.replicas=2")
    world.lives[1].error = WorkerError("it is started anew in that role")
    with pytest.raises(WorkerError, match="started anew"):
        await all_of(world.reshape.set_role("prefill-1", D, 30.0))
    assert world.lives[1].role == D


def test_another_worker_gets_a_name_and_slots_of_its_own() -> None:
    config = configured("prefill.replicas=2", "decode.threads=2")
    specs = worker_specs(config)
    del specs[0]
    spec = another_worker(config, P, specs)
    assert (spec.worker_id, spec.first_slot, spec.slots) == ("prefill-0", 0, 4)
    wide = another_worker(config, D, [*specs, spec])
    assert (wide.worker_id, wide.first_slot, wide.slots) == ("decode-1", 4, 6)
    assert another_worker(config, M, specs).num_blocks == specs[0].num_blocks, "its pool was never sized"


def test_a_prefill_worker_measures_its_decode_steps_and_no_other_does() -> None:
    prefill, decode = worker_specs(configured())
    prefill, decode = (replace(spec, latency={"step": 0.1}) for spec in (prefill, decode))
    config = configured("mixed.max_num_seqs=7")
    assert in_role(config, prefill, M).latency == {}
    assert in_role(config, prefill, M).max_num_seqs == 7
    assert in_role(config, decode, P).latency == {"step": 0.1}
    assert in_role(config, decode, P).max_num_seqs == 0
    assert in_role(config, decode, P).num_blocks == decode.num_blocks
