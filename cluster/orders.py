"""What the command line asks of the process that runs the deployment, as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

from cluster.config import ServeConfig


@dataclass(frozen=True, slots=True)
class Order:
    """config: resolved and checked. as_json: for a program to read. debug: more logs, and tracebacks."""

    config: ServeConfig
    as_json: bool
    debug: bool

    def to_json(self) -> bytes:
        fields = {"config": self.config.model_dump(mode="json"), "as_json": self.as_json, "debug": self.debug}
        return json.dumps(fields).encode()

    @classmethod
    def from_json(cls, line: bytes) -> Order:
        fields = json.loads(line)
        return cls(ServeConfig.model_validate(fields["config"]), fields["as_json"], fields["debug"])
