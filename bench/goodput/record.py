"""The file in which everything measured is kept, a line of JSON each, written as soon as it is there.

It begins with what the experiment was. A run goes on from such a file: what is in it is not measured again.
A last line that was cut off is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.goodput.experiment import Experiment, MeasurePart
from bench.goodput.points import Point
from cluster.workload.errors import BadInputError

_VERSION = 2
"""1 had as many requests at a point as chance gave it."""


class Record:
    """Made by `open`. Reads everything at the beginning, and only adds afterwards."""

    def __init__(self, path: Path, lines: list[dict[str, Any]]) -> None:
        self.path = path
        self._other = [line for line in lines if line["kind"] not in ("point", "experiment")]
        try:
            self.points = [Point.from_json(line) for line in lines if line["kind"] == "point"]
        except (KeyError, TypeError, ValueError) as error:
            raise BadInputError(f"--resume {path}: a point in it cannot be read ({error!r})") from error

    @classmethod
    def open(
        cls, path: Path, experiment: Experiment, about: Mapping[str, Any], simulated: str | None = None
    ) -> Record:
        """Begins the file if it is not there. about: machine and versions. simulated: what names the profile,
        if nothing is measured. Raises BadInputError if it is of something else."""
        head = {
            "kind": "experiment",
            "version": _VERSION,
            "experiment": experiment.model_dump(mode="json"),
            "about": about,
            "simulated": simulated,
        }
        if not path.exists() or not path.read_text().strip():
            path.write_text(json.dumps(head) + "\n")
            return cls(path, [])
        lines = list(_lines(path))
        if not lines or lines[0].get("kind") != "experiment" or lines[0].get("version") != _VERSION:
            raise BadInputError(
                f"--resume {path}: it is not a file that this version of `prelay bench goodput` has written"
            )
        if lines[0].get("simulated") != simulated:
            raise BadInputError(
                f"--resume {path}: what is in it was measured where this is simulated, or the reverse, or "
                "with another profile; give another file"
            )
        _check_same(path, lines[0]["experiment"], experiment)
        return cls(path, lines)

    def add_point(self, point: Point) -> None:
        line = point.to_json()
        # As it is read back from the file: what comes out must not depend on when it was measured.
        self.points.append(Point.from_json(line))
        self._append(line)

    def others(self, kind: str) -> list[dict[str, Any]]:
        """Lines of one kind that are no points."""
        return [line for line in self._other if line["kind"] == kind]

    def add(self, kind: str, fields: Mapping[str, Any]) -> None:
        line = {"kind": kind, **fields}
        self._other.append(line)
        self._append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text()
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            if not isinstance(found, dict) or "kind" not in found:
                raise ValueError("not a record")
        except ValueError as error:
            if number == len(lines) and number > 1:
                path.write_text("".join(f"{whole}\n" for whole in lines[:-1]))
                return
            raise BadInputError(f"--resume {path}, line {number}: {error}") from error
        yield found
    if not text.endswith("\n"):
        path.write_text(text + "\n")


def _measured_with(before: dict[str, Any], name: str) -> object:
    """Of the part measure; what files of before this key was there were measured with is its default."""
    return before["measure"].get(name, MeasurePart.model_fields[name].default)


def _check_same(path: Path, before: dict[str, Any], experiment: Experiment) -> None:
    """Workloads and deployments may come and go, but those that stay must be as they were."""
    now = experiment.model_dump(mode="json")
    differ = [name for name in ("model", "common") if before[name] != now[name]]
    for name in ("workloads", "deployments"):
        both = before[name].keys() & now[name].keys()
        differ += [f"{name}.{one}" for one in sorted(both) if before[name][one] != now[name][one]]
    differ += [
        f"measure.{name}"
        for name, value in now["measure"].items()
        if name not in ("rounds", "max_points", "search_99") and _measured_with(before, name) != value
    ]
    if differ:
        raise BadInputError(
            f"--resume {path}: it was measured with another {', '.join(differ)}; give another file, or make "
            "the experiment what it was"
        )
