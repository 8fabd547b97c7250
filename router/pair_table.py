"""Which prefill and decode workers are linked, as the decode workers say. A core.

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
    """The pairs that somebody was asked about."""

    def __init__(self) -> None:
        self._links: dict[Pair, PairLink] = {}
        self._linked_with: dict[str, set[str]] = {}  # prefill worker -> decode workers

    def put(self, pair: Pair, link: PairLink) -> None:
        """The state of a pair."""
        self._links[pair] = link
        decodes = self._linked_with.setdefault(pair.prefill, set())
        if link.state is LinkState.LINKED:
            decodes.add(pair.decode)
        else:
            decodes.discard(pair.decode)

    def get(self, pair: Pair) -> PairLink | None:
        """What is known of a pair; None if nobody was asked about it."""
        return self._links.get(pair)

    def linked_with(self, prefill: str) -> Collection[str]:
        """The decode workers that are linked to a prefill worker."""
        return self._linked_with.get(prefill, frozenset())

    def forget(self, worker_id: str) -> None:
        """The worker is gone, or lives anew: what was known of its pairs is void."""
        self._linked_with.pop(worker_id, None)
        for pair in [pair for pair in self._links if worker_id in (pair.prefill, pair.decode)]:
            del self._links[pair]
            self._linked_with.get(pair.prefill, set()).discard(pair.decode)

    def why_none(self, prefills: Collection[str], decodes: Collection[str]) -> tuple[bool, str] | None:
        """None while a pair of these workers is linked; else whether none can ever be, and why one is not.

        None ever can when all are mismatched: no time mends that, only another life of a worker.
        """
        if any(decode in decodes for prefill in prefills for decode in self.linked_with(prefill)):
            return None
        why = ""
        for pair in (Pair(prefill, decode) for prefill in prefills for decode in decodes):
            link = self._links.get(pair, PairLink(LinkState.LINKING))
            words = f": {link.message}" if link.message else ""
            if link.state is not LinkState.MISMATCHED:
                return False, f"{pair.decode} and {pair.prefill} are {link.state.value}{words}"
            why = why or f"{pair.decode} and {pair.prefill} do not fit together{words}"
        return True, why
