"""What the roles of workers are called: as the sections of the configuration and in worker ids."""

from __future__ import annotations

from collections.abc import Mapping

from prelay.v1 import worker_pb2

ROLE_NAMES: Mapping[worker_pb2.Role, str] = {
    worker_pb2.ROLE_PREFILL: "prefill",
    worker_pb2.ROLE_DECODE: "decode",
    worker_pb2.ROLE_MIXED: "mixed",
}
"""In the order in which they are shown."""
