"""How long the dispatcher bears with what may still turn out well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """recovery_wait_s: how long requests wait at the gate while there is no pair of workers.
    stream_buffer_tokens: of one answer that may be unread before its decode worker is paused;
    slow_reader_timeout_s: how long they may be.
    """

    recovery_wait_s: float
    stream_buffer_tokens: int
    slow_reader_timeout_s: float
