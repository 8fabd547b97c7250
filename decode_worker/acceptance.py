"""What a router asks for, whether this worker can serve it, and if not, why. A core."""

from __future__ import annotations

from collections.abc import Sequence

from prelay.v1 import worker_pb2

from decode_worker.sequences import DecodeTask
from engine.block_pool import BlockPool
from engine.reservation import has_room, reserved_blocks
from engine.router_messages import sampling_of, urgency_of
from engine.sequence import RequestKey


def task_of(
    key: RequestKey, reserve: worker_pb2.Reserve, digests: Sequence[bytes], arrived_s: float
) -> DecodeTask:
    """As the scheduler takes it. digests: of the full blocks of its tokens."""
    return DecodeTask(
        key,
        list(reserve.token_ids),
        reserve.num_output_tokens,
        sampling_of(reserve.sampling),
        reserve.cache_salt,
        urgency_of(reserve, arrived_s),
        digests,
    )


class Acceptance:
    """max_model_len: most tokens of prompt and answer together. vocab_size: 0 if unknown; prompts are not
    checked against it then. reads_prompts: whether the worker is a mixed one, or has
    been; that may become true at any time."""

    def __init__(self, pool: BlockPool, max_model_len: int, vocab_size: int, *, reads_prompts: bool) -> None:
        self._pool = pool
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self.reads_prompts = reads_prompts

    @staticmethod
    def is_read_here(reserve: worker_pb2.Reserve) -> bool:
        """Whether the worker is to read the prompt itself: there is no prefill worker to take KV from."""
        return not reserve.HasField("prefill")

    def why_invalid(self, reserve: worker_pb2.Reserve) -> str | None:
        """Why it can never be served here; None if it can."""
        num_outputs = reserve.num_output_tokens
        num_tokens, more = len(reserve.token_ids), reserve.sampling.max_tokens - num_outputs
        # The whole answer: whatever else is here, one sequence must be able to end.
        num_blocks = self._pool.num_blocks_for(num_tokens + max(0, more))
        if num_tokens <= num_outputs or more < 1:
            return (
                f"{num_tokens - num_outputs} prompt tokens, {num_outputs} tokens of the answer and "
                f"max_tokens {reserve.sampling.max_tokens}: there must be a prompt, and a token to be drawn"
            )
        if num_tokens + more > self._max_model_len:
            return f"{num_tokens} tokens and {more} more to be drawn exceed {self._max_model_len} tokens"
        if num_blocks > self._pool.num_blocks:
            return (
                f"{num_tokens} tokens and {more} more to be drawn need {num_blocks} KV blocks, "
                f"{self._pool.num_blocks} is all there are"
            )
        return self._why_not_read_here(reserve) if self.is_read_here(reserve) else None

    def _why_not_read_here(self, reserve: worker_pb2.Reserve) -> str | None:
        if not self.reads_prompts:
            return (
                "Reserve names no prefill worker, and this is a decode worker: only a mixed one reads "
                "prompts itself"
            )
        if self._vocab_size and (largest := max(reserve.token_ids)) >= self._vocab_size:
            return f"token id {largest} in the prompt: the model's ids are below {self._vocab_size}"
        return None

    def num_blocks(self, reserve: worker_pb2.Reserve) -> int:
        """That are set aside for it, those included that the prefix cache has."""
        more = reserve.sampling.max_tokens - reserve.num_output_tokens
        return reserved_blocks(self._pool.block_size, len(reserve.token_ids), more)

    def why_no_room(self, num_blocks: int, num_requests: int, *, lacks_blocks: bool) -> str | None:
        """Why so many blocks cannot be set aside now; None if they can.

        num_requests: that are here. lacks_blocks: some of them wait for blocks.
        """
        if lacks_blocks:
            return "sequences that were preempted wait for KV blocks"
        free = self._pool.num_available
        if not has_room(num_blocks, free, num_requests):
            return (
                f"{num_blocks} KV blocks wanted, {free} of {self._pool.num_blocks} are free, and one has to "
                f"stay free for each of {num_requests} requests"
            )
        return None
