"""`prelay bench engine`, `prelay bench transfer` and `prelay profile`: what one worker's parts take."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from bench.cli_parts import need_directory, need_matplotlib, progress

F = TypeVar("F", bound=Callable[..., Any])

SHAPES = Path(__file__).parent / "shapes"

_EXIT_CODES = """
\b
Exit codes:
  0  done
  1  something failed while measuring
  2  the command line is wrong
  4  the model cannot be loaded
"""


def shape_names() -> list[str]:
    """The shapes that come with prelay."""
    return sorted(path.parent.name for path in SHAPES.glob("*/config.json"))


def _model_options(command: F) -> F:
    """What is measured, and on how much of the machine."""
    shapes = ", ".join(shape_names())
    for decorator in reversed(
        [
            click.option("--shape", metavar="NAME", help=f"A public shape with random weights: {shapes}."),
            click.option("--model", type=Path, metavar="DIR", help="A checkpoint in Hugging Face format."),
            click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16"),
            click.option("--threads", type=click.IntRange(1), default=1, help="CPU threads, each on a core."),
            click.option(
                "--kernels",
                type=click.Choice(["auto", "native", "torch"]),
                default="auto",
                help="The compiled CPU kernels, torch's, or the former where they can be used.",
            ),
        ]
    ):
        command = decorator(command)
    return command


@click.command(epilog=_EXIT_CODES)
@_model_options
@click.option("--prefill", "prefill_tokens", default="128,512,2048", metavar="N,N", help="Prompt lengths.")
@click.option("--decode", "decode_batches", default="1,8,32", metavar="N,N", help="Decode batches.")
@click.option("--context", type=click.IntRange(1), default=512, help="Tokens of each decoding sequence.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Times that everything is measured.")
@click.option("--no-transformers", is_flag=True, help="Leave transformers out, and with it the ratios.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE", help="Draw the result into a PNG.")
def engine(plot: Path | None, as_json: bool, no_transformers: bool, **chosen: Any) -> int:
    """Prefill and decode of one engine, beside transformers and the limits of the machine.

    The limits (matrix products, reading of memory) are measured in the same run, round by round. A share of
    the limit is the time that the unavoidable work takes at the limits, over the time that was taken.

    \b
    Examples:
      prelay bench engine --shape smollm2-135m --threads 1 --json
      prelay bench engine --model ~/models/SmolLM2-135M --plot engine.png
    """
    from bench.baseline import TransformersUnavailableError
    from bench.engine import Settings, measure

    name, checkpoint, load = _model(chosen)
    prefill_tokens = _sizes("--prefill", chosen["prefill_tokens"])
    decode_batches = _sizes("--decode", chosen["decode_batches"])
    if not prefill_tokens and not decode_batches:
        raise click.UsageError("--prefill and --decode are both empty: there is nothing to measure")
    need_matplotlib(plot)
    if not no_transformers and importlib.util.find_spec("transformers") is None:
        raise click.UsageError(
            "transformers is not installed: pip install 'prelay[bench]', or give --no-transformers"
        )
    _pin(chosen["threads"])
    settings = Settings(
        checkpoint,
        load,
        chosen["dtype"],
        chosen["threads"],
        chosen["kernels"],
        prefill_tokens,
        decode_batches,
        chosen["context"],
        chosen["rounds"],
        not no_transformers,
    )
    try:
        with progress(f"bench engine {name}") as show:
            result = {"shape": name, **measure(settings, show)}
    except TransformersUnavailableError as error:
        raise click.UsageError(str(error)) from error
    if plot is not None:
        from bench.plots import draw_engine

        draw_engine(result, plot)
    if as_json:
        click.echo(json.dumps(result))
    else:
        Console().print(_engine_table(result))
    return 0


@click.command(epilog=_EXIT_CODES)
@click.option("--shape", metavar="NAME", default="smollm2-135m", show_default=True, help="A public shape.")
@click.option(
    "--backends",
    "backends",
    default="ipc,torchdist,nixl",
    show_default=True,
    metavar="NAME,NAME",
    help="Which.",
)
@click.option("--mb", "sizes", default="1,16,64", show_default=True, metavar="N,N", help="MiB of blocks.")
@click.option(
    "--prompts",
    "prompt_tokens",
    default="128,512,1024,2048",
    show_default=True,
    metavar="N,N",
    help="Lengths.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, help="Times that everything is measured.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE", help="Draw the result into a PNG.")
def transfer(plot: Path | None, as_json: bool, rounds: int, **chosen: str) -> int:
    """Moving KV between two processes, and what a hand-off costs a request and those beside it.

    Two cores are used: one that sends (the prefill workers), one that receives (the decode worker). Beside
    each copy its limit is measured, round by round: a memcpy for ipc, a plain TCP stream over loopback for
    the others. Exposed is the time from the end of a prompt's prefill to the beginning of its first decode
    step, with the KV offered while it is computed, and with all of it offered at the end.

    \b
    Examples:
      prelay bench transfer --json --plot transfer.png
      prelay bench transfer --backends ipc --prompts 512 --rounds 3
    """
    from bench.transfer import Settings, measure

    _, checkpoint, load = _model({"shape": chosen["shape"], "model": None})
    backends = _backends(chosen["backends"])
    sizes, prompt_tokens = _sizes("--mb", chosen["sizes"]), _sizes("--prompts", chosen["prompt_tokens"])
    if not sizes or not prompt_tokens:
        raise click.UsageError("--mb and --prompts each need a number at least")
    need_matplotlib(plot)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise click.UsageError("two cores are needed, one for each side of a hand-off; there is one")
    settings = Settings(checkpoint, load, backends, sizes, prompt_tokens, rounds, (cores[-2], cores[-1]))
    with progress(f"bench transfer {chosen['shape']}") as show:
        result = {"shape": chosen["shape"], **measure(settings, show)}
    if plot is not None:
        from bench.plots import draw_transfer

        draw_transfer(result, plot)
    if as_json:
        click.echo(json.dumps(result))
    else:
        for table in _transfer_tables(result):
            Console().print(table)
    return 0


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EXIT_CODES
)
@_model_options
@click.option("--json", "target", type=Path, metavar="FILE", default=Path("profile.json"), show_default=True)
@click.option("--plot", type=Path, metavar="FILE", help="Draw measured against predicted times into a PNG.")
@click.option("--max-batch-tokens", type=click.IntRange(8), default=2048, help="Largest step, in tokens.")
@click.option("--max-num-seqs", type=click.IntRange(1), default=64, help="Largest decode batch.")
@click.option("--max-context", type=click.IntRange(16), default=2048, help="Longest sequence, in tokens.")
@click.option("--repeats", type=click.IntRange(1), default=5, help="Times that each step is measured.")
def profile(target: Path, plot: Path | None, **chosen: Any) -> int:
    """Measure the steps of one engine, and fit the latency model to them.

    Writes FILE, which router, planner and simulator read, and prints how far the model is off on steps that
    it was not fitted to.

    \b
    Examples:
      prelay profile --model ~/models/SmolLM2-135M --json profile.json --plot profile.png
      prelay profile --shape smollm2-135m --dtype bfloat16 --threads 1
    """
    from bench.profile import ProfileSettings, error_rows, run_profile, to_json

    name, checkpoint, load = _model(chosen)
    need_matplotlib(plot)
    need_directory("--json", target)
    _pin(chosen["threads"])
    keys = ("dtype", "threads", "kernels", "max_batch_tokens", "max_num_seqs", "max_context", "repeats")
    settings = ProfileSettings(checkpoint, name, load, **{key: chosen[key] for key in keys})
    with progress(f"profile {name}") as show:
        result = run_profile(settings, show)
    target.write_text(json.dumps(to_json(result, settings), indent=1) + "\n")
    if plot is not None:
        from bench.plots import draw_profile

        draw_profile(result, name, plot)
    table = Table("steps", "held out", "median error", "95th percentile")
    for kind, count, median, p95 in error_rows(result):
        table.add_row(kind, str(count), f"{median:.1%}", f"{p95:.1%}")
    Console(stderr=True).print(table)
    click.echo(f"{target} written: {len(result.fitted)} steps fitted", err=True)
    return 0


def _model(chosen: dict[str, Any]) -> tuple[str, Path, str]:
    """Name, directory, and where the weights come from."""
    shape, model = chosen["shape"], chosen["model"]
    if (shape is None) == (model is None):
        raise click.UsageError("give either --shape NAME or --model DIR")
    if shape is None:
        return model.absolute().name, model, "weights"
    if shape not in shape_names():
        raise click.UsageError(f"there is no shape {shape!r}; there are {', '.join(shape_names())}")
    return shape, SHAPES / shape, "dummy"


def _sizes(flag: str, text: str) -> list[int]:
    """Comma-separated positive numbers; an empty text is none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise click.UsageError(f"{flag} {text!r}: numbers of at least 1 are needed, as in 1,8,32")
    return [int(part) for part in parts]


def _backends(text: str) -> list[str]:
    """Comma-separated names of backends between processes that can be used here."""
    known = {"ipc": "torch", "torchdist": "torch", "nixl": "nixl"}
    names = list(dict.fromkeys(filter(None, text.split(","))))
    for name in names:
        if name not in known:
            raise click.UsageError(f"--backends {name!r}: there are {', '.join(known)}")
        if importlib.util.find_spec(known[name]) is None:
            raise click.UsageError(f"--backends {name}: it is not installed; pip install 'prelay[nixl]'")
    if not names:
        raise click.UsageError("--backends is empty: there is nothing to measure")
    return names


def _pin(threads: int) -> None:
    """Take the last cores: the first ones serve interrupts."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise click.UsageError(f"--threads {threads}, but there are only {len(cores)} cores")
    os.sched_setaffinity(0, cores[-threads:])


def _engine_table(result: dict[str, Any]) -> Table:
    limits = result["limits"]
    table = Table(
        "step",
        "tok/s (min - max)",
        "share of limit",
        "transformers",
        "ratio (min - max)",
        title=f"{result['shape']}, {result['dtype']}, {result['threads']} threads; limits "
        f"{limits['gemm_gflops']:.0f} GFLOP/s and {limits['read_gbps']:.1f} GB/s; "
        f"ready in {result['ready_s']:.1f} s",
    )
    for phase in ("prefill", "decode"):
        for row in result[phase]:
            spread = row["tok_s_spread"]
            what = (
                f"prefill {row['tokens']}"
                if phase == "prefill"
                else f"decode {row['batch']} x {row['context']}"
            )
            theirs, ratio = "", ""
            if row["ratio"] is not None:
                theirs = f"{row['transformers_tok_s']:.0f}"
                low, high = row["ratio_spread"]["min"], row["ratio_spread"]["max"]
                ratio = f"{row['ratio']:.1f} ({low:.1f} - {high:.1f})"
            table.add_row(
                what,
                f"{row['tok_s']:.0f} ({spread['min']:.0f} - {spread['max']:.0f})",
                f"{row['share_of_limit']:.0%}",
                theirs,
                ratio,
            )
    return table


def _transfer_tables(result: dict[str, Any]) -> Iterator[Table]:
    title = f"{result['shape']}, {result['dtype']}, a core for each side"
    moved = Table(
        "backend", "MiB", "ms", "GB/s (min - max)", "share of limit", "scattered", "unequal", title=title
    )
    for row in result["backends"]:
        spread = row["gbps_spread"]
        moved.add_row(
            row["name"],
            str(row["mb"]),
            f"{row['latency_ms']:.2f}",
            f"{row['gbps']:.2f} ({spread['min']:.2f} - {spread['max']:.2f})",
            f"{row['share_of_limit']:.0%} of {row['limit']}",
            f"{row['scattered']['share_of_limit']:.0%}",
            f"{row['unequal']['share_of_limit']:.0%}",
        )
    yield moved
    exposed = Table("backend", "prompt", "beside", "overlap", "at the end", "goal", "step", "prefill")
    for row in result["exposed"]:
        for beside, case in (("nothing", row), (f"{row['busy']['batch']} sequences", row["busy"])):
            times = ("overlap_ms", "no_overlap_ms", "goal_ms", "decode_step_ms", "prefill_ms")
            exposed.add_row(
                row["backend"], str(row["prompt_tokens"]), beside, *(f"{case[time]:.1f}" for time in times)
            )
    exposed.title = "exposed time of a hand-off, ms"
    yield exposed
    slowdown = Table("backend", "step alone", "beside a prefill", "while fetching", "slowdown (min - max)")
    for row in result["slowdown"]:
        beside_ms, spread = row["beside_prefill_ms"], row["ratio_spread"]
        slowdown.add_row(
            row["backend"],
            f"{row['alone_ms']:.1f}",
            "" if beside_ms is None else f"{beside_ms:.1f}",
            f"{row['fetching_ms']:.1f}",
            f"{row['ratio']:.2f} ({spread['min']:.2f} - {spread['max']:.2f})",
        )
    slowdown.title = f"steps of {result['slowdown'][0]['batch']} sequences, ms"
    yield slowdown
