"""One answer from one engine in one process, without hand-off: what answers of two pools must be equal to."""

from __future__ import annotations

from collections.abc import Sequence

from engine.engine import Engine
from engine.errors import OutOfBlocksError
from engine.sequence import ScheduledChunk, TokenHistory, TokenSampling


def generate(engine: Engine, prompt_ids: Sequence[int], sampling: TokenSampling) -> list[int]:
    """The whole answer, its last token included. The engine must be idle: its KV cache is overwritten.

    Raises OutOfBlocksError if the prompt with max_tokens of answer does not fit into the engine's KV cache.
    """
    config = engine.config
    num_blocks = -(-(len(prompt_ids) + sampling.max_tokens) // config.block_size)
    if num_blocks > config.num_blocks:
        raise OutOfBlocksError(
            f"a prompt of {len(prompt_ids)} and an answer of {sampling.max_tokens} tokens need {num_blocks} "
            f"KV blocks of {config.block_size}; this engine has {config.num_blocks}"
        )
    block_table = range(num_blocks)
    history = TokenHistory(prompt_ids) if sampling.needs_history else None
    answer: list[int] = []
    new: Sequence[int] = prompt_ids
    start = 0
    while True:
        chunk = new[: config.max_batch_tokens]
        new = new[len(chunk) :]
        last = sampling if not new else None
        (result,) = engine.runner.step(
            [ScheduledChunk(chunk, start, block_table, last, len(answer), history)]
        )
        token = result.token_id
        start += len(chunk)
        if token is not None:
            answer.append(token)
            if history is not None:
                history.append(token)
            new = [token]
            if sampling.stop_reason(token, len(answer)) is not None:
                return answer
