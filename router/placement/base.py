"""The interface of placement: which workers a request goes to, now."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from router.requests import Request


class Kind(StrEnum):
    """How a request is placed: a label of `prelay_placement_total`."""

    DISAGGREGATED = "disaggregated"
    """A prefill worker reads the prompt, another worker writes the answer."""
    LOCAL = "local"
    """A mixed worker does both, because that is best."""
    DEFLECTED = "deflected"
    """A mixed worker does both, because the prefill workers would be late."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What was predicted when a request was placed, seconds: time to its first token from now on, its average
    time per output token, and what of the hand-off delays its second token."""

    ttft_s: float
    tpot_s: float
    transfer_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """prefill: the worker that reads the prompt; None if `decode`, a mixed worker, reads it itself. expected:
    of policies that predict."""

    kind: Kind
    prefill: str | None
    decode: str
    expected: Expected | None = None


class Placement(Protocol):
    """A core: told `now`, decides by what its constructor was given to see (pool, estimates, randomness)."""

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        """Where `request` goes, or None while it has to wait at the gate. Prefill and decode worker of a
        decision are linked.

        avoid: workers that have failed this request before: taken only if there is no other.
        """
