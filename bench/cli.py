"""The commands `prelay bench ...` and `prelay profile`."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from bench.cli_accuracy import accuracy
from bench.cli_change import change
from bench.cli_controller import controller
from bench.cli_engine import engine, profile, transfer
from bench.cli_goodput import goodput
from bench.cli_plan import plan
from bench.cli_router import router
from bench.cli_serve import serve
from bench.cli_simulate import simulate
from bench.cli_simulator import simulator
from bench.cli_streams import streams
from bench.errors import MeasurementError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, no_args_is_help=True
)
def bench() -> None:
    """Measure prelay, beside what it is to be compared with, in one run.

    Pin nothing and run nothing beside it: the commands choose their cores themselves.
    """


for _command in (
    engine, transfer, serve, goodput, router, simulator, accuracy, change, controller, streams,
):  # fmt: skip
    bench.add_command(_command)


_OWN: dict[str, click.Command] = {"profile": profile, "simulate": simulate, "plan": plan}
"""Commands beside `prelay bench`, not below it."""


def main() -> None:
    """`python -m bench profile ...` is `prelay profile`; what is not in _OWN is `prelay bench`."""
    from engine.errors import EngineError

    arguments = sys.argv[1:]
    try:
        command = _OWN.get(arguments[0]) if arguments else None
        if command is not None:
            name = f"prelay {arguments[0]}"
            code = command.main(arguments[1:], prog_name=name, standalone_mode=False)
        else:
            code = bench.main(arguments, prog_name="prelay bench", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        hint = (
            f"; see `{error.ctx.command_path} --help`"
            if isinstance(error, click.UsageError) and error.ctx
            else ""
        )
        _fail(f"{error.format_message().rstrip('.')}{hint}", error.exit_code)
    except EngineError as error:
        _fail(str(error), 4)
    except MeasurementError as error:
        _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted, nothing was written", 130)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"prelay: error: {message}", err=True)
    sys.exit(code)
