"""Attention on FlashInfer's paged kernels (Ye et al. 2025): CUDA, bfloat16, planned once a step.

A step is planned for each distinct attention window, on the host, from arrays that never left it; the layers
then only launch kernels. Batches in which every chunk is one token go through the decode wrapper, all others
through the prefill wrapper, in which a decoding sequence is a prefill of one token.

The library is handed in as a module, so that a stand-in can compute the same on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.attention.pages import Pages
from engine.batch import FlatBatch
from engine.kv_cache import KvCache
from engine.staging import Fence, pinned, to_device

HEAD_DIMS = (64, 128, 256)
"""Head sizes for which all of the kernels used here exist."""

_WORKSPACE_NBYTES = 384 * 2**20
_CUDA_CORE_GROUPS = (1, 2, 3)
_LAYOUT = "NHD"


@dataclass(frozen=True, slots=True)
class _Tables:
    """`Pages` on the device, without what only planning needs."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last_lens: torch.Tensor
    chunk_of_row: torch.Tensor
    positions: torch.Tensor


class FlashInferAttention:
    """The AttentionBackend on FlashInfer, and a GraphableAttention.

    flashinfer: the module. num_heads: query heads of this rank. max_pages: pages of the longest sequence.
    """

    def __init__(
        self,
        flashinfer: Any,
        cache: KvCache,
        windows: Sequence[int | None],
        num_heads: int,
        max_pages: int,
    ) -> None:
        self.flashinfer = flashinfer
        self.cache = cache
        self.windows = windows
        self.max_pages = max_pages
        self.device = cache.data.device
        self.fence = Fence(self.device)
        # Keys and values of a layer as [num_blocks, block_size, num_kv_heads, head_dim]; the kernels take the
        # stride from page to page as it is.
        self.layers = [(cache.data[:, layer, 0], cache.data[:, layer, 1]) for layer in range(len(windows))]
        layout = cache.layout
        self._shape = (num_heads, layout.num_kv_heads, layout.head_dim, layout.block_size)
        self._workspace = torch.zeros(_WORKSPACE_NBYTES, dtype=torch.uint8, device=self.device)
        self._prefill = {
            window: flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, _LAYOUT)
            for window in set(windows)
        }
        self._decode = {window: self.decode_wrapper() for window in set(windows)}

    def plan(self, batch: FlatBatch) -> _FlashInferStep:
        pages = Pages.of(batch, self.cache.layout.block_size)
        query_indptr, indptr, last_lens = pinned(
            self.device, pages.query_indptr, pages.indptr, pages.last_lens
        )
        tables = _Tables(
            *to_device(
                self.device,
                pages.indptr,
                pages.indices,
                pages.last_lens,
                pages.chunk_of_row,
                pages.positions,
            )
        )
        if batch.is_decode:
            self.plan_decode(self._decode, indptr, tables.indices, last_lens)
            return _FlashInferStep(self, self._decode, tables)
        self.fence.wait()
        for window, wrapper in self._prefill.items():
            wrapper.plan(
                query_indptr,
                indptr,
                tables.indices,
                last_lens,
                *self._shape,
                causal=True,
                window_left=_window_left(window),
                q_data_type=self.cache.data.dtype,
                kv_data_type=self.cache.data.dtype,
            )
        self.fence.mark()
        return _FlashInferStep(self, self._prefill, tables)

    def fixed(self, size: int) -> _FixedDecode:
        """A step of always `size` decoding sequences, in buffers that stay where they are."""
        return _FixedDecode(self, size)

    def decode_wrapper(self, **buffers: Any) -> Any:
        """A wrapper for batches of single tokens; `buffers` are the options for CUDA graphs."""
        num_heads, num_kv_heads, _, _ = self._shape
        # From four query heads a KV head on, tensor cores win; the other kernel lacks most odd group sizes.
        return self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            _LAYOUT,
            use_tensor_cores=num_heads // num_kv_heads not in _CUDA_CORE_GROUPS,
            **buffers,
        )

    def plan_decode(
        self,
        wrappers: Mapping[int | None, Any],
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_lens: torch.Tensor,
    ) -> None:
        """Plan a decode step for each window; indptr and last_lens lie on the host, indices on the device."""
        # A wrapper plans in pinned memory of its own and has it copied; the last plan must have left it.
        self.fence.wait()
        for window, wrapper in wrappers.items():
            wrapper.plan(
                indptr,
                indices,
                last_lens,
                *self._shape,
                window_left=_window_left(window),
                q_data_type=self.cache.data.dtype,
                kv_data_type=self.cache.data.dtype,
            )
        self.fence.mark()


class _FlashInferStep:
    """The StepAttention of planned wrappers, one for each window."""

    def __init__(
        self, backend: FlashInferAttention, wrappers: Mapping[int | None, Any], tables: _Tables
    ) -> None:
        self._backend = backend
        self._wrappers = wrappers
        self._tables = tables

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> torch.Tensor:
        backend, tables = self._backend, self._tables
        backend.flashinfer.append_paged_kv_cache(
            keys,
            values,
            tables.chunk_of_row,
            tables.positions,
            backend.layers[layer],
            tables.indices,
            tables.indptr,
            tables.last_lens,
            _LAYOUT,
        )
        attended: torch.Tensor = self._wrappers[backend.windows[layer]].run(queries, backend.layers[layer])
        return attended


class _FixedDecode(_FlashInferStep):
    """A decode step to be recorded in a CUDA graph: every plan of it fills the same buffers."""

    def __init__(self, backend: FlashInferAttention, size: int) -> None:
        def ints(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=backend.device)

        tables = _Tables(
            indptr=ints(size + 1),
            indices=ints(size * backend.max_pages),
            last_lens=ints(size),
            chunk_of_row=torch.arange(size, dtype=torch.int32, device=backend.device),
            positions=ints(size),
        )
        wrappers = {
            window: backend.decode_wrapper(
                use_cuda_graph=True,
                paged_kv_indptr_buffer=tables.indptr,
                paged_kv_indices_buffer=tables.indices,
                paged_kv_last_page_len_buffer=tables.last_lens,
            )
            for window in set(backend.windows)
        }
        super().__init__(backend, wrappers, tables)

    def plan(self, batch: FlatBatch) -> None:
        """Make the recorded step one over `batch`, which has `size` chunks of one token each."""
        backend, tables = self._backend, self._tables
        pages = Pages.of(batch, backend.cache.layout.block_size)
        indptr, last_lens = pinned(backend.device, pages.indptr, pages.last_lens)
        indices, positions = to_device(backend.device, pages.indices, pages.positions)
        tables.positions.copy_(positions)
        # The wrappers copy the rest into the buffers that they were given.
        backend.plan_decode(self._wrappers, indptr, indices, last_lens)


def _window_left(window: int | None) -> int:
    """How many tokens before itself a token sees; -1 is all."""
    return -1 if window is None else window - 1
