"""Which prompt's KV lies in which block, so that a prompt that begins alike need not be computed. A core.

Blocks are known by their digests (prefix_digests.py). Routers are told of them (block_changes.py).

The pool keeps the order in which blocks are given up; here is only what they hold. A block that holds a
prefix is held together with those before it by whoever uses it (`insert` sees to that), and `BlockPool.drop`
leaves the end of a sequence to be taken first, so a block is never given up before those that follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.block_changes import BlockChanges, ChangeLog
from engine.block_pool import BlockPool, Holder
from engine.prefix_digests import prefix_digests, short


class PrefixCache:
    """The CACHE references of `pool`: one for each block that is known here.

    identity: of the model; whatever the KV of a token depends on besides the tokens before it.
    """

    def __init__(self, pool: BlockPool, identity: str) -> None:
        self._pool = pool
        self._identity = identity
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._changes = ChangeLog()
        pool.tell(self._forget)

    def __len__(self) -> int:
        """Blocks that are known, also those that somebody else holds as well."""
        return len(self._blocks)

    def digests(self, token_ids: Sequence[int], salt: str) -> list[bytes]:
        """What the full blocks of these tokens are known by: to be worked out once for a sequence."""
        return prefix_digests(self._identity, salt, self._pool.block_size, token_ids)

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning that is known; the caller adds its reference at once.

        To draw a token at least the last one before it must be computed: leave out the digest of a block
        that ends the sequence.
        """
        blocks: list[int] = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, digests: Sequence[bytes], blocks: Sequence[int]) -> list[int]:
        """The KV in the first len(digests) of `blocks` is computed: let others find it.

        The caller holds one SEQUENCE reference of each of `blocks`, and nobody has been told of them yet.
        Where another sequence was faster, its block takes the place of ours, whose reference is dropped:
        the caller goes on with the blocks that are returned.
        """
        table = list(blocks)
        for index, digest in enumerate(digests):
            ours = table[index]
            known = self._blocks.setdefault(digest, ours)
            if known == ours:
                if ours not in self._digests:
                    self._digests[ours] = digest
                    self._changes.stored([short(digest)])
                    self._pool.add([ours], Holder.CACHE)
            else:
                self._pool.add([known], Holder.SEQUENCE)
                self._pool.drop([ours], Holder.SEQUENCE)
                table[index] = known
        return table

    def take_changes(self) -> BlockChanges:
        """Which blocks have become known, and which are known no longer, since the last call."""
        return self._changes.take()

    def _forget(self, block: int) -> None:
        digest = self._digests.pop(block)
        del self._blocks[digest]
        self._changes.removed([short(digest)])
