"""From an experiment to configurations of `prelay serve`: every deployment, with every value to try."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.goodput.experiment import Experiment, Sections
from cluster.config import ServeConfig
from cluster.config_file import Override, load_config
from cluster.errors import ConfigError
from cluster.preflight import check_model
from cluster.workload.errors import BadInputError
from cluster.workload.slo import Limits

_FREE = "127.0.0.1:0"
_LISTENERS = ("http", "grpc", "metrics", "admin")

SEES_LIMITS = frozenset({"goodput", "cache_aware"})
"""Policies that decide by limits. What the others do is the same under any, so their answers can be judged
again by other limits."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A deployment with one choice of the values to try. setting: that choice, `` if there is nothing to
    try. config: under limits that mean nothing; `under` gives others."""

    deployment: str
    setting: str
    config: ServeConfig

    @property
    def name(self) -> str:
        return f"{self.deployment} ({self.setting})" if self.setting else self.deployment

    @property
    def policy(self) -> str:
        return self.config.router.policy

    @property
    def sees_limits(self) -> bool:
        return self.policy in SEES_LIMITS

    @property
    def devices(self) -> int:
        """Cores that its workers hold."""
        return self.config.num_cpus

    @property
    def readers(self) -> int:
        """Workers that read prompts."""
        return self.config.prefill.replicas + self.config.mixed.replicas

    def under(self, limits: Limits) -> ServeConfig:
        """With these limits as those of every request."""
        slo_class = {"ttft_s": limits.ttft_s, "tpot_s": limits.tpot_s}
        slo = type(self.config.slo).model_validate(
            {"default": "workload", "classes": {"workload": slo_class}}
        )
        return self.config.model_copy(update={"slo": slo})


def variants_of(experiment: Experiment, name: str, checkpoint: Path, profile: Path | None) -> list[Variant]:
    """All variants of one deployment, checked against the model. Raises BadInputError."""
    part = experiment.deployments[name]
    choices = itertools.product(*([(key, value) for value in values] for key, values in part.search.items()))
    found = []
    for choice in choices:
        tried: Sections = {}
        for key, value in choice:
            section, _, last = key.partition(".")
            tried.setdefault(section, {})[last] = value
        setting = ", ".join(f"{key}={value}" for key, value in choice)
        layers = (experiment.common, part.serve, tried)
        found.append(
            Variant(name, setting, _config(f"deployments.{name}", experiment, layers, checkpoint, profile))
        )
    return found


def references(experiment: Experiment, checkpoint: Path, profile: Path | None) -> list[Variant]:
    """What a request is alone on: a prefill and a decode worker, and one mixed worker. Raises
    BadInputError."""

    def alone(prefill: int, decode: int, mixed: int, policy: str) -> Sections:
        return {
            "prefill": {"replicas": prefill},
            "decode": {"replicas": decode},
            "mixed": {"replicas": mixed},
            "router": {"policy": policy},
        }

    return [
        Variant(name, "", _config("common", experiment, (experiment.common, part), checkpoint, profile))
        for name, part in (
            ("prefill + decode", alone(1, 1, 0, "round_robin")),
            ("mixed", alone(0, 0, 1, "colocated")),
        )
    ]


def _config(
    where: str, experiment: Experiment, layers: Sequence[Sections], checkpoint: Path, profile: Path | None
) -> ServeConfig:
    """Later layers win, key by key. Raises BadInputError."""
    model = experiment.model
    keys: dict[tuple[str, str], object] = {
        ("model", "path"): str(checkpoint),
        ("model", "dtype"): model.dtype,
        ("model", "load"): model.load,
        ("model", "max_model_len"): model.max_model_len,
        ("model", "profile"): None if profile is None else str(profile),
        **{("router", name): _FREE for name in _LISTENERS},
    }
    for layer in layers:
        for section, values in layer.items():
            if section in ("model", "slo"):
                raise BadInputError(
                    f"{where}: {section} is not for a deployment to say: the model is the experiment's, and "
                    "limits are the workload's"
                )
            keys.update({(section, key): value for key, value in values.items()})
    try:
        config = load_config(None, [Override(path, value, where) for path, value in keys.items()])
        return check_model(config.resolved())
    except ConfigError as error:
        raise BadInputError(f"{where}: {error}") from error
