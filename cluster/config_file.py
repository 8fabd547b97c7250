"""From a YAML file and command-line flags to a `ServeConfig`, or to a message that says what to change."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.config import ServeConfig
from cluster.errors import ConfigError
from cluster.sections import SloClass


@dataclass(frozen=True, slots=True)
class Override:
    """A key that the command line sets. path: ("router", "http"); flag: what the user wrote, for messages."""

    path: tuple[str, ...]
    value: Any
    flag: str


_PATHS = (
    ("model", "path"),
    ("model", "profile"),
    ("router", "tenants"),
    ("tls", "internal"),
    ("tls", "clients"),
)
"""Keys that are files or directories."""


def load_config(path: Path | None, overrides: Sequence[Override] = ()) -> ServeConfig:
    """The configuration of a file (None: the defaults) with the overrides applied. Raises ConfigError.

    A relative path in a file (those of _PATHS) counts from the file's directory, on the command line from the
    current one.
    """
    raw = {} if path is None else _read_mapping(path)
    if path is not None:
        _anchor_paths(raw, path.absolute().parent)
    defaults = ServeConfig().model_dump()
    for override in overrides:
        _apply(raw, defaults, override)
    try:
        return ServeConfig.model_validate(raw)
    except ValidationError as error:
        flags = {override.path: override.flag for override in overrides}
        lines = [_explain(details, flags) for details in error.errors()]
        source = "the command line" if path is None else f"{path}"
        raise ConfigError("\n  ".join([f"the configuration from {source} is not valid:", *lines])) from error


def parse_assignment(text: str) -> Override:
    """`key.path=value`, the value in YAML, as in `--set decode.max_num_seqs=32`. Raises ConfigError."""
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text!r} is not KEY=VALUE, as in --set decode.max_num_seqs=32")
    try:
        return Override(path, yaml.safe_load(value), f"--set {text}")
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML: {_first_line(error)}") from error


def dump_config(config: ServeConfig) -> str:
    """The configuration as YAML that `load_config` reads back as the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        # _Loader is a SafeLoader.
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {path}; without one, `prelay serve` uses its defaults"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_first_line(error)}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds a {type(raw).__name__}; a mapping of sections (model:, prefill:, ...) is needed"
        )
    # A section whose keys are all commented out reads as null and means its defaults.
    return {
        key: value for key, value in raw.items() if value is not None or key not in ServeConfig.model_fields
    }


def _anchor_paths(raw: dict[str, Any], directory: Path) -> None:
    for section, key in _PATHS:
        found = raw.get(section)
        if isinstance(found, dict) and isinstance(found.get(key), str):
            found[key] = str(directory / Path(found[key]).expanduser())


def _apply(raw: dict[str, Any], defaults: Any, override: Override) -> None:
    """Set one key; mappings on the way that the file does not give start from their defaults."""
    node = raw
    for part in override.path[:-1]:
        defaults = defaults.get(part) if isinstance(defaults, dict) else None
        if node.get(part) is None:
            node[part] = copy.deepcopy(defaults) if isinstance(defaults, dict) else {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"{override.flag}: {part} is not a section of the configuration")
    node[override.path[-1]] = override.value


def _explain(details: ErrorDetails, flags: dict[tuple[str, ...], str]) -> str:
    """One line: the key, where it came from if that was a flag, the value, the remedy."""
    location = tuple(str(part) for part in details["loc"])
    key = ".".join(location)
    where = f"{key} (from {flags[location]})" if location in flags else key
    value, context = details["input"], details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            return f"{where}: there is no such key{_did_you_mean(location)}"
        case "missing":
            return f"{where}: missing; give it a value"
        case "greater_than_equal":
            return f"{where}: {value!r} is too small; it must be at least {context['ge']}"
        case "greater_than":
            return f"{where}: {value!r} is too small; it must be greater than {context['gt']}"
        case "less_than_equal":
            return f"{where}: {value!r} is too large; it must be at most {context['le']}"
        case "literal_error":
            return f"{where}: {value!r} is not supported; it must be {context['expected']}"
        case (
            "int_type"
            | "int_from_float"
            | "float_type"
            | "string_type"
            | "path_type"
            | "finite_number" as kind
        ):
            needed = {"i": "a whole number", "f": "a finite number", "s": "a text", "p": "a path"}[kind[0]]
            return f"{where}: {value!r} is not {needed}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{where}: {value!r} is not a mapping of keys"
        case "value_error":
            # Of a whole section: the message names the keys itself.
            message = str(context["error"])
            return message if isinstance(value, dict | BaseModel) else f"{where}: {message}"
        case _:
            return f"{where}: {value!r}: {details['msg']}"


def _did_you_mean(location: tuple[str, ...]) -> str:
    names = _keys_at(location[:-1])
    close = difflib.get_close_matches(location[-1], names, n=1)
    if close:
        return f"; did you mean {'.'.join((*location[:-1], close[0]))}?"
    # The right key in the wrong place.
    elsewhere = [f"{section}.{location[-1]}" for section in names if location[-1] in _keys_at((section,))]
    if len(location) == 1 and elsewhere:
        return f" here; did you mean {elsewhere[0]}?"
    return f"; there are {', '.join(names)}"


def _keys_at(path: tuple[str, ...]) -> list[str]:
    """The keys of the section at `path`; of a class of SLO for anything below slo.classes."""
    node: Any = ServeConfig().model_dump()
    for depth, part in enumerate(path):
        if path[:depth] == ("slo", "classes"):
            return list(SloClass.model_fields)
        node = node.get(part)
        if not isinstance(node, dict):
            return []
    return list(node)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
