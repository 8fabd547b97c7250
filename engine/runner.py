"""What schedulers know of an engine: it runs a step. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.sequence import ChunkResult, ScheduledChunk


class StepRunner(Protocol):
    """Runs steps, and is all that a scheduler knows of an engine: a model_runner.ModelRunner,
    a fake.FakeRunner, or a simulated.SimulatedRunner."""

    def step(
        self, chunks: Sequence[ScheduledChunk], on_layer: Callable[[int], None] | None = None
    ) -> list[ChunkResult]:
        """Compute and store the chunks' KV; draw the token that follows where `chunk.sampling` is set.

        on_layer: may be told, during the step and in order, of how many layers the KV is stored; it need not
        be. Returns one result a chunk, in order. Raises InvalidStepError for chunks that cannot be run;
        nothing was stored then.
        """
        ...
