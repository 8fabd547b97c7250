"""What came into a prefix cache and what left it, on its way to routers. A core.

engine thread:  PrefixCache  notes each change in a ChangeLog, and a turn's batch takes them along
asyncio loop:   RouterStreams  keeps the set that they amount to, and a ChangeLog for each router

So a router that attaches in the middle is told first of the whole set, as it is at that moment, and then of
all that changes; nothing is lost between the two, for both belong to the one thread.

Changes that undo each other are forgotten, so a router that does not keep up leaves no more behind than the
difference between two states of the cache: at most twice the blocks of the pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prelay.v1 import worker_pb2

MAX_DIGESTS = 2**16
"""In one message: half a MiB of the 4 MiB that gRPC takes."""


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """Digests of blocks (prefix_digests.short) that are known now and were not, and the reverse."""

    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stored or self.removed)

    def messages(self) -> Iterator[worker_pb2.BlockEvents]:
        """What a router is told; nothing, if nothing has changed."""
        for start in range(0, max(len(self.stored), len(self.removed)), MAX_DIGESTS):
            end = start + MAX_DIGESTS
            event = worker_pb2.BlockEvent(stored=self.stored[start:end], removed=self.removed[start:end])
            yield worker_pb2.BlockEvents(events=[event])


NO_CHANGES = BlockChanges()


class ChangeLog:
    """What has changed since it was last taken, all together."""

    def __init__(self) -> None:
        # True: stored.
        self._changes: dict[int, bool] = {}

    def __bool__(self) -> bool:
        return bool(self._changes)

    def stored(self, digests: Iterable[int]) -> None:
        self._note(digests, is_stored=True)

    def removed(self, digests: Iterable[int]) -> None:
        self._note(digests, is_stored=False)

    def take(self) -> BlockChanges:
        """Everything since the last call; no digest is both stored and removed."""
        changes, self._changes = self._changes, {}
        return BlockChanges(
            tuple(digest for digest, is_stored in changes.items() if is_stored),
            tuple(digest for digest, is_stored in changes.items() if not is_stored),
        )

    def _note(self, digests: Iterable[int], *, is_stored: bool) -> None:
        for digest in digests:
            if self._changes.setdefault(digest, is_stored) != is_stored:
                del self._changes[digest]
