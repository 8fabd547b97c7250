"""The house keeps its shape: imports go downwards, the router is free of torch, our names are ours."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A package may import from floors below its own, and from itself.
FLOORS = {
    "prelay": 0,
    "engine": 1,
    "transfer": 2,
    "prefill_worker": 3,
    "decode_worker": 3,
    "router": 3,
    "cluster": 4,
    "bench": 5,
}
PACKAGES = [name for name in FLOORS if (ROOT / name / "__init__.py").exists()]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the package"
            yield node.lineno, node.module or ""


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_the_packages_are_found():
    assert {"engine", "transfer", "prefill_worker", "decode_worker", "router", "cluster"} <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_only_downwards(package: str):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules_of(package)
        for line, module in imported_modules(path)
        if (top := module.split(".")[0]) in FLOORS and top != package and FLOORS[top] >= FLOORS[package]
    ]
    assert not wrong


def test_router_takes_only_the_torch_free_part_of_the_engine():
    allowed = {
        "engine.config",
        "engine.errors",
        "engine.latency",
        "engine.link_secret",
        "engine.prefix_digests",
        "engine.reservation",
        "engine.sequence",
        "engine.tls",
        "engine.tokenizer",
        "engine.urgency",
    }
    used = {module for path in modules_of("router") for _, module in imported_modules(path)}
    assert {module for module in used if module.startswith("engine")} <= allowed
    assert not {module for module in used if module.split(".")[0] in {"torch", "ray", "transfer"}}


def test_importing_the_router_loads_neither_torch_nor_ray():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules_of("router")]
    modules = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    script = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
    script += "print(sorted({'torch', 'ray'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nothing_is_timed_by_a_clock_that_people_set():
    """The wall clock says when an answer or a model was made, how long a certificate is valid, and what a
    first epoch is; the next ones are greater, whatever it says by then."""
    wall = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        if package != "bench"
        for path in modules_of(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ".".join(ast.unparse(node).split(".")[-2:]) in wall
    }
    assert found == {
        "cluster/certificates.py",
        "cluster/worker_life.py",
        "router/app.py",
        "router/http_generate.py",
    }


def test_proto_is_a_source_root_and_not_a_package():
    assert not list((ROOT / "proto").glob("__init__.py")), "the name `proto` belongs to proto-plus"


def test_no_installed_distribution_owns_a_name_of_ours():
    owners = packages_distributions()
    ours = {name: sorted(set(owners.get(name, [])) - {"prelay"}) for name in [*PACKAGES, "prelay"]}
    assert not {name: others for name, others in ours.items() if others}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_knows(package: str):
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
    assert docstring, f"{package}/__init__.py needs a docstring: what it knows, does not know, where to start"
