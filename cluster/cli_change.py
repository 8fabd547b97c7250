"""`prelay role`, `drain`, `scale`, `apply` and `upgrade`: commands that change a running deployment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cluster.cli_options import admin_option, not_nan, tls_option

if TYPE_CHECKING:
    from prelay.v1 import worker_pb2

    from engine.tls import Identity

F = TypeVar("F", bound=Callable[..., Any])

_EXIT_CODES = """
\b
Exit codes:
  0  done
  1  no router answers, or the change failed on the way; what was done until then stays
  2  the command line is wrong, or the change would leave requests that nobody could serve
"""

_MOST = 10_000
_ROLES = click.Choice(["prefill", "decode", "mixed"])


def _change_options(command: F) -> F:
    decorators = (
        admin_option,
        tls_option,
        click.option(
            "--drain",
            "drain_s",
            type=click.FloatRange(0.0, 3600.0),
            callback=not_nan,
            default=30.0,
            show_default=True,
            metavar="SECONDS",
            help="How long a worker may take to end what it has; what is left goes on at other workers.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print each line as a JSON object."),
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@click.command(epilog=_EXIT_CODES)
@click.argument("worker")
@click.argument("role", type=_ROLES)
@_change_options
def role(worker: str, role: str, admin: str, tls: Identity | None, drain_s: float, as_json: bool) -> int:
    """Give WORKER another ROLE (prefill, decode or mixed) while requests are served.

    It gets nothing new, ends what it has, and serves its new role on the weights that it has loaded, some
    seconds later and under a new epoch. Between decode and mixed it changes at once, in the middle of what it
    does. A change after which, or during which, nobody could read prompts or write answers is refused.

    \b
    Examples:
      prelay role decode-0 mixed
      prelay role prefill-1 decode --drain 10
    """
    from cluster.control_client import ControlClient

    _print(ControlClient(admin, tls).set_role(worker, _roles()[role], drain_s), as_json)
    return 0


@click.command(epilog=_EXIT_CODES)
@click.argument("worker")
@click.option("--undo", is_flag=True, help="Give it new requests again.")
@_change_options
def drain(worker: str, undo: bool, admin: str, tls: Identity | None, drain_s: float, as_json: bool) -> int:
    """Let WORKER end what it has, and give it nothing new, until that is undone.

    With what it still has after --drain seconds it goes on; the command ends then.

    \b
    Examples:
      prelay drain decode-1
      prelay drain decode-1 --undo
    """
    from cluster.control_client import ControlClient

    _print(ControlClient(admin, tls).drain(worker, drain_s, undo=undo), as_json)
    return 0


def _pool(text: str) -> tuple[str, int]:
    name, equals, count = text.partition("=")
    if not equals or name not in _ROLES.choices or not (count.isascii() and count.isdigit()):
        raise click.UsageError(f"{text!r} is not ROLE=N, as in decode=2 (roles: {', '.join(_ROLES.choices)})")
    if int(count) > _MOST:
        raise click.UsageError(f"{text}: {_MOST} workers of a role are the most")
    return name, int(count)


@click.command(epilog=_EXIT_CODES)
@click.argument("pools", nargs=-1, required=True, metavar="ROLE=N...")
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@_change_options
def scale(
    pools: tuple[str, ...], dry_run: bool, admin: str, tls: Identity | None, drain_s: float, as_json: bool
) -> int:
    """Set how many workers of a ROLE there are, while requests are served.

    Workers change their role rather than that others are started and stopped; those of roles that are not
    named stay. New workers are started first, and need free CPUs in the Ray cluster.

    \b
    Examples:
      prelay scale decode=2
      prelay scale prefill=1 mixed=1 decode=0
    """
    from cluster.control_client import ControlClient

    named: dict[str, int] = {}
    for text in pools:
        name, count = _pool(text)
        if name in named:
            raise click.UsageError(f"{name} is named twice")
        named[name] = count
    wanted = {_roles()[name]: count for name, count in named.items()}
    _print(ControlClient(admin, tls).set_pools(wanted, drain_s, dry_run=dry_run), as_json)
    return 0


@click.command(epilog=_EXIT_CODES)
@click.argument("plan", type=click.Path(path_type=Path), metavar="PLAN.yaml")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_change_options
def apply(plan: Path, yes: bool, admin: str, tls: Identity | None, drain_s: float, as_json: bool) -> int:
    """Bring a running deployment to the pools of PLAN.yaml, as `prelay plan --out` writes it.

    Shows the steps first, and asks. Only how many workers there are of each role is changed. How a worker is
    split over ranks, its limits and everything else need a restart, and are not looked at.

    \b
    Examples:
      prelay apply plan.yaml
      prelay apply plan.yaml --yes --drain 60
    """
    from cluster.config_file import load_config
    from cluster.control_client import ControlClient

    config = load_config(plan, [])
    wanted = {_roles()[name]: pool.replicas for name, pool in config.pools.items()}
    client = ControlClient(admin, tls)
    steps = list(client.set_pools(wanted, drain_s, dry_run=True))
    _print(steps, as_json)
    if steps == ["nothing to change"]:
        return 0
    if not yes and not _is_wanted():
        click.echo("nothing was changed", err=True)
        return 1
    _print(client.set_pools(wanted, drain_s, dry_run=False), as_json)
    return 0


@click.command(epilog=_EXIT_CODES)
@click.argument("workers", nargs=-1, metavar="[WORKER...]")
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@_change_options
def upgrade(
    workers: tuple[str, ...], dry_run: bool, admin: str, tls: Identity | None, drain_s: float, as_json: bool
) -> int:
    """Replace the processes of workers by new ones, one after the other, while requests are served.

    For a new version of prelay, after it was installed on the workers' hosts in place of the old one. Each
    worker is drained, ended, and started anew with what is installed by then; the next one follows when it
    serves. Without WORKER all are replaced. Where nobody could do without a worker, another one stands in, as
    a mixed worker. The router and `prelay serve` itself stay what they are until they are started again.

    \b
    Examples:
      prelay upgrade --dry-run
      prelay upgrade decode-0 decode-1 --drain 60
    """
    from cluster.control_client import ControlClient

    _print(ControlClient(admin, tls).renew(workers, drain_s, dry_run=dry_run), as_json)
    return 0


def _is_wanted() -> bool:
    try:
        return click.confirm("Do this?", err=True)
    except click.Abort:  # nobody is there to answer
        return False


def _roles() -> Mapping[str, worker_pb2.Role]:
    from cluster.roles import ROLE_NAMES

    return {name: role for role, name in ROLE_NAMES.items()}


def _print(lines: Iterable[str], as_json: bool) -> None:
    try:
        for line in lines:
            click.echo(json.dumps({"line": line}) if as_json else line)
    except KeyboardInterrupt:
        click.echo("broken off; what was done until then stays", err=True)
        sys.exit(130)


COMMANDS = (role, drain, scale, apply, upgrade)
