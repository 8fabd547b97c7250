"""A torch.distributed group of two, for one link: gloo for messages, NCCL for KV in CUDA memory.

No process-wide state (see engine/parallel/groups.py). Idle ends are blocked in the kernel. When the peer's
process ends, its connections close and every operation fails at once; a peer that is only stopped is given up
after a while, but not while nothing is asked of it. The NCCL path has not been run yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from transfer.errors import PeerUnreachableError

FOREVER = timedelta(days=365)
_MEETING = timedelta(seconds=10)
# A message is this long or, where its words do not fit, is followed by the rest of them.
_FIRST_WORDS = 1024
# Tags. Nothing is ever sent with the last one.
_MESSAGE, _DATA, _NUMBERS, _NOTHING = 1, 2, 3, 4


@contextmanager
def _with_peer() -> Iterator[None]:
    """torch's complaints about connections told apart from our own mistakes."""
    try:
        yield
    except RuntimeError as error:
        # The rest of gloo's message is advice.
        raise PeerUnreachableError(f"the group with the peer is broken: {_first_line(error)}") from error


class GlooDevice:
    """The socket loop that all groups of one backend share. host: address that we are reached at."""

    def __init__(self, host: str) -> None:
        backend: Any = ProcessGroupGloo  # its stub lacks what it has
        # Named: gloo would otherwise look up the host's own name, which need not lead anywhere.
        self.device = backend.create_device(hostname=host)


class PairGroup:
    """One of the two ends; rank 0 or 1.

    Made when both are there; raises PeerUnreachableError if the other does not come. on_cuda: data are in
    CUDA memory, and travel over NCCL. patience_s: a message that is under way must arrive within it.
    """

    @_with_peer()
    def __init__(self, store: Store, rank: int, gloo: GlooDevice, on_cuda: bool, patience_s: float) -> None:
        self._other = 1 - rank
        self._patience = timedelta(seconds=patience_s)
        backend: Any = ProcessGroupGloo
        options = backend._Options()
        options._devices = [gloo.device]
        options._threads = 1
        options._timeout = _MEETING  # for this only: each operation brings its own
        self._messages: Any = backend(PrefixStore("messages", store), rank, 2, options)
        self._data = self._messages
        self.on_cuda = on_cuda
        if on_cuda:
            from torch._C._distributed_c10d import ProcessGroupNCCL

            nccl = ProcessGroupNCCL.Options()
            nccl._timeout = FOREVER
            self._data = ProcessGroupNCCL(PrefixStore("data", store), rank, 2, nccl)

    @_with_peer()
    def send_message(self, words: torch.Tensor) -> None:
        """words: int64 [n]"""
        first = torch.zeros(_FIRST_WORDS, dtype=torch.int64)
        first[0] = len(words)
        in_first = words[: _FIRST_WORDS - 1]
        first[1 : 1 + len(in_first)] = in_first
        self._messages.send([first], self._other, _MESSAGE).wait(self._patience)
        if len(words) > len(in_first):
            self._messages.send([words[len(in_first) :]], self._other, _MESSAGE).wait(self._patience)

    @_with_peer()
    def receive_message(self, max_words: int, timeout: timedelta | None = None) -> torch.Tensor:
        """int64 [n]. timeout: until it begins, if that may take longer."""
        first = torch.empty(_FIRST_WORDS, dtype=torch.int64)
        self._messages.recv([first], self._other, _MESSAGE).wait(timeout or self._patience)
        num_words = int(first[0])
        if not 0 <= num_words <= max_words:
            raise PeerUnreachableError(f"the peer announces {num_words} numbers, at most {max_words} are due")
        if num_words < _FIRST_WORDS:
            return first[1 : 1 + num_words]
        words = torch.empty(num_words, dtype=torch.int64)
        words[: _FIRST_WORDS - 1] = first[1:]
        self._messages.recv([words[_FIRST_WORDS - 1 :]], self._other, _MESSAGE).wait(self._patience)
        return words

    @_with_peer()
    def send_numbers(self, numbers: torch.Tensor) -> None:
        """numbers: int64 [n], as many as the peer's `start_receive_numbers` is for."""
        self._messages.send([numbers], self._other, _NUMBERS).wait(self._patience)

    @_with_peer()
    def start_receive_numbers(self, numbers: torch.Tensor) -> Any:
        """Fills `numbers`, int64 [n], until `finish_numbers` has been called with what is returned.

        Called before the peer sends, it spares a round trip: gloo sends when it has heard of a receive.
        """
        return self._messages.recv([numbers], self._other, _NUMBERS)

    @_with_peer()
    def finish_numbers(self, started: Any) -> None:
        started.wait(self._patience)

    @_with_peer()
    def start_send(self, data: torch.Tensor) -> Any:
        """data: contiguous; kept as it is until `finish` has been called with what is returned."""
        return self._data.send([data], self._other, _DATA)

    @_with_peer()
    def start_receive(self, data: torch.Tensor) -> Any:
        """Fills `data`, which is contiguous, until `finish` has been called with what is returned."""
        return self._data.recv([data], self._other, _DATA)

    @_with_peer()
    def finish(self, started: Any) -> None:
        """Of data in CUDA memory only the current stream waits; see `drain`."""
        if self.on_cuda:
            started.wait()
        else:
            started.wait(self._patience)

    @_with_peer()
    def drain(self) -> None:
        """Wait until the bytes of all finished operations are where they belong."""
        if not self.on_cuda:
            return
        reached = torch.Event("cuda")
        reached.record()
        give_up_s = time.monotonic() + self._patience.total_seconds()
        while not reached.query():
            if time.monotonic() > give_up_s:
                self._data.abort()
                raise PeerUnreachableError(f"the peer's data has not arrived within {self._patience}")
            time.sleep(1e-4)

    def break_off(self) -> None:
        """Close the connections: whoever waits at either end, in whichever thread, fails at once."""
        if self.on_cuda:
            with suppress(RuntimeError):
                self._data.abort()
        # Gloo has no other way: an operation that times out closes its group's connections.
        with suppress(RuntimeError):
            nothing = torch.empty(1, dtype=torch.int64)
            self._messages.recv([nothing], self._other, _NOTHING).wait(timedelta(milliseconds=1))


def _first_line(error: Exception) -> str:
    return str(error).split(". This is", 1)[0].splitlines()[0]
