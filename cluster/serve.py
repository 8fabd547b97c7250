"""`prelay serve`, in the process that runs the deployment: start, say what listens where, watch, stop."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table

from cluster.detached import start_detached
from cluster.launch import Deployment, Ready
from cluster.orders import Order
from cluster.reporter import reporter_for
from cluster.roles import ROLE_NAMES
from cluster.router_config import listening
from cluster.worker_life import LiveWorker


async def serve(order: Order, run_directory: Path) -> None:
    """Runs until it is cancelled, which is how it is stopped; a detached deployment only until it serves.
    Raises ClusterError if the deployment fails."""
    console = Console(stderr=True)
    reporter = reporter_for(console)
    if order.config.ray.detached is not None:
        try:
            ready = await start_detached(order, run_directory, reporter)
        finally:
            reporter.close()
        _show(ready, order)
        return
    log_level = "INFO" if order.debug else "WARNING"
    deployment = Deployment(order.config, run_directory, reporter, reporter.event, log_level)
    try:
        ready = await deployment.start()
        reporter.close()
        _show(ready, order)
        await deployment.run()
    finally:
        reporter.close()
        reporter.event("stopping")
        await deployment.stop()


def _show(ready: Ready, order: Order) -> None:
    if order.as_json:
        print(json.dumps(ready_json(ready)), flush=True)
    else:
        # A pipe has no width to respect.
        Console(width=None if sys.stdout.isatty() else 120).print(ready_panel(ready))


def ready_json(ready: Ready) -> dict[str, Any]:
    """What a program needs to use and to watch the deployment."""
    return {
        "event": "ready",
        "model": ready.config.model.name,
        "max_model_len": ready.config.model.max_model_len,
        "policy": ready.config.router.policy,
        **({} if ready.addresses is None else asdict(ready.addresses)),
        "external_routers": ready.config.router.external,
        "router_actors": [asdict(addresses) for addresses in ready.router_actors],
        "router_pid": ready.router_pid,
        "ray": ready.config.ray.address or "local",
        "detached": ready.config.ray.detached,
        "workers": [_worker_json(worker) for worker in ready.workers],
        "startup_s": round(ready.startup_s, 3),
    }


def _worker_json(worker: LiveWorker) -> dict[str, Any]:
    info = worker.info
    return {
        "worker_id": info.worker_id,
        "role": ROLE_NAMES[info.role],
        "epoch": info.epoch,
        "pid": info.pid,
        "cores": list(worker.report.cores),
        "address": info.address,
        "metrics": info.metrics_address,
        "kv_tokens": info.num_blocks * info.block_size,
        "kv_bytes": worker.report.kv_bytes,
    }


def ready_panel(ready: Ready) -> Panel:
    """The same for a person."""
    listeners = Table.grid(padding=(0, 2))
    for name, url, note in listening(ready.config, ready.addresses, ready.router_actors):
        listeners.add_row(f"[bold]{name}[/]", f"[cyan]{url}[/]", f"[dim]{note}[/]")
    workers = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    for column in ("worker", "core", "pid", "KV tokens", "address", "metrics"):
        workers.add_column(column, justify="right" if column == "KV tokens" else "left", no_wrap=True)
    for worker in ready.workers:
        info = worker.info
        workers.add_row(
            f"[bold]{info.worker_id}[/]",
            ",".join(map(str, worker.report.cores)),
            str(info.pid),
            f"{info.num_blocks * info.block_size:,}",
            info.address,
            info.metrics_address,
        )
    ray = ready.config.ray
    end = (
        "Ctrl-C stops everything."
        if ray.detached is None
        else f"It goes on by itself; prelay stop {ray.detached} --ray-address {ray.address} ends it."
    )
    body = Group(listeners, "", workers, "", f"[dim]{end}[/]")
    title = (
        f"prelay serves [bold]{ready.config.model.name}[/], policy [bold]{ready.config.router.policy}[/], "
        f"ready in {ready.startup_s:.1f} s"
    )
    return Panel(body, title=title, title_align="left", expand=False)
