"""Which prefill and decode workers are linked, as the decode workers say. A core.

A mixed worker takes hand-offs as a decode worker does, and is one here.

    (both up) --Pair sent--> linking --PairState--> linked <--> unreachable
                                          +-------> mismatched, until one of the two has another life

Requests are placed on linked pairs only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Pair:
    """A prefill and a decode worker, by id."""

    prefill: str
    decode: str


class LinkState(StrEnum):
    """Of a pair."""

    LINKING = "linking"
    LINKED = "linked"
    UNREACHABLE = "unreachable"
    MISMATCHED = "mismatched"


@dataclass(frozen=True, slots=True)
class PairLink:
    """What is known of a pair. message: why it is not linked; of a mismatch, with the field."""

    state: LinkState
    message: str = ""


class PairTable:
    """The pairs that somebody was asked about. version: another one after each change."""

    def __init__(self) -> None:
        self.version = 0
        self._links: dict[str, dict[str, PairLink]] = {}  # by prefill and decode worker
        self._linked_with: dict[str, set[str]] = {}  # prefill worker -> decode workers

    def put(self, pair: Pair, link: PairLink) -> None:
        """The state of a pair."""
        self.version += 1
        self._links.setdefault(pair.prefill, {})[pair.decode] = link
        decodes = self._linked_with.setdefault(pair.prefill, set())
        if link.state is LinkState.LINKED:
            decodes.add(pair.decode)
        else:
            decodes.discard(pair.decode)

    def get(self, pair: Pair) -> PairLink | None:
        """What is known of a pair; None if nobody was asked about it."""
        return self._links.get(pair.prefill, {}).get(pair.decode)

    def linked_with(self, prefill: str) -> Collection[str]:
        """The decode workers that are linked to a prefill worker."""
        return self._linked_with.get(prefill, frozenset())

    def forget(self, worker_id: str) -> None:
        """The worker is gone, or lives anew: what was known of its pairs is void."""
        self.version += 1
        self._links.pop(worker_id, None)
        self._linked_with.pop(worker_id, None)
        for links in self._links.values():
            links.pop(worker_id, None)
        for decodes in self._linked_with.values():
            decodes.discard(worker_id)

    def why_none(self, prefills: Collection[str], decodes: Collection[str]) -> tuple[bool, str] | None:
        """None while a pair of these workers is linked; else whether none can ever be, and why one is not.

        None ever can when all are mismatched: no time mends that, only another life of a worker.
        """
        if any(decode in decodes for prefill in prefills for decode in self.linked_with(prefill)):
            return None
        why = ""
        for pair in (Pair(prefill, decode) for prefill in prefills for decode in decodes):
            link = self.get(pair) or PairLink(LinkState.LINKING)
            words = f": {link.message}" if link.message else ""
            if link.state is not LinkState.MISMATCHED:
                return False, f"{pair.decode} and {pair.prefill} are {link.state.value}{words}"
            why = why or f"{pair.decode} and {pair.prefill} do not fit together{words}"
        return True, why
