"""A fake worker's end of the stream to one router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from prelay.v1 import worker_pb2

from engine.sequence import RequestKey

PairRefusal = tuple[worker_pb2.FailureReason, str]


class FakeStream:
    """seen: number of the last command. snapshots: that were sent. pairs: prefill workers that the router
    wants linked, by id. steps: what the next snapshot says of them."""

    def __init__(self) -> None:
        self.seen = 0
        self.snapshots = 0
        self.pairs: dict[str, worker_pb2.PeerRef] = {}
        self.steps: list[worker_pb2.StepTime] = []
        self._outgoing: asyncio.Queue[worker_pb2.WorkerMessage] = asyncio.Queue()
        self._all_out = asyncio.Event()
        self._broken = asyncio.Event()

    async def messages(self, thawed: asyncio.Event) -> AsyncGenerator[worker_pb2.WorkerMessage, None]:
        """What goes out, until the stream is broken; nothing while the worker is not `thawed`."""
        broken = asyncio.create_task(self._broken.wait())
        getting: asyncio.Task[worker_pb2.WorkerMessage] | None = None
        try:
            while not self._broken.is_set():
                getting = asyncio.create_task(self._outgoing.get())
                await asyncio.wait((getting, broken), return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    return
                await thawed.wait()
                yield getting.result()
                if self._outgoing.empty():
                    self._all_out.set()
        finally:
            broken.cancel()
            if getting is not None:
                getting.cancel()

    def break_off(self) -> None:
        """Ends it."""
        self._broken.set()

    async def all_out(self) -> None:
        """Returns when nothing waits to go out."""
        while not self._outgoing.empty():
            self._all_out.clear()
            await self._all_out.wait()

    def put(self, **message: Any) -> None:
        """Sends a WorkerMessage."""
        self._outgoing.put_nowait(worker_pb2.WorkerMessage(**message))

    def fail(self, key: RequestKey, reason: worker_pb2.FailureReason, message: str = "") -> None:
        """Says that a request failed."""
        failed = worker_pb2.Failed(
            request_id=key.request_id, attempt=key.attempt, reason=reason, message=message
        )
        self.put(failed=failed)

    def pair(self, peer: worker_pb2.PeerRef, refusal: PairRefusal | None) -> None:
        """The router wants this pair."""
        self.pairs[peer.worker_id] = peer
        self._say_pair(peer, refusal)

    def unpair(self, peer: worker_pb2.PeerRef) -> None:
        """The router says that this life of a prefill worker is over."""
        known = self.pairs.get(peer.worker_id)
        if known is not None and known.epoch == peer.epoch:
            del self.pairs[peer.worker_id]

    def say_pairs(self, refusal: PairRefusal | None) -> None:
        """How it stands with all pairs: linked, or refused for a reason."""
        for peer in self.pairs.values():
            self._say_pair(peer, refusal)

    def _say_pair(self, peer: worker_pb2.PeerRef, refusal: PairRefusal | None) -> None:
        state = worker_pb2.PairState(worker_id=peer.worker_id, epoch=peer.epoch)
        if refusal is None:
            state.linked, state.backend = True, "fake"
        else:
            state.reason, state.message = refusal
        self.put(pair=state)
