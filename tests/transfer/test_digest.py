"""Digests of what was offered against what arrived, between equal and unequal layouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from transfer.base import KvMemory, copy_boxes
from transfer.digest import check_digests, digests_of
from transfer.errors import DigestError
from transfer.layout import Part, Route, WorkerLayout

SOURCE = WorkerLayout(num_layers=2, num_kv_heads=2, head_dim=2, block_size=4, dtype="bfloat16")
LAYOUTS = {
    "the same": SOURCE,
    "other blocks": replace(SOURCE, block_size=6),
    "more ranks": replace(SOURCE, tp_size=2, pp_size=2),
    "heads twice": replace(SOURCE, tp_size=4),
    "all of it": replace(SOURCE, block_size=8, tp_size=2, pp_size=2),
}
NUM_BLOCKS = 8
# Of a sequence of 15 tokens: a chunk's second layer, and all layers of its end.
MIDDLE = Part(4, 12, 1, 2, (5, 2), (0, 0))
END = Part(8, 15, 0, 2, (2, 7), (0, 0))
WHOLE = Part(0, 15, 0, 2, (3, 5, 2, 7), (0, 0, 0, 0))


def memory(layout: WorkerLayout, seed: int) -> KvMemory:
    random = torch.Generator().manual_seed(seed)
    ranks = (
        torch.randint(0, 256, (NUM_BLOCKS, layout.rank(r).block_nbytes), dtype=torch.uint8, generator=random)
        for r in range(layout.num_ranks)
    )
    return KvMemory(layout, tuple(ranks), np.zeros(NUM_BLOCKS, np.uint32))


class Copied:
    """A part, offered with digests and copied to the target."""

    def __init__(self, source: WorkerLayout, target: WorkerLayout, part: Part, skip_tokens: int = 0) -> None:
        self.source, self.target = memory(source, 1), memory(target, 2)
        self.route = Route(source, target)
        self.part = replace(part, digests=digests_of(self.source, self.route, part))
        self.boxes = self.route.boxes(part, [6, 1, 4, 3, 0], skip_tokens)
        copy_boxes(self.source, part, self.boxes, self.target)

    def check(self) -> None:
        check_digests(self.target, self.route, self.part, self.boxes)

    def places(self) -> torch.Tensor:
        """[n, 3] rank, block and byte in it of all that was copied."""
        marked = KvMemory(
            self.target.layout,
            tuple(torch.zeros_like(rank) for rank in self.target.ranks),
            self.target.generations,
        )
        for box in self.boxes:
            for block in box.target.blocks:
                marked.corner(box.target, block, 1).fill_(1)
        return torch.cat(
            [
                torch.nn.functional.pad(rank.nonzero(), (1, 0), value=number)
                for number, rank in enumerate(marked.ranks)
            ]
        )


@pytest.mark.parametrize("part", [MIDDLE, END], ids=["middle", "end"])
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_a_good_copy_agrees(source: str, target: str, part: Part) -> None:
    blocks = part.blocks
    if LAYOUTS[source].block_size != 4:
        # As the source's own blocks cut it.
        size = LAYOUTS[source].block_size
        start = part.start_token // size * size
        count = -(-(part.end_token - start) // size)
        blocks = (5, 2, 7)[:count]
        part = replace(part, start_token=start, blocks=blocks, generations=(0,) * count)
    copied = Copied(LAYOUTS[source], LAYOUTS[target], part)
    assert copied.part.digests
    copied.check()


@pytest.mark.parametrize("target", LAYOUTS)
def test_one_flipped_bit_anywhere_is_found(target: str) -> None:
    copied = Copied(SOURCE, LAYOUTS[target], END)
    places = copied.places().tolist()
    assert len(places) >= 7 * 2 * 2 * 2 * 2 * 2  # tokens, layers, keys and values, heads, head_dim, bytes
    for number, (rank, block, byte) in enumerate(places):
        held = copied.target.ranks[rank]
        held[block, byte] ^= 1 << number % 8
        with pytest.raises(
            DigestError, match=f"block {block} holds other bytes than were offered for tokens 8 to 14"
        ):
            copied.check()
        held[block, byte] ^= 1 << number % 8
    copied.check()


def test_what_was_not_copied_does_not_matter() -> None:
    copied = Copied(SOURCE, LAYOUTS["all of it"], END)
    kept = torch.zeros(0)
    for rank, held in enumerate(copied.target.ranks):
        mask = torch.ones_like(held, dtype=torch.bool)
        for _, block, byte in (place for place in copied.places().tolist() if place[0] == rank):
            mask[block, byte] = False
        held[mask] ^= 255
        kept = torch.cat([kept, held[mask]])
    assert len(kept)
    copied.check()


@pytest.mark.parametrize("target", LAYOUTS)
def test_a_skipped_prefix_is_neither_copied_nor_checked(target: str) -> None:
    """Its digests are in the offer all the same: the offerer does not know what is skipped."""
    layout = LAYOUTS[target]
    skip_tokens = 12 // layout.block_size * layout.block_size
    copied = Copied(SOURCE, layout, WHOLE, skip_tokens)
    copied.check()
    everything = Copied(SOURCE, layout, WHOLE)
    assert copied.part.digests == everything.part.digests
    assert len(copied.places()) < len(everything.places())
    rank, block, byte = copied.places()[-1].tolist()
    copied.target.ranks[rank][block, byte] ^= 1
    with pytest.raises(DigestError):
        copied.check()


def test_a_wrong_map_is_found() -> None:
    """Two blocks that are exchanged, with all bytes of each intact."""
    copied = Copied(SOURCE, SOURCE, END)
    first, second = copied.boxes[0].target.blocks
    held = copied.target.ranks[0]
    held[[first, second]] = held[[second, first]]
    with pytest.raises(DigestError):
        copied.check()


@pytest.mark.parametrize("count", [1, 3])
def test_digests_that_are_missing_are_a_difference(count: int) -> None:
    copied = Copied(SOURCE, LAYOUTS["more ranks"], END)
    copied.part = replace(copied.part, digests=copied.part.digests[:count])
    with pytest.raises(DigestError):
        copied.check()
