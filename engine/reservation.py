"""How many KV blocks a decode worker sets aside for a request, and when it has room: workers and routers use
the same formula, so that a router's ledger is right before the worker has answered. No torch here.
"""

from __future__ import annotations

HEADROOM_BLOCKS = 1
"""Set aside beyond the prompt: an answer's first steps never have to look for a block."""


def reserved_blocks(block_size: int, prompt_tokens: int, max_tokens: int) -> int:
    """Blocks for the prompt and HEADROOM_BLOCKS more, but never more than prompt and answer can fill."""
    whole = -(-(prompt_tokens + max_tokens) // block_size)
    return min(whole, -(-prompt_tokens // block_size) + HEADROOM_BLOCKS)


def has_room(num_blocks: int, free_blocks: int, num_requests: int) -> bool:
    """Whether a worker with `num_requests` requests may set `num_blocks` of its `free_blocks` aside.

    One block for each request that is there stays free. All of them can then grow by a block before any has
    to be preempted; by that time, if the pool is in balance, some have ended. A worker without requests
    gives all that it has.
    """
    return num_blocks + num_requests <= free_blocks
