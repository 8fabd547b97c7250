"""One GPU against its own limits: decode against memory bandwidth, prefill against bf16 matrix products.

    python -m bench.cuda --shape llama-3.1-8b --json cuda.json

The limits are measured in the same run. A share of a limit counts the work that must be done: in decode every
weight and every stored key and value read once a step, in prefill the products of the linear layers and of
causal attention. Steps are whole steps, as a worker makes them: batch in, drawn tokens on the host. Weights
are random, made on the GPU. Needs one GPU; a run takes a few minutes, most of them compiling kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig, ModelConfig
from engine.cuda import CudaBackend
from engine.cuda_memory import measure_memory
from engine.device import open_device
from engine.errors import DeviceError
from engine.layout import KvLayout
from engine.model import LlamaModel
from engine.model_runner import ModelRunner
from engine.parallel.base import Solo
from engine.sequence import ScheduledChunk, TokenSampling
from engine.shard import WHOLE
from engine.weights import ModelWeights, allocate_weights

SHAPES = Path(__file__).parent / "shapes"
MEMORY_SHARE = 0.9

_GREEDY = TokenSampling(
    temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=2, min_tokens=0, stop_token_ids=frozenset()
)


@dataclass(frozen=True, slots=True)
class Limits:
    """copy_gbps: bytes read plus bytes written. read_gbps: bytes read. gemm_tflops: bf16, square matrices."""

    copy_gbps: float
    read_gbps: float
    gemm_tflops: float

    @property
    def memory_gbps(self) -> float:
        """The larger of both ways to measure the bandwidth."""
        return max(self.copy_gbps, self.read_gbps)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a step: the median, and the fastest and slowest, of `repeats`."""

    median_s: float
    fastest_s: float
    slowest_s: float
    repeats: int


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured: runners over one model and one cache, with and without recorded decode steps."""

    model: ModelConfig
    layout: KvLayout
    block_size: int
    num_blocks: int
    weights_nbytes: int
    recorded: ModelRunner
    eager: ModelRunner


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        device = open_device("cuda")
    except DeviceError as error:
        print(f"bench.cuda needs a GPU: {error}", file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    properties = torch.cuda.get_device_properties(device)
    say(f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    limits = measure_limits(device, lambda: torch.cuda.synchronize(device))
    say(f"limits: {limits}")
    bench, setup = set_up(options.shape, device, max(options.prefill), max(options.decode))
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": properties.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "shape": options.shape,
        "dtype": bench.layout.dtype,
        "limits": asdict(limits) | {"memory_gbps": limits.memory_gbps},
        **setup,
        "prefill": [],
        "decode": [],
    }
    rows = measure(
        bench, limits, options.prefill, options.decode, options.context, options.repeats, time.perf_counter
    )
    for phase, row in rows:
        result[phase].append(row)
        say(f"{phase}: {json.dumps(row)}")
        # After every row, so that a run that is cut off has what it has measured.
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.json is None:
        print(json.dumps(result, indent=1))
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def set_up(
    shape: str, device: torch.device, max_batch_tokens: int, max_num_seqs: int
) -> tuple[Bench, dict[str, Any]]:
    """The shape's model with random weights, and how long its parts took."""
    model_config = ModelConfig.from_pretrained(SHAPES / shape)
    config = EngineConfig(
        num_blocks=1, max_batch_tokens=max_batch_tokens, dtype="bfloat16", device="cuda", load="dummy"
    )
    started = time.perf_counter()
    weights = random_weights(model_config, torch.bfloat16, device)
    backend = CudaBackend.of(model_config, config, device)
    model = LlamaModel(model_config, WHOLE, weights, backend.kernels(), Solo())
    layout = KvLayout.of(model_config, config)
    memory = measure_memory(backend, model, max_num_seqs)
    num_blocks = memory.for_kv_cache(MEMORY_SHARE) // layout.block_nbytes
    first_step_s = time.perf_counter() - started
    say(f"weights and first steps (kernels compiled) after {first_step_s:.1f} s; {memory}")
    cache = backend.cache(num_blocks)
    cache.data.normal_()
    recorded = backend.executor(model, cache)
    ready_s = time.perf_counter() - started
    say(f"decode steps recorded: ready after {ready_s:.1f} s; {num_blocks * config.block_size} tokens of KV")
    eager = replace(backend, recorder=None).executor(model, cache)

    def runner(executor: Any) -> ModelRunner:
        return ModelRunner(executor, config.block_size, num_blocks, model_config.vocab_size)

    bench = Bench(
        model_config,
        layout,
        config.block_size,
        num_blocks,
        weights_nbytes(weights),
        runner(recorded),
        runner(eager),
    )
    return bench, {
        "attention": "sdpa" if backend.flashinfer is None else f"flashinfer {backend.flashinfer.__version__}",
        "cuda_graphs": backend.recorder is not None,
        "first_step_s": first_step_s,
        "ready_s": ready_s,
        "kv_tokens": num_blocks * config.block_size,
        "memory": asdict(memory),
    }


def random_weights(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Random numbers of the right scale in every tensor, made on the device."""
    weights = allocate_weights(model, dtype, WHOLE, device)
    for tensor in _tensors(weights):
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, tensor.shape[1] ** -0.5)
    return weights


def weights_nbytes(weights: ModelWeights) -> int:
    """Bytes of weights that every decode step reads: all but the embedding, of which it reads a few rows."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(weights)}
    if weights.embedding is not None and weights.embedding is not weights.lm_head:
        del tensors[weights.embedding.data_ptr()]
    return sum(tensors.values())


def prefill_flop(model: ModelConfig, num_tokens: int) -> int:
    """Multiplications and additions of a prompt from position 0, with the logits of its last token only."""
    heads_width = model.num_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    per_token = model.hidden_size * (2 * heads_width + 2 * kv_width + 3 * model.intermediate_size)
    # Queries with keys and weights with values, of token i with the i + 1 tokens up to itself.
    attention = 2 * heads_width * num_tokens * (num_tokens + 1) // 2
    layers = model.num_layers * (num_tokens * per_token + attention)
    return 2 * (layers + model.hidden_size * model.vocab_size)


def decode_nbytes(bench: Bench, batch: int, context: int) -> int:
    """Bytes that a decode step reads: the weights once, and the keys and values of all stored tokens."""
    return bench.weights_nbytes + batch * context * (bench.layout.block_nbytes // bench.layout.block_size)


def measure_limits(
    device: torch.device, synchronize: Callable[[], None], nbytes: int = 4 * 2**30, width: int = 8192
) -> Limits:
    """The fastest of several runs each; on random data, as zeros draw less power."""
    source = torch.empty(nbytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    left = torch.randn(width, width, device=device).to(torch.bfloat16)
    right = torch.randn(width, width, device=device).to(torch.bfloat16)

    def fastest(run: Callable[[], object]) -> float:
        timings = []
        for _ in range(8):
            synchronize()
            started = time.perf_counter()
            for _ in range(5):
                run()
            synchronize()
            timings.append((time.perf_counter() - started) / 5)
        return min(timings)

    vectors = source.view(torch.float32)
    return Limits(
        copy_gbps=2 * nbytes / fastest(lambda: target.copy_(source)) / 1e9,
        read_gbps=nbytes / fastest(lambda: torch.amax(vectors)) / 1e9,
        gemm_tflops=2 * width**3 / fastest(lambda: left @ right) / 1e12,
    )


def measure(
    bench: Bench,
    limits: Limits,
    prefill: Sequence[int],
    decode: Sequence[int],
    context: int,
    repeats: int,
    clock: Callable[[], float],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(phase, row of the result), one by one. Decode batches that do not fit the cache are left out."""
    for num_tokens in prefill:
        chunk = ScheduledChunk([7] * num_tokens, 0, range(-(-num_tokens // bench.block_size)), _GREEDY, 0)
        timing = time_steps(bench.eager, [chunk], repeats, clock)
        tflops = prefill_flop(bench.model, num_tokens) / timing.median_s / 1e12
        yield (
            "prefill",
            {
                "tokens": num_tokens,
                "tok_s": num_tokens / timing.median_s,
                "tflops": tflops,
                "share_of_limit": tflops / limits.gemm_tflops,
                **asdict(timing),
            },
        )
    for batch in decode:
        each = -(-(context + 1) // bench.block_size)
        if batch * each > bench.num_blocks:
            say(f"decode: batch {batch} at context {context} left out: {bench.num_blocks} blocks are too few")
            continue
        chunks = [
            ScheduledChunk([7], context, range(index * each, (index + 1) * each), _GREEDY, 1)
            for index in range(batch)
        ]
        timing = time_steps(bench.recorded, chunks, repeats, clock)
        eager = time_steps(bench.eager, chunks, repeats, clock)
        gbps = decode_nbytes(bench, batch, context) / timing.median_s / 1e9
        yield (
            "decode",
            {
                "batch": batch,
                "context": context,
                "tok_s": batch / timing.median_s,
                "gbps": gbps,
                "share_of_limit": gbps / limits.memory_gbps,
                "eager_tok_s": batch / eager.median_s,
                **asdict(timing),
            },
        )


def time_steps(
    runner: ModelRunner, chunks: Sequence[ScheduledChunk], repeats: int, clock: Callable[[], float]
) -> Timing:
    """Whole steps, after two that are not counted; a step ends with its tokens on the host."""
    for _ in range(2):
        runner.step(chunks)
    timings = []
    for _ in range(repeats):
        started = clock()
        runner.step(chunks)
        timings.append(clock() - started)
    return Timing(statistics.median(timings), min(timings), max(timings), repeats)


def _tensors(weights: ModelWeights) -> list[torch.Tensor]:
    found = [getattr(weights, field.name) for field in fields(weights)]
    found += [getattr(layer, field.name) for layer in weights.layers for field in fields(layer)]
    return [value for value in found if isinstance(value, torch.Tensor)]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    def sizes(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda", description="Measure prefill and decode on one GPU against its limits."
    )
    parser.add_argument("--shape", default="llama-3.1-8b", help="a directory of bench/shapes")
    parser.add_argument("--prefill", type=sizes, default=[128, 512, 2048, 8192], help="prompt lengths")
    parser.add_argument("--decode", type=sizes, default=[1, 8, 32, 128, 256], help="batch sizes")
    parser.add_argument("--context", type=int, default=512, help="stored tokens of each decoding sequence")
    parser.add_argument("--repeats", type=int, default=20, help="steps timed for each figure")
    parser.add_argument("--json", type=Path, help="file for the result; standard output without it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
