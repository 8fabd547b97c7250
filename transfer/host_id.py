"""Which machine this is, for those who can only meet on one."""

from __future__ import annotations

import os
from pathlib import Path


def host_id() -> str:
    """Identifies the kernel that runs this process and the namespace in which its process number counts."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
