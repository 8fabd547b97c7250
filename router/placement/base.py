"""The interface of placement: which pair of workers a request goes to, now."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from router.pool_view import PoolView
from router.requests import Request


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers that a request is placed on, by id."""

    prefill: str
    decode: str


class Placement(Protocol):
    """A policy. A core: decides from what it is shown, keeps nothing."""

    def choose(self, request: Request, pool: PoolView, excluded: Collection[Pair], now: float) -> Pair | None:
        """The pair for `request`, or None while it has to wait at the gate.

        excluded: pairs that are known not to reach each other.
        """
