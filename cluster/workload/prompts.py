"""The tokens of prompts. What they say does not matter; whether they begin alike does."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from cluster.workload.datasets import Shape

# Which stream of random numbers; numpy takes keys for equal that differ in zeros at their end alone.
_UNIQUE, _SHARED = 1, 2


class PromptWriter:
    """Writes prompts that share exactly the beginnings that their hash_ids share."""

    def __init__(self, key: Sequence[int], vocabulary: range) -> None:
        """key: what the contents depend on; two writers with different keys have nothing in common.
        vocabulary: the token ids to draw from."""
        self._key = tuple(key)
        self._vocabulary = vocabulary
        self._rng = np.random.default_rng((_UNIQUE, *self._key))
        self._blocks: dict[tuple[int, int], array[int]] = {}

    def prompt(self, shape: Shape) -> Sequence[int]:
        """Token ids, shape.prompt_tokens of them."""
        tokens: array[int] = array("I")
        for index, hash_id in enumerate(shape.hash_ids):
            # Where a block ends depends on its place alone, also where a block's length is no whole number.
            length = int((index + 1) * shape.block_tokens) - int(index * shape.block_tokens)
            tokens.extend(self._block(hash_id, length))
        del tokens[shape.prompt_tokens :]
        tokens.extend(self._draw(self._rng, shape.prompt_tokens - len(tokens)))
        return tokens

    def _block(self, hash_id: int, length: int) -> array[int]:
        if (hash_id, length) not in self._blocks:
            rng = np.random.default_rng((_SHARED, hash_id, *self._key))
            self._blocks[hash_id, length] = self._draw(rng, length)
        return self._blocks[hash_id, length]

    def _draw(self, rng: np.random.Generator, count: int) -> array[int]:
        drawn = rng.integers(self._vocabulary.start, self._vocabulary.stop, size=count, dtype=np.uint32)
        return array("I", drawn.tobytes())
