"""What of a worker's load is not in its snapshots yet: counts of requests, prompt tokens and blocks. A core.

Every request that this router places is credited at once. The command that tells the worker has a number, and
a snapshot says up to which number the worker has taken commands into account: from then on the credit is part
of the snapshot's figures, and no longer added to them. What ended since the snapshot is taken off again. So
neither a stale snapshot nor a command under way sends a herd of requests to one worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.sequence import RequestKey


@dataclass(slots=True)
class _Credit:
    tokens: int
    blocks: int
    command: int | None = None  # None until the command that tells the worker is sent
    seen: bool = False


@dataclass(slots=True)
class Counts:
    """Of some requests together. tokens: of prompts that are not read yet."""

    requests: int = 0
    tokens: int = 0
    blocks: int = 0


class Ledger:
    """unseen: placed here, and not in the last snapshot. ended: in the last snapshot, and here no more."""

    def __init__(self) -> None:
        self.unseen = Counts()
        self.ended = Counts()
        self._credits: dict[RequestKey, _Credit] = {}
        self._not_seen: set[RequestKey] = set()

    def __len__(self) -> int:
        """Requests that this router has there."""
        return len(self._credits)

    def credit(self, key: RequestKey, tokens: int, blocks: int) -> None:
        """`key` is placed: so many prompt tokens to read, so many blocks."""
        self._credits[key] = _Credit(tokens, blocks)
        self._not_seen.add(key)
        self.unseen.requests += 1
        self.unseen.tokens += tokens
        self.unseen.blocks += blocks

    def sent(self, key: RequestKey, command: int) -> None:
        """Command number `command` tells the worker about `key`."""
        self._credits[key].command = command

    def read(self, key: RequestKey) -> None:
        """The prompt of `key` is read; one that is not here is ignored."""
        credit = self._credits.get(key)
        if credit is None or credit.tokens == 0:
            return
        if credit.seen:
            self.ended.tokens += credit.tokens
        else:
            self.unseen.tokens -= credit.tokens
        credit.tokens = 0

    def release(self, key: RequestKey) -> None:
        """`key` no longer loads the worker; one that is not here is ignored."""
        credit = self._credits.pop(key, None)
        if credit is None:
            return
        if credit.seen:
            self.ended.requests += 1
            self.ended.tokens += credit.tokens
            self.ended.blocks += credit.blocks
        else:
            self._not_seen.discard(key)
            self._uncount(credit)

    def snapshot(self, commands_seen: int) -> Sequence[RequestKey]:
        """Returns the requests that are part of the worker's figures from now on, and were not before."""
        self.ended = Counts()
        seen = []
        for key in self._not_seen:
            credit = self._credits[key]
            if credit.command is not None and credit.command <= commands_seen:
                credit.seen = True
                self._uncount(credit)
                seen.append(key)
        self._not_seen.difference_update(seen)
        return seen

    def _uncount(self, credit: _Credit) -> None:
        self.unseen.requests -= 1
        self.unseen.tokens -= credit.tokens
        self.unseen.blocks -= credit.blocks
