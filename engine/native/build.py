"""Compiles the CPU kernels: run by the installer, or by hand as `python -m engine.native.build`.

Imports nothing but the standard library, since the installer runs it before anything else is there.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = SOURCES / "_kernels.so"

COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-pthread",
    *(f"-m{name}" for name in ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")),
)


class BuildError(Exception):
    """The kernels could not be compiled; the message says why in one line."""


def source_hash() -> str:
    """Of all that the library is made from: a library that says another one is out of date."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def build(target: Path, compilers: Sequence[str] = COMPILERS) -> None:
    """Compile into `target` with the first of `compilers` that there is. Raises BuildError."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"the kernels are written for x86-64, and this is {platform.machine()}")
    found = [path for path in map(shutil.which, compilers) if path]
    if not found:
        raise BuildError(f"no C++ compiler ({', '.join(compilers)})")
    command = [found[0], *_FLAGS, f'-DSOURCE_HASH="{source_hash()}"', str(SOURCES / "kernels.cpp")]
    # Replaced in one go: a process that has the old one mapped must not see it change.
    fresh = target.with_suffix(".new")
    try:
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            errors = [line for line in lines if "error" in line] or lines
            raise BuildError(f"{found[0]} failed: {errors[0]}")
        fresh.replace(target)
    except OSError as error:
        raise BuildError(f"{target} cannot be written: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)


def main() -> int:
    """Build in place, and say how it went."""
    try:
        build(LIBRARY)
    except BuildError as error:
        print(f"prelay: CPU kernels not built, torch will do their work: {error}", file=sys.stderr)
        return 1
    print(f"prelay: CPU kernels built: {LIBRARY}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
