"""With a compiler or without, with the library, a stale one or none: the engine says what it uses."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import cpu
from engine.config import EngineConfig, ModelConfig
from engine.errors import KernelsUnavailableError
from engine.kernels.native import NativeKernels
from engine.kernels.torch_ops import TorchKernels
from engine.native import build as native_build
from engine.native import library

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, native_build.COMPILERS)), reason="no C++ compiler on this machine"
)


@pytest.fixture
def capable_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has whatever is asked for, so that what is tested comes after that question."""
    monkeypatch.setattr(library, "cpu_flags", lambda: set(library._INSTRUCTIONS))


@pytest.mark.usefixtures("capable_cpu")
def test_a_library_that_is_missing_or_no_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailableError, match="were not built: install a C\\+\\+ compiler"):
        library.load_library(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(KernelsUnavailableError, match=r"text\.so cannot be loaded"):
        library.load_library(tmp_path / "text.so")


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("capable_cpu")
def test_a_library_of_other_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "stale.so"
    native_build.build(target)
    monkeypatch.setattr(library, "source_hash", lambda: "another")
    with pytest.raises(KernelsUnavailableError, match="was built from other sources"):
        library.load_library(target)


def test_a_cpu_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: old\nflags\t\t: fpu avx2 fma\n")
    flags = library.cpu_flags(tmp_path / "cpuinfo")
    assert flags == {"fpu", "avx2", "fma"}
    assert library.cpu_flags(tmp_path / "none") == set()
    monkeypatch.setattr(library, "cpu_flags", lambda: flags)
    with pytest.raises(KernelsUnavailableError, match="this CPU lacks avx512_bf16, avx512bw"):
        library.load_library(tmp_path / "unread.so")


def test_auto_falls_to_torch_with_a_warning_and_native_is_an_error(
    storyteller: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise KernelsUnavailableError("none here")

    monkeypatch.setattr(cpu, "load_library", refuse)
    model = ModelConfig.from_pretrained(storyteller)
    with caplog.at_level(logging.WARNING):
        backend = cpu.CpuBackend(model, EngineConfig(num_blocks=1))
    assert "use=torch why='none here'" in caplog.text
    assert isinstance(backend.kernels(), TorchKernels)
    with pytest.raises(KernelsUnavailableError, match="none here; kernels 'auto' would fall to torch"):
        cpu.CpuBackend(model, EngineConfig(num_blocks=1, kernels="native"))
    with pytest.raises(ValueError, match="kernels is 'fast'; it must be auto, native or torch"):
        EngineConfig(num_blocks=1, kernels="fast")


def test_auto_is_native_where_it_can_be(storyteller: Path) -> None:
    try:
        library.load_library()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    backend = cpu.CpuBackend(ModelConfig.from_pretrained(storyteller), EngineConfig(num_blocks=1))
    assert isinstance(backend.kernels(), NativeKernels)


def test_no_compiler_and_a_compiler_that_fails_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build.platform, "machine", lambda: "x86_64")
    with pytest.raises(native_build.BuildError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        native_build.build(tmp_path / "k.so", ["no-such-compiler"])
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho note >&2\necho 'error: out of luck' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(native_build.BuildError, match=r"failed: error: out of luck$"):
        native_build.build(tmp_path / "k.so", [str(broken)])
    assert not list(tmp_path.glob("k*"))


def hook(root: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Any:
    """hatch_build.py's hook over `root`, with a stand-in for hatchling, which only the installer has."""
    base = type("BuildHookInterface", (), {"__class_getitem__": classmethod(lambda cls, item: cls)})
    for name in (
        "hatchling",
        "hatchling.builders",
        "hatchling.builders.hooks",
        "hatchling.builders.hooks.plugin",
    ):
        monkeypatch.setitem(__import__("sys").modules, name, SimpleNamespace())
    interface = SimpleNamespace(BuildHookInterface=base)
    monkeypatch.setitem(__import__("sys").modules, "hatchling.builders.hooks.plugin.interface", interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.KernelsHook()
    made.root, made.app = str(root), SimpleNamespace(display_warning=said.append)
    return made


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A root with the sources alone."""
    shutil.copytree(
        ROOT / "engine" / "native",
        tmp_path / "engine" / "native",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return tmp_path


def test_the_hook_succeeds_without_a_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    said: list[str] = []
    build_data: dict[str, Any] = {"artifacts": []}
    hook(sources, monkeypatch, said).initialize("standard", build_data)
    assert len(said) == 1
    assert said[0].startswith("CPU kernels not built, torch will do their work: ")
    assert build_data == {"artifacts": []}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("version", ["standard", "editable"])
def test_the_hook_puts_the_library_into_wheels_of_this_platform(
    sources: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    said: list[str] = []
    build_data: dict[str, Any] = {"artifacts": []}
    hook(sources, monkeypatch, said).initialize(version, build_data)
    assert said == []
    assert (sources / "engine" / "native" / "_kernels.so").exists()
    if version == "standard":
        assert build_data["artifacts"] == ["engine/native/_kernels.so"]
        assert build_data["pure_python"] is False
        assert build_data["tag"].startswith("py3-none-linux_")
