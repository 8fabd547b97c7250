"""How the C library treats memory that tensors give back."""

from __future__ import annotations

import ctypes

# mallopt(3) of glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, instead of giving it to the system and asking for it again.

    A prefill step makes and drops tensors of some MiB in every layer. glibc maps such memory anew each time,
    and the
    first touch of every page is a fault: 5-15 % of a prefill step on a virtual machine. False where the C
    library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
