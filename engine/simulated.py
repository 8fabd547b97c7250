"""An engine without a model whose steps take as long as a latency model says. No torch here.

With it dozens of workers fit on two cores: their schedulers, KV blocks, transfers and messages are real, only
the arithmetic is left out. Answers are a FakeRunner's, so they can be checked (`fake.fake_answer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.fake import FakeRunner
from engine.latency import LatencyModel, StepShape
from engine.layout import KvLayout
from engine.sequence import ChunkResult, ScheduledChunk


def simulated_layout(block_size: int) -> KvLayout:
    """The smallest KV: two words a token, so that moving blocks costs next to nothing."""
    return KvLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=block_size, dtype="float32")


def simulated_fingerprint(checkpoint: Path) -> str:
    """Identity of the simulation of a checkpoint: never that of the model itself."""
    return f"simulated-{blake2b((checkpoint / 'config.json').read_bytes(), digest_size=16).hexdigest()}"


class SimulatedRunner:
    """A StepRunner over the bytes of any KV memory; see FakeRunner for `blocks` and answers.

    A step first sleeps and then does the fake's work, so that what it stores is there (and is offered to
    others) no sooner than a model's would be. The sleep is shorter by what the step before took beyond its
    own: so the steps that follow each other take what `latency` says, as long as the fake's work is less.

    clock: seconds. sleep: until that many seconds have passed on it.
    """

    def __init__(
        self,
        blocks: npt.NDArray[np.uint8],
        block_size: int,
        num_layers: int,
        latency: LatencyModel,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._fake = FakeRunner(blocks, block_size, num_layers=num_layers)
        self._latency = latency
        self._clock = clock
        self._sleep = sleep
        self._overhead_s = 0.0

    def step(
        self, chunks: Sequence[ScheduledChunk], on_layer: Callable[[int], None] | None = None
    ) -> list[ChunkResult]:
        """Raises InvalidStepError."""
        begin = self._clock()
        sleep_s = max(0.0, self._latency.step_s(shape_of(chunks)) - self._overhead_s)
        if sleep_s > 0:
            self._sleep(sleep_s)
        results = self._fake.step(chunks, on_layer)
        self._overhead_s = max(0.0, self._clock() - begin - sleep_s)
        return results


def shape_of(chunks: Sequence[ScheduledChunk]) -> StepShape:
    """What a latency model is asked for: single tokens that go on with an answer are those that decode."""
    decoding = [chunk for chunk in chunks if len(chunk.token_ids) == 1 and chunk.num_output_tokens > 0]
    prefill = tuple(
        (len(chunk.token_ids), chunk.start)
        for chunk in chunks
        if len(chunk.token_ids) > 1 or chunk.num_output_tokens == 0
    )
    return StepShape(prefill, len(decoding), sum(chunk.start + 1 for chunk in decoding))
