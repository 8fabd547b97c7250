"""Constructors that dataclasses get in the copy of the sources that is compiled."""

from __future__ import annotations

from typing import Any

import pytest

from engine import cores
from engine.native.constructors import with_constructors

SOURCE = '''from __future__ import annotations

from dataclasses import dataclass, field

LEAST = 2


@dataclass(slots=True)
class Point:
    """A place."""

    x: int
    """From the left."""
    y: int = LEAST

    @property
    def both(self) -> int:
        return self.x + self.y


@dataclass
class Checked:
    x: int

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError("negative")


@dataclass
class Own:
    x: int

    def __init__(self) -> None:
        self.x = 7


@dataclass(kw_only=True)
class Named:
    x: int


@dataclass
class Listed:
    x: list[int] = field(default_factory=list)


@dataclass
class Child(Point):
    z: int = 3


class Plain:
    x: int


@dataclass(eq=False)
class Last:
    x: str'''


def names_of(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, "sample", "exec"), names)
    return names


def test_they_make_what_dataclasses_make():
    written = with_constructors(SOURCE)
    before, after = names_of(SOURCE), names_of(written)
    for names in (before, after):
        assert repr(names["Point"](1)) == "Point(x=1, y=2)"
        assert names["Point"](y=5, x=4) == names["Point"](4, 5)
        assert names["Last"]("a").x == "a"
        with pytest.raises(ValueError, match="negative"):
            names["Checked"](-1)
        with pytest.raises(TypeError):
            names["Point"]()
    added = [line for line in written.splitlines() if "def __init__" in line and "type: ignore" in line]
    assert len(added) == 3, "of Point, Checked and Last: the others are not plain"


def test_no_line_moves():
    before, after = SOURCE.splitlines(), with_constructors(SOURCE).splitlines()
    assert all(old in (new, "") for old, new in zip(before, after, strict=False))
    assert len(after) == len(before) + 1, "the last class ends with its field"


def test_every_core_is_still_a_module():
    changed = 0
    for module in cores.MODULES:
        source = (cores.ROOT / cores.source_of(module)).read_text()
        written = with_constructors(source)
        compile(written, module, "exec")
        changed += written != source
    assert changed > len(cores.MODULES) / 4
