"""From what people write on the command line to a plan. Everything that is wrong there is refused here."""

from __future__ import annotations

import math
import secrets
from typing import Any

from bench.load.serve import ServePlan, vocabulary_of
from cluster.workload.arrivals import Arrivals, Process
from cluster.workload.datasets import Dataset, TimedRows, load_dataset
from cluster.workload.drawing import WorkloadSpec
from cluster.workload.errors import BadInputError
from cluster.workload.slo import Slo

DURATION_S = 60.0
"""That is judged at each rate, if nothing else is said."""


def plan_of(chosen: dict[str, Any]) -> ServePlan:
    """chosen: the options of `prelay bench serve` by name. Raises BadInputError."""
    for flag in ("time_scale", "length_scale", "duration", "timeout"):
        value = chosen[flag]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadInputError(f"--{flag.replace('_', '-')} {value:g}: a number greater than 0 is needed")
    if chosen["duration"] is not None and chosen["requests"] is not None:
        raise BadInputError("give either --duration or --requests")
    rates = rates_of(chosen)
    slo = Slo.parse(chosen["slo_text"])
    dataset = load_dataset(source_of(chosen), chosen["length_scale"], chosen["max_tokens"])
    arrivals = arrivals_of(chosen, rates, dataset)
    duration_s = DURATION_S if chosen["duration"] is None else chosen["duration"]
    return ServePlan(
        spec=WorkloadSpec(
            dataset,
            arrivals,
            vocabulary_of(chosen["vocab_size"]),
            chosen["time_scale"] or 1.0,
            secrets.randbits(32),
        ),
        rates=rates or [None],
        seeds=chosen["seeds"],
        duration_s=duration_s if chosen["requests"] is None else None,
        count=chosen["requests"],
        warmup_s=chosen["warmup"],
        slo=slo,
        timeout_s=chosen["timeout"],
        send_slo=not chosen["no_send_slo"],
        vocab_size=chosen["vocab_size"],
        devices=chosen["devices"],
    )


def source_of(chosen: dict[str, Any]) -> str:
    """--trace or --dataset, as load_dataset takes it. Raises BadInputError."""
    if (chosen["trace"] is None) == (chosen["dataset"] is None):
        raise BadInputError("give either --trace FILE or --dataset NAME:...")
    return f"trace:{chosen['trace']}" if chosen["dataset"] is None else str(chosen["dataset"])


def rates_of(chosen: dict[str, Any]) -> list[float]:
    """--rate or --rates, in order; empty without either. Raises BadInputError."""
    if chosen["rate"] is not None and chosen["rates"] is not None:
        raise BadInputError("give either --rate or --rates")
    if chosen["rate"] is not None:
        flag, texts = "--rate", [str(chosen["rate"])]
    else:
        flag, texts = "--rates", (chosen["rates"] or "").split(",") if chosen["rates"] is not None else []
    rates: list[float] = []
    for text in texts:
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0):
            raise BadInputError(f"{flag} {text.strip()!r}: requests per second, greater than 0, are needed")
        rates.append(rate)
    if len(set(rates)) != len(rates):
        raise BadInputError(f"--rates {chosen['rates']}: a rate is there twice")
    return sorted(rates)


def arrivals_of(chosen: dict[str, Any], rates: list[float], dataset: Dataset) -> Arrivals:
    """--arrivals, or what goes without saying. Raises BadInputError."""
    has_own = isinstance(dataset, TimedRows)
    text = chosen["arrivals"] or ("trace" if has_own and not rates else "poisson")
    arrivals = Arrivals.parse(text)
    if arrivals.process is not Process.TRACE and not rates:
        raise BadInputError("--rate R or --rates A,B,C is missing")
    if arrivals.process is Process.TRACE and not has_own:
        raise BadInputError(f"--arrivals trace: {source_of(chosen)} has no arrivals of its own")
    if chosen["time_scale"] is not None and (arrivals.process is not Process.TRACE or rates):
        raise BadInputError("--time-scale is for a trace's own pace: leave --rate and other --arrivals away")
    return arrivals


def header_of(text: str) -> tuple[str, str]:
    """(name, value) of NAME:VALUE. Raises BadInputError."""
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise BadInputError(f"--header {text!r}: write it as NAME:VALUE")
    return name.strip(), value.strip()
