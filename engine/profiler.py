"""Which steps an engine is measured with, to fit a latency model to it, and how. No torch here.

The steps cover what schedulers ask for: prompt chunks of all sizes after nothing and after a cached context,
several chunks together, decode batches at several contexts, and both mixed. Sizes grow geometrically, as
errors are relative. Some steps lie between those and are held out: the error is told on them.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engine.latency import StepShape
from engine.latency_fit import Sample
from engine.runner import StepRunner
from engine.sequence import ScheduledChunk, TokenSampling

_GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=1, min_tokens=0, stop_token_ids=frozenset()
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How large steps can be. max_context: tokens of one sequence. num_tokens: of all sequences together."""

    max_batch_tokens: int
    max_num_seqs: int
    max_context: int
    num_tokens: int

    def allow(self, shape: StepShape) -> bool:
        """Whether it is a step, and one that is not too large."""
        contexts = [cached + new for new, cached in shape.prefill]
        if shape.decode_batch:
            contexts.append(-(-shape.decode_context // shape.decode_batch))
        total = sum(cached + new for new, cached in shape.prefill) + shape.decode_context
        return (
            1 <= shape.num_tokens <= self.max_batch_tokens
            and shape.decode_batch <= self.max_num_seqs
            and max(contexts) <= self.max_context
            # Blocks are not full: half a block a sequence is left to spare.
            and total + 16 * len(contexts) + 16 * shape.decode_batch <= self.num_tokens
        )


@dataclass(frozen=True, slots=True)
class Steps:
    """fitted: what a model is fitted to. held_out: what it is judged by."""

    fitted: tuple[StepShape, ...]
    held_out: tuple[StepShape, ...]


def choose_steps(limits: Limits, seed: int = 0) -> Steps:
    """A grid to fit, and random steps between its lines to judge by; every one within the limits."""
    dice = random.Random(seed)
    sizes = _powers(1, limits.max_batch_tokens)
    contexts = [0, *_powers(64, limits.max_context // 2, 4)]
    batches = _powers(1, limits.max_num_seqs)
    grid = [
        *(StepShape(((new, cached),)) for new in sizes for cached in contexts),
        *(StepShape(((new, 0),) * count) for count in (2, 4) for new in _powers(16, sizes[-1] // count, 4)),
        *(_decode(batch, context) for batch in batches for context in _powers(16, limits.max_context, 4)),
        *(
            StepShape(((new, cached),), batch, batch * 256)
            for batch in batches[::2]
            for new in _powers(16, sizes[-1] // 2, 4)
            for cached in (0, 256)
        ),
    ]
    between = [
        *(
            StepShape(
                ((_between(dice, 1, sizes[-1]), dice.choice([0, _between(dice, 1, contexts[-1] or 1)])),)
            )
            for _ in range(16)
        ),
        *(_decode(_between(dice, 1, batches[-1]), _between(dice, 16, limits.max_context)) for _ in range(16)),
        *(
            StepShape(((_between(dice, 8, sizes[-1]), 0),), batch, batch * _between(dice, 16, 512))
            for batch in (_between(dice, 1, batches[-1]) for _ in range(8))
        ),
    ]
    fitted = tuple(dict.fromkeys(shape for shape in grid if limits.allow(shape)))
    held_out = tuple(dict.fromkeys(s for s in between if limits.allow(s) and s not in set(fitted)))
    return Steps(fitted, held_out)


def measure(
    runner: StepRunner,
    shapes: Sequence[StepShape],
    block_size: int,
    vocab_size: int,
    repeats: int,
    clock: Callable[[], float],
    on_progress: Callable[[float], None],
) -> list[Sample]:
    """The median of `repeats` runs of every step, one sample a shape, in order.

    Each round goes through all shapes in another order, after one round that is not counted, so that the
    drift of a busy machine hits all alike.
    """
    times: list[list[float]] = [[] for _ in shapes]
    steps = [chunks_of(shape, block_size, vocab_size) for shape in shapes]
    done = 0
    for number in range(repeats + 1):
        order = list(range(len(shapes)))
        random.Random(number).shuffle(order)
        for index in order:
            started = clock()
            runner.step(steps[index])
            if number:
                times[index].append(clock() - started)
            done += 1
            on_progress(done / (len(shapes) * (repeats + 1)))
    return [Sample(shape, statistics.median(taken)) for shape, taken in zip(shapes, times, strict=True)]


def chunks_of(shape: StepShape, block_size: int, vocab_size: int) -> list[ScheduledChunk]:
    """A step of this shape, on blocks from 0 on; its decoding sequences share the context evenly."""
    blocks = _Blocks(block_size)
    chunks = []
    for new, cached in shape.prefill:
        token_ids = [index % vocab_size for index in range(new)]
        chunks.append(ScheduledChunk(token_ids, cached, blocks.take(cached + new), _GREEDY, 0))
    for index in range(shape.decode_batch):
        each, more = divmod(shape.decode_context, shape.decode_batch)
        context = each + (index < more)
        chunks.append(ScheduledChunk([index % vocab_size], context - 1, blocks.take(context), _GREEDY, 0))
    return chunks


def num_blocks_of(shape: StepShape, block_size: int) -> int:
    """KV blocks that `chunks_of` uses."""
    contexts = [cached + new for new, cached in shape.prefill]
    if shape.decode_batch:
        contexts += [-(-shape.decode_context // shape.decode_batch)] * shape.decode_batch
    return sum(-(-context // block_size) for context in contexts)


class _Blocks:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._next = 0

    def take(self, num_tokens: int) -> range:
        first = self._next
        self._next += -(-num_tokens // self._block_size)
        return range(first, self._next)


def _decode(batch: int, context: int) -> StepShape:
    return StepShape((), batch, batch * context)


def _powers(first: int, last: int, base: int = 2) -> list[int]:
    """first, first * base, ... and `last` itself; at least `last`."""
    return list(dict.fromkeys([*_up_to(first, last, base), max(last, 1)]))


def _up_to(value: int, last: int, base: int) -> Iterator[int]:
    while value < last:
        yield value
        value *= base


def _between(dice: random.Random, low: int, high: int) -> int:
    """Evenly spread on a logarithmic scale."""
    return max(low, min(high, round(math.exp(dice.uniform(math.log(low), math.log(max(low, high)))))))
