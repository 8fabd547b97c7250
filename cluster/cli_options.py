"""Options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from engine.tls import Identity


def _checked_address(context: click.Context, parameter: click.Parameter, value: str) -> str:
    from cluster.sections import parse_host_port

    try:
        parse_host_port(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error
    return value


def not_nan(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Callback of an option that is a number."""
    if value is not None and math.isnan(value):  # which no range keeps out
        raise click.BadParameter("nan is not a number", context, parameter)
    return value


admin_option = click.option(
    "--admin",
    default="127.0.0.1:9091",
    show_default=True,
    metavar="HOST:PORT",
    callback=_checked_address,
    help="The router's admin port.",
)


def _identity(context: click.Context, parameter: click.Parameter, value: Path | None) -> Identity | None:
    from engine.errors import TlsError
    from engine.tls import Identity

    try:
        return None if value is None else Identity(value)
    except TlsError as error:
        raise click.BadParameter(str(error), context, parameter) from error


tls_option = click.option(
    "--tls",
    type=click.Path(path_type=Path),
    callback=_identity,
    metavar="DIR",
    help="Certificates, if the admin port has TLS (tls.internal).",
)
