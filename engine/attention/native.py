"""Attention compiled for AVX-512, on the KV blocks where they lie: nothing is gathered or padded."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from engine.batch import FlatBatch
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.native.library import load_library


class _Call(ctypes.Structure):
    """`struct Attention` of engine/native/kernels.cpp; addresses, then sizes and strides in elements."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("queries", "keys", "values", "out", "cached_keys", "cached_values")
        ),
        *((name, ctypes.c_void_p) for name in ("query_starts", "context_lens", "block_tables")),
        *((name, ctypes.c_size_t) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_size_t) for name in ("block_stride", "table_stride", "num_chunks", "num_heads")),
        *((name, ctypes.c_size_t) for name in ("num_kv_heads", "head_dim", "block_size", "window")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_size_t),
    )


class NativeAttention:
    """The AttentionBackend for CPUs with AVX-512. Raises KernelsUnavailableError."""

    def __init__(self, cache: KvCache, windows: Sequence[int | None], threads: int) -> None:
        self.layout = cache.layout
        self.windows = windows
        self.threads = threads
        self.attend = getattr(load_library(), f"attend_{cache.layout.dtype}")
        self.data = cache.data

    @staticmethod
    def supports(layout: KvLayout) -> bool:
        """Whether there is code for heads of this size."""
        return layout.head_dim in ((32, 64, 128) if layout.dtype == "bfloat16" else (16, 32, 64, 128))

    def plan(self, batch: FlatBatch) -> _NativeStep:
        return _NativeStep(self, batch)


class _NativeStep:
    def __init__(self, backend: NativeAttention, batch: FlatBatch) -> None:
        layout = backend.layout
        # Elements from one layer's keys to its values.
        half = layout.block_size * layout.num_kv_heads * layout.head_dim
        self._backend = backend
        self._half_nbytes = half * backend.data.element_size()
        self._batch = batch  # the call holds addresses of its arrays
        self._call = _Call(
            query_starts=batch.query_starts.ctypes.data,
            context_lens=batch.context_lens.ctypes.data,
            block_tables=batch.block_tables.ctypes.data,
            block_stride=2 * half * layout.num_layers,
            table_stride=batch.block_tables.shape[1],
            num_chunks=batch.num_chunks,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            block_size=layout.block_size,
            scale=layout.head_dim**-0.5,
            threads=backend.threads,
        )

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> torch.Tensor:
        output = torch.empty(queries.shape, dtype=queries.dtype)
        call = self._call
        call.queries, call.query_stride = queries.data_ptr(), queries.stride(0)
        call.keys, call.key_stride = keys.data_ptr(), keys.stride(0)
        call.values, call.value_stride = values.data_ptr(), values.stride(0)
        call.out = output.data_ptr()
        call.num_heads = queries.shape[1]
        call.window = self._backend.windows[layer] or 0
        call.cached_keys = self._backend.data.data_ptr() + 2 * layer * self._half_nbytes
        call.cached_values = call.cached_keys + self._half_nbytes
        unsupported = self._backend.attend(ctypes.addressof(call))
        assert not unsupported, f"no code for heads of {self._backend.layout.head_dim}"
        return output
