"""Which backends a worker has, by its configuration.

A pair uses the first in the puller's list that the offerer has too and that reaches from one to the other
(handshake.choose_backend); each link logs which. With "auto" the list has all that can be used here; a
backend that is named is the only one, and an error where it is missing, so that nothing is slow unnoticed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from transfer.base import Backend, KvMemory
from transfer.errors import BackendMissingError
from transfer.ipc import IpcBackend, SharedSegment
from transfer.nixl import NixlBackend
from transfer.torchdist import TorchDistBackend

_log = logging.getLogger(__name__)

AUTO = "auto"
BEST_FIRST = ("ipc", "nixl", "torchdist")


def make_backends(
    choice: str, memory: KvMemory, segments: Sequence[SharedSegment], host: str, agent: str
) -> list[Backend]:
    """The worker's backends, best first; close them when it stops.

    choice: AUTO or one of BEST_FIRST. segments: those of `memory`, one for each rank. host: address that
    peers reach this process at. agent: name of this life of this worker, different from all others.
    Raises BackendMissingError if the chosen one cannot be used here.
    """
    makers: dict[str, Callable[[], Backend]] = {
        "ipc": lambda: IpcBackend(memory, segments),
        "nixl": lambda: NixlBackend(memory, agent),
        "torchdist": lambda: TorchDistBackend(memory, host),
    }
    if choice != AUTO:
        if choice not in makers:
            raise BackendMissingError(f"backend {choice!r} is not known; one of {(AUTO, *BEST_FIRST)} is")
        return [makers[choice]()]
    backends: list[Backend] = []
    missing: list[str] = []
    for name in BEST_FIRST:
        try:
            backends.append(makers[name]())
        except BackendMissingError as error:
            missing.append(str(error))
    usable = ",".join(backend.name for backend in backends)
    _log.info("event=backends choice=%s usable=%s missing=%r", choice, usable, missing)
    return backends
