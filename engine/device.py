"""The device that an engine computes on, found or refused by name."""

from __future__ import annotations

import torch

from engine.errors import DeviceError


def open_device(name: str) -> torch.device:
    """The device for EngineConfig.device, "cpu" or "cuda" (the process's current GPU).

    Raises DeviceError if torch cannot use it, saying why.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise DeviceError(f"device is {name!r}; it must be 'cpu' or 'cuda'")
    if torch.version.cuda is None:
        raise DeviceError(
            f"device is 'cuda', but torch {torch.__version__} is built without CUDA; install a CUDA build of "
            "torch, or set device to 'cpu'"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            "device is 'cuda', but torch finds no GPU that it can use; check the driver (nvidia-smi) and "
            "CUDA_VISIBLE_DEVICES, or set device to 'cpu'"
        )
    return torch.device("cuda", torch.cuda.current_device())
