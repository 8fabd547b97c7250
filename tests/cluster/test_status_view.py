"""What people see of a router's status, and what of it is recent."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prelay.v1 import admin_pb2
from rich.console import Console, RenderableType

from cluster.errors import NoRouterError
from cluster.status_view import status_view, waiting_view
from cluster.status_window import Recent, StatusWindow
from cluster.top import watch
from tests.cluster.status_samples import busy_status


def drawn(view: RenderableType) -> list[str]:
    console = Console(file=io.StringIO(), width=140, record=True)
    console.print(view)
    return console.export_text().splitlines()


def line_of(lines: list[str], *words: str) -> str:
    (line,) = [line for line in lines if all(word in line for word in words)]
    return line


def counted(uptime_s: float, good: int, missed: int = 0, tokens: int = 0) -> admin_pb2.GetStatusResponse:
    outcomes = {"good": good, "ttft_miss": missed} if missed else {"good": good}
    return admin_pb2.GetStatusResponse(
        uptime_s=uptime_s, tokens=tokens, classes={"standard": admin_pb2.ClassOutcomes(outcomes=outcomes)}
    )


def test_everything_is_on_it() -> None:
    lines = drawn(status_view(busy_status(), None, "127.0.0.1:9091"))
    assert "policy goodput  up 1:02:05" in lines[0]
    assert "127.0.0.1:9091" in lines[-1]
    assert "11 live, of which 5 wait at the gate" in line_of(lines, "requests", "gate")
    assert "6 good, 1 ttft_miss, 1 rejected, 2 cancelled; 4,321 tokens" in line_of(lines, "since the start")
    assert "p50 200 ms  p90 500 ms  p99 1.75 s" in line_of(lines, "TTFT", "p50")
    assert not [line for line in lines if "TPOT" in line and "p50" in line]
    assert line_of(lines, "standard").split()[2:9] == ["2.00", "s", "200", "ms", "10", "75.0%", "1"]
    assert line_of(lines, "batch").split()[6:9] == ["0", "-", "-"]
    assert "prefill 1 up, 1 down   decode 1 up, 1 suspected   mixed 1 up" in line_of(lines, "mixed 1")
    row = line_of(lines, "decode-10").split()
    assert row[2:8] == ["up", "3", "0", "0", "2", "1,234"]
    assert "17.1" in line_of(lines, "decode-10")
    assert "53%" in line_of(lines, "decode-10")
    assert line_of(lines, "prefill-0").split()[3:6] == ["3", "4", "2,048"]
    assert line_of(lines, "prefill-1").split()[1:4] == ["prefill-1", "down", "│"]


def test_nothing_is_cut_off_on_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(status_view(busy_status(), Recent(20.0, 1000, {}), "127.0.0.1:9091"))
    assert "…" not in console.export_text()


def test_a_router_without_workers_and_requests_is_shown_as_that() -> None:
    lines = drawn(status_view(admin_pb2.GetStatusResponse(), None, "x"))
    assert "without workers" in lines[0]
    assert "none has ended" in line_of(lines, "since the start")


def test_what_is_recent_stands_beside_what_was_ever() -> None:
    recent = Recent(20.0, 1000, {"standard": {"good": 30, "tpot_miss": 10}})
    lines = drawn(status_view(busy_status(), recent, "x"))
    assert "1.50 good/s of 2.00 ended/s, 50.0 tokens/s" in line_of(lines, "last 20 s", "good/s")
    assert "75.0%      75.0%  10 tpot_miss" in line_of(lines, "standard")


def test_a_window_counts_what_came_in_its_span() -> None:
    window = StatusWindow(10.0)
    assert window.add(0.0, counted(5, good=100, tokens=7)) is None
    recent = window.add(4.0, counted(9, good=110, missed=2, tokens=11))
    assert recent == Recent(4.0, 4, {"standard": {"good": 10, "ttft_miss": 2}})
    assert (recent.count(), recent.count("good"), recent.count("error")) == (12, 10, 0)
    recent = window.add(14.0, counted(19, good=111, missed=2, tokens=11))
    assert recent == Recent(10.0, 0, {"standard": {"good": 1, "ttft_miss": 0}})


def test_a_router_that_was_started_again_begins_a_new_window() -> None:
    window = StatusWindow(10.0)
    window.add(0.0, counted(500, good=100))
    assert window.add(1.0, counted(0.5, good=1)) is None
    assert window.add(2.0, counted(1.5, good=3)) == Recent(1.0, 0, {"standard": {"good": 2}})


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 40))
def test_a_window_is_as_long_as_it_should_be_once_there_is_enough(gaps: list[int], span_s: int) -> None:
    window = StatusWindow(span_s)
    times = list(itertools.accumulate(gaps, initial=0))
    for at, now in enumerate(times):
        recent = window.add(now, counted(now, good=at))
        if recent is None:
            assert at == 0
            continue
        assert recent.span_s >= span_s or recent.span_s == now
        assert recent.span_s < span_s + max(gaps)
        # One request came before each look but the first.
        assert recent.count("good") == sum(1 for then in times[: at + 1] if then > now - recent.span_s)


def test_top_goes_on_while_there_is_no_router() -> None:
    answers: Iterator[admin_pb2.GetStatusResponse | NoRouterError] = iter(
        [NoRouterError("no router at [::1]:9"), busy_status(), NoRouterError("gone"), busy_status()]
    )
    shown: list[RenderableType] = []
    slept: list[float] = []
    now = [0.0]

    class Client:
        def fetch(self) -> admin_pb2.GetStatusResponse:
            now[0] += 0.25
            answer = next(answers, None)
            if answer is None:
                raise KeyboardInterrupt
            if isinstance(answer, NoRouterError):
                raise answer
            return answer

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    with pytest.raises(KeyboardInterrupt):
        watch(Client(), "x", 2.0, shown.append, clock=lambda: now[0], sleep=sleep)
    texts = ["\n".join(drawn(view)) for view in shown]
    assert "no router at [::1]:9" in texts[0]
    assert "Trying again every 2 s" in texts[0]
    assert "policy goodput" in texts[1]
    assert "gone" in texts[2]
    assert "last 4 s         0.00 good/s of 0.00 ended/s" in texts[3]
    assert slept == [1.75] * 4


def test_waiting_says_how_to_end_it() -> None:
    assert "Ctrl-C" in "\n".join(drawn(waiting_view("nobody there", 1.0)))
