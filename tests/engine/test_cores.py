"""Compiled cores decide what their sources decide; simulations use them where they are up to date."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from bench.simulating import simulates
from engine import cores
from engine.latency import LatencyModel
from router.slo import SloLimits

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "deploy" / "bench" / "opt-13b-a100.json"
SHAPES = {
    "pairs": ["--prefill", "replicas=2", "--decode", "replicas=2"],
    "mixed": ["--mixed", "replicas=2"],
    "prefill and mixed": ["--prefill", "replicas=1", "--mixed", "replicas=2"],
    "least_loaded": ["--prefill", "replicas=2", "--decode", "replicas=2", "--policy", "least_loaded"],
}
compiled = pytest.mark.skipif(
    cores.state() != "compiled",
    reason=f"cores are {cores.state()}; `python -m engine.native.build_cores` compiles them",
)


def python(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


def simulated(shape: list[str], requests: Path, **environment: str) -> tuple[dict[str, object], str]:
    command = ["simulate", "--profile", str(PROFILE), "--dataset", "synthetic:prompt=50-900,answer=10-150"]
    command += [
        "--rate",
        "9",
        "--count",
        "300",
        "--slo",
        "ttft=1,tpot=0.1",
        "--kv-tokens",
        "6000",
        "--kv-bytes",
        "819200",
    ]
    command += ["--noise", "0.1", *shape, "--json", "--requests", str(requests)]
    said = json.loads(python("from cluster.cli import main; main()", *command, **environment))
    del said["wall_s"], said["requests_per_wall_s"]
    return said, requests.read_text()


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_they_decide_the_same(shape: str, tmp_path: Path):
    found = simulated(SHAPES[shape], tmp_path / "compiled.csv")
    assert found == simulated(SHAPES[shape], tmp_path / "sources.csv", PRELAY_CORES="source")


FILES = "import sys, importlib as i\nfor m in sys.argv[1:]: print(i.import_module(m).__file__)"
USE = "from engine import cores; cores.use_compiled()\n"


@compiled
def test_every_core_is_found_compiled_and_where_asked_for_from_its_source():
    found = python(USE + FILES, *cores.MODULES).split()
    assert {Path(file).suffix for file in found} == {".so"}
    found = python(USE + FILES, *cores.MODULES, PRELAY_CORES="source").split()
    assert [Path(file) for file in found] == [ROOT / cores.source_of(module) for module in cores.MODULES]


@compiled
def test_processes_of_a_planner_run_them_too():
    where = "__import__('engine.latency').latency.__file__"
    code = "import sys; from bench.cli_plan import _processes\n"
    code += "with _processes() as pool: print(pool.submit(eval, sys.argv[1]).result())"
    assert python(code, where).strip().endswith(".so")


def test_what_serves_runs_the_sources():
    serving = (
        "router.app",
        "cluster.host",
        "cluster.host_engine",
        "cluster.launch",
        "cluster.role_controller",
    )
    code = f"import {', '.join(serving)}\n" + FILES
    assert {Path(file).suffix for file in python(code, *cores.MODULES).split()} == {".py"}


@compiled
def test_where_a_core_is_there_already_the_others_are_no_compiled_ones():
    found = python("import router.slo\n" + USE + FILES, *cores.MODULES).split()
    assert {Path(file).suffix for file in found} == {".py"}


@compiled
def test_the_way_to_them_is_laid_once():
    code = "import sys; before = len(sys.meta_path)\n"
    assert python(code + USE + USE + "print(len(sys.meta_path) - before)") == "1\n"


@compiled
def test_what_a_compiled_process_pickles_any_other_restores():
    """Not so the other way round: a compiled class makes no object without its constructor's arguments."""
    given = (LatencyModel({"step": 0.5}), SloLimits(1.0, 0.25))
    code = "import pickle; from engine.latency import LatencyModel; from router.slo import SloLimits\n"
    code += "print(pickle.dumps((LatencyModel({'step': 0.5}), SloLimits(1.0, 0.25))).hex())"
    pickled = python(USE + code).strip()
    assert pickle.loads(bytes.fromhex(pickled)) == given
    code = "import sys, pickle; print(repr(pickle.loads(bytes.fromhex(sys.argv[1]))))"
    assert python(USE + code, pickled).strip() == repr(given)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("simulate --rate 1", True),
        ("plan --live 127.0.0.1:9091", True),
        ("controller --config x.yaml", True),
        ("goodput --config x.yaml --simulate", True),
        ("goodput --simulate=profile.json", True),
        ("goodput --config x.yaml", False),
        ("router --json", False),
        ("accuracy", False),
        ("", False),
    ],
)
def test_commands_that_simulate_are_known(words: str, expected: bool):
    assert simulates(words.split()) is expected


def test_all_of_them_are_sources_that_are_there():
    assert all((ROOT / cores.source_of(module)).is_file() for module in cores.MODULES)


def test_nothing_compiled_is_used_where_it_is_missing_old_or_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(cores.VARIABLE, raising=False)
    monkeypatch.setattr(cores, "DIRECTORY", tmp_path)
    assert cores.state() == "run from their sources (not compiled)"
    (tmp_path / cores.HASH_FILE).write_text(cores.source_hash())
    assert cores.state() == "run from their sources (compiled for another Python)"
    first = cores._file_of(tmp_path, cores.MODULES[0])
    first.parent.mkdir()
    first.touch()
    assert cores.state() == "compiled"
    monkeypatch.setenv(cores.VARIABLE, "source")
    assert cores.state() == "run from their sources (PRELAY_CORES=source)"
    monkeypatch.delenv(cores.VARIABLE)
    (tmp_path / cores.HASH_FILE).write_text("of other sources")
    assert cores.state() == "run from their sources (edited since they were compiled)"


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from engine.native import build_cores

    sources = tmp_path / "sources"
    for module in (*cores.MODULES, "engine.native.constructors"):
        source = sources / cores.source_of(module)
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("broken: int = ''")
    monkeypatch.setattr(cores, "ROOT", sources)
    with pytest.raises(build_cores.BuildError, match=r"\.py:1: error: Incompatible types"):
        build_cores.build(tmp_path / "target")
    assert not (tmp_path / "target").exists()
