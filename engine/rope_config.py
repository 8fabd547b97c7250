"""The rotary embedding that a config.json asks for, in the spelling of any transformers. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config_file import Reader
from engine.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Rotary scaling of Llama 3.1; the names are those of its config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023), section 3; beta_fast and beta_slow are its beta and alpha.

    attention_factor: what cosines and sines are multiplied with; None is 0.1 ln(factor) + 1 (section 3.4).
    truncate: whether the bounds between kept and slowed components are rounded to whole ones.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta: base of the rotary frequencies. scaling: None leaves them as they are."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(Llama3Scaling.__slots__),
    "yarn": frozenset(YarnScaling.__slots__),
}
"""The rope types that are computed here, with what each reads besides its type and rope_theta."""


def read_rope(model: Reader, max_position_embeddings: int) -> RopeConfig:
    """What transformers would make of a model's `rope_theta`, `rope_scaling` and `rope_parameters`.

    Raises UnsupportedModelError for other types of scaling and for parameters that their type does not have.
    """
    key = "rope_scaling" if model.raw.get("rope_scaling") else "rope_parameters"
    rope = model.table(key)
    # transformers 5 moved the key from the top level into rope_parameters.
    theta = rope.positive_float("rope_theta", model.positive_float("rope_theta", 10000.0))
    rope_type = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _KEYS:
        raise UnsupportedModelError(
            f"{rope.where} has rope_type {rope_type!r}; supported are {', '.join(_KEYS)}"
        )
    for name, value in rope.raw.items():
        if name == "partial_rotary_factor" and value in (1, None):
            continue
        if name not in _KEYS[rope_type] | {"rope_type", "type", "rope_theta"} and value is not None:
            raise UnsupportedModelError(
                f"{rope.where} has {name} {value!r}, which is not supported for rope_type {rope_type!r}; "
                "remove it if it changes nothing"
            )
    match rope_type:
        case "linear":
            return RopeConfig(theta, LinearScaling(rope.positive_float("factor")))
        case "llama3":
            return RopeConfig(
                theta,
                Llama3Scaling(
                    rope.positive_float("factor"),
                    rope.positive_float("low_freq_factor"),
                    rope.positive_float("high_freq_factor"),
                    rope.positive_int("original_max_position_embeddings", max_position_embeddings),
                ),
            )
        case "yarn":
            own_attention_factor = rope.raw.get("attention_factor") is not None
            return RopeConfig(
                theta,
                YarnScaling(
                    rope.positive_float("factor"),
                    rope.positive_int("original_max_position_embeddings", max_position_embeddings),
                    rope.positive_float("attention_factor") if own_attention_factor else None,
                    rope.positive_float("beta_fast", 32.0),
                    rope.positive_float("beta_slow", 1.0),
                    rope.boolean("truncate", True),
                ),
            )
        case _:
            return RopeConfig(theta)
