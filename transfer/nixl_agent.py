"""One NIXL agent: registers memory, knows peers, reads from them. What transfer/nixl.py needs of the library.

NIXL's progress thread, which also serves peers that read from us over TCP, polls without a pause as NIXL's
own Python interface starts it. With a delay it sleeps until UCX has something to do; hence the bindings below
that interface are used here.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from transfer.errors import BackendMissingError, PeerUnreachableError

_log = logging.getLogger(__name__)

_PROGRESS_DELAY_US = 20_000
"""The thread wakes up when UCX has an event, and this often in case that one was missed."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3


@dataclass(frozen=True, slots=True)
class Place:
    """A run of bytes in some process. memory: "DRAM" or "VRAM". device: of VRAM, else 0."""

    address: int
    num_bytes: int
    memory: str
    device: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Place:
        """tensor: contiguous"""
        memory, device = ("VRAM", tensor.get_device()) if tensor.is_cuda else ("DRAM", 0)
        return cls(tensor.data_ptr(), tensor.numel() * tensor.element_size(), memory, device)


class NixlAgent:
    """name: different from those of all other agents that ever meet one that knows this one. patience_s: a
    read must end within it.

    Raises BackendMissingError if NIXL or its UCX plugin is not there.
    """

    def __init__(self, name: str, patience_s: float) -> None:
        try:
            self._nixl: Any = importlib.import_module("nixl._bindings")
        except ImportError as error:
            raise BackendMissingError(
                f"backend nixl: NIXL is not installed ({error}); pip install 'prelay[nixl]'"
            ) from error
        # They have no class of their own in common.
        self._errors = tuple(
            each
            for each in vars(self._nixl).values()
            if isinstance(each, type) and issubclass(each, Exception)
        )
        self.name = name
        self.patience_s = patience_s
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _PROGRESS_DELAY_US
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
        self._agent = self._nixl.nixlAgent(name, config)
        try:
            self._ucx = self._agent.createBackend("UCX", {})
        except self._errors as error:
            raise BackendMissingError(f"backend nixl: its UCX plugin does not start: {error}") from error
        self._lock = threading.Lock()
        self._peers: dict[str, NixlPeer] = {}
        self._kept: list[object] = []

    def register(self, place: Place) -> Any:
        """Until what is returned is given to `deregister`, NIXL may read and write there, and so may peers
        that are told of it."""
        where = (place.address, place.num_bytes, place.device, "")
        descriptors = self._nixl.nixlRegDList(self._segment(place.memory), [where])
        self._agent.registerMem(descriptors, [self._ucx])
        return descriptors

    def deregister(self, registered: Any) -> None:
        if self._agent is not None:
            self._agent.deregisterMem(registered, [self._ucx])

    def metadata(self) -> bytes:
        """What a peer needs to read what is registered so far."""
        metadata: bytes = self._agent.getLocalMD()
        return metadata

    def meet(self, name: str, metadata: bytes) -> NixlPeer:
        """The peer of that name; `leave` it as often as it is met. Raises PeerUnreachableError.

        A peer that nobody uses stays connected until another is met: it may come back over another link, and
        the far end of a connection that we close keeps two open files for it until its process ends.
        """
        with self._lock:
            for other in [other for other in self._peers.values() if not other.users and other.name != name]:
                self._forget(other)
            peer = self._peers.get(name)
            if peer is None:
                with self._reaching(name):
                    found: bytes = self._agent.loadRemoteMD(metadata)
                if found.decode() != name:
                    raise PeerUnreachableError(
                        f"the metadata of NIXL agent {name} are those of {found.decode()}"
                    )
                peer = self._peers[name] = NixlPeer(self, name)
            peer.users += 1
            return peer

    def forget(self, peer: NixlPeer) -> None:
        """Close the connection."""
        with self._lock:
            self._forget(peer)

    def leave(self, peer: NixlPeer) -> None:
        """One user fewer."""
        with self._lock:
            peer.users -= 1

    def start_read(self, peer: NixlPeer, ours: Sequence[Place], theirs: Sequence[Place]) -> Any:
        """Copy theirs[i] to ours[i]; each side in one kind of memory. Returns a handle."""
        with self._reaching(peer.name):
            if peer.is_gone:
                raise PeerUnreachableError(f"the connection to NIXL agent {peer.name} is closed")
            handle = self._agent.createXferReq(
                self._nixl.NIXL_READ, self._list(ours), self._list(theirs), peer.name, "", [self._ucx]
            )
            try:
                self._agent.postXferReq(handle, "")
            except BaseException:
                self._agent.releaseXferReq(handle)
                raise
            return handle

    def is_under_way(self, peer: NixlPeer, handle: Any) -> bool:
        """Raises PeerUnreachableError if the read failed."""
        with self._reaching(peer.name):
            return bool(self._agent.getXferStatus(handle) == self._nixl.NIXL_IN_PROG)

    def release(self, handle: Any) -> None:
        """Of a read that is done, or whose connection is closed."""
        try:
            self._agent.releaseXferReq(handle)
        except self._errors as error:
            # It goes with the agent.
            _log.warning("event=nixl_read_not_released agent=%s why=%r", self.name, str(error))

    def keep(self, memory: Sequence[object]) -> None:
        """Registered memory that reads which were given up may yet write to: until we are closed."""
        _log.warning("event=nixl_buffers_kept agent=%s", self.name)
        self._kept += memory

    def close(self) -> None:
        """Of pulls that are still open only `close` may be called."""
        with self._lock:
            for peer in list(self._peers.values()):
                self._forget(peer)
            self._agent = None

    def _forget(self, peer: NixlPeer) -> None:
        if not peer.is_gone:
            peer.is_gone = True
            del self._peers[peer.name]
            # NIXL forgets peers that are dead by itself.
            with suppress(*self._errors):
                self._agent.invalidateRemoteMD(peer.name)

    def _list(self, places: Sequence[Place]) -> Any:
        where = [(place.address, place.num_bytes, place.device) for place in places]
        return self._nixl.nixlXferDList(self._segment(places[0].memory), where)

    def _segment(self, memory: str) -> Any:
        return {"DRAM": self._nixl.DRAM_SEG, "VRAM": self._nixl.VRAM_SEG}[memory]

    @contextmanager
    def _reaching(self, name: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise PeerUnreachableError(f"NIXL agent {name} cannot be read: {error}") from error


class NixlPeer:
    """What an agent knows of a peer. users: pulls that read from it."""

    def __init__(self, agent: NixlAgent, name: str) -> None:
        self._agent = agent
        self.name = name
        self.users = 0
        self.is_gone = False

    def start_read(self, ours: Sequence[Place], theirs: Sequence[Place]) -> Any:
        return self._agent.start_read(self, ours, theirs)

    def finish(self, handle: Any) -> None:
        """Wait for a read. Raises PeerUnreachableError; then it may still be under way."""
        patience_s = self._agent.patience_s
        pause_s, give_up_s = _FIRST_PAUSE_S, time.monotonic() + patience_s
        while self._agent.is_under_way(self, handle):
            if time.monotonic() > give_up_s:
                raise PeerUnreachableError(f"NIXL agent {self.name} has not been read within {patience_s} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self._agent.release(handle)

    def abandon(self, handles: Sequence[Any]) -> bool:
        """Reads failed: close the connection. Returns whether some were still under way, whose bytes may come
        all the same (see NixlAgent.keep)."""
        are_left = [self._is_left(handle) for handle in handles]
        self._agent.forget(self)
        for handle in handles:
            self._agent.release(handle)
        return any(are_left)

    def _is_left(self, handle: Any) -> bool:
        try:
            return self._agent.is_under_way(self, handle)
        except PeerUnreachableError:
            return False

    def leave(self) -> None:
        self._agent.leave(self)
