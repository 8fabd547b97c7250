"""A runner without a model, for tests and simulations of everything around the engine. No torch here.

It writes each token's id into its KV slot and draws the next token from a hash of ALL the ids that it reads
back through the block table. So its answers are right only if every byte of every slot of the sequence is
right: a wrong, stale, swapped or half-copied block changes them as it would a model's, but at once (a token
is right by chance only once in FAKE_VOCAB_SIZE times).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from engine.layout import locate_context
from engine.sequence import ChunkResult, ScheduledChunk, TokenSampling

FAKE_VOCAB_SIZE = 2048
"""Fake answers are made of token ids below this; prompts may hold any."""


class FakeRunner:
    """A StepRunner over the bytes of any KV memory.

    blocks: uint8 [num_blocks, block_nbytes], shared with whoever moves blocks; a slot, block_nbytes /
    block_size bytes, must be a multiple of 4.
    before_step: called with the chunks before anything is written: there a test or a simulation moves its
    clock, waits for an event, or raises.
    """

    def __init__(
        self,
        blocks: npt.NDArray[np.uint8],
        block_size: int,
        before_step: Callable[[Sequence[ScheduledChunk]], None] | None = None,
    ) -> None:
        num_blocks, block_nbytes = blocks.shape
        if block_nbytes % (4 * block_size):
            raise ValueError(f"blocks of {block_nbytes} bytes do not hold {block_size} slots of 32-bit words")
        # A token's id fills its slot to the last byte, so that no byte of a block is without meaning.
        self._slots = blocks.view(np.uint32).reshape(num_blocks, block_size, -1)
        self._before_step = before_step

    def step(self, chunks: Sequence[ScheduledChunk]) -> list[ChunkResult]:
        """Store the chunks' tokens; draw one for each chunk that asks for it. Raises InvalidStepError."""
        if self._before_step is not None:
            self._before_step(chunks)
        num_blocks, block_size, _ = self._slots.shape
        places = [locate_context(chunk, block_size, num_blocks) for chunk in chunks]
        for chunk, (blocks, offsets) in zip(chunks, places, strict=True):
            new = np.asarray(chunk.token_ids, dtype=np.uint32)
            self._slots[blocks[chunk.start :], offsets[chunk.start :]] = new[:, None]
        return [
            ChunkResult(
                None
                if chunk.sampling is None
                else _draw(self._slots[place], chunk.sampling, chunk.num_output_tokens)
            )
            for chunk, place in zip(chunks, places, strict=True)
        ]


def fake_answer(prompt_ids: Sequence[int], sampling: TokenSampling) -> list[int]:
    """What a FakeRunner answers when nothing goes wrong, the token that ends the answer included."""
    token_ids = list(prompt_ids)
    answer: list[int] = []
    while True:
        slots = np.asarray(token_ids, dtype=np.uint32)[:, None]
        token = _draw(slots, sampling, len(answer))
        token_ids.append(token)
        answer.append(token)
        if sampling.stop_reason(token, len(answer)) is not None:
            return answer


def _draw(slots: npt.NDArray[np.uint32], sampling: TokenSampling, num_output_tokens: int) -> int:
    """The token after a sequence whose slots, as read back, are [num_tokens, words in a slot]."""
    token_ids = slots[:, :1]
    intact = bool((slots == token_ids).all())
    # As with a model, the seed says nothing about a greedy answer.
    key = b"" if sampling.temperature == 0 else sampling.seed.to_bytes(8, "little")
    digest = blake2b((token_ids if intact else slots).tobytes(), digest_size=8, key=key).digest()
    token = int.from_bytes(digest, "little") % FAKE_VOCAB_SIZE
    if num_output_tokens < sampling.min_tokens:
        allowed = (t % FAKE_VOCAB_SIZE for t in range(token, token + FAKE_VOCAB_SIZE))
        token = next((t for t in allowed if t not in sampling.stop_token_ids), token)
    return token
