"""How long the steps of this engine take, measured in two seconds when its worker starts. No torch here.

A profile (`prelay profile`) takes minutes and is right to a few percent. This is for workers without one:
some twenty steps, as often as there is time for. What it gets wrong, routers and the worker itself learn from
the steps that are served (latency.OnlineLatency).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engine.latency import LatencyModel, StepShape
from engine.latency_fit import Sample, fit
from engine.profiler import Limits, chunks_of, num_blocks_of
from engine.runner import StepRunner

BUDGET_S = 2.0
"""Of a worker's start: about as long as importing torch."""

_MAX_ROUNDS = 5
_MAX_CONTEXT = 8192
"""Tokens of KV memory: enough for attention to show, little enough to be touched for the first time."""

_VOCAB_SIZE = 16
"""Token ids of measured steps are below this: every model has so many."""


def calibrate(
    runner: StepRunner, limits: Limits, block_size: int, budget_s: float, clock: Callable[[], float]
) -> LatencyModel:
    """Run steps on `runner`, whose KV memory holds nothing yet, and fit a model to them.

    limits: of the worker's own steps; max_num_seqs is 0 if nobody will decode here. budget_s: no step begins
    that would probably not end within it, but the first ones. Unknown, if the clock does not move.
    """
    shapes = list(calibration_steps(limits, block_size))
    best: dict[StepShape, float] = {}
    started = clock()
    runner.step(chunks_of(shapes[0], block_size, _VOCAB_SIZE))  # the first one of all takes much longer
    for _ in range(_MAX_ROUNDS):
        for shape in shapes:
            step = chunks_of(shape, block_size, _VOCAB_SIZE)
            begun = clock()
            if best and begun + _guess_s(shape, best) > started + budget_s:
                continue
            runner.step(step)
            seconds = clock() - begun
            # The first time is longer, for memory is touched for the first time; later ones, if others run
            # on these cores. Neither is what the engine needs.
            best[shape] = min(seconds, best.get(shape, seconds))
    samples = [Sample(shape, seconds) for shape, seconds in best.items() if seconds > 0]
    return fit(samples) if samples else LatencyModel.unknown()


def calibration_steps(limits: Limits, block_size: int) -> Iterator[StepShape]:
    """Those to measure, the smallest first: of chunks and of decoding by size and by context, and of both
    together. At least one."""
    context = max(1, min(limits.max_context // 2, _MAX_CONTEXT // 8))
    sizes = _powers(limits.max_batch_tokens)
    batches = _powers(limits.max_num_seqs) if limits.max_num_seqs else []
    shapes = [
        *(StepShape(((size, 0),)) for size in sizes),
        *(StepShape(((size, context),)) for size in sizes[1:]),
        *(StepShape((), batch, batch * each) for batch in batches for each in (16, 128, context)),
        *(StepShape(((size, 0),), batch, batch * 128) for batch in batches[1:3] for size in (8, 32)),
    ]
    num_blocks = min(limits.num_tokens, _MAX_CONTEXT) // block_size
    allowed = [s for s in shapes if limits.allow(s) and num_blocks_of(s, block_size) <= num_blocks]
    yield from sorted(dict.fromkeys(allowed or [StepShape(((1, 0),))]), key=lambda shape: shape.num_tokens)


def _guess_s(shape: StepShape, best: dict[StepShape, float]) -> float:
    """How long the step will take at most, as far as one can tell from those before it."""
    if shape in best:
        return best[shape]
    largest = max(best, key=lambda each: each.num_tokens)
    return best[largest] * max(1.0, shape.num_tokens / largest.num_tokens)


def _powers(last: int) -> list[int]:
    """1, 4, 16, ... and `last` itself."""
    return sorted({last, *(4**power for power in range(16) if 4**power < last)})
