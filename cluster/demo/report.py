"""What the demo prints: two answers as they are written, then how every request was served."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cluster.demo.clients import Answer
from cluster.demo.prompts import DemoPrompt
from cluster.sections import SloClass

_STAGES = (
    ("gate", "gate"),
    ("prefill_queue", "prefill\nqueue"),
    ("prefill", "prefill"),
    ("first_token", "first\ntoken"),
    ("transfer", "transfer"),
    ("decode_queue", "decode\nqueue"),
    ("decode", "decode"),
    ("handoff_retry", "retry"),
)
_WIDE = 150
"""Columns from which on one table holds everything."""


class Typewriter:
    """Prints an answer as it arrives, word by word, without breaking words at the right edge."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._word = ""
        self._column = 0

    def begin(self, prompt: DemoPrompt) -> None:
        kind = "chat" if prompt.chat else "story"
        how = "greedy" if prompt.seed is None else f"sampled with seed {prompt.seed}"
        title = f"request {prompt.number}: {kind} through {prompt.front_end.value}, {how}"
        self._console.rule(title, align="left", style="dim")
        # An answer to a chat begins a line; a story goes on where its prompt ends.
        self._write(prompt.text + "\n" * prompt.chat, "dim")
        self._flush("dim")

    def text(self, piece: str) -> None:
        self._write(piece, None)

    def end(self, answer: Answer) -> None:
        self._flush(None)
        served = answer.served
        self._console.print(
            f"\n[dim]{answer.completion_tokens} tokens, first after {1000 * served.ttft_s:.0f} ms, "
            f"then {1000 * served.tpot_s:.1f} ms each[/]\n"
        )

    def _write(self, piece: str, style: str | None) -> None:
        for char in piece:
            self._word += char
            if char.isspace():
                self._flush(style)

    def _flush(self, style: str | None) -> None:
        if self._column + len(self._word.rstrip()) > self._console.width:
            self._console.out("")
            self._column = 0
        self._console.out(self._word, end="", style=style, highlight=False)
        self._column = 0 if self._word.endswith("\n") else self._column + len(self._word)
        self._word = ""
        self._console.file.flush()


def print_answers(console: Console, answers: Sequence[Answer], slo_name: str, slo: SloClass) -> None:
    """Every request in a table (two where the terminal is narrow), and the attainment of the SLO."""
    if console.width >= _WIDE:
        console.print(_table(answers, "24 requests; times in ms", requests=True, stages=True))
    else:
        console.print(_table(answers, "24 requests; times in ms", requests=True, stages=False))
        console.print(_table(answers, "where their time went, in ms", requests=False, stages=True))
    good = sum(answer.served.outcome == "good" for answer in answers)
    moved = sum(answer.served.kv_bytes for answer in answers)
    console.print(
        f"[bold]Attainment {good / len(answers):.0%}[/]: {good} of {len(answers)} requests were good under "
        f"SLO class {slo_name} (first token within {1000 * slo.ttft_s:.0f} ms, then at most "
        f"{1000 * slo.tpot_s:.0f} ms per token)."
    )
    console.print(
        f"{sum(answer.completion_tokens for answer in answers):,} tokens answered, {moved / 2**20:.1f} MiB "
        f"of KV moved from prefill to decode; median TTFT {1000 * _median_ttft(answers):.0f} ms."
    )


def answers_json(answers: Sequence[Answer], slo_name: str, slo: SloClass, equal: bool) -> dict[str, Any]:
    """The same for a program."""
    good = sum(answer.served.outcome == "good" for answer in answers)
    return {
        "equal_to_one_process": equal,
        "slo": {"class": slo_name, "ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "attainment": good / len(answers),
        "requests": [
            {
                "number": answer.prompt.number,
                "front_end": answer.prompt.front_end.value,
                "kind": _kind(answer.prompt),
                "seed": answer.prompt.seed,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                **dataclasses.asdict(answer.served),
            }
            for answer in answers
        ],
    }


def _table(answers: Sequence[Answer], title: str, *, requests: bool, stages: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("#", justify="right")
    if requests:
        table.add_column("request", no_wrap=True)
        table.add_column("via")
        for name in ("prompt\ntokens", "answer\ntokens"):
            table.add_column(name, justify="right")
        for name in ("prefill", "decode"):
            table.add_column(f"{name}\nworker")
        for name in ("KV\nKiB", "TTFT", "TPOT"):
            table.add_column(name, justify="right")
    if stages:
        for _, name in _STAGES:
            table.add_column(name, justify="right")
        table.add_column("sum", justify="right")
    for answer in answers:
        served = answer.served
        row = [str(answer.prompt.number)]
        if requests:
            row += [
                f"{_kind(answer.prompt)} {'greedy' if answer.prompt.seed is None else 'sampled'}",
                answer.prompt.front_end.value,
                str(answer.prompt_tokens),
                str(answer.completion_tokens),
                served.prefill_worker,
                served.decode_worker,
                f"{served.kv_bytes / 1024:,.0f}",
                _ms(served.ttft_s),
                _ms(served.tpot_s),
            ]
        if stages:
            row += [_ms(served.stages.get(stage, 0.0)) for stage, _ in _STAGES]
            row.append(_ms(sum(served.stages.values())))
        table.add_row(*row)
    return table


def _kind(prompt: DemoPrompt) -> str:
    return "chat" if prompt.chat else "story"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _median_ttft(answers: Sequence[Answer]) -> float:
    return statistics.median(answer.served.ttft_s for answer in answers)
