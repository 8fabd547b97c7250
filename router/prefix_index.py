"""Which worker holds which prefix, as the workers' block events say. A core.

Bounded: a worker cannot hold more blocks than it has, and what leaves its cache leaves the index.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.requests import Request


class PrefixIndex:
    """Blocks by the first 64 bits of their digests (engine/prefix_digests.py), by worker."""

    def stored(self, worker_id: str, digests: Iterable[int]) -> None:
        """Now in the worker's cache."""
        raise NotImplementedError

    def removed(self, worker_id: str, digests: Iterable[int]) -> None:
        """No longer in the worker's cache; of what is not known there is nothing to forget."""
        raise NotImplementedError

    def forget(self, worker_id: str) -> None:
        """The worker is gone, or lives anew."""
        raise NotImplementedError

    def cached_tokens(self, worker_id: str, request: Request) -> int:
        """Tokens at the request's beginning (prompt, and answer so far) that the worker holds; at most all
        but the last. The request's digests are worked out once."""
        raise NotImplementedError

    def holders(self, request: Request) -> Iterable[str]:
        """The workers that hold at least the first block, a few at most, who holds most first."""
        raise NotImplementedError
