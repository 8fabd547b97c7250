"""The cores as machine code, for simulations: the modules that decide, compiled by mypyc at installation.

Nothing is written twice: what is compiled is the annotated Python that everybody reads. It is used only if
it was made for this Python, and from the sources as they are now; in every other case (no compiler, a source
that was edited since) the sources are run, which decide the same, a third as fast. PRELAY_CORES=source
asks for them: a debugger and a profiler see more there.

What serves always runs the sources: mypyc checks the types of all that it is given, and once brought a whole
process down (decision 23). `bench/simulating.py` says which commands simulate.

`engine/native/build_cores.py` compiles, into `DIRECTORY`. Imports nothing but the standard library: the
installer imports it before anything else is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / "engine" / "native" / "_cores"
HASH_FILE = "SOURCES"
"""In DIRECTORY: what `source_hash` was when they were compiled."""

GROUP = "prelay_cores"
VARIABLE = "PRELAY_CORES"

_BY_PACKAGE = {
    "engine": (
        "block_changes block_pool latency prefix_cache prefix_digests reservation sequence step_log urgency"
    ),
    "prefill_worker": "chunk_size prompts scheduler",
    "decode_worker": "chunk_budget places scheduler sequences",
    "router": (
        "errors kv_growth ledger lengths pair_table placed_work pool_view prefix_index pump read_ledger "
        "reading_time requests slo stages transfer_times estimates urgency write_ledger"
    ),
    "router.admission": "audit base goodput shortage structural writers",
    "router.gate": "base drain fairness goodput line moore_hodgson plan readers waiting",
    "router.placement": "base bookings candidates goodput options room",
    "cluster.simulator": "clock heard_ledger live network reader router run steps worker writer",
}

MODULES = tuple(f"{package}.{name}" for package, names in _BY_PACKAGE.items() for name in names.split())
"""All of them are compiled together, as they call each other directly, and used together."""


def source_of(module: str) -> Path:
    """Its file, relative to ROOT."""
    return Path(*module.split(".")).with_suffix(".py")


def source_hash() -> str:
    """Of all that is compiled, and of what changes it before."""
    found = hashlib.sha256()
    for module in (*MODULES, "engine.native.constructors"):
        found.update((ROOT / source_of(module)).read_bytes())
    return found.hexdigest()[:16]


def state() -> str:
    """What a process that starts now would run, and why, in a few words."""
    if os.environ.get(VARIABLE) == "source":
        return f"run from their sources ({VARIABLE}=source)"
    try:
        made_from = (DIRECTORY / HASH_FILE).read_text()
    except OSError:
        return "run from their sources (not compiled)"
    if not _file_of(DIRECTORY, MODULES[0]).exists():
        return "run from their sources (compiled for another Python)"
    if made_from != source_hash():
        return "run from their sources (edited since they were compiled)"
    return "compiled"


def use_compiled() -> None:
    """From now on imports find what was compiled, if it is up to date; not if a core is there already, as
    some compiled and others not would not know each other. Repeatable."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if sys.modules.keys().isdisjoint(MODULES) and state() == "compiled":
        sys.meta_path.insert(0, _Finder(DIRECTORY))


class _Finder(MetaPathFinder):
    def __init__(self, directory: Path) -> None:
        self._files = {name: str(_file_of(directory, name)) for name in (*MODULES, f"{GROUP}__mypyc")}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._files.get(fullname)
        if file is None:
            return None
        return spec_from_file_location(fullname, file, loader=_Loader(fullname, file))


class _Loader(ExtensionFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for one in vars(module).values():
            if isinstance(one, type) and dataclasses.is_dataclass(one) and one.__module__ == module.__name__:
                _make_picklable(one)


def _make_picklable(cls: Any) -> None:
    """By its constructor, without which compiled classes make no objects; or, where not every field is for
    it, as dataclasses with slots are. (mypyc's own way to restore an object stumbles over frozen ones.)"""
    fields = dataclasses.fields(cls)
    if all(field.init for field in fields):
        cls.__reduce__ = lambda self: (cls, tuple(getattr(self, field.name) for field in fields))
        return
    cls.__getstate__ = lambda self: [getattr(self, field.name) for field in fields]
    cls.__setstate__ = _restore


def _restore(self: Any, values: Sequence[Any]) -> None:
    for field, value in zip(dataclasses.fields(self), values, strict=True):
        object.__setattr__(self, field.name, value)


def _file_of(directory: Path, module: str) -> Path:
    return directory.joinpath(*module.split(".")).with_suffix(str(sysconfig.get_config_var("EXT_SUFFIX")))
