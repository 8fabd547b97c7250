"""Roles that change while a simulated cluster serves: nothing is lost, and time is what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulator.reshaping import Change, Reshaping
from cluster.simulator.run import simulate
from cluster.workload.jobs import Status
from cluster.workload.slo import Slo
from router.pool_view import Role
from router.workload_profile import Seen
from tests.cluster.simulator.clusters import arrivals, pools, worker

LOOSE = Slo.fixed(600.0, 10.0)
WORKERS = {role: worker(role) for role in Role}


class Script:
    """Makes its changes, some at each look, and remembers what it saw."""

    def __init__(self, *changes: Sequence[Change]) -> None:
        self._left = list(changes)
        self.seen: list[tuple[float, dict[str, Role], Seen]] = []

    def look(self, now: float, roles: Mapping[str, Role], seen: Seen) -> Sequence[Change]:
        self.seen.append((now, dict(roles), seen))
        return self._left.pop(0) if self._left else ()


def reshaping(script: Script, **times: float) -> Reshaping:
    return Reshaping(script, WORKERS, **{"tick_s": 1.0, "drain_s": 3.0, "away_s": 0.5, **times})


def test_a_reader_becomes_a_writer_and_the_others_serve_meanwhile() -> None:
    script = Script([("prefill-1", Role.DECODE)])
    requests = arrivals(*[(0.1 * number, 300, 20) for number in range(60)])
    outcome = simulate(pools(2, 1), requests, LOOSE, reshaping=reshaping(script))
    assert {row.status for row in outcome.rows} == {Status.COMPLETE}
    assert script.seen[0][1] == {
        "prefill-0": Role.PREFILL,
        "prefill-1": Role.PREFILL,
        "decode-2": Role.DECODE,
    }
    assert script.seen[-1][1]["prefill-1"] is Role.DECODE
    # It is not asked while it makes the change: a drained reader has soon read what it has.
    first, second = (now for now, _, _ in script.seen[:2])
    assert first == 1.0
    assert second > first + 1.0 + 0.5


def test_answers_of_a_drained_writer_end_there_or_go_on_elsewhere() -> None:
    """Long answers: with time they end where they are; without, they are computed again at the other."""
    requests = arrivals((0.0, 100, 200), (0.0, 100, 200))
    patient, hasty = (
        simulate(
            pools(1, 2, policy="round_robin"), requests, LOOSE,
            reshaping=reshaping(Script([("decode-1", Role.PREFILL)]), drain_s=drain_s),
        )
        for drain_s in (60.0, 0.0)
    )  # fmt: skip
    for outcome in (patient, hasty):
        assert {(row.status, row.output_tokens) for row in outcome.rows} == {(Status.COMPLETE, 200)}
    assert sum(patient.placements.values()) == 2
    assert sum(hasty.placements.values()) == 3


def test_decode_becomes_mixed_in_the_middle_of_a_life() -> None:
    """The only writer, with an answer under way: no placement is lost, and then it reads itself."""
    script = Script([("decode-1", Role.MIXED), ("prefill-0", Role.MIXED)])
    requests = arrivals((0.0, 100, 100), (4.0, 100, 20), (4.5, 100, 20))
    outcome = simulate(pools(1, 1), requests, LOOSE, reshaping=reshaping(script))
    assert {row.status for row in outcome.rows} == {Status.COMPLETE}
    assert outcome.placements["disaggregated"] == 1
    assert sum(outcome.placements.values()) == 3


def test_what_has_come_is_told() -> None:
    script = Script()
    simulate(
        pools(1, 1), arrivals(*[(0.1 * one, 50, 4) for one in range(20)]), LOOSE, reshaping=reshaping(script)
    )
    now, _, seen = script.seen[-1]
    assert seen.rate > 0
    assert seen.seconds == now
    assert set(seen.shapes) == {(50, 4)}


def test_it_ends_when_all_requests_have() -> None:
    """Nobody is asked for ever."""
    script = Script()
    outcome = simulate(pools(1, 1), arrivals((0.0, 50, 4)), LOOSE, reshaping=reshaping(script, tick_s=0.01))
    assert script.seen
    assert script.seen[-1][0] <= outcome.ended_s


changes_st = st.lists(
    st.lists(st.tuples(st.sampled_from(["prefill-0", "decode-1"]), st.sampled_from(Role)), max_size=2),
    max_size=4,
)
requests_st = st.lists(
    st.tuples(st.floats(0, 8).map(lambda at: round(at, 4)), st.integers(1, 600), st.integers(1, 80)),
    min_size=1,
    max_size=20,
).map(sorted)


@settings(deadline=None)
@given(
    requests_st, changes_st, st.sampled_from([0.0, 0.3, 60.0]), st.sampled_from(["goodput", "least_loaded"])
)
def test_whatever_changes_one_mixed_worker_keeps_all_answers_going(
    requests: list[tuple[float, int, int]], changes: list[list[Change]], drain_s: float, policy: str
) -> None:
    cluster = pools(1, 1, 1, policy=policy)
    found = []
    for max_run in (64, 1):
        how = reshaping(Script(*changes), drain_s=drain_s)
        found.append(simulate(cluster, arrivals(*requests), LOOSE, max_run=max_run, reshaping=how).rows)
    assert found[0] == found[1]
    for row, (_, _, output) in zip(found[0], requests, strict=True):
        assert (row.status, row.output_tokens) == (Status.COMPLETE, output)
