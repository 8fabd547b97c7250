"""The backend `ipc`: a worker's KV pool in anonymous shared memory, read by other processes on the same host.

The segment is a memfd: it has no name anywhere in the file system, and the kernel frees it with the last
process that maps it, however that process ends. A peer reaches it as /proc/PID/fd/FD, which needs the same
user on the same host.

    offset  size             content
    0       8                magic
    8       8                epoch (uint64, little-endian as all that follows)
    16      8                num_blocks
    24      8                block_nbytes
    32      8                offset of the data, a multiple of the page size
    40      4 * num_blocks   generations (uint32)
    data    num_blocks * block_nbytes

KV in CUDA memory is reached by its CUDA IPC handle instead of the segment's data (cuda_ipc.py).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from prelay.v1 import transfer_pb2

from engine.layout import KvLayout
from transfer.base import Blocks, Generations, KvMemory, copy_boxes, on_cuda, tensor_of
from transfer.errors import SegmentError
from transfer.handoff import LinkId
from transfer.host_id import host_id
from transfer.layout import Box, Part, Route, WorkerLayout

if TYPE_CHECKING:
    import torch

_MAGIC = b"prelayKV"
_HEADER = struct.Struct("<8sQQQQ")

# Python's fcntl module does not name these (linux/fcntl.h).
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Where another process finds a segment.

    host_id: tells apart hosts and process namespaces, in which the same pid means another process.
    """

    pid: int
    fd: int
    num_bytes: int
    host_id: str


class SharedSegment:
    """This worker's KV pool: header, generations and data in one piece of shared memory.

    Its pages are touched when it is made, so that no request waits for the kernel to find memory.
    """

    def __init__(self, fd: int, memory: mmap.mmap, num_blocks: int, block_nbytes: int, data_at: int) -> None:
        self._fd = fd
        # For the next life that this memory serves. Nobody is told of it.
        self._kept_fd = os.dup(fd)
        weakref.finalize(self, os.close, self._kept_fd)
        self._memory = memory
        self._num_bytes = len(memory)
        self.num_blocks = num_blocks
        view = memoryview(memory)
        self._data = view[data_at:]
        self._generations: Generations = np.frombuffer(
            view, dtype=np.uint32, count=num_blocks, offset=_HEADER.size
        )
        self._array = np.frombuffer(self._data, dtype=np.uint8).reshape(num_blocks, block_nbytes)

    @classmethod
    def create(cls, layout: KvLayout, num_blocks: int, epoch: int) -> SharedSegment:
        """Raises SegmentError if the host does not have the memory."""
        data_at = _data_offset(num_blocks)
        num_bytes = data_at + num_blocks * layout.block_nbytes
        fd = os.memfd_create("prelay-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Otherwise a host that is out of memory kills the process when it touches a page some day.
            os.posix_fallocate(fd, 0, num_bytes)
            # A peer that maps the segment must not be killed by its shrinking.
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW)
            memory = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(fd)
            raise SegmentError(
                f"no {num_bytes} bytes of shared memory for {num_blocks} KV blocks ({error}): "
                f"lower kv_cache_tokens or give the host more memory"
            ) from error
        _HEADER.pack_into(memory, 0, _MAGIC, epoch, num_blocks, layout.block_nbytes, data_at)
        return cls(fd, memory, num_blocks, layout.block_nbytes, data_at)

    @property
    def ref(self) -> SegmentRef:
        return SegmentRef(os.getpid(), self._fd, self._num_bytes, host_id())

    @property
    def data_buffer(self) -> memoryview:
        """Writable, num_blocks * block_nbytes bytes."""
        return self._data

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The same bytes as uint8 [num_blocks, block_nbytes]."""
        return self._array

    @property
    def blocks(self) -> torch.Tensor:
        """The same again."""
        import torch

        return torch.from_numpy(self._array)

    @property
    def generations(self) -> Generations:
        """uint32 [num_blocks]; written by this worker's BlockPool only."""
        return self._generations

    def reopen(self, epoch: int) -> None:
        """After `close`: peers can open it again, as the memory of another life of this worker. What copies
        they still make of the earlier one they find out to be stale."""
        self._generations += 1  # modulo 2**32
        struct.pack_into("<Q", self._memory, len(_MAGIC), epoch)
        self.close()
        self._fd = os.dup(self._kept_fd)

    def close(self) -> None:
        """No peer can open the segment from here on. The memory itself goes with the last view and mapping
        of it, which is why this works while there still are some. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class IpcBackend:
    """Backend over SharedSegments, one for each of our ranks; the first has the generations that count."""

    name = "ipc"

    def __init__(self, memory: KvMemory, segments: Sequence[SharedSegment]) -> None:
        self._memory = memory
        self._segments = segments

    def reaches(self, theirs: transfer_pb2.Handshake) -> bool:
        return theirs.host_id == host_id()

    def offer(self, link: LinkId, theirs: transfer_pb2.Handshake, answer: transfer_pb2.Handshake) -> None:
        for segment, blocks in zip(self._segments, self._memory.ranks, strict=True):
            ref = segment.ref
            region = answer.ipc.ranks.add(pid=ref.pid, fd=ref.fd, num_bytes=ref.num_bytes)
            if on_cuda(blocks):
                from transfer.cuda_ipc import share_cuda

                region.cuda_handle, region.cuda_offset = share_cuda(tensor_of(blocks))

    def end_offer(self, link: LinkId) -> None:
        """Who has mapped a segment may go on reading it: generations tell it what its copy is worth."""

    def connect(self, theirs: transfer_pb2.Handshake, route: Route) -> IpcPull:
        if theirs.host_id != host_id():
            raise SegmentError(
                f"the peer's shared memory is on another host or in another container ({theirs.host_id}, "
                f"here is {host_id()}): place the two workers on one host, or use another backend"
            )
        refs = [SegmentRef(ref.pid, ref.fd, ref.num_bytes, theirs.host_id) for ref in theirs.ipc.ranks]
        if len(refs) != route.source.num_ranks:
            raise SegmentError(f"the peer has {route.source.num_ranks} ranks and {len(refs)} segments")
        source = map_memory(route.source, refs, theirs.epoch)
        ranks = [
            _open_cuda(region, blocks) if region.cuda_handle else blocks
            for region, blocks in zip(theirs.ipc.ranks, source.ranks, strict=True)
        ]
        return IpcPull(replace(source, ranks=tuple(ranks)), self._memory)

    def close(self) -> None:
        for segment in self._segments:
            segment.close()


class IpcPull:
    """The peer's memory, mapped read-only."""

    def __init__(self, source: KvMemory, target: KvMemory) -> None:
        self._source: KvMemory | None = source
        self._target = target

    def pull(self, part: Part, boxes: Sequence[Box]) -> None:
        assert self._source is not None
        copy_boxes(self._source, part, boxes, self._target)

    def close(self) -> None:
        self._source = None


def map_memory(layout: WorkerLayout, refs: Sequence[SegmentRef], epoch: int) -> KvMemory:
    """The segments of a peer's ranks. Raises SegmentError if one is not there, or is not of the life and
    shape that were announced."""
    ranks: list[Blocks] = []
    generations: list[Generations] = []
    for rank, ref in enumerate(refs):
        blocks, generation = _map_segment(ref, epoch, layout.rank(rank).block_nbytes)
        ranks.append(blocks)
        generations.append(generation)
    return KvMemory(layout, tuple(ranks), generations[0])


def _open_cuda(region: transfer_pb2.IpcSegment, blocks: Blocks) -> Blocks:
    """blocks: in the segment, of the same shape."""
    from transfer.cuda_ipc import open_cuda

    return open_cuda(region.cuda_handle, region.cuda_offset, blocks.shape)


def _map_segment(ref: SegmentRef, epoch: int, block_nbytes: int) -> tuple[npt.NDArray[np.uint8], Generations]:
    path = f"/proc/{ref.pid}/fd/{ref.fd}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"the peer's shared memory {path} cannot be opened: {error}") from error
    try:
        # Mapped page by page while copying, the first copies would be several times slower.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        memory = mmap.mmap(fd, ref.num_bytes, flags=flags, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise SegmentError(f"{path} is not shared memory of {ref.num_bytes} bytes: {error}") from error
    finally:
        os.close(fd)
    num_blocks, data_at = _checked_header(memory, path, epoch, block_nbytes)
    view = memoryview(memory)
    generations: Generations = np.frombuffer(view, np.uint32, num_blocks, _HEADER.size)
    data = np.frombuffer(view[data_at:], dtype=np.uint8)
    return data.reshape(num_blocks, block_nbytes), generations


def _data_offset(num_blocks: int) -> int:
    size = _HEADER.size + 4 * num_blocks
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _checked_header(memory: mmap.mmap, path: str, epoch: int, block_nbytes: int) -> tuple[int, int]:
    if len(memory) < _HEADER.size:
        raise SegmentError(f"{path} has {len(memory)} bytes: no room for a header")
    magic, found_epoch, num_blocks, found_nbytes, data_at = _HEADER.unpack_from(memory, 0)
    if magic != _MAGIC:
        raise SegmentError(f"{path} is not a KV segment: it begins with {magic!r}")
    if found_epoch != epoch:
        raise SegmentError(f"{path} belongs to epoch {found_epoch} of the peer, {epoch} was expected")
    if found_nbytes != block_nbytes:
        raise SegmentError(f"{path} has blocks of {found_nbytes} bytes, ours have {block_nbytes}")
    if data_at != _data_offset(num_blocks) or len(memory) != data_at + num_blocks * block_nbytes:
        raise SegmentError(f"{path} has {len(memory)} bytes, which {num_blocks} blocks do not add up to")
    return num_blocks, data_at
