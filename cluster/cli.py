"""The command `prelay`. Imports what a subcommand needs only when it is used, so that --help is quick."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from cluster.cli_change import COMMANDS as CHANGES
from cluster.cli_watch import COMMANDS as VIEWS
from engine import cores

if TYPE_CHECKING:
    from cluster.config import ServeConfig

F = TypeVar("F", bound=Callable[..., Any])

_EXIT_CODES = """
\b
Exit codes:
  0  done, or stopped on request
  1  something failed while starting or running
  2  the command line or the configuration is wrong
  3  an address is in use
  4  the model cannot be served
"""

_STOP_EXIT_CODES = """
\b
Exit codes:
  0  done
  1  the Ray cluster does not answer
  2  the command line is wrong, or there is no deployment of this name
"""

# Flags that set one key of the configuration each: flag, key, type, metavar, help.
_KEY_FLAGS: tuple[tuple[str, str, type, str, str], ...] = (
    ("--model", "model.path", str, "DIR", "Checkpoint in Hugging Face format (default: the demo model)."),
    ("--model-name", "model.name", str, "NAME", "What clients call it (default: the directory's name)."),
    ("--dtype", "model.dtype", str, "TYPE", "float32 (default) or bfloat16."),
    ("--max-model-len", "model.max_model_len", int, "N", "Longest prompt and answer together, in tokens."),
    ("--prefill", "prefill.replicas", int, "N", "Prefill workers (default 1)."),
    ("--decode", "decode.replicas", int, "N", "Decode workers (default 1)."),
    ("--mixed", "mixed.replicas", int, "N", "Workers that decode and can also prefill (default 0)."),
    ("--policy", "router.policy", str, "NAME", "How requests are admitted, ordered and placed."),
    ("--http", "router.http", str, "HOST:PORT", "OpenAI-compatible HTTP (default 127.0.0.1:8000)."),
    ("--grpc", "router.grpc", str, "HOST:PORT", "gRPC (default 127.0.0.1:8001)."),
    ("--metrics", "router.metrics", str, "HOST:PORT", "Prometheus metrics (default 127.0.0.1:9090)."),
    ("--admin", "router.admin", str, "HOST:PORT", "Operators' gRPC (default 127.0.0.1:9091)."),
    ("--slo-class", "slo.default", str, "NAME", "SLO class of requests that name none (default standard)."),
    (
        "--controller",
        "controller.mode",
        str,
        "MODE",
        "none (default), observe, or act: change roles by load.",
    ),
    ("--ray-address", "ray.address", str, "HOST:PORT", "Join this Ray cluster instead of starting one."),
    (
        "--detach",
        "ray.detached",
        str,
        "NAME",
        "Leave it in that cluster, until `prelay stop NAME`.",
    ),
)


def _config_options(command: F) -> F:
    """[CONFIG.yaml], a flag for the keys that are used most, and --set for every other."""
    decorators = [
        click.argument("config_file", metavar="[CONFIG.yaml]", required=False, type=Path),
        *(
            click.option(flag, type=kind, metavar=metavar, help=text)
            for flag, _, kind, metavar, text in _KEY_FLAGS
        ),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set any key of the configuration, as in --set decode.max_num_seqs=32. May be repeated.",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _debug_option(command: F) -> F:
    text = "Log more, and show tracebacks of errors."
    return click.option("--debug", is_flag=True, help=text)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(
    importlib.metadata.version("prelay"),
    prog_name="prelay",
    message=f"%(prog)s, version %(version)s; cores of simulations: {cores.state()}",
)
def cli() -> None:
    """Serve a language model on two pools: prefill workers read prompts, decode workers write answers.

    \b
    A first look:    prelay demo
    A server:        prelay serve --model DIR --prefill 1 --decode 1
    What it does:    prelay top
    Change it:       prelay role decode-0 mixed
    Its settings:    prelay config --show
    Its goodput:     prelay bench serve --url http://127.0.0.1:8000 --rate 1
    Other figures:   prelay bench --help
    """


@cli.command(epilog=_EXIT_CODES)
@_config_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output when ready.")
@_debug_option
def serve(config_file: Path | None, as_json: bool, debug: bool, **settings: Any) -> int:
    """Start the router and the workers, and serve until Ctrl-C or SIGTERM.

    The settings come from CONFIG.yaml, if given, and from flags, which override it; `prelay config --show`
    prints them. Without a model of your own, the demo model is served. Every worker is a process on cores
    of its own, placed by Ray: by one that is started for this server alone, or by the cluster at
    --ray-address.

    \b
    Examples:
      prelay serve
      prelay serve --model ~/models/SmolLM2-135M --dtype bfloat16 --http 0.0.0.0:8000
      prelay serve prelay.yaml --prefill 2 --set decode.max_num_seqs=32
      prelay serve --prefill 1 --decode 0 --mixed 1
    """
    config = _load(config_file, settings)
    return _run_guarded("serve", config, as_json, debug)


@cli.command(epilog=_STOP_EXIT_CODES)
@click.argument("name")
@click.option("--ray-address", metavar="HOST:PORT", required=True, help="The Ray cluster that it lives in.")
def stop(name: str, ray_address: str) -> int:
    """End a deployment that was started by `prelay serve --detach NAME`: its controller and its workers.

    Its routers go on without workers. A `prelay serve` in a terminal is ended by Ctrl-C instead.

    \b
    Examples:
      prelay stop chat --ray-address 10.0.0.2:6379
    """
    import asyncio

    from cluster.detached import stop_detached
    from cluster.sections import parse_host_port

    try:
        parse_host_port(ray_address)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--ray-address") from error
    ended = asyncio.run(stop_detached(name, ray_address))
    click.echo(f"deployment {name} has ended; it had {ended} worker{'' if ended == 1 else 's'}")
    return 0


@cli.command(epilog=_EXIT_CODES)
@_config_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output when ready.")
@_debug_option
def router(config_file: Path | None, as_json: bool, debug: bool, **settings: Any) -> int:
    """Run one router by itself, until Ctrl-C or SIGTERM: outside of Ray, for workers that `prelay serve`
    starts.

    Takes the same file and flags as `prelay serve`, of which it goes by the model (its tokenizer, no
    weights), the router, the SLO classes and TLS. It has no workers until a `prelay serve` names its admin
    port under router.external; several routers may be named there, and clients may ask any of them.

    \b
    Examples:
      prelay router prelay.yaml --http 0.0.0.0:8000 --admin 10.0.0.5:9091
      prelay serve prelay.yaml --set 'router.external=["10.0.0.5:9091", "10.0.0.6:9091"]'
    """
    import asyncio

    from cluster.standalone_router import run_router

    config = _load(config_file, settings)
    asyncio.run(run_router(config, as_json=as_json, log_level="INFO" if debug else "WARNING"))
    return 0


@cli.command(epilog=_EXIT_CODES)
@_config_options
@click.option("--show", is_flag=True, help="Print the effective configuration as YAML.")
@_debug_option
def config(config_file: Path | None, show: bool, **settings: Any) -> int:
    """Check a configuration, and show what it comes to.

    Takes the same file and flags as `prelay serve`, starts nothing, and looks at no model. What --show
    prints is a configuration file again.

    \b
    Examples:
      prelay config prelay.yaml
      prelay config --show --prefill 2 > prelay.yaml
    """
    from cluster.config_file import dump_config

    loaded = _load(config_file, settings)
    if show:
        click.echo(dump_config(loaded), nl=False)
    else:
        click.echo(f"{config_file or 'the default configuration'} is valid; --show prints what it comes to")
    return 0


@cli.command(epilog=_EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@_debug_option
def demo(as_json: bool, debug: bool) -> int:
    """Show the main job: answer 24 prompts on one prefill and one decode worker, and check every answer.

    Starts a server on free ports, sends stories and chats through gRPC and through the OpenAI-compatible
    HTTP front end, prints how each request was served, and compares each answer with the same prompt run in
    a single process without hand-off. Takes about a minute; fails (exit 1) if one answer differs.

    \b
    Examples:
      prelay demo
      prelay demo --json > demo.json
    """
    from cluster.demo.run import demo_config

    return _run_guarded("demo", demo_config(), as_json, debug)


@cli.command()
@click.argument("tenant")
def key(tenant: str) -> int:
    """Make an API key for TENANT: the key for its clients, and the entry for the file of tenants.

    The file (router.tenants) has the key's SHA-256 only, so keep the key. Whoever is named in it may ask;
    while `prelay serve` runs, the file is read again whenever it changes.

    \b
    Examples:
      prelay key search
      prelay serve --set router.tenants=tenants.yaml
    """
    import hashlib
    import secrets

    import yaml

    made = f"sk-prelay-{secrets.token_urlsafe(32)}"
    entry = {"tenants": {tenant: {"keys": [hashlib.sha256(made.encode()).hexdigest()]}}}
    click.echo(f"# The key, for authorization: Bearer KEY. It is not kept anywhere:\n# {made}")
    click.echo(yaml.safe_dump(entry, sort_keys=False), nl=False)
    return 0


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.argument("names", nargs=-1, metavar="[HOST...]")
@click.option(
    "--days",
    type=click.IntRange(1, 3650),
    default=365,
    show_default=True,
    metavar="N",
    help="Valid for so long.",
)
def certificates(directory: Path, names: tuple[str, ...], days: int) -> int:
    """Make certificates for TLS in DIR, for a deployment that gets none from elsewhere.

    HOST: names or IP addresses under which clients know the router, for tls.clients; tls.internal needs none.
    The first time an authority is made (ca.crt, ca.key), after that only tls.crt and tls.key are made anew,
    of the same authority: a running deployment takes them from then on. Keep ca.key to yourself; the others
    are what every host needs.

    \b
    Examples:
      prelay certificates tls/
      prelay certificates tls/ prelay.example.com 10.0.0.7
      prelay serve --set tls.internal=tls --set tls.clients=tls
    """
    from cluster.certificates import make_certificates

    made = make_certificates(directory, names, days)
    click.echo(f"{directory}: {'an authority, and ' if made else ''}a certificate for {days} days")
    return 0


for _command in (*VIEWS, *CHANGES):
    cli.add_command(_command)


_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@cli.command(context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> NoReturn:
    """Measure a server's goodput, deployments beside each other, the router, the engine, the hand-off."""
    _become_bench(arguments)


@cli.command(context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def profile(arguments: tuple[str, ...]) -> NoReturn:
    """Measure the steps of an engine, and fit the latency model to them."""
    _become_bench(("profile", *arguments))


@cli.command(context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def plan(arguments: tuple[str, ...]) -> NoReturn:
    """Which workers to run for a workload and its limits: how split, how many, on which devices."""
    _become_bench(("plan", *arguments))


@cli.command(context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def simulate(arguments: tuple[str, ...]) -> NoReturn:
    """What a cluster would do with a workload, in virtual time."""
    _become_bench(("simulate", *arguments))


def main() -> None:
    """Entry point of the console script."""
    from cluster.errors import ClusterError

    # gRPC's core else says on standard error, in here and in all that is started, which connections end.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        code = cli.main(prog_name="prelay", standalone_mode=False)
    except click.ClickException as error:
        hint = (
            f"; see `{error.ctx.command_path} --help`"
            if isinstance(error, click.UsageError) and error.ctx
            else ""
        )
        _fail(f"{error.format_message().rstrip('.')}{hint}", error.exit_code)
    except ClusterError as error:
        _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(0)  # Ctrl-C before anything was started
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _fail(f"unexpected {type(error).__name__}: {error}; --debug shows the traceback", 1)
    sys.exit(code)


def _become_bench(arguments: tuple[str, ...]) -> NoReturn:
    """Measurements look at this package from above: it does not import them, but gives them the process."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", "bench", *arguments])


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"prelay: error: {message}", err=True)
    sys.exit(code)


def _load(config_file: Path | None, settings: dict[str, Any]) -> ServeConfig:
    from cluster.config_file import Override, load_config, parse_assignment

    overrides = [parse_assignment(text) for text in settings["assignments"]]
    for flag, key, *_ in _KEY_FLAGS:
        value = settings[flag.removeprefix("--").replace("-", "_")]
        if value is not None:
            overrides.append(Override(tuple(key.split(".")), value, f"{flag} {value}"))
    return load_config(config_file, overrides).resolved()


def _run_guarded(name: str, config: ServeConfig, as_json: bool, debug: bool) -> int:
    from cluster.config import child_environment
    from cluster.guard import run_guarded
    from cluster.orders import Order
    from cluster.preflight import check_model

    order = Order(check_model(config), as_json, debug)
    # -P: packages of the folder where the user happens to be must not be taken for ours.
    command = [sys.executable, "-P", "-m", "cluster.child", name]
    return run_guarded(command, order.to_json(), child_environment(local_ray=config.ray.address is None))


if __name__ == "__main__":
    main()
