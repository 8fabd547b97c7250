"""Compiles the cores: run by the installer, or by hand as `python -m engine.native.build_cores`.

By hand it needs mypy and setuptools, which the installer has for itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from engine import cores
from engine.native.constructors import with_constructors

_MYPY = """
[mypy]
explicit_package_bases = True
ignore_missing_imports = True
follow_imports = silent
"""
"""What other people's modules are is no concern of the compiler, and to find out would take a minute."""

_OPTIMISE = "3"
_THIS = "engine.native.build_cores"


class BuildError(Exception):
    """The cores could not be compiled; the message says why in one line."""


def build(directory: Path) -> None:
    """Compile into `directory`, in place of what is there. Raises BuildError."""
    made_from = cores.source_hash()  # who edits one meanwhile has another
    with tempfile.TemporaryDirectory() as work:
        fresh = Path(work, "cores")
        copy = Path(work, "sources")
        _copy_sources(copy)
        # A process of its own: the compiler looks at where it is, and setuptools changes what is global.
        command = [sys.executable, "-m", _THIS, "--compile", str(work), str(fresh)]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise BuildError(errors[-1])
        try:
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(fresh, directory)
            (directory / cores.HASH_FILE).write_text(made_from)  # last: nobody uses half of them
        except OSError as error:
            raise BuildError(f"{directory} cannot be written: {error}") from error


def _copy_sources(copy: Path) -> None:
    """Of ours, all: the compiler reads types there. And the cores as they are to be compiled."""
    for package in {module.partition(".")[0] for module in cores.MODULES}:
        shutil.copytree(cores.ROOT / package, copy / package, ignore=_all_but_sources)
    for module in cores.MODULES:
        file = copy / cores.source_of(module)
        file.write_text(with_constructors(file.read_text()))


def _all_but_sources(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (name.endswith(".py") or Path(folder, name).is_dir())]


def _compile(work: Path, directory: Path) -> None:
    from mypyc.build import mypycify
    from setuptools import Distribution  # type: ignore[import-untyped]

    config = work / "mypy.ini"
    config.write_text(_MYPY)
    options = ["--config-file", str(config), "--no-site-packages", "--cache-dir", os.devnull]
    extensions = mypycify(
        [*options, *(str(cores.source_of(module)) for module in cores.MODULES)],
        opt_level=_OPTIMISE,
        debug_level="0",
        multi_file=True,
        group_name=cores.GROUP.removesuffix("__mypyc"),
        target_dir=str(work / "c"),
    )
    command = Distribution({"name": "cores", "ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(directory), str(work / "objects")
    command.parallel = os.cpu_count()
    command.ensure_finalized()
    command.run()


def main() -> int:
    """Build in place, and say how it went."""
    if sys.argv[1:2] == ["--compile"]:
        _compile(Path(sys.argv[2]), Path(sys.argv[3]))
        return 0
    try:
        build(cores.DIRECTORY)
    except BuildError as error:
        print(f"prelay: cores not compiled, Python runs their sources: {error}", file=sys.stderr)
        return 1
    print(f"prelay: cores compiled: {cores.DIRECTORY}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
