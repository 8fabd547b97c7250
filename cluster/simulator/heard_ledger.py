"""The router's ledger of a writer, of whose tokens it hears when somebody asks and not one by one."""

from __future__ import annotations

from collections.abc import Callable

from engine.sequence import RequestKey
from router.placed_work import PlacedWork
from router.write_ledger import Batch, WriteLedger


class HeardLedger(WriteLedger):
    """hear: calls `heard` for what has come by now. Whatever is asked or changed, that comes first."""

    def __init__(self, hear: Callable[[], None]) -> None:
        super().__init__()
        self._hear = hear

    def heard(self, key: RequestKey, num_tokens: int) -> None:
        super().emitted(key, num_tokens)

    def add(self, key: RequestKey, work: PlacedWork) -> None:
        self._hear()
        super().add(key, work)

    def emitted(self, key: RequestKey, num_tokens: int) -> None:
        self._hear()
        super().emitted(key, num_tokens)

    def remove(self, key: RequestKey) -> None:
        self._hear()
        super().remove(key)

    def snapshot(self, batch: Batch, least_tpot_s: float, ahead_s: float = 0.0) -> None:
        self._hear()
        super().snapshot(batch, least_tpot_s, ahead_s)

    @property
    def now(self) -> Batch:
        self._hear()
        return super().now

    @property
    def ahead_s(self) -> float:
        self._hear()
        return super().ahead_s

    def after(self, in_s: float, step_s: float, now: float) -> Batch:
        self._hear()
        return super().after(in_s, step_s, now)

    def limit_s(self, least_s: float) -> float:
        self._hear()
        return super().limit_s(least_s)

    def outgrows(self, free_tokens: int, context: int, tokens: int) -> bool:
        self._hear()
        return super().outgrows(free_tokens, context, tokens)
