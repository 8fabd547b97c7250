"""What a running cluster has seen and what it is made of, as a question to the planner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from prelay.v1 import admin_pb2, worker_pb2

from cluster.planner.errors import PlanError
from cluster.planner.hardware import Devices, Gpu, Hardware
from cluster.planner.kinds import Kind
from cluster.planner.plans import Plan, Pool
from cluster.roles import ROLE_NAMES
from cluster.status import StatusClient
from cluster.workload.datasets import Lengths, Shape
from cluster.workload.slo import Slo
from engine.latency import LatencyModel
from engine.tls import Identity
from router.pool_view import Role

LEAST_ANSWERS = 50
_LINK_BYTES_PER_S = 10e9
_TYPICAL_PROMPT = 512


@dataclass(frozen=True, slots=True)
class Live:
    """address: that was asked. workers: those that are up. num_devices: of these and of those that are
    down."""

    address: str
    workers: Sequence[worker_pb2.WorkerInfo]
    num_devices: int
    classes: Mapping[str, admin_pb2.ClassOutcomes]
    workload: admin_pb2.GetWorkloadResponse

    @classmethod
    def ask(cls, url: str, identity: Identity | None = None) -> Live:
        """url: HOST:PORT of a router's admin port, with or without grpc:// before it. identity: if it listens
        with TLS. Raises NoRouterError, PlanError."""
        address = urlsplit(url).netloc if "://" in url else url
        if not address:
            raise PlanError(f"--live {url!r}: give HOST:PORT, what `prelay serve` shows as admin")
        with StatusClient(address, identity) as client:
            return cls.of(address, client.fetch(), client.fetch_workload())

    @classmethod
    def of(
        cls, address: str, status: admin_pb2.GetStatusResponse, workload: admin_pb2.GetWorkloadResponse
    ) -> Live:
        """From what a router has said. Raises PlanError if no worker is up."""
        workers = [worker.info for worker in status.workers if worker.up]
        if not workers:
            raise PlanError(f"--live {address}: no worker is up there, so there is nothing to plan with")
        num_devices = sum(_devices(worker.info) for worker in status.workers)
        return cls(address, workers, num_devices, dict(status.classes), workload)

    @property
    def dataset(self) -> Lengths:
        """Prompts and answers as they were. Raises PlanError if there are too few."""
        shapes = [Shape(one.prompt_tokens, one.answer_tokens) for one in self.workload.shapes]
        if len(shapes) < LEAST_ANSWERS:
            raise PlanError(
                f"--live {self.address}: {len(shapes)} answers are complete so far, and a plan needs "
                f"{LEAST_ANSWERS}; try again later, or give --dataset"
            )
        return Lengths(shapes)

    @property
    def latest(self) -> tuple[Lengths, float]:
        """Prompts and answers of the last minute or two, and the rate. Raises PlanError if there are too few
        even with those before them."""
        count = max(LEAST_ANSWERS, self.workload.num_latest)
        return Lengths(self.dataset.pool[-count:]), self.workload.latest_rate

    @property
    def slo(self) -> Slo:
        """Of the class that most requests came with."""
        name = max(self.classes, key=lambda one: sum(self.classes[one].outcomes.values()))
        return Slo.fixed(self.classes[name].ttft_limit_s, self.classes[name].tpot_limit_s)

    @property
    def hardware(self) -> Hardware:
        """As many devices as its workers hold. All that is known of them is how long steps take."""
        return Hardware([Devices(DEVICE, self.num_devices)])

    def kinds(self) -> list[Kind]:
        """A kind for each way that workers are split, in any role: with the step times that the worker in the
        middle has measured of itself, and the least room. Raises PlanError."""
        measured = [info for info in self.workers if info.latency]
        if not measured:
            raise PlanError(f"--live {self.address}: its workers do not say how long their steps take")
        return [_kind(alike) for _, alike in sorted(_by_split(measured).items())]

    def plan(self) -> Plan | None:
        """What runs now, with the limits and the room that each role has. Workers of a role that differ count
        as the kind that most of them are of. None if a role without which nothing is served has no worker
        that is up and says how long its steps take."""
        pools = []
        for role in Role:
            infos = [
                info for info in self.workers if info.latency and ROLE_NAMES.get(info.role) == role.value
            ]
            if infos:
                usual = max(_by_split(infos).values(), key=len)
                pools.append(Pool(role, _kind(usual), len(infos)))
        roles = {pool.role for pool in pools}
        can_serve = Role.MIXED in roles or {Role.PREFILL, Role.DECODE} <= roles
        return Plan(tuple(pools)) if can_serve else None

    def said(self) -> Iterator[str]:
        """What was seen, in words."""
        seen, shapes = self.workload, self.workload.shapes
        yield (
            f"seen in {seen.seconds:.0f} s: {seen.rate:.3g} requests/s; of the last {len(shapes)} answers: "
            f"prompts of {_mean([one.prompt_tokens for one in shapes]):.0f} tokens on average, answers of "
            f"{_mean([one.answer_tokens for one in shapes]):.0f}; {seen.hit_share:.0%} of the prompts' "
            "tokens were in prefix caches (planned as if none were)"
        )
        link = f"{_LINK_BYTES_PER_S / 1e9:g} GB/s"
        yield f"links between workers are not known: hand-offs are planned at {link}"
        for drift in seen.drifts:
            yield f"changed in the last minutes: {drift.trait}, from {drift.before:.3g} to {drift.now:.3g}"


DEVICE = Gpu("device", 0.0, 0.0, 0.0, _LINK_BYTES_PER_S)
"""Of which nothing is known but how long steps take."""


def difference(now: Plan, planned: Plan) -> list[str]:
    """What would have to change, a line for each role that does."""
    lines = []
    for role in Role:
        old, new = now.pool(role), planned.pool(role)
        if old == new:
            continue
        before, after = (f"{pool.replicas} x {pool.kind}" if pool else "none" for pool in (old, new))
        lines.append(f"{role.value}: {before} -> {after}")
    return lines


def _devices(info: worker_pb2.WorkerInfo) -> int:
    return max(1, info.num_devices)


def _by_split(
    infos: Sequence[worker_pb2.WorkerInfo],
) -> dict[tuple[int, int], list[worker_pb2.WorkerInfo]]:
    """By (TP, PP); of one that does not say, all its devices are TP."""
    alike: defaultdict[tuple[int, int], list[worker_pb2.WorkerInfo]] = defaultdict(list)
    for info in infos:
        alike[info.tensor_parallel or _devices(info), info.pipeline_parallel or 1].append(info)
    return alike


def _kind(infos: Sequence[worker_pb2.WorkerInfo]) -> Kind:
    """Of workers that are split alike, and of whom all have said how long their steps take. Prefill workers
    have not measured decode steps: where there are others, these count."""
    [(tp, pp)] = _by_split(infos)
    writers = [info for info in infos if info.role != worker_pb2.ROLE_PREFILL]
    models = sorted(
        (LatencyModel.from_coefficients(info.latency) for info in writers or infos),
        key=lambda model: model.prefill_s(_TYPICAL_PROMPT),
    )
    return Kind(
        DEVICE,
        tp,
        pp,
        models[len(models) // 2],
        min(info.num_blocks * info.block_size for info in infos),
        max(info.kv_token_bytes for info in infos),
        is_measured=True,
        batch_tokens=max(info.max_batch_tokens for info in infos),
        num_seqs=max(info.max_num_seqs for info in infos) or None,
    )


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
