"""A row for each request, for those who want to look closer."""

from __future__ import annotations

import csv
from pathlib import Path

from bench.load.serve import Measured, Run
from cluster.workload.judge import outcome_of

_COLUMNS = (
    "rate", "seed", "judged", "arrival_s", "sent_s", "prompt_tokens", "output_tokens", "status", "outcome",
    "ttft_s", "tpot_s", "end_s", "error",
)  # fmt: skip


def write_requests(measured: Measured, target: Path) -> None:
    """judged: 1, or 0 in the warm-up. arrival_s, sent_s: since the start of the run; the others since
    sending."""
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for run in measured.runs:
            writer.writerows(_cells(measured, run))


def _cells(measured: Measured, run: Run) -> list[list[object]]:
    return [
        [
            "" if run.rate is None else run.rate,
            run.seed,
            int(number >= run.first),
            f"{row.arrival_s:.6f}",
            f"{row.sent_s:.6f}",
            row.prompt_tokens,
            row.output_tokens,
            row.status.value,
            outcome_of(row, measured.slo).value,
            *("" if value is None else f"{value:.6f}" for value in (row.ttft_s, row.tpot_s, row.last_s)),
            row.error,
        ]
        for number, row in enumerate(run.rows)
    ]
