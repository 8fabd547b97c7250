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
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.layout import KvLayout
from transfer.base import Blocks, Generations, copy_blocks
from transfer.errors import SegmentError

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
        self._num_bytes = len(memory)
        self.num_blocks = num_blocks
        view = memoryview(memory)
        self._data = view[data_at:]
        self._generations: Generations = np.frombuffer(
            view, dtype=np.uint32, count=num_blocks, offset=_HEADER.size
        )
        self._blocks: Blocks = np.frombuffer(self._data, dtype=np.uint8).reshape(num_blocks, block_nbytes)

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
    def blocks(self) -> Blocks:
        """The same bytes as uint8 [num_blocks, block_nbytes]."""
        return self._blocks

    @property
    def generations(self) -> Generations:
        """uint32 [num_blocks]; written by this worker's BlockPool only."""
        return self._generations

    def close(self) -> None:
        """No peer can open the segment from here on. The memory itself goes with the last view and mapping
        of it, which is why this works while there still are some. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class IpcBackend:
    """PullBackend over a peer's SharedSegment, mapped read-only.

    Raises SegmentError if there is no such segment, or it is not of the life and shape that were announced.
    """

    name = "ipc"

    def __init__(self, ref: SegmentRef, epoch: int, target: SharedSegment) -> None:
        if ref.host_id != host_id():
            raise SegmentError(
                f"the peer's shared memory is on another host or in another container ({ref.host_id}, "
                f"here is {host_id()}): place the two workers on one host"
            )
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
        self._target = target.blocks
        block_nbytes = target.blocks.shape[1]
        num_blocks, data_at = _checked_header(memory, path, epoch, block_nbytes)
        view = memoryview(memory)
        self._generations: Generations = np.frombuffer(view, np.uint32, num_blocks, _HEADER.size)
        self._source: Blocks = np.frombuffer(view[data_at:], np.uint8).reshape(num_blocks, block_nbytes)

    def pull(self, remote: Sequence[int], generations: Sequence[int], local: Sequence[int]) -> None:
        copy_blocks(self._source, self._generations, remote, generations, self._target, local)

    def close(self) -> None:
        self._source = np.empty((0, 0), np.uint8)
        self._generations = np.empty(0, np.uint32)


def host_id() -> str:
    """Identifies the kernel that runs this process and the namespace in which its process number counts."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


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
