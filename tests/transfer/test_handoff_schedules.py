"""Both state machines against each other: thousands of random schedules, each repeatable by its seed.

simulation.py has time, engines and links; simulated_workers.py a prefill and a decode worker; both check the
invariants as they go:
  - no block is kept longer than a lease and 1 s after the last thing that happened, and none at rest;
  - none is given up while its reader's link stands, none is written that is not lent or is cached;
  - no sequence is delivered twice, after its cancel, before its copies end, or with a block that holds
    anything else than its KV;
  - no request is stuck; without faults, however long steps take, none fails.
simulated_cluster.py has the router, and what goes wrong.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.transfer.simulated_cluster import Schedule, run_range
from transfer.handoff import HandoffFailure
from transfer.offer_side import OfferState
from transfer.pull_side import PullState

OFFER_EVENTS = ("offer", "complete", "withdraw", "acknowledged", "dropped", "renewed", "link up", "link lost")
PULL_EVENTS = (
    *("offered", "completed", "withdrawn", "cancel", "fetched", "fetch failed", "recalled", "renewed"),
    *("link up", "link failed", "link lost", "unpair"),
)

CANNOT_BE = {
    # A prompt that is not being computed (any more) is not offered: HandoffError.
    *((state, event) for state in ("offered", "withdrawn") for event in ("offer", "complete")),
    ("promised", "complete"),  # a prompt has a token, so there is an offer first
    # The puller answers offers, and says that it holds them from the first one on.
    ("promised", "acknowledged"),
    ("promised", "renewed"),
    ("promised", "lease end"),
    ("offering", "acknowledged"),  # only `complete` is acknowledged
    # Nothing is said about a key over a link that is not up, and copies only begin when it is.
    *(("connecting", event) for event in ("offered", "completed", "withdrawn", "fetched", "fetch failed")),
    ("connecting", "renewed"),
    ("connecting", "link lost"),
    # A link is not dialled while it is up, and who is reserved is on the one that is; a link keeps its order.
    *(("reserved", event) for event in ("link up", "link failed", "completed", "fetched", "fetch failed")),
    # Blocks come back that were asked for: HandoffError. There is no lease on what comes back in any case.
    *((state, "recalled") for state in ("connecting", "reserved", "fetching")),
    ("recalled", "lease end"),
}
"""(state, event) that no schedule without a defect brings about, but if the router says things twice."""


def all_pairs() -> set[tuple[str, str]]:
    offers = {(s.value, event) for s in OfferState for event in (*OFFER_EVENTS, "lease end")}
    pulls = {(s.value, event) for s in PullState for event in (*PULL_EVENTS, "lease end")}
    # Keys that are settled, or were never heard of.
    late = {
        "promise",
        "reserve",
        "withdraw",
        "dropped",
        "renewed",
        "offered",
        "completed",
        "withdrawn",
        "cancel",
    }
    return offers | pulls | {("gone", event) for event in late} | {("digest", "differs")}


def test_faulty_schedules_reach_every_outcome_and_every_event_in_every_state() -> None:
    outcomes, seen = run_range(0, 4000, faults=0.3, cancels=0.3)
    assert outcomes.keys() == {
        *("delivered", "cancelled", "down", "no blocks", "refused", "ended with its first token"),
        *(failure.value for failure in HandoffFailure),
    }
    assert all_pairs() - CANNOT_BE - seen == set()


@pytest.mark.parametrize("cancels", [0.0, 0.5])
def test_without_faults_nothing_fails(cancels: float) -> None:
    """Cancels, steps of several leases and full pools are no faults."""
    good = {"delivered", "no blocks", "refused", "ended with its first token"}
    for seed in range(500):
        schedule = Schedule(seed, faults=0.0, cancels=cancels).run()
        assert set(schedule.outcomes.values()) <= (good | {"cancelled"} if cancels else good), seed
        assert schedule.failures == [], seed


def test_a_schedule_can_be_repeated() -> None:
    first, second = (Schedule(7, faults=0.3, cancels=0.3).run() for _ in range(2))
    assert first.outcomes == second.outcomes
    assert first.time.now == second.time.now


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_faulty_schedules() -> None:
    """Other ones than in the default run, from few faults to many."""
    starts = range(10_000, 110_000, 1_000)
    faults = [(0.1, 0.3, 0.6)[i % 3] for i in range(len(starts))]
    spawn = multiprocessing.get_context("spawn")
    outcomes: Counter[str] = Counter()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        stops = [start + 1_000 for start in starts]
        for found, _ in pool.map(run_range, starts, stops, faults, [0.3] * len(starts)):
            outcomes += found
    assert outcomes["delivered"] > 100_000
