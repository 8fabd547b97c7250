"""When the gate is looked at: at most once a turn, and never for all of the time."""

from __future__ import annotations

import asyncio

from router.pump import RETRY_S, ROUND_S, Pump


class Gate:
    """So many wait; each decision costs `cost_s`."""

    def __init__(self, waiting=0, room=0, cost_s=0.0):
        self.waiting = waiting
        self.room = room
        self.cost_s = cost_s
        self.now = 0.0
        self.decisions = 0
        self.rounds = 0
        self.empty = asyncio.Event()
        self.retry_s = 0.0
        self.pump = Pump(self.place_next, self.placed_all, lambda: self.now)

    def place_next(self, now):
        assert now == self.now
        if not self.waiting:
            return False
        self.decisions += 1
        self.now += self.cost_s
        if not self.room:
            return False
        self.room -= 1
        self.waiting -= 1
        if not self.waiting:
            self.empty.set()
        return True

    def placed_all(self, now):
        self.rounds += 1
        return self.retry_s if self.waiting else None


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_however_many_ask_there_is_one_round_a_turn():
    gate = Gate(waiting=3, room=3)
    for _ in range(50):
        gate.pump.soon()
    assert gate.rounds == 0
    await turns(2)
    assert (gate.rounds, gate.waiting) == (1, 0)
    await turns(5)
    assert gate.rounds == 1  # nobody waits, and nobody has asked
    gate.pump.soon()
    await turns(2)
    assert gate.rounds == 2


async def test_who_arrives_is_placed_at_once():
    gate = Gate(waiting=1, room=1)
    gate.pump.soon()
    gate.pump.now()
    assert (gate.rounds, gate.waiting) == (1, 0)
    await turns(5)
    assert gate.rounds == 1  # that was the round that had been asked for


async def test_a_decision_in_vain_is_followed_by_a_pause():
    gate = Gate(waiting=2, cost_s=1000.0)
    gate.pump.now()
    assert gate.decisions == 1
    gate.room = 2
    gate.pump.now()
    gate.pump.soon()
    await turns(20)
    assert gate.decisions == 1  # the pause is four times as long as the decision took
    gate.pump.close()


async def test_a_long_round_lets_others_have_a_turn():
    gate = Gate(waiting=10, room=10, cost_s=0.6 * ROUND_S)
    gate.pump.now()
    assert (gate.waiting, gate.rounds) == (8, 0)
    await turns(2)
    assert (gate.waiting, gate.rounds) == (6, 0)
    await turns(10)
    assert (gate.waiting, gate.rounds) == (0, 1)


async def test_while_somebody_waits_it_is_looked_at_again():
    gate = Gate(waiting=1)
    gate.pump.now()
    gate.room = 1
    await asyncio.sleep(0)
    assert gate.waiting == 1
    await gate.empty.wait()  # though nobody has asked
    assert gate.decisions == 2


async def test_after_close_nothing_runs():
    gate = Gate(waiting=1, room=1)
    gate.pump.soon()
    gate.pump.close()
    await turns(5)
    assert gate.rounds == 0


async def test_it_is_not_looked_at_before_time_can_have_changed_anything():
    gate = Gate(waiting=1)
    gate.retry_s = 3600.0
    gate.pump.now()
    gate.room = 1
    await asyncio.sleep(5 * RETRY_S)
    assert (gate.waiting, gate.rounds) == (1, 1)
    gate.pump.soon()  # but at once when something has happened
    await gate.empty.wait()
    gate.pump.close()
