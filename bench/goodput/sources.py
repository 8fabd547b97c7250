"""From the workloads of an experiment to what is sent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bench.goodput.experiment import RatioPart, WorkloadPart
from cluster.workload.arrivals import Arrivals, Process
from cluster.workload.datasets import Dataset, TimedRows, load_dataset
from cluster.workload.errors import BadInputError
from cluster.workload.slo import Slo


@dataclass(frozen=True, slots=True)
class Source:
    """A workload: where its requests come from, and the limits that were asked for."""

    name: str
    dataset: Dataset
    arrivals: Arrivals
    slo: Slo


def source_of(name: str, part: WorkloadPart, traces: Path, max_model_len: int) -> Source:
    """traces: where files count from. Raises BadInputError."""
    where = f"workloads.{name}"
    try:
        arrivals, slo = Arrivals.parse(part.arrivals), Slo.parse(part.slo)
        longest = max_model_len if part.max_tokens is None else part.max_tokens
        if longest > max_model_len:
            raise BadInputError(f"max_tokens is {longest}, but the model takes {max_model_len} at most")
        dataset = load_dataset(anchored(part.dataset, traces), part.length_scale, longest)
        if arrivals.process is Process.TRACE and not isinstance(dataset, TimedRows):
            raise BadInputError(f"arrivals: trace, but {part.dataset} has no arrivals of its own")
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from error
    return Source(name, dataset, arrivals, slo)


def ratio_name(ratio: RatioPart) -> str:
    """Of a synthetic workload of the map."""
    return f"{ratio.prompt}:{ratio.answer}"


def source_of_ratio(ratio: RatioPart, slo: str, max_model_len: int) -> Source:
    """Prompts and answers of these lengths, give or take a tenth. Raises BadInputError."""
    prompt, answer = (f"{max(1, round(n * 0.9))}-{round(n * 1.1)}" for n in (ratio.prompt, ratio.answer))
    part = WorkloadPart(dataset=f"synthetic:prompt={prompt},answer={answer}", slo=slo)
    return source_of(ratio_name(ratio), part, Path(), max_model_len)


def anchored(dataset: str, traces: Path) -> str:
    """With the files in it counted from `traces`."""
    kind, _, rest = dataset.partition(":")
    match kind:
        case "sharegpt" | "trace":
            return f"{kind}:{traces / rest}"
        case "mix" if (found := re.fullmatch(r"([^,]+),([^,]+),(.*)", rest)) is not None:
            return f"mix:{traces / found[1]},{traces / found[2]},{found[3]}"
    return dataset
