"""With a compiler or without, with the library, a stale one or none: the engine says what it uses."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import cores, cpu
from engine.config import EngineConfig, ModelConfig
from engine.errors import KernelsUnavailableError
from engine.kernels.native import NativeKernels
from engine.kernels.torch_ops import TorchKernels
from engine.native import build as native_build
from engine.native import build_cores, library

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


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """hatch_build.py's, with a stand-in for hatchling, which only the installer has. said: its warnings."""
    base = type("BuildHookInterface", (), {"__class_getitem__": classmethod(lambda cls, item: cls)})
    for name in (
        "hatchling",
        "hatchling.builders",
        "hatchling.builders.hooks",
        "hatchling.builders.hooks.plugin",
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    interface = SimpleNamespace(BuildHookInterface=base)
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin.interface", interface)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.NativeHook()
    made.said = []
    made.root, made.app = str(ROOT), SimpleNamespace(display_warning=made.said.append)
    monkeypatch.setattr(cores, "state", lambda: "run from their sources (not compiled)")
    return made


def built(target: Path) -> None:
    """In place of a compiler that does its work."""


def cannot_build_kernels(target: Path) -> None:
    raise native_build.BuildError("no C++ compiler")


def cannot_build_cores(target: Path) -> None:
    raise build_cores.BuildError("no C compiler")


def test_the_hook_succeeds_without_a_compiler(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "build", cannot_build_kernels)
    monkeypatch.setattr(build_cores, "build", cannot_build_cores)
    build_data: dict[str, Any] = {"artifacts": []}
    hook.initialize("standard", build_data)
    assert hook.said == [
        "CPU kernels not built, torch will do their work: no C++ compiler",
        "cores not compiled, Python runs their sources: no C compiler",
    ]
    assert build_data == {"artifacts": []}


def test_a_wheel_with_kernels_is_for_the_platform(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "build", built)
    monkeypatch.setattr(build_cores, "build", cannot_build_cores)
    build_data: dict[str, Any] = {"artifacts": []}
    hook.initialize("standard", build_data)
    assert build_data["tag"].startswith("py3-none-linux_")
    assert build_data["pure_python"] is False
    assert build_data["artifacts"] == ["engine/native/_kernels.so"]


def test_a_wheel_with_cores_is_for_the_version_of_python_too(
    hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "build", built)
    monkeypatch.setattr(build_cores, "build", built)
    build_data: dict[str, Any] = {"artifacts": []}
    hook.initialize("standard", build_data)
    assert build_data == {
        "artifacts": ["engine/native/_kernels.so", "engine/native/_cores/**"],
        "pure_python": False,
        "infer_tag": True,
    }


def test_an_editable_installation_has_what_was_built_in_place(
    hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(native_build, "build", asked.append)
    monkeypatch.setattr(build_cores, "build", asked.append)
    build_data: dict[str, Any] = {"artifacts": []}
    hook.initialize("editable", build_data)
    assert asked == [native_build.LIBRARY, cores.DIRECTORY]
    assert build_data == {"artifacts": []}
    monkeypatch.setattr(cores, "state", lambda: "compiled")
    hook.initialize("editable", build_data)
    assert asked[2:] == [native_build.LIBRARY], "cores take a minute, and are as they should be"
