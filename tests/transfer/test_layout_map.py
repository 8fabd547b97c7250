"""The map between two layouts, against looking every token, layer and head up one by one."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.layout import KvLayout
from engine.shard import Shard
from transfer.errors import TransferError
from transfer.layout import Box, Part, Route, WorkerLayout

Memory = list[npt.NDArray[np.int64]]
"""One array for each rank: [num_blocks, layers, 2, block_size, heads], a number for each head of a token."""

UNTOUCHED = -1
SOURCE_BLOCKS, TARGET_BLOCKS = 40, 40


def code(layer: int, kv: int, token: int, head: int) -> int:
    """A number that only this key (kv 0) or value (kv 1) has."""
    return ((layer * 2 + kv) * 1000 + token) * 1000 + head


def empty(layout: WorkerLayout, num_blocks: int) -> Memory:
    shapes = (layout.rank(rank).block_shape[:-1] for rank in range(layout.num_ranks))
    return [np.full((num_blocks, *shape), UNTOUCHED, np.int64) for shape in shapes]


def look_up(layout: WorkerLayout, memory: Memory, table: list[int], rank: int, token: int) -> npt.NDArray:
    """[layers, 2, heads] of one token on one rank, by plain arithmetic."""
    return memory[rank][table[token // layout.block_size], :, :, token % layout.block_size, :]


def codes(layout: WorkerLayout, rank: int, token: int) -> npt.NDArray:
    """What `look_up` must give."""
    return np.array(
        [
            [[code(layer, kv, token, head) for head in layout.heads(rank)] for kv in (0, 1)]
            for layer in layout.layers(rank)
        ]
    )


@dataclass(frozen=True)
class Transfer:
    """A sequence that travels in parts.

    cuts, layer_cuts: where chunks and layer groups end, besides at the end of all.
    """

    source: WorkerLayout
    target: WorkerLayout
    num_tokens: int
    skip_tokens: int = 0
    cuts: tuple[int, ...] = ()
    layer_cuts: tuple[int, ...] = ()
    seed: int = 0

    def tables(self) -> tuple[list[int], list[int]]:
        dice = random.Random(self.seed)
        return tuple(  # type: ignore[return-value]
            dice.sample(range(count), -(-self.num_tokens // layout.block_size))
            for layout, count in ((self.source, SOURCE_BLOCKS), (self.target, TARGET_BLOCKS))
        )

    def parts(self, table: list[int]) -> Iterator[Part]:
        size = self.source.block_size
        borders = sorted({0, self.num_tokens, *(cut // size * size for cut in self.cuts)})
        layer_borders = sorted({0, self.source.num_layers, *self.layer_cuts})
        for start, end in pairwise(borders):
            if end <= self.skip_tokens:
                continue
            for first_layer, end_layer in pairwise(layer_borders):
                blocks = tuple(table[start // size : -(-end // size)])
                yield Part(start, end, first_layer, end_layer, blocks, (0,) * len(blocks))


def check(transfer: Transfer) -> None:
    """Do the transfer's boxes, and compare with what every place of every rank must hold then."""
    source, target = transfer.source, transfer.target
    source_table, target_table = transfer.tables()
    source_memory, target_memory = empty(source, SOURCE_BLOCKS), empty(target, TARGET_BLOCKS)
    for rank, token in product(range(source.num_ranks), range(transfer.num_tokens)):
        look_up(source, source_memory, source_table, rank, token)[...] = codes(source, rank, token)
    route = Route(source, target)
    times_written = [np.zeros_like(of_rank) for of_rank in target_memory]
    for part in transfer.parts(source_table):
        boxes = route.boxes(part, target_table, transfer.skip_tokens)
        assert len(boxes) <= bound(route)
        num_pieces = len(route.pieces(part.start_token, part.end_token))
        assert all(piece < num_pieces for box in boxes for piece in box.pieces)
        done = [(box.slice_index, piece) for box in boxes for piece in box.pieces]
        assert len(set(done)) == len(done), "a piece of a slice has no digest of its own"
        for box in boxes:
            copy(box, source_memory, target_memory)
            corner = box.target
            for block in corner.blocks:
                times_written[corner.rank][block, corner.layers, :, corner.tokens, corner.heads] += 1

    wanted = range(transfer.skip_tokens, transfer.num_tokens)
    for rank, token in product(range(target.num_ranks), wanted):
        assert np.array_equal(
            look_up(target, target_memory, target_table, rank, token), codes(target, rank, token)
        ), f"rank {rank}, token {token}"
        assert (look_up(target, times_written, target_table, rank, token) == 1).all()
    fetched = target_table[transfer.skip_tokens // target.block_size :]
    for of_rank, written in zip(target_memory, times_written, strict=True):
        others = np.setdiff1d(np.arange(TARGET_BLOCKS), fetched)
        assert (of_rank[others] == UNTOUCHED).all()
        assert not written[others].any()


def copy(box: Box, source: Memory, target: Memory) -> None:
    """Slice by slice, as every backend does it; numpy refuses slices whose shapes differ."""
    there, here = box.source, box.target
    for at, to in zip(there.blocks, here.blocks, strict=True):
        read = source[there.rank][at, there.layers, :, there.tokens, there.heads]
        wanted = target[here.rank][to, here.layers, :, here.tokens, here.heads]
        assert read.shape == wanted.shape
        wanted[...] = read


def bound(route: Route) -> int:
    """As transfer/layout.py promises it."""
    source, target = route.source, route.target
    slices = (source.pp_size + target.pp_size - 1) * (source.tp_size + target.tp_size - 1)
    assert len(route.slices) <= slices
    common = math.gcd(source.block_size, target.block_size)
    return slices * ((source.block_size + target.block_size) // common - 1)


def splits(num_kv_heads: int, max_tp: int = 8, max_pp: int = 4) -> list[tuple[int, int]]:
    """All (tp_size, pp_size) that an engine can split so many KV heads over."""
    sizes = [tp for tp in range(1, max_tp + 1) if num_kv_heads % tp == 0 or tp % num_kv_heads == 0]
    return list(product(sizes, range(1, max_pp + 1)))


def layout(num_kv_heads: int, block_size: int, tp_size: int, pp_size: int, layers: int = 5) -> WorkerLayout:
    return WorkerLayout(layers, num_kv_heads, 1, block_size, "float32", tp_size, pp_size)


HEADS = {"mha": 8, "gqa": 2, "gqa_by_3": 6, "mqa": 1}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_pair_of_splits_brings_every_head_of_every_layer(heads: int) -> None:
    """Layers and heads by every pair; tokens enough to see that they do not get mixed up."""
    sizes = [(2, 2), (2, 4), (4, 2), (2, 3), (3, 1)]
    for index, (one, other) in enumerate(product(splits(heads), repeat=2)):
        at_source, at_target = sizes[index % len(sizes)]
        check(
            Transfer(
                layout(heads, at_source, *one),
                layout(heads, at_target, *other),
                num_tokens=5,
                layer_cuts=(2,),
                seed=index,
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (8, 4), (4, 6), (6, 4), (1, 4), (4, 1)])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_pair_of_splits_in_random_parts(heads: int, sizes: tuple[int, int]) -> None:
    dice = random.Random(heads * 100 + sizes[0] * 10 + sizes[1])
    for one, other in product(splits(heads), repeat=2):
        num_tokens = dice.randrange(1, 26)
        check(
            Transfer(
                layout(heads, sizes[0], *one),
                layout(heads, sizes[1], *other),
                num_tokens,
                skip_tokens=dice.randrange(num_tokens) // sizes[1] * sizes[1],
                cuts=tuple(dice.choices(range(num_tokens), k=2)),
                layer_cuts=tuple(dice.sample(range(5), 2)),
                seed=dice.randrange(1000),
            )
        )


@st.composite
def transfers(draw: st.DrawFn) -> Transfer:
    heads = draw(st.sampled_from(sorted(HEADS.values())))
    layers = draw(st.integers(4, 6))
    one, other = (draw(st.sampled_from(splits(heads))) for _ in range(2))
    size, other_size = (draw(st.integers(1, 9)) for _ in range(2))
    num_tokens = draw(st.integers(1, 30))
    return Transfer(
        layout(heads, size, *one, layers),
        layout(heads, other_size, *other, layers),
        num_tokens,
        draw(st.integers(0, (num_tokens - 1) // other_size)) * other_size,
        tuple(draw(st.lists(st.integers(0, num_tokens), max_size=4))),
        tuple(draw(st.lists(st.integers(0, layers), max_size=3))),
        draw(st.integers(0, 1000)),
    )


@given(transfers())
@settings(max_examples=150)
def test_any_parts_of_any_sequence_between_any_two_layouts(transfer: Transfer) -> None:
    check(transfer)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_ranks_that_hold_the_same_send_equally_often(heads: int) -> None:
    for one, other in product(splits(heads), repeat=2):
        source, target = layout(heads, 4, *one), layout(heads, 4, *other)
        route = Route(source, target)
        for head, layer in product(range(heads), range(0, 5, 2)):
            sent = Counter(
                each.source_rank
                for each in route.slices
                if head in each.heads and layer in source.layers(each.source_rank)
            )
            counts = [sent[rank] for rank in source.holders(layer, head)]
            assert sum(counts) == sent.total() > 0
            assert max(counts) - min(counts) <= 1, (source, target, head, counts)


def test_the_number_of_boxes_does_not_depend_on_the_length() -> None:
    for at_source, at_target, places in [(16, 16, 1), (16, 32, 2), (32, 16, 2), (16, 24, 4), (1, 16, 16)]:
        route = Route(layout(8, at_source, 4, 2), layout(8, at_target, 2, 1))
        for num_tokens in (960, 9600):
            blocks = tuple(range(num_tokens // at_source))
            part = Part(0, num_tokens, 0, 5, blocks, blocks)
            boxes = route.boxes(part, range(num_tokens // at_target))
            assert len(boxes) == places * len(route.slices)
            assert len(route.slices) == 8


def test_equal_layouts_make_one_box_of_whole_blocks_for_each_rank() -> None:
    same = layout(8, 16, 2, 2)
    boxes = Route(same, same).boxes(Part(0, 40, 0, 5, (7, 8, 9), (0, 0, 0)), [1, 2, 3])
    assert [(box.source.rank, box.target.rank) for box in boxes] == [(rank, rank) for rank in range(4)]
    for rank, box in enumerate(boxes):
        assert (box.source.blocks, box.target.blocks) == ((7, 8, 9), (1, 2, 3))
        num_layers, _, num_tokens, num_heads, _ = same.rank(rank).block_shape
        for corner in (box.source, box.target):
            assert (corner.layers, corner.tokens, corner.heads) == (
                slice(0, num_layers),
                slice(0, num_tokens),
                slice(0, num_heads),
            )


def test_ranks_keep_what_the_engines_shards_say() -> None:
    whole = KvLayout(5, 4, 8, 16, "bfloat16")
    worker = WorkerLayout.of(whole, 2, 3)
    assert worker.num_ranks == 6
    for rank in range(6):
        shard = Shard(rank % 2, 2, rank // 2, 3)
        assert (worker.layers(rank), worker.heads(rank)) == (shard.layers(worker), shard.kv_heads(worker))
    assert worker.rank(0) == KvLayout(2, 2, 8, 16, "bfloat16")
    assert worker.rank(5) == KvLayout(1, 2, 8, 16, "bfloat16")
    assert WorkerLayout.of(whole).rank(0) == whole


@pytest.mark.parametrize(
    ("change", "table", "complaint"),
    [
        ({"start_token": 2}, [0, 1, 2], "tokens 2 to 9 are offered in 3 blocks of 4 tokens"),
        ({"end_token": 13}, [0, 1, 2, 3], "tokens 0 to 12 are offered in 3 blocks"),
        ({"end_token": 8}, [0, 1, 2], "tokens 0 to 7 are offered in 3 blocks"),
        ({"generations": (0, 0)}, [0, 1, 2], "with 2 generations"),
        ({"end_token": -4}, [0, 1, 2], "tokens 0 to -5"),
        ({}, [0, 1], "the 2 blocks of 4 tokens that are set aside do not hold them"),
    ],
)
def test_an_offer_whose_blocks_do_not_add_up_is_refused(
    change: dict[str, int], table: list[int], complaint: str
) -> None:
    route = Route(layout(2, 4, 1, 1), layout(2, 4, 2, 1))
    part = Part(0, 10, 0, 5, (5, 6, 7), (0, 0, 0))
    assert route.boxes(part, [0, 1, 2])
    with pytest.raises(TransferError, match=complaint):
        route.boxes(replace(part, **change), table)
