"""Which bytes of a prefill worker's KV go where on a decode worker that is laid out differently.

A worker's KV is spread over its ranks: pipeline stages hold runs of layers, tensor-parallel ranks hold runs
of KV heads (several of them the same head, where there are more ranks than heads). Block sizes may differ as
well. The map between two layouts has two halves, which do not depend on each other:

    slices   which (layers, heads) travel from which rank to which: fixed for a pair of workers
    pieces   which tokens lie together in a block of the one and in a block of the other: for each offer

A box is one slice of all pieces that lie at the same place in their blocks: one strided copy for each run of
blocks, not one for each token and head. How many boxes an offer makes does not depend on its length, for
pieces of s and t tokens a block lie at (s + t) / gcd(s, t) - 1 different places at most (one, if s is t):

    slices <= (pp_size of source + target - 1) * (tp_size of source + target - 1)
    boxes  <= slices * ((s + t) / gcd(s, t) - 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.layout import KvLayout
from engine.shard import Shard
from transfer.errors import TransferError


@dataclass(frozen=True, slots=True)
class WorkerLayout:
    """How a worker, all its ranks together, keeps KV. dtype: "float32" or "bfloat16"."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    tp_size: int = 1
    pp_size: int = 1

    @classmethod
    def of(cls, whole: KvLayout, tp_size: int = 1, pp_size: int = 1) -> WorkerLayout:
        """whole: what a worker with one rank would keep."""
        return cls(
            whole.num_layers,
            whole.num_kv_heads,
            whole.head_dim,
            whole.block_size,
            whole.dtype,
            tp_size,
            pp_size,
        )

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    def layers(self, rank: int) -> range:
        """The model's layers that this rank keeps."""
        return self._shard(rank).layers(self)

    def heads(self, rank: int) -> range:
        """The model's KV heads that this rank keeps."""
        return self._shard(rank).kv_heads(self)

    def rank(self, rank: int) -> KvLayout:
        """One rank's block."""
        return KvLayout(
            len(self.layers(rank)), len(self.heads(rank)), self.head_dim, self.block_size, self.dtype
        )

    def holders(self, layer: int, head: int) -> list[int]:
        """The ranks that keep this head of this layer, all the same; in order."""
        return [
            rank for rank in range(self.num_ranks) if layer in self.layers(rank) and head in self.heads(rank)
        ]

    def _shard(self, rank: int) -> Shard:
        return Shard(rank % self.tp_size, self.tp_size, rank // self.tp_size, self.pp_size)


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of the model's KV that travels between two ranks. layers, heads: the model's."""

    source_rank: int
    target_rank: int
    layers: range
    heads: range


@dataclass(frozen=True, slots=True)
class Part:
    """KV that is computed: tokens [start_token, end_token) of a sequence in layers [start_layer, end_layer).

    start_token: a multiple of the source's block size. end_token: that too, or all of the sequence that will
    be computed, as whole blocks travel. blocks: those of the source that hold the tokens, in order.
    generations: of the blocks, when they were offered. digests: of piece p in slice s at p * len(slices) + s,
    where the pieces are those of all tokens of the part (transfer/digest.py); empty if none.
    """

    start_token: int
    end_token: int
    start_layer: int
    end_layer: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    digests: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that lie together on both sides. blocks: by their place in the sequence."""

    source_block: int
    source_token: int
    target_block: int
    target_token: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Corner:
    """One side of a box: rank, blocks, and what of each block, all as the rank counts them."""

    rank: int
    blocks: tuple[int, ...]
    layers: slice
    tokens: slice
    heads: slice


@dataclass(frozen=True, slots=True)
class Box:
    """One strided copy: what `source` holds goes to `target`; both have the same shape.

    slice_index: in Route.slices. pieces: one for each block, counted from the beginning of the part.
    """

    slice_index: int
    pieces: tuple[int, ...]
    source: Corner
    target: Corner


class Route:
    """The map from one worker's layout to another's.

    The two must agree on the model: layers, heads, head_dim and dtype (the handshake sees to that).
    """

    def __init__(self, source: WorkerLayout, target: WorkerLayout) -> None:
        self.source = source
        self.target = target

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """Together every rank of the target gets all its layers and heads, each from one source."""
        return tuple(
            Slice(source_rank, target_rank, layers, heads)
            for target_rank in range(self.target.num_ranks)
            for source_rank in range(self.source.num_ranks)
            if (layers := _common(self.source.layers(source_rank), self.target.layers(target_rank)))
            and (heads := _common(self.source.heads(source_rank), self.target.heads(target_rank)))
            and self._is_turn_of(source_rank, target_rank, layers.start, heads.start)
        )

    def pieces(self, start_token: int, end_token: int) -> list[Piece]:
        """The tokens, cut where a block of either side begins. The last piece goes to the end of its block,
        for a copy of whole blocks is cheaper: what lies behind the tokens is nobody's yet."""
        size, other = self.source.block_size, self.target.block_size
        pieces: list[Piece] = []
        while start_token < end_token:
            end = min(start_token // size * size + size, start_token // other * other + other)
            pieces.append(
                Piece(
                    start_token // size,
                    start_token % size,
                    start_token // other,
                    start_token % other,
                    end - start_token,
                )
            )
            start_token = end
        return pieces

    def boxes(self, part: Part, table: Sequence[int], skip_tokens: int = 0) -> list[Box]:
        """The copies that bring a part to the target.

        table: the target's blocks of the whole sequence. skip_tokens: the first ones of the sequence, which
        the target has already; a multiple of its block size. Raises TransferError if the part's blocks or
        the table's are not those that its tokens need.
        """
        self._check(part, len(table))
        first_block = part.start_token // self.source.block_size
        first_wanted = skip_tokens // self.target.block_size
        # (token in the source's block, in the target's, tokens): pieces at one place go into one box.
        places: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
        for at, piece in enumerate(self.pieces(part.start_token, part.end_token)):
            if piece.target_block >= first_wanted:
                place = (piece.source_token, piece.target_token, piece.num_tokens)
                blocks = (part.blocks[piece.source_block - first_block], table[piece.target_block])
                places.setdefault(place, []).append((at, *blocks))
        offered = range(part.start_layer, part.end_layer)
        boxes: list[Box] = []
        for (source_token, target_token, num_tokens), found in places.items():
            pieces, sources, targets = zip(*found, strict=True)
            for index, each in enumerate(self.slices):
                if layers := _common(each.layers, offered):
                    kept = (layers, each.heads, num_tokens)
                    source = _corner(self.source, each.source_rank, sources, source_token, *kept)
                    target = _corner(self.target, each.target_rank, targets, target_token, *kept)
                    boxes.append(Box(index, pieces, source, target))
        return boxes

    def _is_turn_of(self, source_rank: int, target_rank: int, layer: int, head: int) -> bool:
        """Where several ranks of the source hold a head, those of the target take it from one after the
        other. They are counted over all stages, which would otherwise all begin with the same one."""
        holders = self.source.holders(layer, head)
        takers = [rank for rank in range(self.target.num_ranks) if head in self.target.heads(rank)]
        return holders[takers.index(target_rank) % len(holders)] == source_rank

    def _check(self, part: Part, num_blocks: int) -> None:
        """Offers come from another process."""
        start, end, size = part.start_token, part.end_token, self.source.block_size
        num_needed = -(-(end - start) // size)
        if start % size or not len(part.blocks) == len(part.generations) == num_needed:
            raise TransferError(
                f"tokens {start} to {end - 1} are offered in {len(part.blocks)} blocks of {size} tokens with "
                f"{len(part.generations)} generations: they must begin with a block, and fill that many"
            )
        if end > num_blocks * self.target.block_size:
            raise TransferError(
                f"tokens {start} to {end - 1} are offered; the {num_blocks} blocks of "
                f"{self.target.block_size} tokens that are set aside do not hold them"
            )


def _corner(
    layout: WorkerLayout,
    rank: int,
    blocks: tuple[int, ...],
    token: int,
    layers: range,
    heads: range,
    num_tokens: int,
) -> Corner:
    first_layer, first_head = layout.layers(rank).start, layout.heads(rank).start
    return Corner(
        rank,
        blocks,
        slice(layers.start - first_layer, layers.stop - first_layer),
        slice(token, token + num_tokens),
        slice(heads.start - first_head, heads.stop - first_head),
    )


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
