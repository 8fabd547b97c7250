"""The rows of a simulation's requests in a hundred bytes each, so that there may be millions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from cluster.workload.drawing import Arrival
from cluster.workload.jobs import Row, Status
from router.requests import Stage

_STAGES = tuple(stage.value for stage in Stage)
_STATUSES = tuple(Status)
_OPEN = -1
_FIRST, _LAST, _HAS_STAGES = range(3)


class RowTable(Sequence[Row]):
    """A row for each arrival, in their order. A request of which nothing was put has been timed out. What is
    sliced is a view."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self._arrivals = arrivals
        self._numbers = range(len(arrivals))
        self._status = np.full(len(arrivals), _OPEN, dtype=np.int8)
        self._output_tokens = np.zeros(len(arrivals), dtype=np.int32)
        self._times = np.full((len(arrivals), 3 + len(_STAGES)), np.nan)
        self._errors: dict[int, str] = {}

    def put(self, number: int, row: Row) -> None:
        """Of a request that has ended."""
        self._status[number] = _STATUSES.index(row.status)
        self._output_tokens[number] = row.output_tokens
        times = self._times[number]
        if row.first_s is not None:
            times[_FIRST] = row.first_s
        if row.last_s is not None:
            times[_LAST] = row.last_s
        if row.stages:
            times[_HAS_STAGES] = 1.0
            times[3:] = [row.stages.get(stage, 0.0) for stage in _STAGES]
        if row.error:
            self._errors[number] = row.error

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> RowTable: ...
    def __getitem__(self, index: int | slice) -> Row | RowTable:
        if isinstance(index, int):
            return self._row(self._numbers[index])
        part = RowTable.__new__(RowTable)
        part.__dict__ |= self.__dict__ | {"_numbers": self._numbers[index]}
        return part

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(one == another for one, another in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _row(self, number: int) -> Row:
        arrival = self._arrivals[number]
        at, prompt_tokens = arrival.arrival_s, arrival.shape.prompt_tokens
        status = int(self._status[number])
        if status == _OPEN:
            error = "the simulation was ended before it"
            return Row(at, at, prompt_tokens, 0, Status.TIMED_OUT, error=error)
        times: list[float] = self._times[number].tolist()
        return Row(
            at,
            at,
            prompt_tokens,
            int(self._output_tokens[number]),
            _STATUSES[status],
            _known(times[_FIRST]),
            _known(times[_LAST]),
            stages=dict(zip(_STAGES, times[3:], strict=True)) if times[_HAS_STAGES] == 1.0 else {},
            error=self._errors.get(number, ""),
        )


def _known(seconds: float) -> float | None:
    return None if seconds != seconds else seconds
