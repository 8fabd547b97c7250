"""KV memory that a rank shares with its leader: one process of a worker sees that of all its ranks."""

from __future__ import annotations

import mmap
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """`num_bytes` bytes from `offset` on of the file that is open as `descriptor` in this process; a rank's
    process inherits it under the same number."""

    descriptor: int
    offset: int
    num_bytes: int

    def map(self) -> memoryview:
        """The memory, writable. It stays for as long as the view does. Raises OSError or ValueError."""
        # Pages that are mapped one by one would make the first steps slow.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return memoryview(mmap.mmap(self.descriptor, self.offset + self.num_bytes, flags=flags))[
            self.offset :
        ]
