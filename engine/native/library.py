"""The compiled CPU kernels as Python calls, if this machine has them."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from engine.errors import KernelsUnavailableError
from engine.native.build import LIBRARY, source_hash

_INSTRUCTIONS = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}

_ADDRESS = ctypes.c_void_p
_SIZE = ctypes.c_size_t
_FLOAT = ctypes.c_float

_SIGNATURES = {
    "linear": [_ADDRESS] * 4 + [_SIZE] * 4,
    "rms_norm": [_ADDRESS] * 3 + [_SIZE] * 2 + [_FLOAT, _SIZE],
    "add_rms_norm": [_ADDRESS] * 4 + [_SIZE] * 2 + [_FLOAT, _SIZE],
    "rotate": [_ADDRESS] * 3 + [_SIZE] * 5,
    "gated_silu": [_ADDRESS] * 2 + [_SIZE] * 3,
    "attend": [_ADDRESS],
}


@cache
def load_library(path: Path = LIBRARY) -> ctypes.CDLL:
    """The library, with the types of its functions set. Raises KernelsUnavailableError, which says why."""
    missing = _INSTRUCTIONS - cpu_flags()
    if missing:
        raise KernelsUnavailableError(f"this CPU lacks {', '.join(sorted(missing))}")
    if not path.exists():
        raise KernelsUnavailableError(
            "they were not built: install a C++ compiler and run `python -m engine.native.build`"
        )
    try:
        library = ctypes.CDLL(str(path))
        library.source_hash.restype = ctypes.c_char_p
        built_from = library.source_hash().decode()
        for name, types in _SIGNATURES.items():
            for dtype in ("float32", "bfloat16"):
                function = getattr(library, f"{name}_{dtype}")
                function.argtypes = types
                function.restype = ctypes.c_int if name == "attend" else None
    except (OSError, AttributeError) as error:
        raise KernelsUnavailableError(f"{path.name} cannot be loaded: {error}") from error
    if built_from != source_hash():
        raise KernelsUnavailableError(
            f"{path.name} was built from other sources: run `python -m engine.native.build`"
        )
    return library


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What instructions the CPU has, by the kernel's names; nothing where that cannot be read."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())
