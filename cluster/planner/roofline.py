"""How long steps take on hardware that nobody has measured: a roofline over the shapes of the layers.

A step takes as long as its arithmetic or its reads from memory, whichever is longer, at the share of the best
that good kernels reach; beside that

    TP   two all-reduces a layer of tokens x hidden, a ring's 2 (TP - 1) / TP of it over the node's links
    PP   the engine cuts a step into PP parts that follow each other through the stages, so it takes
         2 PP - 1 turns of a stage with one part each, and hands each part on over the link

It is no measurement, and plans made with it say so. On GPUs, the shares were chosen as the field reports
them (Zhong et al. 2024, Agrawal et al. 2024), not fitted to anything here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from cluster.planner.hardware import Gpu
from engine.config import DTYPE_NBYTES, ModelConfig
from engine.latency import LatencyModel, StepShape
from engine.latency_fit import Sample, fit

FLOPS_SHARE = 0.55
BYTES_SHARE = 0.75
STEP_S = 1e-3
"""Of the engine's loop, whatever a step computes."""
LAYER_S = 4e-6
"""Of launching a layer's kernels, from a recorded graph."""
ALL_REDUCE_S = 12e-6
HOP_S = 20e-6

_PREFILLS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
_CACHED = (0, 2048)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (128, 1024, 4096)


@dataclass(frozen=True, slots=True)
class Roofline:
    """A worker: a model over tp x pp devices. link_bytes_per_s: between its devices, the slowest of them."""

    model: ModelConfig
    gpu: Gpu
    tp: int
    pp: int
    link_bytes_per_s: float
    dtype: str = "bfloat16"

    def step_s(self, shape: StepShape) -> float:
        """Of all its devices together."""
        turns = 2 * self.pp - 1
        return STEP_S + turns * self._stage_s(shape)

    def latency(self) -> LatencyModel:
        """The same as production's cores take it."""
        shapes = [StepShape(((new, cached),)) for new, cached in itertools.product(_PREFILLS, _CACHED)] + [
            StepShape((), batch, batch * context) for batch, context in itertools.product(_BATCHES, _CONTEXTS)
        ]
        return fit([Sample(shape, self.step_s(shape)) for shape in shapes])

    def _stage_s(self, shape: StepShape) -> float:
        """One part of the step on one stage."""
        model, size = self.model, DTYPE_NBYTES[self.dtype]
        rows = max(1.0, shape.num_tokens / self.pp)
        layers = model.num_layers / self.pp
        heads = model.num_heads * model.head_dim
        kv = model.num_kv_heads * model.head_dim
        matrices = model.hidden_size * (2 * heads + 2 * kv + 3 * model.intermediate_size)
        head = model.vocab_size * model.hidden_size / self.pp
        wanted = (shape.decode_batch + len(shape.prefill)) / self.pp
        pairs = sum(new * (cached + new / 2) for new, cached in shape.prefill) + shape.decode_context
        flops = 2 * (layers * matrices * rows + head * wanted) + 4 * layers * heads * pairs / self.pp
        context = shape.decode_context + sum(new + cached for new, cached in shape.prefill)
        read = size * (layers * matrices + head + 2 * layers * kv * context / self.pp)
        busy_s = max(
            flops / self.tp / (FLOPS_SHARE * self.gpu.flops),
            read / self.tp / (BYTES_SHARE * self.gpu.bytes_per_s),
        )
        return busy_s + layers * LAYER_S + layers * self._all_reduces_s(rows) + self._hop_s(rows)

    def _all_reduces_s(self, rows: float) -> float:
        """Of a layer."""
        if self.tp == 1:
            return 0.0
        num_bytes = rows * self.model.hidden_size * DTYPE_NBYTES[self.dtype]
        return 2 * (ALL_REDUCE_S + 2 * (self.tp - 1) / self.tp * num_bytes / self.gpu.link_bytes_per_s)

    def _hop_s(self, rows: float) -> float:
        """From one stage to the next."""
        if self.pp == 1:
            return 0.0
        return HOP_S + rows * self.model.hidden_size * DTYPE_NBYTES[self.dtype] / self.link_bytes_per_s
