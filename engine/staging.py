"""From numpy to the device: all arrays of a step in one copy that the host does not wait for.

On CUDA a copy is asynchronous only if its source is pinned memory, and each has a cost of some microseconds
whatever its size; so the arrays are packed into one pinned buffer and cut apart again on the device. The
buffer is fresh each time: torch keeps pinned memory that is given back, and hands it out again only when the
copies that read it are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16


def to_device(device: torch.device, *arrays: npt.NDArray[Any]) -> list[torch.Tensor]:
    """Each array as a tensor on `device`; on the CPU the tensors share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    places = places_of(arrays)
    return unpack(_staged(arrays, places).to(device, non_blocking=True), places, arrays)


def pinned(device: torch.device, *arrays: npt.NDArray[Any]) -> list[torch.Tensor]:
    """Each array as a tensor of host memory that `device` can copy from without the host waiting."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    places = places_of(arrays)
    return unpack(_staged(arrays, places), places, arrays)


def places_of(arrays: Sequence[npt.NDArray[Any]]) -> list[int]:
    """The byte at which each array begins in the packed buffer, and last the buffer's size, never 0."""
    places = [0]
    for array in arrays:
        places.append(-(-(places[-1] + array.nbytes) // _ALIGNMENT) * _ALIGNMENT)
    return [*places[:-1], max(places[-1], _ALIGNMENT)]


def pack(arrays: Sequence[npt.NDArray[Any]], places: Sequence[int], buffer: npt.NDArray[np.uint8]) -> None:
    """Write the arrays into `buffer` at their places."""
    for array, place in zip(arrays, places, strict=False):
        buffer[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def unpack(
    buffer: torch.Tensor, places: Sequence[int], arrays: Sequence[npt.NDArray[Any]]
) -> list[torch.Tensor]:
    """Views of `buffer`, uint8 [size], with the shapes and number types of the arrays that were packed."""
    return [
        buffer[place : place + array.nbytes].view(_torch_dtype(array)).view(array.shape)
        for array, place in zip(arrays, places, strict=False)
    ]


def _staged(arrays: Sequence[npt.NDArray[Any]], places: Sequence[int]) -> torch.Tensor:
    """The arrays in one buffer of pinned memory."""
    staged = torch.empty(places[-1], dtype=torch.uint8, pin_memory=True)
    pack(arrays, places, staged.numpy())
    return staged


def _torch_dtype(array: npt.NDArray[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype


class Fence:
    """Keeps the host from overwriting memory that the device has yet to read; nothing to do on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.Event(device=device) if device.type == "cuda" else None

    def mark(self) -> None:
        """All copies that were asked for so far are to be waited for."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Sleep until what was asked for before the last `mark` is done."""
        if self._event is not None:
            self._event.synchronize()
