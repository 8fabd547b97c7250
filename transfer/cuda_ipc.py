"""CUDA memory shown to other processes of the host. It has not been run yet.

torch keeps the account of who has memory of ours open, and says how to open it in eight fields of fixed
types; they travel as plain bytes, for what comes from another process is not unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch

from transfer.errors import SegmentError

# device, size, offset, offset of the reference count, whether the event is waited for; then the lengths of
# the three byte strings that follow: memory handle, name of the reference count's file, event handle.
_FIELDS = struct.Struct("<iQQQ?HHH")


def share_cuda(blocks: torch.Tensor) -> tuple[bytes, int]:
    """(handle, byte offset in the shared storage). For one peer; it holds the memory until it lets go.

    Not for memory of torch's expandable segments.
    """
    storage: Any = blocks.untyped_storage()
    device, handle, size, offset, count_name, count_offset, event, wait = storage._share_cuda_()
    fields = _FIELDS.pack(device, size, offset, count_offset, wait, len(handle), len(count_name), len(event))
    start = int(blocks.storage_offset()) * blocks.element_size()
    return fields + handle + count_name + event, start


def open_cuda(shared: bytes, offset: int, shape: Sequence[int]) -> torch.Tensor:
    """uint8 [*shape] of another process. Raises SegmentError."""
    try:
        device, size, at, count_offset, wait, *lengths = _FIELDS.unpack_from(shared)
        strings, start = [], _FIELDS.size
        for length in lengths:
            strings.append(shared[start : start + length])
            start += length
        handle, count_name, event = strings
        kind: Any = torch.UntypedStorage
        storage = kind._new_shared_cuda(device, handle, size, at, count_name, count_offset, event, wait)
        empty = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", device))
        strides = torch.empty(shape, dtype=torch.uint8, device="meta").stride()
        return empty.set_(storage, offset, tuple(shape), strides)
    except (RuntimeError, struct.error) as error:
        raise SegmentError(f"the peer's CUDA memory cannot be opened: {error}") from error
