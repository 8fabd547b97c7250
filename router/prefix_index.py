"""Which worker holds which prefix, as the workers' block events say. A core.

Bounded: a worker cannot hold more blocks than it has, and what leaves its cache leaves the index. Digests are
worked out as far as anybody holds the prompt, and kept for the requests seen last, so a prompt that begins
like no other costs one.

A worker never gives a block up before those that follow it in a sequence (engine/prefix_cache.py), so how
much it holds of a prompt is found by bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.prefix_digests import prefix_digests, short
from router.pool_view import PoolView, WorkerView
from router.requests import Request

_MOST_HOLDERS = 4


def cache_salt(request: Request) -> str:
    """The tenant: who measures how fast a prompt is read must not learn what other tenants have asked."""
    # HTTP headers may hold bytes that are no text, which protobuf would refuse.
    return request.tenant.encode("utf-8", "backslashreplace").decode()


class PrefixIndex:
    """Blocks by the first 64 bits of their digests (engine/prefix_digests.py), by worker."""

    def __init__(self, pool: PoolView, max_requests: int = 2048) -> None:
        """max_requests: whose digests are kept."""
        self._pool = pool
        self._max_requests = max_requests
        self._blocks: dict[str, set[int]] = {}
        # Most blocks have one holder: those of a worker share one tuple.
        self._alone: dict[str, tuple[str, ...]] = {}
        self._holders: dict[int, tuple[str, ...]] = {}
        self._chains: OrderedDict[tuple[str, int, int, str], _Chain] = OrderedDict()
        # One worker of each kind whose digests are alike, as of a version of the pool.
        self._kinds: tuple[WorkerView, ...] = ()
        self._kinds_of = -1

    def __len__(self) -> int:
        """Blocks that are known, one that several workers hold as often."""
        return sum(len(blocks) for blocks in self._blocks.values())

    @property
    def num_requests(self) -> int:
        """Requests whose digests are kept, for each size of blocks."""
        return len(self._chains)

    def stored(self, worker_id: str, digests: Iterable[int]) -> None:
        """Now in the worker's cache."""
        blocks = self._blocks.setdefault(worker_id, set())
        alone = self._alone.setdefault(worker_id, (worker_id,))
        for digest in digests:
            if digest not in blocks:
                blocks.add(digest)
                others = self._holders.get(digest)
                self._holders[digest] = alone if others is None else others + alone

    def removed(self, worker_id: str, digests: Iterable[int]) -> None:
        """No longer in the worker's cache; of what is not known there is nothing to forget."""
        blocks = self._blocks.get(worker_id, set())
        for digest in digests:
            if digest in blocks:
                blocks.remove(digest)
                self._drop(worker_id, digest)

    def forget(self, worker_id: str) -> None:
        """The worker is gone, or lives anew."""
        for digest in self._blocks.pop(worker_id, ()):
            self._drop(worker_id, digest)
        self._alone.pop(worker_id, None)

    def cached_tokens(self, worker_id: str, request: Request) -> int:
        """Tokens at the request's beginning (prompt, and answer so far) that the worker holds; at most all
        but the last. The request's digests are worked out once."""
        blocks = self._blocks.get(worker_id)
        worker = self._pool.get(worker_id)
        if not blocks or worker is None:
            return 0
        digests = self._digests(worker, request)
        held = bisect_left(digests, True, key=lambda digest: digest not in blocks)
        return held * worker.capacity.block_size

    def holders(self, request: Request) -> Iterable[str]:
        """The workers that hold at least the first block, a few at most, who holds most first."""
        found: dict[str, int] = {}
        for worker in self._some_workers():
            digests = self._digests(worker, request)
            names: dict[str, int] = {}
            depth = bisect_left(digests, True, key=lambda digest: digest not in self._holders)
            while depth > 0 and len(names) < _MOST_HOLDERS:
                for name in self._holders.get(digests[depth - 1], ()):
                    names.setdefault(name, depth * worker.capacity.block_size)
                    if len(names) == _MOST_HOLDERS:
                        break
                depth //= 2
            found |= names
        return sorted(found, key=lambda name: (-found[name], name))[:_MOST_HOLDERS]

    def _some_workers(self) -> Iterable[WorkerView]:
        """One of each kind whose digests are alike."""
        if self._kinds_of != self._pool.version:
            self._kinds_of = self._pool.version
            kinds = {(one.capacity.block_size, one.capacity.fingerprint): one for one in self._pool}
            self._kinds = tuple(kinds.values())
        return self._kinds

    def _digests(self, worker: WorkerView, request: Request) -> Sequence[int]:
        """Of the request's blocks as that worker has them, as far as anybody holds them, and one more."""
        capacity = worker.capacity
        name = (request.request_id, request.num_tokens, capacity.block_size, capacity.fingerprint)
        chain = self._chains.get(name)
        if chain is None:
            chain = self._chains[name] = _Chain(request, capacity.block_size, capacity.fingerprint)
            if len(self._chains) > self._max_requests:
                self._chains.popitem(last=False)
        while not chain.is_whole and (not chain.digests or chain.digests[-1] in self._holders):
            chain.extend()
        return chain.digests

    def _drop(self, worker_id: str, digest: int) -> None:
        others = tuple(name for name in self._holders[digest] if name != worker_id)
        if not others:
            del self._holders[digest]
        else:
            self._holders[digest] = self._alone[others[0]] if len(others) == 1 else others


class _Chain:
    """The digests of a request's full blocks but one that ends it, for its last token is always computed."""

    def __init__(self, request: Request, block_size: int, fingerprint: str) -> None:
        self.digests: list[int] = []
        self._request = request
        self._block_size = block_size
        self._fingerprint = fingerprint
        self._num_blocks = (request.num_tokens - 1) // block_size

    @property
    def is_whole(self) -> bool:
        return len(self.digests) >= self._num_blocks

    def extend(self) -> None:
        """The first one, or four times as many: starting over costs little beside what is new."""
        num_blocks = min(self._num_blocks, max(1, 4 * len(self.digests)))
        tokens = (self._request.prompt_token_ids + self._request.answered)[: num_blocks * self._block_size]
        digests = prefix_digests(self._fingerprint, cache_salt(self._request), self._block_size, tokens)
        self.digests = [short(digest) for digest in digests]
