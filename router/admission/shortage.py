"""Whether there is a place for any request at all."""

from __future__ import annotations

from dataclasses import dataclass

from router.errors import NoPairError, NoWorkersError, RouterError
from router.pool_view import PoolView


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why there is no pair of workers for any request. passes: whether it may well be over in a moment."""

    reason: str
    error: RouterError
    passes: bool


def shortage_of(pool: PoolView) -> Shortage | None:
    """None while two workers are linked; that they are loaded or suspected is no shortage."""
    missing = pool.missing_role()
    if missing is not None:
        return Shortage("no_worker", NoWorkersError(missing), passes=False)
    none = pool.why_no_pair()
    if none is None:
        return None
    never, why = none
    error = NoPairError(f"no prefill worker is linked to a decode worker ({why})")
    return Shortage("no_pair", error, passes=not never)
