"""What `prelay status` and `prelay top` show to a person, drawn with rich."""

from __future__ import annotations

from collections.abc import Mapping

from prelay.v1 import admin_pb2
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.roles import ROLE_NAMES
from cluster.status import attainment, in_order, state_of
from cluster.status_window import Recent

_STATE_STYLES = {"up": "green", "suspected": "yellow", "draining": "cyan", "down": "bold red"}
_MISSES = ("ttft_miss", "tpot_miss", "both_miss", "rejected", "error", "cancelled")
_BAR_CELLS = 4


def status_view(status: admin_pb2.GetStatusResponse, recent: Recent | None, address: str) -> RenderableType:
    """All of it; recent: None where only one status is known."""
    models = sorted({worker.info.model for worker in status.workers})
    title = (
        f"prelay [bold]{', '.join(models) or 'without workers'}[/]  policy [bold]{status.policy or '?'}[/]  "
        f"up {_duration(status.uptime_s)}"
    )
    return Panel(
        Group(_requests(status, recent), "", _classes(status, recent), "", _pools(status), _workers(status)),
        title=title,
        title_align="left",
        subtitle=f"[dim]{escape(address)}[/]",
        subtitle_align="right",
    )


def waiting_view(problem: str, retry_s: float) -> RenderableType:
    """Instead of a status, while there is no router."""
    body = f"{escape(problem)}\n\n[dim]Trying again every {retry_s:g} s; Ctrl-C ends this.[/]"
    return Panel(body, title="[bold red]no router[/]", title_align="left")


def _requests(status: admin_pb2.GetStatusResponse, recent: Recent | None) -> Table:
    grid = Table.grid(padding=(0, 2))
    now = f"[bold]{status.live_requests}[/] live, of which [bold]{status.gated_requests}[/] wait at the gate"
    grid.add_row("[dim]requests[/]", now)
    since = ", ".join(f"{count:,} {outcome}" for outcome, count in _sorted_outcomes(status.outcomes))
    grid.add_row("[dim]since the start[/]", f"{since or 'none has ended'}; {status.tokens:,} tokens")
    if recent is not None:
        rates = (
            f"[bold]{recent.count('good') / recent.span_s:.2f} good/s[/] of "
            f"{recent.count() / recent.span_s:.2f} ended/s, {recent.tokens / recent.span_s:,.1f} tokens/s"
        )
        grid.add_row(f"[dim]last {recent.span_s:.0f} s[/]", rates)
    for name, quantiles in (("TTFT", status.ttft), ("TPOT", status.tpot)):
        if quantiles.p99_s:
            times = (
                f"p50 {_time(quantiles.p50_s)}  p90 {_time(quantiles.p90_s)}  p99 {_time(quantiles.p99_s)}"
                "  [dim]of the last 1,024[/]"
            )
            grid.add_row(f"[dim]{name}[/]", times)
    return grid


def _classes(status: admin_pb2.GetStatusResponse, recent: Recent | None) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("SLO class")
    for column in ("TTFT ≤", "TPOT ≤", "ended", "attained"):
        table.add_column(column, justify="right", no_wrap=True)
    if recent is not None:
        table.add_column(f"last {recent.span_s:.0f} s", justify="right", no_wrap=True)
    table.add_column("not good" if recent is None else "not good of these")
    for name, one in sorted(status.classes.items()):
        lately = one.outcomes if recent is None else recent.outcomes.get(name, {})
        table.add_row(
            f"[bold]{name}[/]",
            _time(one.ttft_limit_s),
            _time(one.tpot_limit_s),
            f"{sum(one.outcomes.values()):,}",
            _share(attainment(one.outcomes)),
            *([] if recent is None else [_share(attainment(lately))]),
            ", ".join(f"{lately[miss]:,} {miss}" for miss in _MISSES if lately.get(miss)) or "[dim]-[/]",
        )
    return table


def _pools(status: admin_pb2.GetStatusResponse) -> str:
    pools = []
    for role, name in ROLE_NAMES.items():
        states = [state_of(worker) for worker in status.workers if worker.info.role == role]
        told = [
            f"[{style}]{states.count(state)} {state}[/]"
            for state, style in _STATE_STYLES.items()
            if state in states
        ]
        if told:
            pools.append(f"[bold]{name}[/] {', '.join(told)}")
    return "   ".join(pools) or "[dim]no workers[/]"


def _workers(status: admin_pb2.GetStatusResponse) -> Table:
    """requests: of this router. queue, tokens: prompts that wait there, and what is not computed of them.
    seqs, context: that decode, and their tokens. ms: of the last step. KV: blocks in use. cache: blocks that
    are kept until somebody needs them. Fits into 80 columns."""
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("worker", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column in ("reqs", "queue", "tokens", "seqs", "context", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("KV", no_wrap=True)
    table.add_column("cache", justify="right", no_wrap=True)
    for worker in in_order(status.workers):
        table.add_row(*_worker_row(worker))
    return table


def _worker_row(worker: admin_pb2.WorkerStatus) -> list[RenderableType]:
    info, load, state = worker.info, worker.load, state_of(worker)
    style = _STATE_STYLES[state]
    name: list[RenderableType] = [f"[bold]{info.worker_id}[/]", f"[{style}]{state}[/]"]
    if state == "down":
        return name
    used = load.owned_blocks + load.leased_blocks
    step = f"{load.steps[-1].seconds * 1000:.1f}" if load.steps else "[dim]-[/]"
    return [
        *name,
        _count(worker.live_requests),
        _count(load.queue_requests),
        _count(load.queue_tokens),
        _count(load.decoding_requests),
        _count(load.decode_context),
        step,
        _bar(used / info.num_blocks if info.num_blocks else 0.0),
        f"{load.cached_blocks / info.num_blocks:.0%}" if info.num_blocks else "",
    ]


def _bar(share: float) -> Text:
    filled = min(_BAR_CELLS, -int(-share * _BAR_CELLS // 1))  # something is seen of the smallest share
    style = "red" if share > 0.9 else "yellow" if share > 0.7 else "green"
    return Text.assemble(("━" * filled, style), ("━" * (_BAR_CELLS - filled), "dim"), f" {share:4.0%}")


def _share(value: float | None) -> str:
    if value is None:
        return "[dim]-[/]"
    style = "green" if value >= 0.9 else "yellow" if value >= 0.7 else "red"
    return f"[{style}]{value:.1%}[/]"


def _count(value: int) -> str:
    return f"{value:,}" if value else "[dim]0[/]"


def _sorted_outcomes(outcomes: Mapping[str, int]) -> list[tuple[str, int]]:
    order = ("good", *_MISSES)
    return sorted(
        ((name, count) for name, count in outcomes.items() if count),
        key=lambda item: order.index(item[0]) if item[0] in order else len(order),
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
