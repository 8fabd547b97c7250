"""What a router learns of a prefix cache, whenever it is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import block_changes
from engine.block_changes import BlockChanges, ChangeLog

CHANGES = st.lists(st.sets(st.integers(0, 12)) | st.none(), max_size=40)


@given(CHANGES)
def test_whoever_takes_now_and_then_knows_all(changes: list[set[int] | None]) -> None:
    """A set is turned over, None takes."""
    log, cached, known = ChangeLog(), set[int](), set[int]()
    for change in [*changes, None]:
        if change is not None:
            log.stored(sorted(change - cached))
            log.removed(sorted(change & cached))
            cached ^= change
            continue
        assert bool(log) == (cached != known)
        taken = log.take()
        assert set(taken.stored) == cached - known
        assert set(taken.removed) == known - cached
        known = set(cached)
    assert not log


@given(st.integers(0, 9), st.integers(0, 9))
def test_messages_are_of_bounded_size_and_say_each_digest_once(num_stored: int, num_removed: int) -> None:
    stored, removed = tuple(range(num_stored)), tuple(range(100, 100 + num_removed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_changes, "MAX_DIGESTS", 4)
        events = [event for told in BlockChanges(stored, removed).messages() for event in told.events]
    assert all(0 < len(event.stored) + len(event.removed) <= 8 for event in events)
    assert tuple(digest for event in events for digest in event.stored) == stored
    assert tuple(digest for event in events for digest in event.removed) == removed


def test_a_digest_has_room_for_all_its_bits() -> None:
    (message,) = BlockChanges((2**64 - 1,), (0,)).messages()
    assert (list(message.events[0].stored), list(message.events[0].removed)) == ([2**64 - 1], [0])
