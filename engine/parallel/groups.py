"""Groups of ranks over torch.distributed, as objects: gloo between CPUs, NCCL between GPUs.

No process-wide state: a group is made from a store that its ranks share, and is gone with its object. With
gloo an operation raises GroupBrokenError at once when another rank's process is gone, as its connections
close; with NCCL `abort` makes it fail. The NCCL path has not been run yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from engine.errors import GroupBrokenError
from engine.shard import Shard

# Operations wait for as long as other ranks compute; who is dead is found out otherwise.
_FOREVER = timedelta(days=365)
_START_TIMEOUT = timedelta(seconds=300)


@contextmanager
def _between_ranks() -> Iterator[None]:
    """torch's complaint about a connection told apart from those about a rank's own part."""
    try:
        yield
    except RuntimeError as error:
        raise GroupBrokenError(f"an operation between ranks failed: {error}") from error


def open_store(host: str, port: int, is_leader: bool) -> TCPStore:
    """Where ranks find each other. The leader serves it; with port 0 on a free port, `store.port`."""
    return TCPStore(host, port, is_master=is_leader, timeout=_START_TIMEOUT, wait_for_workers=False)


@dataclass(frozen=True, slots=True)
class RankGroups:
    """The groups that one rank is in. tensor: ranks with the same layers. world: all of the worker."""

    tensor: DistributedGroup
    world: DistributedGroup

    @classmethod
    @_between_ranks()
    def open(cls, store: Store, shard: Shard, device: torch.device, host: str) -> RankGroups:
        """Meet the others; returns when all are there. host: address that this rank is reached at.

        A rank that has gone before is waited for all the same.
        """
        rank = shard.pp_rank * shard.tp_size + shard.tp_rank
        size = shard.pp_size * shard.tp_size
        tensor_store = PrefixStore(f"tensor{shard.pp_rank}", store)
        return cls(
            DistributedGroup(_process_group(tensor_store, shard.tp_rank, shard.tp_size, device, host)),
            DistributedGroup(_process_group(PrefixStore("world", store), rank, size, device, host)),
        )


class DistributedGroup:
    """engine.parallel.base.TensorGroup over a process group, and messages between two of its ranks."""

    def __init__(self, group: Any) -> None:
        self._group = group

    @property
    def size(self) -> int:
        size: int = self._group.size()
        return size

    @_between_ranks()
    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            self._group.allreduce([partial]).wait()
        return partial

    @_between_ranks()
    def concat(self, columns: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return columns
        columns = columns.contiguous()
        parts = [torch.empty_like(columns) for _ in range(self.size)]
        self._group.allgather([parts], [columns]).wait()
        return torch.cat(parts, dim=-1)

    @_between_ranks()
    def send(self, tensor: torch.Tensor, to_rank: int, tag: int) -> Any:
        """Start to send; give `sent` what is returned, and keep the tensor as it is until then."""
        return self._group.send([tensor], to_rank, tag)

    @_between_ranks()
    def sent(self, sending: Any) -> None:
        """Wait until what `send` has begun is done."""
        sending.wait()

    @_between_ranks()
    def receive(self, tensor: torch.Tensor, from_rank: int, tag: int) -> torch.Tensor:
        """Fill `tensor` with what was sent with this tag."""
        self._group.recv([tensor], from_rank, tag).wait()
        return tensor

    @_between_ranks()
    def barrier(self) -> None:
        """Returns when every rank has called it."""
        if self.size > 1:
            self._group.allreduce([torch.zeros(1)]).wait()


def _process_group(store: Store, rank: int, size: int, device: torch.device, host: str) -> Any:
    if device.type == "cuda":
        from torch._C._distributed_c10d import ProcessGroupNCCL

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = _FOREVER
        return ProcessGroupNCCL(store, rank, size, nccl)
    backend: Any = ProcessGroupGloo  # its stub lacks what it has
    gloo = backend._Options()
    # Named: gloo would otherwise look up the host's own name, which need not lead anywhere.
    gloo._devices = [backend.create_device(hostname=host)]
    gloo._timeout = _FOREVER
    return backend(store, rank, size, gloo)
