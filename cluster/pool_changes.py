"""Which steps lead from the workers that there are to those that are wanted, so that requests are served all
along. A core.

    start what there is no worker for --> give others' roles away, one after the other --> stop what is left

A worker that gets another role is drained and serves nobody for a second or two, so that is done when the
others can serve without it. Decode and mixed are exchanged for each other in the middle of a life, which
costs nothing; that is done when it lets others be drained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from prelay.v1 import worker_pb2

from cluster.errors import ConfigError

_PREFILL, _DECODE, _MIXED = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED
WRITERS = (_DECODE, _MIXED)


@dataclass(frozen=True, slots=True)
class Start:
    """Another worker."""

    role: worker_pb2.Role


@dataclass(frozen=True, slots=True)
class Become:
    """A worker gets another role."""

    worker_id: str
    role: worker_pb2.Role


@dataclass(frozen=True, slots=True)
class Stop:
    """A worker is no longer wanted."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Renew:
    """A worker gets a new process."""

    worker_id: str


Step: TypeAlias = Start | Become | Stop | Renew


def can_serve(roles: Iterable[worker_pb2.Role]) -> bool:
    """Whether workers of these roles can read prompts and write answers together."""
    there = set(roles)
    return _MIXED in there or {_PREFILL, _DECODE} <= there


def is_live(now: worker_pb2.Role, then: worker_pb2.Role) -> bool:
    """Whether a worker changes from the one role to the other in the middle of a life."""
    return now in WRITERS and then in WRITERS


def serves_without(workers: Mapping[str, worker_pb2.Role], worker_id: str) -> bool:
    """Whether the others can serve while that one is drained."""
    return can_serve(role for other, role in workers.items() if other != worker_id)


def steps_to(workers: Mapping[str, worker_pb2.Role], wanted: Mapping[worker_pb2.Role, int]) -> list[Step]:
    """workers: the role of each, the youngest last. wanted: how many of each role; those that are not named
    stay as many. Raises ConfigError if no order of steps keeps requests served, as when those that are wanted
    could not serve."""
    have = Counter(workers.values())
    more = {role: wanted.get(role, have[role]) - have[role] for role in (_PREFILL, _DECODE, _MIXED)}
    missing = [role for role, count in more.items() for _ in range(count)]
    # The youngest of a role are those that it can spare.
    spare = [
        worker_id
        for role, count in more.items()
        if count < 0
        for worker_id in [one for one, its in workers.items() if its == role][count:]
    ]
    changes: dict[str, worker_pb2.Role] = {}
    for only_live in (True, False):  # those that cost nothing first
        for role in list(missing):
            found = (one for one in spare if is_live(workers[one], role) or not only_live)
            if (taken := next(found, None)) is not None:
                spare.remove(taken)
                missing.remove(role)
                changes[taken] = role
    now = dict(workers) | {f"another {index}": role for index, role in enumerate(missing)}
    return [
        *(Start(role) for role in missing),
        *in_order(now, changes),
        *(Stop(worker_id) for worker_id in spare),
    ]


def renewals(workers: Mapping[str, worker_pb2.Role], whom: Iterable[str]) -> list[Step]:
    """Every one of `whom` gets a new process, one after the other; where nobody can do without it, another
    worker is mixed for that time. Raises ConfigError if there is no other."""
    steps: list[Step] = []
    for worker_id in whom:
        if serves_without(workers, worker_id):
            steps.append(Renew(worker_id))
            continue
        # A decode worker becomes mixed at no cost.
        others = sorted((one for one in workers if one != worker_id), key=lambda one: workers[one] != _DECODE)
        if not others:
            raise ConfigError(f"{worker_id} is the only worker: start another one before (prelay scale)")
        helper = others[0]
        helped = {**workers, helper: _MIXED}
        steps += [
            *in_order(workers, {helper: _MIXED}),
            Renew(worker_id),
            *in_order(helped, {helper: workers[helper]}),
        ]
    return steps


def in_order(workers: Mapping[str, worker_pb2.Role], changes: Mapping[str, worker_pb2.Role]) -> list[Become]:
    """The changes in an order in which requests are served all along. If there is none, a decode worker is
    mixed for the time being. Raises ConfigError if not even that helps, as when nobody could serve in the
    end."""
    now, left = dict(workers), dict(changes)
    steps: list[Become] = []
    # One who helps is enough: while he is mixed, everybody else can be drained.
    can_help = can_serve((now | left).values())

    def make(worker_id: str, role: worker_pb2.Role) -> None:
        steps.append(Become(worker_id, role))
        now[worker_id] = role

    while left:
        drained = (one for one in left if not is_live(now[one], left[one]) and serves_without(now, one))
        live = (
            one
            for one in left
            if is_live(now[one], left[one]) and can_serve((now | {one: left[one]}).values())
        )
        helpers = (one for one, role in now.items() if role == _DECODE and one not in left)
        if (chosen := next(drained, None) or next(live, None)) is not None:
            make(chosen, left.pop(chosen))
        elif can_help and (helper := next(helpers, None)) is not None:
            can_help = False
            make(helper, _MIXED)
            left[helper] = _DECODE
        else:
            raise ConfigError(
                "no order of changes keeps requests served: go by way of more mixed workers, which both read "
                "and write"
            )
    return steps


def said(step: Step, names: Mapping[worker_pb2.Role, str]) -> str:
    """For a person. names: of the roles."""
    match step:
        case Start(role):
            return f"start another {names[role]} worker"
        case Become(worker_id, role):
            return f"make {worker_id} a {names[role]} worker"
        case Stop(worker_id):
            return f"stop {worker_id}"
        case Renew(worker_id):
            return f"replace {worker_id}"
