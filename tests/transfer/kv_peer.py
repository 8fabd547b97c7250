"""A worker's KV with known content, for tests of the backends. Run as a program, it offers it to others.

The program obeys lines: `offer LINK HANDSHAKE` (hex; answers with its own), `end LINK`, `recycle BLOCK`, and
`usage`, to which it answers with the CPU seconds it has used, its threads and its open files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from prelay.v1 import transfer_pb2

from engine.config import DTYPE_NBYTES
from transfer.base import Backend, KvMemory
from transfer.host_id import host_id
from transfer.ipc import IpcBackend, SharedSegment
from transfer.layout import Part, WorkerLayout
from transfer.memory import MemoryBackend
from transfer.nixl import NixlBackend
from transfer.torchdist import TorchDistBackend

NAMES = ("memory", "ipc", "torchdist", "nixl")
REMOTE_NAMES = NAMES[1:]
EPOCH = 7


def layout(tp: int = 1, pp: int = 1, block_size: int = 16, heads: int = 4) -> WorkerLayout:
    return WorkerLayout(
        num_layers=4,
        num_kv_heads=heads,
        head_dim=8,
        block_size=block_size,
        dtype="bfloat16",
        tp_size=tp,
        pp_size=pp,
    )


def truth(of: WorkerLayout, num_tokens: int) -> npt.NDArray[np.uint8]:
    """A sequence's KV: [num_layers, 2, num_tokens, num_kv_heads, head nbytes]."""
    shape = (of.num_layers, 2, num_tokens, of.num_kv_heads, of.head_dim * DTYPE_NBYTES[of.dtype])
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


class Worker:
    """KvMemory with one backend, its own and others' blocks filled with noise."""

    def __init__(
        self, name: str, of: WorkerLayout, num_blocks: int, peers: dict[str, KvMemory], patience_s: float = 10
    ) -> None:
        self._patience_s = patience_s
        ranks = range(of.num_ranks)
        self.worker_id = f"w{len(peers)}"
        self.segments = [SharedSegment.create(of.rank(rank), num_blocks, EPOCH) for rank in ranks]
        self.memory = KvMemory(
            of, tuple(segment.blocks for segment in self.segments), self.segments[0].generations
        )
        rng = np.random.default_rng(len(peers))
        for blocks in self.memory.ranks:
            blocks.numpy()[:] = rng.integers(0, 256, blocks.shape, dtype=np.uint8)
        self.memory.generations[:] = rng.integers(0, 2**32, num_blocks, dtype=np.uint32)
        peers[self.worker_id] = self.memory
        self.backend = self._backend(name, peers)

    def _backend(self, name: str, peers: dict[str, KvMemory]) -> Backend:
        match name:
            case "memory":
                return MemoryBackend(self.memory, peers)
            case "ipc":
                return IpcBackend(self.memory, self.segments)
            case "torchdist":
                return TorchDistBackend(self.memory, "127.0.0.1", self._patience_s)
            case _:
                return NixlBackend(
                    self.memory, f"{self.worker_id}-{os.getpid()}-{id(self)}", self._patience_s
                )

    def handshake(self) -> transfer_pb2.Handshake:
        return transfer_pb2.Handshake(worker_id=self.worker_id, epoch=EPOCH, host_id=host_id())

    def offer(self, link: int, theirs: transfer_pb2.Handshake) -> transfer_pb2.Handshake:
        answer = self.handshake()
        self.backend.offer(link, theirs, answer)
        return answer

    def write(self, kv: npt.NDArray[np.uint8], blocks: Sequence[int]) -> None:
        """Put a sequence into blocks of ours, on every rank that keeps some of it."""
        for rank, view in enumerate(self._views()):
            layers, heads, size = (*self._share(rank), self.memory.layout.block_size)
            for token in range(kv.shape[2]):
                view[blocks[token // size], :, :, token % size] = kv[layers, :, token, heads]

    def read(self, num_tokens: int, blocks: Sequence[int]) -> list[tuple[slice, slice, Any]]:
        """(layers, heads, [layers, 2, num_tokens, heads, head nbytes]) of every rank."""
        size, found = self.memory.layout.block_size, []
        for rank, view in enumerate(self._views()):
            tokens = [view[blocks[token // size], :, :, token % size] for token in range(num_tokens)]
            found.append((*self._share(rank), np.stack(tokens, axis=2)))
        return found

    def part(
        self, start: int, end: int, blocks: Sequence[int], layers: tuple[int, int] | None = None
    ) -> Part:
        """Tokens [start, end) of a sequence in these blocks, offered as they are now."""
        size = self.memory.layout.block_size
        mine = tuple(blocks[start // size : -(-end // size)])
        generations = tuple(int(self.memory.generations[block]) for block in mine)
        return Part(start, end, *(layers or (0, self.memory.layout.num_layers)), mine, generations)

    def close(self) -> None:
        self.backend.close()
        for segment in self.segments:
            segment.close()

    def _share(self, rank: int) -> tuple[slice, slice]:
        layers, heads = self.memory.layout.layers(rank), self.memory.layout.heads(rank)
        return slice(layers.start, layers.stop), slice(heads.start, heads.stop)

    def _views(self) -> list[npt.NDArray[np.uint8]]:
        of = self.memory.layout
        shapes = [of.rank(rank).block_shape for rank in range(of.num_ranks)]
        return [
            blocks.numpy().reshape(-1, *shape[:-1], shape[-1] * DTYPE_NBYTES[of.dtype])
            for blocks, shape in zip(self.memory.ranks, shapes, strict=True)
        ]


@dataclass
class Usage:
    cpu_s: float
    threads: int
    files: int

    @classmethod
    def now(cls) -> Usage:
        return cls(time.process_time(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")))


class PeerProcess:
    """This file as another process, seen from the test."""

    def __init__(self, name: str, num_blocks: int, num_tokens: int, blocks: Sequence[int]) -> None:
        arguments = [name, str(num_blocks), str(num_tokens), *map(str, blocks)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.generations = [int(word) for word in self._answer().split()]

    def offer(self, link: int, ours: transfer_pb2.Handshake) -> transfer_pb2.Handshake:
        return transfer_pb2.Handshake.FromString(
            bytes.fromhex(self.do(f"offer {link} {ours.SerializeToString().hex()}"))
        )

    def do(self, command: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def usage(self) -> Usage:
        cpu_s, threads, files = self.do("usage").split()
        return Usage(float(cpu_s), int(threads), int(files))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the peer process has ended"
        return line.strip()


def main(name: str, num_blocks: str, num_tokens: str, *blocks: str) -> None:
    worker = Worker(name, layout(), int(num_blocks), {})
    worker.write(truth(worker.memory.layout, int(num_tokens)), [int(block) for block in blocks])
    print(*worker.memory.generations, flush=True)
    for line in sys.stdin:
        match line.split():
            case "offer", link, theirs:
                answer = worker.offer(int(link), transfer_pb2.Handshake.FromString(bytes.fromhex(theirs)))
                print(answer.SerializeToString().hex(), flush=True)
            case "end", link:
                worker.backend.end_offer(int(link))
                print("done", flush=True)
            case "recycle", block:
                worker.memory.generations[int(block)] += 1
                for rank in worker.memory.ranks:
                    rank[int(block)] = 255
                print("done", flush=True)
            case _:
                usage = Usage.now()
                print(usage.cpu_s, usage.threads, usage.files, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
