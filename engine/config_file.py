"""The JSON files of a checkpoint, read with complaints that name file, key and value. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises CheckpointError if there is none."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is not a directory; a checkpoint directory is needed")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value


@dataclass(frozen=True, slots=True)
class Reader:
    """Typed access to the keys of one JSON object. An absent key has the `default`; so has null.

    where: names the object in messages, such as the file that holds it. Raises CheckpointError for values of
    another type, and for what is absent without a default.
    """

    raw: Mapping[str, Any]
    where: str

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(key, value, "a positive integer")
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._error(key, value, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def token_ids(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A token id, a list of them, or nothing: null is no token, an absent key the default."""
        value = self.raw.get(key, list(default))
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            raise self._error(key, value, "a token id or a list of token ids")
        return tuple(ids)

    def table(self, key: str) -> Reader:
        """The object under `key`; empty if there is none."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._error(key, value, "an object")
        return Reader(value, f"{self.where}: {key}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.where}: {key} is missing")
        return value

    def _error(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {value!r}; it must be {wanted}")
