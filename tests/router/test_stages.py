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
    clock.tokens(7.0)
    spent = clock.finish(9.0)
    expected = {Stage.GATE: 1.0, Stage.PREFILL_QUEUE: 3.0, Stage.PREFILL: 2.0, Stage.FIRST_TOKEN: 1.0}
    assert {stage: spent[stage] for stage in expected} == expected
    assert spent[Stage.DECODE] == 2.0
    assert sum(spent.values()) == pytest.approx(9.0)


def test_a_loss_before_the_first_token_keeps_what_was_waited_for():
    clock = StageClock(arrived_at=0.0)
    clock.placed(1.0)
    clock.reserved(2.0)
    clock.lost(4.0)
    clock.placed(7.0)
    spent = clock.finish(8.0)
    assert (spent[Stage.GATE], spent[Stage.PREFILL_QUEUE], spent[Stage.HANDOFF_RETRY]) == (4.0, 1.0, 2.0)
    assert sum(spent.values()) == pytest.approx(8.0)


def test_a_loss_after_the_first_token_is_recovery_until_the_next_one():
    clock = StageClock(arrived_at=0.0)
    clock.placed(1.0)
    clock.report(Stage.PREFILL, 1.0)
    clock.tokens(2.0)
    clock.report(Stage.TRANSFER, 0.5)
    clock.tokens(4.0)
    clock.lost(5.0)
    clock.placed(6.0)
    clock.reserved(7.0)
    clock.lost(8.0)  # again, before any token
    clock.placed(9.0)
    clock.report(Stage.PREFILL, 0.5)  # part of the recovery
    clock.tokens(10.0)
    clock.report(Stage.TRANSFER, 0.25)
    spent = clock.finish(11.0)
    assert {stage: seconds for stage, seconds in spent.items() if seconds} == {
        Stage.GATE: 1.0, Stage.PREFILL: 1.0, Stage.TRANSFER: 0.75, Stage.DECODE: 3.25, Stage.RECOVERY: 5.0,
    }  # fmt: skip


def test_a_request_that_ends_while_it_recovers():
    clock = StageClock(arrived_at=0.0)
    clock.placed(1.0)
    clock.tokens(2.0)
    clock.lost(3.0)
    spent = clock.finish(7.0)
    assert (spent[Stage.RECOVERY], sum(spent.values())) == (4.0, 7.0)
