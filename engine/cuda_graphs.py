"""CUDA graphs of decode steps: hundreds of kernel launches replaced by one, for a ladder of batch sizes.

A decode step of a small batch is a few hundred kernels of some microseconds each, which a host launches no
faster than a GPU runs them. So a step of every size of the ladder is recorded once, from the token ids to the
last layer's hidden states, over input buffers that stay where they are; a batch is padded to the next size,
its inputs are copied into the buffers, and the recording is replayed. Padding rows belong to a sequence of
one token in a spare block of the KV cache that no other sequence has. Steps with prefill are not recorded:
their shapes are too many, and their kernels long enough to hide the launches.

The logits are computed outside the recording: only for the rows that are wanted, and without keeping a buffer
of [size, vocab_size] for each size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.attention.base import AttentionBackend, StepAttention
from engine.batch import FlatBatch
from engine.executor import Executor
from engine.model import LlamaModel
from engine.staging import to_device


class FixedStep(StepAttention, Protocol):
    """Attention of a decode step whose buffers stay where they are, so that it can be recorded."""

    def plan(self, batch: FlatBatch) -> None:
        """Fill the buffers for this batch: as many chunks as the step was made for, one token each."""
        ...


class GraphableAttention(AttentionBackend, Protocol):
    """An AttentionBackend whose decode steps can be recorded."""

    def fixed(self, size: int) -> FixedStep:
        """A step of always `size` decoding sequences."""
        ...


@dataclass(frozen=True, slots=True)
class Recording:
    """replay: runs what was recorded; `output` then has its result, until any recording is replayed."""

    replay: Callable[[], object]
    output: torch.Tensor


class Recorder(Protocol):
    """Records device work. `compute` reads and writes only tensors that stay where they are."""

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording: ...


class CudaRecorder:
    """The Recorder on CUDA. All its recordings take their temporary memory from one pool.

    That is sound because they are replayed one after the other; record the largest first, so that the others
    fit into what it took.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        # A first run outside the recording, on a stream of its own as torch asks for: it compiles kernels and
        # makes libraries allocate what a recording must not.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = compute()
        return Recording(graph.replay, output)


class RerunRecorder:
    """A Recorder for devices without graphs, and for tests: a replay computes again, into the same output."""

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        output = compute()
        return Recording(lambda: output.copy_(compute()), output)


def ladder(largest: int) -> tuple[int, ...]:
    """Batch sizes to record, ascending, up to `largest`: powers of two, from 16 on also those in between.

    A decode step reads the weights whatever its size, so a padding row costs far less than its share.
    """
    sizes = [1, 2, 4, 8]
    while sizes[-1] < largest:
        step = sizes[-1] if sizes[-1] < 16 else 1 << (sizes[-1].bit_length() - 2)
        sizes.append(sizes[-1] + step)
    return (*(size for size in sizes if size < largest), largest)


def choose_size(sizes: Sequence[int], batch: FlatBatch, max_pages: int) -> int | None:
    """The smallest recorded size (`sizes` ascend) that holds the batch; None if it must run unrecorded."""
    if not batch.is_decode or batch.block_tables.shape[1] > max_pages:
        return None
    at = bisect_left(sizes, batch.num_chunks)
    return sizes[at] if at < len(sizes) else None


def pad(batch: FlatBatch, size: int, spare_block: int) -> FlatBatch:
    """A decode batch with `size` chunks: behind its own, sequences of one token (id 0) in the spare block."""
    more = size - batch.num_chunks
    width = max(1, batch.block_tables.shape[1])
    tables = np.zeros((size, width), dtype=np.int32)
    tables[: batch.num_chunks, : batch.block_tables.shape[1]] = batch.block_tables
    tables[batch.num_chunks :, 0] = spare_block
    return FlatBatch(
        token_ids=np.pad(batch.token_ids, (0, more)),
        positions=np.pad(batch.positions, (0, more)),
        query_starts=np.arange(size + 1, dtype=np.int32),
        context_lens=np.pad(batch.context_lens, (0, more), constant_values=1),
        block_tables=tables,
        wanted=batch.wanted,
    )


def padding(size: int, spare_block: int) -> FlatBatch:
    """A batch of `size` padding rows and nothing else; what a step is recorded on."""
    empty = FlatBatch(
        token_ids=np.empty(0, dtype=np.int64),
        positions=np.empty(0, dtype=np.int64),
        query_starts=np.zeros(1, dtype=np.int32),
        context_lens=np.empty(0, dtype=np.int32),
        block_tables=np.empty((0, 1), dtype=np.int32),
        wanted=np.empty(0, dtype=np.int64),
    )
    return pad(empty, size, spare_block)


class GraphExecutor:
    """The Executor that replays recorded decode steps, and hands every other batch to `eager`.

    sizes: batch sizes to record, ascending. spare_block: a block of the KV cache that no sequence has.
    max_pages: blocks of the longest sequence that `attention.fixed` steps have room for.
    """

    def __init__(
        self,
        eager: Executor,
        model: LlamaModel,
        attention: GraphableAttention,
        recorder: Recorder,
        sizes: Sequence[int],
        spare_block: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        self._eager = eager
        self._model = model
        self._sizes = sizes
        self._spare_block = spare_block
        self._max_pages = max_pages
        self._device = device
        self._token_ids = torch.zeros(sizes[-1], dtype=torch.int64, device=device)
        self._positions = torch.zeros(sizes[-1], dtype=torch.int64, device=device)
        self._recorded = {size: self._record(attention, recorder, size) for size in reversed(sizes)}

    @torch.inference_mode()
    def logits(self, batch: FlatBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        size = choose_size(self._sizes, batch, self._max_pages)
        if size is None:
            return self._eager.logits(batch, on_layer)
        step, recording = self._recorded[size]
        padded = pad(batch, size, self._spare_block)
        token_ids, positions, wanted = to_device(
            self._device, padded.token_ids, padded.positions, batch.wanted
        )
        self._token_ids[:size].copy_(token_ids)
        self._positions[:size].copy_(positions)
        step.plan(padded)
        recording.replay()
        return self._model.logits(recording.output[wanted])

    @torch.inference_mode()
    def _record(
        self, attention: GraphableAttention, recorder: Recorder, size: int
    ) -> tuple[FixedStep, Recording]:
        step = attention.fixed(size)
        step.plan(padding(size, self._spare_block))

        def compute() -> torch.Tensor:
            hidden = self._model.embed(self._token_ids[:size])
            return self._model.forward(hidden, self._positions[:size], step)

        return step, recorder.record(compute)
