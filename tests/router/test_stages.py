"""Where the time of a request went."""

from __future__ import annotations

import pytest

from router.requests import Stage
from router.stages import StageClock


def test_the_wait_for_the_reservation_belongs_to_the_prefill_queue():
    clock = StageClock(arrived_at=0.0)
    clock.placed(1.0)
    clock.reserved(3.0)
    clock.report(Stage.PREFILL_QUEUE, 1.0)
    clock.report(Stage.PREFILL, 2.0)
    clock.first_token(7.0)
    spent = clock.finish(9.0)
    expected = {Stage.GATE: 1.0, Stage.PREFILL_QUEUE: 3.0, Stage.PREFILL: 2.0, Stage.FIRST_TOKEN: 1.0}
    assert {stage: spent[stage] for stage in expected} == expected
    assert spent[Stage.DECODE] == 2.0
    assert sum(spent.values()) == pytest.approx(9.0)


def test_a_retry_keeps_what_was_waited_for():
    clock = StageClock(arrived_at=0.0)
    clock.placed(1.0)
    clock.reserved(2.0)
    clock.retried(4.0)
    clock.placed(7.0)
    spent = clock.finish(8.0)
    assert (spent[Stage.GATE], spent[Stage.PREFILL_QUEUE], spent[Stage.HANDOFF_RETRY]) == (4.0, 1.0, 2.0)
    assert sum(spent.values()) == pytest.approx(8.0)
