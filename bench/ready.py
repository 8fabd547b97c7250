"""A process that ends as soon as an engine in it is ready; started and timed by bench/engine.py."""

from __future__ import annotations

import sys
from pathlib import Path

from engine.config import EngineConfig
from engine.engine import Engine
from engine.sequence import ScheduledChunk, TokenSampling


def main(checkpoint: str, load: str, dtype: str, threads: str, kernels: str) -> None:
    """Load, and compute one token, so that nothing is left to be done at the first request."""
    config = EngineConfig(num_blocks=256, dtype=dtype, threads=int(threads), load=load, kernels=kernels)
    engine = Engine.load(Path(checkpoint), config, None, lambda fraction: None)
    greedy = TokenSampling(
        temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=1, min_tokens=0, stop_token_ids=frozenset()
    )
    engine.runner.step([ScheduledChunk([0], 0, [0], greedy, 0)])


if __name__ == "__main__":
    main(*sys.argv[1:])
