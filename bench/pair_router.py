"""A router's client of two prefill workers and one decode worker, as small as a measurement needs it.

A request lives as in the router: Reserve at the decode worker, `Reserved` back, Prefill at the prefill
worker, the first token from there and the others from the decode worker.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from prelay.v1 import worker_pb2

from bench.errors import MeasurementError
from router.worker_link import ROLE_OF_PROTO, Registration, WorkerLink, connect

_TIMEOUT_S = 60.0


@dataclass
class Answer:
    """What was heard of one request. times: prefill_* from one worker, the others from the other."""

    prefill: str
    num_tokens: int = 0
    failed: str | None = None
    times: worker_pb2.StageTimes = field(default_factory=worker_pb2.StageTimes)
    reserved: asyncio.Event = field(default_factory=asyncio.Event)
    first: asyncio.Event = field(default_factory=asyncio.Event)
    decoding: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, event: asyncio.Event) -> None:
        """One of the answer's. Raises MeasurementError if the request failed, or nothing comes."""
        try:
            await asyncio.wait_for(event.wait(), _TIMEOUT_S)
        except TimeoutError as error:
            raise MeasurementError(f"no sign of a request on {self.prefill} for {_TIMEOUT_S} s") from error
        if self.failed is not None:
            raise MeasurementError(f"a request on {self.prefill} failed: {self.failed}")

    def fail(self, why: str) -> None:
        self.failed = why
        for event in (self.reserved, self.first, self.decoding, self.done):
            event.set()


class PairRouter:
    """Made by `attach`."""

    def __init__(self, prefills: dict[str, WorkerLink], decode: WorkerLink) -> None:
        self._prefills = prefills
        self._decode = decode
        self._answers: dict[str, Answer] = {}
        self._names = map(str, itertools.count(1))

    @classmethod
    async def attach(
        cls, prefills: Sequence[worker_pb2.WorkerInfo], decode: worker_pb2.WorkerInfo
    ) -> PairRouter:
        links = [await _connect(info) for info in (*prefills, decode)]
        router = cls({link.worker_id: link for link in links[:-1]}, links[-1])
        for link in links:
            link.start(router._heard, router._lost)
        return router

    async def place(
        self, prefill: str, prompt: Sequence[int], max_tokens: int, *, is_held: bool = False
    ) -> tuple[str, Answer]:
        """Returns the request's name when both workers have it. is_held: it is never to be decoded."""
        name = next(self._names)
        answer = self._answers[name] = Answer(prefill)
        sampling = worker_pb2.TokenSampling(max_tokens=max_tokens, top_p=1.0)
        with_peer = _ref(self._prefills[prefill])
        self._decode.send(
            worker_pb2.RouterMessage(
                reserve=worker_pb2.Reserve(
                    request_id=name, token_ids=prompt, sampling=sampling, prefill=with_peer
                )
            )
        )
        if is_held:
            self._decode.send(worker_pb2.RouterMessage(pause=worker_pb2.Pause(request_id=name)))
        await answer.until(answer.reserved)
        self._prefills[prefill].send(
            worker_pb2.RouterMessage(
                prefill=worker_pb2.Prefill(
                    request_id=name, token_ids=prompt, sampling=sampling, decode=_ref(self._decode)
                )
            )
        )
        return name, answer

    def cancel(self, name: str) -> None:
        for link in (self._prefills[self._answers.pop(name).prefill], self._decode):
            link.send(worker_pb2.RouterMessage(cancel=worker_pb2.Cancel(request_id=name)))

    async def close(self) -> None:
        for link in (*self._prefills.values(), self._decode):
            await link.close()

    def _heard(self, link: WorkerLink, message: worker_pb2.WorkerMessage) -> None:
        match message.WhichOneof("message"):
            case "reserved" if answer := self._answers.get(message.reserved.request_id):
                answer.reserved.set()
            case "failed" if answer := self._answers.get(message.failed.request_id):
                answer.fail(message.failed.message)
            case "step":
                for tokens in message.step.sequences:
                    self._tokens(tokens)

    def _tokens(self, tokens: worker_pb2.SequenceTokens) -> None:
        if (answer := self._answers.get(tokens.request_id)) is None:
            return  # cancelled
        answer.num_tokens += len(tokens.token_ids)
        answer.times.MergeFrom(tokens.times)
        (answer.first if tokens.first_index == 0 else answer.decoding).set()
        if tokens.stop_reason:
            answer.done.set()

    def _lost(self, link: WorkerLink, why: str) -> None:
        for answer in self._answers.values():
            answer.fail(f"{link.worker_id} is lost: {why}")


async def _connect(info: worker_pb2.WorkerInfo) -> WorkerLink:
    role = ROLE_OF_PROTO[info.role]
    return await connect(Registration(info.worker_id, info.epoch, role, info.address), "bench", _TIMEOUT_S)


def _ref(link: WorkerLink) -> worker_pb2.PeerRef:
    return worker_pb2.PeerRef(worker_id=link.worker_id, epoch=link.epoch, address=link.info.address)
