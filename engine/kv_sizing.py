"""How large a KV cache in main memory is if nobody says so (on a GPU: cuda_memory.py). No torch here."""

from __future__ import annotations

from engine.errors import KvMemoryError


def blocks_of_share(
    available_nbytes: int, share: float, num_workers: int, block_nbytes: int, min_blocks: int
) -> int:
    """KV blocks of each of `num_workers` workers that take `share` of the available memory together.

    min_blocks: of the longest sequence. Raises KvMemoryError if it does not fit.
    """
    num_blocks = int(available_nbytes * share / num_workers) // block_nbytes
    if num_blocks < min_blocks:
        raise KvMemoryError(
            f"a share of {share:g} of {available_nbytes / 2**30:,.1f} GiB is "
            f"{num_blocks * block_nbytes / 2**30:,.2f} GiB of KV for each of {num_workers} workers, but "
            f"one sequence of full length takes {min_blocks * block_nbytes / 2**30:,.2f} GiB"
        )
    return num_blocks
