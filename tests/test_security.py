"""Rules of security that hold for the code as a whole; those of a part have their tests beside it
(docs/security.md names them)."""

from __future__ import annotations

import ast
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.config import ServeConfig
from cluster.sections import parse_host_port
from router.settings import RouterSettings

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "transfer", "prefill_worker", "decode_worker", "router", "cluster", "bench")

# Modules and functions that run what they read, or make objects of any class from it.
RUNNING = {
    "pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "runpy",
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.hub", "torch.package", "numpy.fromfile", "np.load", "numpy.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader", "yaml.FullLoader",
    "os.system", "os.popen", "subprocess.getoutput",
}  # fmt: skip
# Collectives that pickle what they send.
OBJECTS = {
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported, or called or looked up by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names):
                yield node.lineno, module or ""
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.Attribute():
                yield node.lineno, ast.unparse(node)
            case ast.Call(func=ast.Name(id=name)):
                yield node.lineno, name


def test_nothing_is_run_or_unpickled_that_was_read() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sources()
        for line, name in names_in(path)
        if name in RUNNING or name.split(".")[0] in RUNNING or name.rpartition(".")[2] in OBJECTS
    ]
    assert not found


def test_yaml_is_only_read_safely() -> None:
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("yaml.load", "yaml.load_all"):
                (loader,) = node.args[1:]
                bases = [
                    ast.unparse(base)
                    for one in ast.walk(ast.parse(path.read_text()))
                    if isinstance(one, ast.ClassDef) and one.name == ast.unparse(loader)
                    for base in one.bases
                ]
                if bases != ["yaml.SafeLoader"]:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_no_shell_reads_what_we_run() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords)
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["http", "grpc", "metrics", "admin"])
def test_everything_binds_to_loopback_unless_told_otherwise(name: str) -> None:
    for settings in (ServeConfig().router, RouterSettings(checkpoint="x", model_name="x")):
        host, _ = parse_host_port(getattr(settings, name))
        assert ipaddress.ip_address(host).is_loopback
    example = yaml.safe_load((ROOT / "deploy" / "prelay.example.yaml").read_text())
    assert example["router"][name].startswith("127.0.0.1:")
