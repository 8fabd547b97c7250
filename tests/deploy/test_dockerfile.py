"""The image: by the linter of Dockerfiles, and by what it copies, installs and runs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"


def instructions(name: str) -> list[str]:
    joined = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    return [line.partition(" ")[2] for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_is_built_with_a_python_and_extras_that_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = set(re.findall(r"python(3\.\d+)", DOCKERFILE.read_text()))
    assert version in ("3.11", "3.12")
    assert project["requires-python"] == ">=3.11,<3.13"
    for extras in re.findall(r"EXTRAS=(\S+)", DOCKERFILE.read_text()):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_what_a_build_needs_is_not_left_out() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py", "constraints.txt", "deploy"):
        assert (ROOT / needed).exists()
        assert not any(fnmatch(needed, pattern) for pattern in ignored)


def test_nobody_in_it_is_root_and_signals_arrive() -> None:
    assert instructions("USER")[-1] != "root"
    assert instructions("ENTRYPOINT") == ['["tini", "--", "prelay"]']
