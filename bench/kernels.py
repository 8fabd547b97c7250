"""The CPU kernels side by side, torch's and the compiled ones: `python -m bench.kernels [--dtype float32]`.

Shapes are those of one layer of a model in bench/shapes. Matrices take turns, so that they come from memory,
as they do in a step, and not from a cache. Pin it to one core
(`taskset -c 1`) for figures that can be compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from engine.attention.base import AttentionBackend
from engine.attention.native import NativeAttention
from engine.attention.sdpa import SdpaAttention
from engine.batch import FlatBatch
from engine.config import DTYPE_NBYTES, ModelConfig
from engine.kernels.base import Kernels
from engine.kernels.native import NativeKernels
from engine.kernels.torch_ops import TorchKernels
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.sequence import ScheduledChunk

Candidate = TypeVar("Candidate")

_BLOCK_SIZE = 16
_CONTEXT = 512
_SHAPES = Path(__file__).parent / "shapes"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2-135m", help="a directory of bench/shapes")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPE_NBYTES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = ModelConfig.from_pretrained(_SHAPES / arguments.shape)
    kernels: dict[str, Kernels] = {
        "torch": TorchKernels(),
        "native": NativeKernels(arguments.dtype, arguments.threads),
    }
    print(
        f"{arguments.shape} {arguments.dtype}, {arguments.threads} threads, all layers once; ms min / median"
    )
    print(f"{'':34}{'torch':>17}{'native':>17}{'ratio of min':>14}")
    with torch.inference_mode():
        dtype = getattr(torch, arguments.dtype)
        linears(model, dtype, kernels, arguments.repeats)
        elementwise(model, dtype, kernels, arguments.repeats)
        attention(model, arguments.dtype, arguments.threads, arguments.repeats)


def linears(model: ModelConfig, dtype: torch.dtype, kernels: dict[str, Kernels], repeats: int) -> None:
    """The four products of every layer."""
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    shapes = [
        (qkv, model.hidden_size),
        (model.hidden_size, model.num_heads * model.head_dim),
        (2 * model.intermediate_size, model.hidden_size),
        (model.hidden_size, model.intermediate_size),
    ]
    weights = [torch.randn(shape).to(dtype) for _ in range(model.num_layers) for shape in shapes]
    for num_rows in (1, 2, 4, 8, 16, 32, 64, 128, 512):
        rows = {inputs: torch.randn(num_rows, inputs).to(dtype) for _, inputs in shapes}

        def run(own: Kernels, rows: dict[int, torch.Tensor] = rows) -> None:
            for weight in weights:
                own.linear(rows[weight.shape[1]], weight, None)

        compare(f"linear, {num_rows} rows", kernels, run, repeats)


def elementwise(model: ModelConfig, dtype: torch.dtype, kernels: dict[str, Kernels], repeats: int) -> None:
    norm = torch.ones(model.hidden_size, dtype=dtype)
    for num_rows in (1, 32, 512):
        hidden = torch.randn(num_rows, model.hidden_size).to(dtype)
        inner = torch.randn(num_rows, 2 * model.intermediate_size).to(dtype)
        heads = torch.randn(num_rows, model.num_heads, model.head_dim).to(dtype)
        angles = torch.randn(num_rows, model.head_dim // 2)

        def layers(call: Callable[[], object]) -> None:
            for _ in range(model.num_layers):
                call()

        def norms(own: Kernels, hidden: torch.Tensor = hidden) -> None:
            layers(lambda: own.add_rms_norm(hidden, hidden.clone(), norm, 1e-5))

        def turns(own: Kernels, heads: torch.Tensor = heads, angles: torch.Tensor = angles) -> None:
            cosines, sines = angles.cos(), angles.sin()
            layers(lambda: own.rotate(heads, cosines, sines))

        def gates(own: Kernels, inner: torch.Tensor = inner) -> None:
            layers(lambda: own.gated_silu(inner))

        compare(f"add_rms_norm, {num_rows} rows", kernels, norms, repeats)
        compare(f"rotate, {num_rows} rows", kernels, turns, repeats)
        compare(f"gated_silu, {num_rows} rows", kernels, gates, repeats)


def attention(model: ModelConfig, dtype: str, threads: int, repeats: int) -> None:
    layout = KvLayout(model.num_layers, model.num_kv_heads, model.head_dim, _BLOCK_SIZE, dtype)
    num_blocks = 33 * _CONTEXT // _BLOCK_SIZE
    cache = KvCache(layout, num_blocks)
    cache.data.normal_()
    backends: dict[str, AttentionBackend] = {"torch": SdpaAttention(cache, model.windows)}
    if NativeAttention.supports(layout):
        backends["native"] = NativeAttention(cache, model.windows, threads)
    blocks = random.Random(0).sample(range(num_blocks), num_blocks)
    each = _CONTEXT // _BLOCK_SIZE
    steps = {
        f"attention, prefill {count}": [
            ScheduledChunk([0] * count, 0, blocks[: count // _BLOCK_SIZE], None, 0)
        ]
        for count in (128, 512, 2048)
    } | {
        f"attention, decode {count} x {_CONTEXT}": [
            ScheduledChunk([0], _CONTEXT - 1, blocks[at * each : (at + 1) * each], None, 0)
            for at in range(count)
        ]
        for count in (1, 8, 32)
    }
    for name, chunks in steps.items():
        batch = FlatBatch.of(chunks, _BLOCK_SIZE, num_blocks, vocab_size=1)
        heads = model.num_heads + 2 * model.num_kv_heads
        rows = torch.randn(batch.num_tokens, heads, model.head_dim).to(cache.data.dtype)
        split = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        parts = rows.split_with_sizes(split, dim=1)

        def run(
            own: AttentionBackend, batch: FlatBatch = batch, parts: tuple[torch.Tensor, ...] = tuple(parts)
        ) -> None:
            step = own.plan(batch)
            for layer in range(model.num_layers):
                step.attend(parts[0], parts[1], parts[2], layer)

        compare(name, backends, run, repeats)


def compare(
    name: str, candidates: dict[str, Candidate], run: Callable[[Candidate], None], repeats: int
) -> None:
    """Time `run` for each candidate in turns, so that a disturbance meets all of them; print one line."""
    times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    for turn in range(repeats + 1):
        for label, candidate in candidates.items():
            started = time.perf_counter()
            run(candidate)
            if turn:  # the first one warms up
                times[label].append(1e3 * (time.perf_counter() - started))
    columns = "".join(f"{min(each):8.2f} /{statistics.median(each):7.2f}" for each in times.values())
    fastest = [min(each) for each in times.values()]
    print(f"{name:34}{columns}{fastest[0] / fastest[-1]:13.2f}x", flush=True)


if __name__ == "__main__":
    main()
