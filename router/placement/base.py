"""The interface of placement: which pair of workers a request goes to, now."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from router.pair_table import Pair
from router.pool_view import PoolView
from router.requests import Request


class Placement(Protocol):
    """A policy. A core: decides from what it is shown, keeps nothing."""

    def choose(self, request: Request, pool: PoolView, avoid: Collection[str], now: float) -> Pair | None:
        """The linked pair for `request`, or None while it has to wait at the gate.

        avoid: workers that have failed this request before: taken only if there is no other.
        """
