"""The file that says what to compare: a model, deployments, workloads, limits, and how long to measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cluster.workload.errors import BadInputError
from cluster.workload.slo import DEFAULT

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Sections = dict[str, dict[str, Any]]
"""Keys of `prelay serve`'s configuration by section."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelPart(_Section):
    """shape: one of bench/shapes, without weights of its own; path: a checkpoint's directory; one of the two.
    load, profile, dtype, max_model_len: as in the configuration of `prelay serve`. time_scale: of a simulated
    model; its steps take so many times what the profile says, so that few cores carry many workers."""

    shape: str | None = None
    path: Annotated[Path | None, Field(strict=False)] = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    load: Literal["weights", "dummy", "simulated"] = "dummy"
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    profile: Annotated[Path | None, Field(strict=False)] = None
    time_scale: Positive = 1.0

    @model_validator(mode="after")
    def _is_one_model(self) -> Self:
        if (self.shape is None) == (self.path is None):
            raise ValueError("give either shape (one of bench/shapes) or path (a checkpoint)")
        if self.shape is not None and self.load == "weights":
            raise ValueError("a shape has no weights: load must be dummy or simulated")
        if (self.load == "simulated") != (self.profile is not None):
            raise ValueError("load: simulated and profile: FILE go together")
        if self.time_scale != 1.0 and self.load != "simulated":
            raise ValueError("time_scale is for load: simulated; other steps take the time that they take")
        return self


class DeploymentPart(_Section):
    """serve: what this deployment sets in the configuration of `prelay serve`. search: keys of it, as in
    mixed.max_batch_tokens, with values to try; the best for a workload counts there."""

    serve: Sections
    search: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _keys_have_sections(self) -> Self:
        for key in self.search:
            if len(key.split(".")) != 2:
                raise ValueError(f"search: {key!r} is not SECTION.KEY, as in mixed.max_batch_tokens")
        return self


class WorkloadPart(_Section):
    """dataset, arrivals, length_scale, max_tokens, slo: as the flags of `prelay bench serve`; files count
    from the directory of traces. Limits that are multiples are of the p90 request alone."""

    dataset: str
    arrivals: str = "poisson"
    length_scale: Positive = 1.0
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    slo: str = DEFAULT


class MeasurePart(_Section):
    """rounds: each visits every deployment once, with a seed of its own. seconds: judged at each rate, after
    warmup_s that are not; longer where fewer than min_requests would come. timeout_s: after which a request
    is given up that cannot be good any more. step: from one rate of the grid to the next. max_points: of one
    visit. search_99: whether the rate at 99 % is searched, too, or only read off the points for 90 %.
    follow_pace: whether seconds are those of the machine (pace.py)."""

    rounds: Count = 3
    seconds: Positive = 60.0
    warmup_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 8.0
    min_requests: Count = 40
    timeout_s: Positive = 60.0
    step: Annotated[float, Field(gt=1.01, le=2)] = 1.15
    max_points: Annotated[int, Field(ge=2)] = 10
    search_99: bool = True
    follow_pace: bool = False


class RatioPart(_Section):
    """Lengths of a synthetic workload, in tokens."""

    prompt: Count
    answer: Count


class MapPart(_Section):
    """The plane of limits: every ttft with every tpot (as in 3x, or 60ms) for every pair of lengths. The best
    of the deployments that have the first one's policy is compared with the best of the others."""

    lengths: Annotated[list[RatioPart], Field(min_length=1)]
    ttft: Annotated[list[str], Field(min_length=1)]
    tpot: Annotated[list[str], Field(min_length=1)]
    deployments: Annotated[list[str], Field(min_length=2)]


class Experiment(_Section):
    """common: what all deployments set in the configuration of `prelay serve`, unless they say otherwise."""

    model: ModelPart
    common: Sections = Field(default_factory=dict)
    deployments: Annotated[dict[str, DeploymentPart], Field(min_length=1)]
    workloads: Annotated[dict[str, WorkloadPart], Field(min_length=1)]
    measure: MeasurePart = Field(default_factory=MeasurePart)
    map: MapPart | None = None

    @model_validator(mode="after")
    def _map_names_deployments(self) -> Self:
        if self.map is not None:
            known("map.deployments", self.map.deployments, self.deployments)
        return self

    @model_validator(mode="after")
    def _pace_is_that_of_an_engine(self) -> Self:
        if self.measure.follow_pace and self.model.load == "simulated":
            raise ValueError("measure.follow_pace times steps of the model, and a simulated one has none")
        return self


def load_experiment(path: Path) -> Experiment:
    """Relative paths of the model part count from the file's directory. Raises BadInputError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"--config {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInputError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise BadInputError(
            f"--config {path}: a mapping with model, deployments and workloads is needed, not {raw!r:.40}"
        )
    try:
        experiment = Experiment.model_validate(raw)
    except ValidationError as error:
        lines = (_explain(one) for one in error.errors())
        raise BadInputError("\n  ".join([f"--config {path} is not valid:", *lines])) from error
    model, folder = experiment.model, path.absolute().parent
    anchored = {
        name: folder / value.expanduser()
        for name in ("path", "profile")
        if (value := getattr(model, name)) is not None
    }
    return experiment.model_copy(update={"model": model.model_copy(update=anchored)})


def known(what: str, names: list[str], there: Mapping[str, object]) -> None:
    """Raises BadInputError for the first name that is not there."""
    for name in names:
        if name not in there:
            raise BadInputError(f"{what}: there is no {name!r}; there are {', '.join(there)}")


def _explain(details: ErrorDetails) -> str:
    """One line: the key, what is wrong with it, and its value unless it is a whole mapping."""
    key = ".".join(str(part) for part in details["loc"]) or "the file"
    said = details["msg"].removeprefix("Value error, ")
    value = "" if isinstance(details["input"], dict) else f" (it is {details['input']!r:.60})"
    return f"{key}: {said}{value}"


def chosen_part(
    experiment: Experiment,
    workloads: list[str] | None,
    deployments: list[str] | None,
    rounds: int | None,
    seconds: float | None,
    *,
    only_90: bool = False,
) -> Experiment:
    """With only these workloads and deployments, and so many rounds and seconds; None leaves all as it is.
    only_90: the rate at 99 % is not searched.

    Raises BadInputError.
    """
    update: dict[str, Any] = {}
    for name, chosen, there in (
        ("workloads", workloads, experiment.workloads),
        ("deployments", deployments, experiment.deployments),
    ):
        if chosen is not None:
            known(f"--{name}", chosen, there)
            if not chosen:
                raise BadInputError(f"--{name} is empty; there are {', '.join(there)}")
            update[name] = {one: there[one] for one in chosen}
    measure = {
        **({} if rounds is None else {"rounds": rounds}),
        **({} if seconds is None else {"seconds": seconds}),
        **({"search_99": False} if only_90 else {}),
    }
    if seconds is not None and not 0 < seconds < float("inf"):
        raise BadInputError(f"--seconds {seconds:g}: a number greater than 0 is needed")
    update["measure"] = experiment.measure.model_copy(update=measure)
    return experiment.model_copy(update=update)
