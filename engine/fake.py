"""A runner without a model, for tests and simulations of everything around the engine. No torch here.

It writes each token's id into its KV slot and draws the next token from a hash of ALL the ids that it reads
back through the block table. So its answers are right only if every byte of every slot of the sequence is
right: a wrong, stale, swapped or half-copied block changes them as it would a model's, but at once (a token
is right by chance only once in FAKE_VOCAB_SIZE times). So are its log-probabilities, which are made up from
the same ids, and where a request has penalties its answers depend on the history that came with the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from engine.layout import locate_context
from engine.sequence import ChunkResult, ScheduledChunk, TokenHistory, TokenLogprobs, TokenSampling

FAKE_VOCAB_SIZE = 2048
"""Fake answers are made of token ids below this; prompts may hold any."""


class FakeRunner:
    """A StepRunner over the bytes of any KV memory.

    blocks: uint8 [num_blocks, block_nbytes], shared with whoever moves blocks; a slot, block_nbytes /
    block_size bytes, must be a multiple of 4.
    before_step: called with the chunks before anything is written: there a test or a simulation moves its
    clock, waits for an event, or raises. num_layers: for `on_layer`, which is told of them one by one when
    all is written.
    """

    def __init__(
        self,
        blocks: npt.NDArray[np.uint8],
        block_size: int,
        before_step: Callable[[Sequence[ScheduledChunk]], None] | None = None,
        num_layers: int = 0,
    ) -> None:
        num_blocks, block_nbytes = blocks.shape
        if block_nbytes % (4 * block_size):
            raise ValueError(f"blocks of {block_nbytes} bytes do not hold {block_size} slots of 32-bit words")
        # A token's id fills its slot to the last byte, so that no byte of a block is without meaning.
        self._slots = blocks.view(np.uint32).reshape(num_blocks, block_size, -1)
        self._before_step = before_step
        self._num_layers = num_layers

    def step(
        self, chunks: Sequence[ScheduledChunk], on_layer: Callable[[int], None] | None = None
    ) -> list[ChunkResult]:
        """Store the chunks' tokens; draw one for each chunk that asks for it. Raises InvalidStepError."""
        if self._before_step is not None:
            self._before_step(chunks)
        num_blocks, block_size, _ = self._slots.shape
        places = [locate_context(chunk, block_size, num_blocks) for chunk in chunks]
        for chunk, (blocks, offsets) in zip(chunks, places, strict=True):
            new = np.asarray(chunk.token_ids, dtype=np.uint32)
            self._slots[blocks[chunk.start :], offsets[chunk.start :]] = new[:, None]
        if on_layer is not None:
            for num_layers in range(1, self._num_layers + 1):
                on_layer(num_layers)
        return [_result(self._slots[place], chunk) for chunk, place in zip(chunks, places, strict=True)]


def fake_answer(prompt_ids: Sequence[int], sampling: TokenSampling) -> list[int]:
    """What a FakeRunner answers when nothing goes wrong, the token that ends the answer included."""
    token_ids = list(prompt_ids)
    answer: list[int] = []
    history = TokenHistory(prompt_ids) if sampling.needs_history else None
    while True:
        token = _draw(_context(_as_slots(token_ids)), sampling, len(answer), history)
        token_ids.append(token)
        answer.append(token)
        if history is not None:
            history.append(token)
        if sampling.stop_reason(token, len(answer)) is not None:
            return answer


def fake_logprobs(token_ids: Sequence[int], index: int, num_top: int) -> TokenLogprobs:
    """What a FakeRunner says of token_ids[index], the tokens before it being what they are.

    The token's rank is 1 to 4, and the rank decides its log-probability, up to a little.
    """
    return _logprobs(_context(_as_slots(token_ids[:index])), token_ids[index], num_top)


def _result(slots: npt.NDArray[np.uint32], chunk: ScheduledChunk) -> ChunkResult:
    """slots: of the chunk's sequence up to the chunk's end, as read back, [num_tokens, words in a slot]."""
    prompt_logprobs: list[TokenLogprobs] = []
    if chunk.prompt_logprobs is not None:
        following = [*chunk.token_ids[1:], *([] if chunk.next_token is None else [chunk.next_token])]
        prompt_logprobs = [
            _logprobs(_context(slots[: chunk.start + at]), token, chunk.prompt_logprobs)
            for at, token in enumerate(following, start=1)
        ]
    if chunk.sampling is None:
        return ChunkResult(None, None, tuple(prompt_logprobs))
    context = _context(slots)
    token = _draw(context, chunk.sampling, chunk.num_output_tokens, chunk.history)
    asked = chunk.sampling.logprobs
    own = None if asked is None else _logprobs(context, token, asked)
    return ChunkResult(token, own, tuple(prompt_logprobs))


def _as_slots(token_ids: Sequence[int]) -> npt.NDArray[np.uint32]:
    return np.asarray(token_ids, dtype=np.uint32)[:, None]


def _context(slots: npt.NDArray[np.uint32]) -> bytes:
    """The ids of a sequence whose slots are [num_tokens, words in a slot]; all their bytes if one is off."""
    token_ids = slots[:, :1]
    return (token_ids if bool((slots == token_ids).all()) else slots).tobytes()


def _draw(
    context: bytes, sampling: TokenSampling, num_output_tokens: int, history: TokenHistory | None
) -> int:
    """The token after a sequence."""
    # As with a model, the seed says nothing about a greedy answer.
    key = b"" if sampling.temperature == 0 else sampling.seed.to_bytes(8, "little")
    if sampling.needs_history and history is not None:
        in_order = history.token_ids.argsort()
        context += history.token_ids[in_order].tobytes() + history.counts[in_order].tobytes()
        context += np.sort(history.token_ids[: history.num_prompt]).tobytes()
    token = int.from_bytes(blake2b(context, digest_size=8, key=key).digest(), "little") % FAKE_VOCAB_SIZE
    if num_output_tokens < sampling.min_tokens:
        allowed = (t % FAKE_VOCAB_SIZE for t in range(token, token + FAKE_VOCAB_SIZE))
        token = next((t for t in allowed if t not in sampling.stop_token_ids), token)
    return token


def _logprobs(context: bytes, token_id: int, num_top: int) -> TokenLogprobs:
    noise = int.from_bytes(blake2b(context, digest_size=8, person=b"logprobs").digest(), "little")
    rank = 1 + noise % 4
    highest = -(noise % 1000) / 1000
    others = ((token_id + step) % FAKE_VOCAB_SIZE for step in range(1, FAKE_VOCAB_SIZE))
    ids = [token_id if at == rank else next(others) for at in range(1, num_top + 1)]
    top = tuple((each, highest - at) for at, each in enumerate(ids))
    return TokenLogprobs(token_id, highest - (rank - 1), rank, top)
