"""Requests in the order of a key."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
Key = tuple[float, ...]


class Line(Generic[_Item]):
    """Keys are unique. Every change moves what stands behind, which for some thousands costs a microsecond
    or two."""

    def __init__(self, entries: Iterable[tuple[Key, float, _Item]] = ()) -> None:
        """entries: (key, work in seconds, item), in any order."""
        ordered = sorted(entries, key=lambda entry: entry[0])
        self._keys = [key for key, _, _ in ordered]
        self._work_s = [work_s for _, work_s, _ in ordered]
        self._items = [item for _, _, item in ordered]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[_Item]:
        return iter(self._items)

    def add(self, key: Key, work_s: float, item: _Item) -> None:
        index = bisect_left(self._keys, key)
        self._keys.insert(index, key)
        self._work_s.insert(index, work_s)
        self._items.insert(index, item)

    def remove(self, key: Key) -> None:
        """Raises KeyError."""
        index = bisect_left(self._keys, key)
        if index == len(self._keys) or self._keys[index] != key:
            raise KeyError(key)
        del self._keys[index], self._work_s[index], self._items[index]

    def before(self, key: Key) -> list[_Item]:
        """What stands before the key."""
        return self._items[: bisect_left(self._keys, key)]

    def count_before(self, key: Key) -> int:
        """How many stand before the key."""
        return bisect_left(self._keys, key)

    def work_before_s(self, key: Key) -> float:
        """Work of all that stands before the key."""
        return sum(self._work_s[: bisect_left(self._keys, key)])

    @property
    def work_s(self) -> float:
        """Work of all."""
        return sum(self._work_s)
