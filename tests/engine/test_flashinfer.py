"""The FlashInfer backend and kernels on a stand-in for the library; test_cuda.py has the library itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.attention import flashinfer_fake
from engine.attention.base import AttentionBackend
from engine.attention.flashinfer import FlashInferAttention
from engine.attention.pages import Pages
from engine.attention.reference import ReferenceAttention
from engine.batch import FlatBatch
from engine.kernels.cuda import FlashInferKernels
from engine.kernels.torch_ops import TorchKernels
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.sequence import ScheduledChunk
from engine.staging import pack, places_of, to_device, unpack

CPU = torch.device("cpu")
WINDOWS = (None, 5, None)


@st.composite
def scheduled(draw: st.DrawFn) -> tuple[list[ScheduledChunk], int]:
    """Chunks that do not share blocks, and their block size."""
    block_size = draw(st.integers(1, 5))
    chunks = []
    for index in range(draw(st.integers(1, 6))):
        length, start = draw(st.integers(1, 9)), draw(st.integers(0, 20))
        num_blocks = -(-(start + length) // block_size) + draw(st.integers(0, 3))
        table = [100 * index + block for block in draw(st.permutations(range(num_blocks)))]
        chunks.append(ScheduledChunk([0] * length, start, table, None, 0))
    return chunks, block_size


@given(scheduled())
def test_pages_hold_every_context_and_no_more(case: tuple[list[ScheduledChunk], int]) -> None:
    chunks, block_size = case
    pages = Pages.of(FlatBatch.of(chunks, block_size, 1000, vocab_size=1), block_size)
    assert {array.dtype for array in _arrays(pages)} == {np.dtype(np.int32)}
    row = 0
    for index, chunk in enumerate(chunks):
        context = chunk.start + len(chunk.token_ids)
        own = pages.indices[pages.indptr[index] : pages.indptr[index + 1]].tolist()
        assert own == list(chunk.block_table)[: len(own)]
        assert (len(own) - 1) * block_size + pages.last_lens[index] == context
        assert 1 <= pages.last_lens[index] <= block_size
        for position in range(chunk.start, context):
            assert (pages.chunk_of_row[row], pages.positions[row]) == (index, position)
            row += 1
        assert pages.query_indptr[index + 1] == row
    assert pages.indptr[0] == pages.query_indptr[0] == 0
    assert len(pages.positions) == row


@given(st.lists(st.tuples(st.sampled_from(["int32", "int64", "uint8"]), st.integers(0, 40)), max_size=6))
def test_arrays_survive_being_packed_into_one_copy(kinds: list[tuple[str, int]]) -> None:
    arrays = [np.arange(count).astype(kind)[:, None] * 3 for kind, count in kinds]
    places = places_of(arrays)
    buffer = np.full(places[-1], 255, dtype=np.uint8)
    pack(arrays, places, buffer)
    tensors = unpack(torch.from_numpy(buffer), places, arrays)
    assert all(place % 16 == 0 for place in places)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype


def test_on_the_cpu_nothing_is_copied() -> None:
    array = np.arange(4)
    (tensor,) = to_device(CPU, array)
    array[0] = 9
    assert tensor.tolist() == [9, 1, 2, 3]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (7, 1), (14, 2)])
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (1, 9, 1, 3), (5,)], ids=["decode", "mixed", "prefill"])
def test_the_backend_gives_the_references_numbers(
    num_heads: int, num_kv_heads: int, lengths: Sequence[int]
) -> None:
    layout = KvLayout(len(WINDOWS), num_kv_heads, head_dim=8, block_size=4, dtype="float32")
    caches = KvCache(layout, 40), KvCache(layout, 40)
    backends: tuple[AttentionBackend, AttentionBackend] = (
        FlashInferAttention(flashinfer_fake, caches[0], WINDOWS, num_heads, max_pages=10),
        ReferenceAttention(caches[1], WINDOWS),
    )
    generator = torch.Generator().manual_seed(0)
    caches[0].data.copy_(torch.randn(caches[0].data.shape, generator=generator))
    caches[1].data.copy_(caches[0].data)
    dice = random.Random(0)
    for _ in range(2):
        blocks = dice.sample(range(40), 40)
        chunks = [
            ScheduledChunk([0] * length, dice.randint(0, 12), blocks[index * 6 : index * 6 + 6], None, 0)
            for index, length in enumerate(lengths)
        ]
        batch = FlatBatch.of(chunks, layout.block_size, 40, vocab_size=1)
        steps = [backend.plan(batch) for backend in backends]
        for layer in range(len(WINDOWS)):
            queries = torch.randn(sum(lengths), num_heads, 8, generator=generator)
            keys, values = torch.randn(2, sum(lengths), num_kv_heads, 8, generator=generator)
            attended, expected = (step.attend(queries, keys, values, layer) for step in steps)
            torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(caches[0].data, caches[1].data)


def test_the_kernels_take_strided_layers_of_the_cache() -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
    cache = KvCache(layout, 5, num_spare=1)
    attention = FlashInferAttention(flashinfer_fake, cache, WINDOWS, num_heads=4, max_pages=5)
    keys, values = attention.layers[1]
    assert keys.data_ptr() == cache.data[0, 1, 0].data_ptr()
    assert keys.stride() == values.stride() == (3 * 2 * 4 * 2 * 8, 2 * 8, 8, 1)
    assert keys.shape == (6, 4, 2, 8)


@pytest.mark.parametrize("num_heads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_torchs(num_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)

    def random_rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kernels, expected = FlashInferKernels(flashinfer_fake, max_rows=7, device=CPU), TorchKernels()
    hidden, delta, weight = random_rows(7, 16), random_rows(7, 16), random_rows(16)
    qkv = random_rows(7, num_heads + 3, 16)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    pairs = [
        (kernels.linear(hidden, delta, None), expected.linear(hidden, delta, None)),
        (kernels.rms_norm(hidden, weight, 1e-5), expected.rms_norm(hidden, weight, 1e-5)),
        (kernels.rms_norm(qkv, weight, 1e-5), expected.rms_norm(qkv, weight, 1e-5)),
        (kernels.gated_silu(hidden), expected.gated_silu(hidden)),
        *zip(
            kernels.add_rms_norm(hidden.clone(), delta.clone(), weight, 1e-5),
            expected.add_rms_norm(hidden, delta, weight, 1e-5),
            strict=True,
        ),
    ]
    for _ in range(2):
        angles = torch.randn(7, 8, generator=generator)
        # A slice of the rows that one matrix product gives, as in the model; only the slice may change.
        turned = qkv.clone()
        pairs.append(
            (
                kernels.rotate(turned[:, 1 : 1 + num_heads], angles.cos(), angles.sin()),
                expected.rotate(qkv[:, 1 : 1 + num_heads], angles.cos(), angles.sin()),
            )
        )
        assert torch.equal(turned[:, :1], qkv[:, :1])
        assert torch.equal(turned[:, 1 + num_heads :], qkv[:, 1 + num_heads :])
    for ours, torchs in pairs:
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, torchs, **close)


def test_more_rows_than_the_kernels_were_made_for_are_still_turned() -> None:
    kernels = FlashInferKernels(flashinfer_fake, max_rows=2, device=CPU)
    heads, angles = torch.ones(3, 2, 4), torch.ones(3, 2)
    torch.testing.assert_close(
        kernels.rotate(heads.clone(), angles.cos(), angles.sin()),
        TorchKernels().rotate(heads, angles.cos(), angles.sin()),
    )


def _arrays(pages: Pages) -> list[np.ndarray]:
    return [getattr(pages, name) for name in Pages.__slots__]
