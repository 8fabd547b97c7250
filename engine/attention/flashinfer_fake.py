"""A stand-in for the module `flashinfer`: the part of it that prelay uses, computed on any device.

It is what the backend is tested with where there is no GPU. Names, arguments and what is refused are those of
FlashInfer 0.7; the mathematics is the definition, one sequence at a time, in float32. As with the library, a
wrapper made for CUDA graphs keeps reading the buffers that it was given, whatever it is planned with.
"""

from __future__ import annotations

from typing import Any

import torch

PagedKv = tuple[torch.Tensor, torch.Tensor]


class BatchPrefillWithPagedKVCacheWrapper:
    """Causal attention of runs of new tokens to their paged contexts."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        _check(float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD", "workspace or layout")
        self._planned: dict[str, Any] = {}

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        _check(causal, "only causal attention is used")
        self._planned = {
            "qo_indptr": _int32(qo_indptr).clone(),
            "indptr": _int32(paged_kv_indptr).clone(),
            "indices": _int32(paged_kv_indices).clone(),
            "last_lens": _int32(paged_kv_last_page_len).clone(),
            "shape": (num_qo_heads, num_kv_heads, head_dim_qk, page_size),
            "window_left": window_left,
            "dtypes": (q_data_type, kv_data_type or q_data_type),
        }

    def run(self, q: torch.Tensor, paged_kv_cache: PagedKv) -> torch.Tensor:
        return _attend(q, paged_kv_cache, **self._planned)


class BatchDecodeWithPagedKVCacheWrapper:
    """Attention of one new token of each sequence to its paged context."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        _check(float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD", "workspace or layout")
        self._use_tensor_cores = use_tensor_cores
        self._buffers: tuple[torch.Tensor, ...] | None = None
        if use_cuda_graph:
            buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
            self._buffers = tuple(_int32(buffer) for buffer in buffers if buffer is not None)
            _check(len(self._buffers) == 3, "a buffer for CUDA graphs is missing")
            _check(len(self._buffers[0]) == len(self._buffers[2]) + 1, "indptr is one longer than the batch")
        self._planned: dict[str, Any] = {}

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        _check(self._use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 6, 8, 16), "group size")
        arrays = (_int32(indptr), _int32(indices), _int32(last_page_len))
        if self._buffers is None:
            arrays = (arrays[0].clone(), arrays[1].clone(), arrays[2].clone())
        else:
            fixed_indptr, fixed_indices, fixed_last_lens = self._buffers
            _check(len(last_page_len) == len(fixed_last_lens), "the batch size of a CUDA graph is fixed")
            _check(len(indices) <= len(fixed_indices), "more pages than the buffer holds")
            fixed_indptr.copy_(indptr)
            fixed_indices[: len(indices)].copy_(indices)
            fixed_last_lens.copy_(last_page_len)
            arrays = (fixed_indptr, fixed_indices, fixed_last_lens)
        self._planned = {
            "qo_indptr": torch.arange(len(last_page_len) + 1),
            "indptr": arrays[0],
            "indices": arrays[1],
            "last_lens": arrays[2],
            "shape": (num_qo_heads, num_kv_heads, head_dim, page_size),
            "window_left": window_left,
            "dtypes": (q_data_type, kv_data_type or q_data_type),
        }

    def run(self, q: torch.Tensor, paged_kv_cache: PagedKv) -> torch.Tensor:
        return _attend(q, paged_kv_cache, **self._planned)


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedKv,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Store each new token's keys and values in the page that has its position."""
    _check(len(kv_indptr) == len(kv_last_page_len) + 1 and kv_layout == "NHD", "indptr or layout")
    keys, values = paged_kv_cache
    page_size = keys.shape[1]
    pages = _int32(kv_indices)[
        _int32(kv_indptr)[_int32(batch_indices).long()] + positions // page_size
    ].long()
    keys[pages, positions.long() % page_size] = append_key
    values[pages, positions.long() % page_size] = append_value


def rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """input / RMS(input) * weight over the last of two or three dimensions."""
    _check(input.ndim in (2, 3) and input.stride(-1) == 1 and len(input) > 0, "shape")
    wide = input.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed.to(input.dtype)


def fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> None:
    """residual += input; input = rmsnorm(residual)."""
    _check(input.ndim == 2 and residual.ndim == 2 and len(input) > 0, "shape")
    residual += input
    input.copy_(rmsnorm(residual, weight, eps))


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = input.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """Turn queries and keys [num_tokens, heads * head_size] by rows of a table (cosines | sines)."""
    _check(cos_sin_cache.dtype == torch.float32 and is_neox, "table")
    cosines, sines = cos_sin_cache[positions.long()][:, None].chunk(2, dim=-1)
    for rows in (query, key):
        heads = rows.view(rows.shape[0], -1, head_size)
        first, second = heads.float().chunk(2, dim=-1)
        turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
        heads.copy_(turned)


def _attend(
    q: torch.Tensor,
    paged_kv: PagedKv,
    *,
    qo_indptr: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_lens: torch.Tensor,
    shape: tuple[int, int, int, int],
    window_left: int,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> torch.Tensor:
    num_heads, num_kv_heads, head_dim, page_size = shape
    keys, values = paged_kv
    _check((q.dtype, keys.dtype) == dtypes, "number types differ from the plan's")
    _check(tuple(q.shape) == (int(qo_indptr[-1]), num_heads, head_dim), "queries differ from the plan's")
    _check(tuple(keys.shape[1:]) == (page_size, num_kv_heads, head_dim), "cache differs from the plan's")
    _check(keys.stride() == values.stride(), "keys and values differ in strides")
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for chunk, last_len in enumerate(last_lens.tolist()):
        first, stop = int(qo_indptr[chunk]), int(qo_indptr[chunk + 1])
        pages = indices[int(indptr[chunk]) : int(indptr[chunk + 1])].long()
        length = (len(pages) - 1) * page_size + last_len
        group = num_heads // num_kv_heads
        context_keys, context_values = (
            side[pages].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
            for side in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", q[first:stop].float(), context_keys) / head_dim**0.5
        # The new tokens are the last of the context.
        distance = torch.arange(length - (stop - first), length, device=q.device)[:, None] - torch.arange(
            length, device=q.device
        )
        hidden = (distance < 0) | ((distance > window_left) & (window_left >= 0))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        output[first:stop] = torch.einsum("hqk,khd->qhd", weights, context_values).to(q.dtype)
    return output


def _int32(array: torch.Tensor) -> torch.Tensor:
    _check(
        array.dtype == torch.int32 and array.ndim == 1 and array.is_contiguous(), "arrays are flat and int32"
    )
    return array


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"FlashInfer would refuse this: {what}")
