"""A cluster to strike at: workers on fake engines, each a process behind proxies, and a router right here.

A fake engine's answer is a hash of its whole context as it stands in the KV blocks, so an answer that equals
`undisturbed` shows that every block, token and index was right on its way through whatever was done to it.

`Cluster.all_is_well` holds the four assertions that every fault test makes: the tokens of an undisturbed run,
no block leaked on either side, no request beyond its deadline, the right status code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import aiohttp
import grpc
import grpc.aio
from prelay.v1 import inference_pb2, inference_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from engine.fake import fake_answer, fake_logprobs
from engine.sequence import TokenSampling
from router.app import Addresses, Router
from router.pair_table import LinkState, Pair
from router.pool_view import Role
from router.settings import RouterSettings
from router.worker_link import Registration
from tests.faults.fake_worker import Spec
from transfer.fault_proxy import FaultProxy

STORYTELLER = Path(__file__).parents[2] / "deploy" / "models" / "storyteller"
LIVENESS_S = 1.0
LEASE_S = Spec("", "").lease_s
DEADLINE_S = 30.0
"""Of a request that says nothing else. What takes longer is stuck, also on a slow machine."""

Wish: TypeAlias = tuple[list[int], inference_pb2.SamplingParams]

SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
"""A gRPC client's channel that takes no more of an answer than it reads, about."""

OK = grpc.StatusCode.OK
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def sampling(max_tokens: int = 40, **fields: Any) -> inference_pb2.SamplingParams:
    """Greedy, of exactly so many tokens, unless `fields` say otherwise."""
    return inference_pb2.SamplingParams(
        **{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **fields}
    )


def prompts(count: int, seed: int, longest: int = 300) -> list[list[int]]:
    """Different prompts of token ids, of up to `longest` tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 2000) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def mixed(count: int, seed: int, max_tokens: int = 40, longest: int = 300) -> list[Wish]:
    """Requests of every kind whose answer a fault could spoil: greedy, seeded, with penalties, with
    log-probabilities, with a least and a most number of tokens."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": seed},
        {"presence_penalty": 0.5, "repetition_penalty": 1.1},
        {"logprobs": 2},
        {"temperature": 0.7, "seed": seed + 1, "frequency_penalty": 0.5, "logprobs": 0},
    ]
    return [
        (prompt, sampling(max_tokens, **kinds[index % len(kinds)]))
        for index, prompt in enumerate(prompts(count, seed, longest))
    ]


def undisturbed(prompt: Sequence[int], wanted: inference_pb2.SamplingParams) -> list[int]:
    """The answer that a run without faults gives."""
    return fake_answer(
        prompt,
        TokenSampling(
            temperature=wanted.temperature,
            top_k=0,
            top_p=1.0,
            seed=wanted.seed,
            max_tokens=wanted.max_tokens,
            min_tokens=wanted.min_tokens,
            stop_token_ids=frozenset(wanted.stop_token_ids),
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            repetition_penalty=wanted.repetition_penalty if wanted.HasField("repetition_penalty") else 1.0,
        ),
    )


class Ask:
    """A client's request: sent when it is made, read as the answer comes."""

    def __init__(
        self,
        stub: inference_pb2_grpc.InferenceStub,
        prompt: Sequence[int],
        wanted: inference_pb2.SamplingParams,
        deadline_s: float,
    ) -> None:
        self.prompt, self.wanted, self.deadline_s = list(prompt), wanted, deadline_s
        self.messages: list[inference_pb2.GenerateResponse] = []
        self.code: grpc.StatusCode | None = None
        self.error = ""
        self.duration_s = 0.0
        self._news = asyncio.Condition()
        token_ids = inference_pb2.TokenIds(ids=self.prompt)
        request = inference_pb2.GenerateRequest(token_ids=token_ids, sampling=wanted)
        self._call = stub.Generate(request, timeout=deadline_s)
        self._task = asyncio.create_task(self._read())

    @property
    def tokens(self) -> list[int]:
        return [token for message in self.messages for token in message.token_ids]

    @property
    def finish(self) -> inference_pb2.Finish:
        assert self.messages, f"no answer: {self.code} {self.error}"
        return self.messages[-1].finish

    async def reaches(self, num_tokens: int) -> Ask:
        """Until so many tokens of the answer are here. An end before that is a failure."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.tokens) >= num_tokens or self.code is not None)
        assert len(self.tokens) >= num_tokens, f"{self.code} after {len(self.tokens)} tokens: {self.error}"
        return self

    async def end(self) -> Ask:
        """Until the call has ended."""
        await asyncio.wait([self._task])
        self._task.result()
        return self

    def leave(self) -> None:
        """The client goes away."""
        self._call.cancel()

    async def _read(self) -> None:
        began = time.monotonic()
        try:
            async for message in self._call:
                async with self._news:
                    self.messages.append(message)
                    self._news.notify_all()
            code = await self._call.code()
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
        except grpc.aio.AioRpcError as error:
            code, self.error = error.code(), error.details() or ""
        async with self._news:
            self.code = code
            self._news.notify_all()
        self.duration_s = time.monotonic() - began


class Nursery:
    """The process that workers are forked from."""

    def __init__(self, orders: IO[bytes]) -> None:
        self._orders = orders

    async def birth(self, spec: Spec) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new worker process; its end of the line that fake_worker.py describes."""
        dialled: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()
        server = await asyncio.start_server(lambda *streams: dialled.set_result(streams), "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self._orders.write(spec.order(f"{host}:{port}").encode() + b"\n")
        self._orders.flush()
        async with asyncio.timeout(DEADLINE_S):
            streams = await dialled
        server.close()
        return streams


@contextmanager
def nursery() -> Iterator[Nursery]:
    script = Path(__file__).with_name("fake_worker.py")
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        yield Nursery(process.stdin)
        process.stdin.close()


class Worker:
    """One life of a worker. router_side: between the router and it. peer_side: between it and those that
    dial it, decode workers if it is a prefill worker."""

    def __init__(
        self,
        spec: Spec,
        ready: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        router_side: FaultProxy,
        peer_side: FaultProxy,
    ) -> None:
        self.spec, self.router_side, self.peer_side = spec, router_side, peer_side
        self.address: str = ready["address"]
        self.metrics: str = ready["metrics"]
        self.dead = False
        self.defects: list[str] = []
        """What it has logged as an error."""
        self._pid: int = ready["pid"]
        self._writer = writer
        self._held: asyncio.Queue[int] = asyncio.Queue()
        self._obeyed: asyncio.Queue[str] = asyncio.Queue()
        self._reading = asyncio.create_task(self._read(reader))

    @property
    def id(self) -> str:
        return self.spec.worker_id

    @property
    def ended(self) -> bool:
        """Whether its process has ended."""
        return self._reading.done()

    async def tell(self, line: str) -> None:
        """One of the words of fake_worker.py; returns when it holds."""
        self._writer.write(line.encode() + b"\n")
        await self._obeyed.get()

    async def held(self) -> int:
        """Until its engine stands before a step; how many tokens that step has."""
        return await self._held.get()

    async def kill(self) -> None:
        """kill -9."""
        self.dead = True
        if not self.ended:
            os.kill(self._pid, signal.SIGKILL)
        await self._reading

    def pause(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    async def samples(self) -> dict[tuple[str, str], float]:
        """Its metrics by name and the value of their only label, "" if they have none. Sums, where several
        have the same."""
        found: Counter[tuple[str, str]] = Counter()
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{self.metrics}/metrics") as response,
        ):
            text = await response.text()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name, next(iter(sample.labels.values()), "")] += sample.value
        return dict(found)

    async def blocks_held(self) -> dict[str, float]:
        """KV blocks that somebody owns or leases, or that the books have lost; all zero when it is idle."""
        samples = await self.samples()
        counts = {
            state: samples["prelay_kv_blocks", state] for state in ("free", "cached", "owned", "leased")
        }
        lost = self.spec.num_blocks - sum(counts.values())
        return {"owned": counts["owned"], "leased": counts["leased"], "lost": lost}

    async def idle(self, within_s: float = LEASE_S + 5.0) -> None:
        """Until it holds no block for anybody."""
        end = time.monotonic() + within_s
        while any((held := await self.blocks_held()).values()):
            assert time.monotonic() < end, f"{self.id} still holds blocks after {within_s} s: {held}"
            await asyncio.sleep(0.01)
        assert not self.ended, f"{self.id} ended by itself"

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                said = json.loads(line)
                match said:
                    case "ok":
                        self._obeyed.put_nowait(said)
                    case {"held": num_tokens}:
                        self._held.put_nowait(num_tokens)
                    case {"defect": text}:
                        self.defects.append(text)
        self._writer.close()


class Defects(logging.Handler):
    """What the router logs as an error: no fault from outside may cause that."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(self.format(record))


class Cluster:
    """Used in `async with`: a router, and workers as they are added."""

    def __init__(self, nursery: Nursery, **settings: Any) -> None:
        self._nursery = nursery
        doors = dict.fromkeys(("http", "grpc", "metrics", "admin"), "127.0.0.1:0")
        self.router = Router(
            RouterSettings(
                checkpoint=str(STORYTELLER),
                model_name="fake",
                liveness_timeout_s=LIVENESS_S,
                **doors,
                **settings,
            )
        )
        self.workers: dict[str, Worker] = {}
        self.addresses: Addresses
        self.stub: inference_pb2_grpc.InferenceStub
        self._stack = AsyncExitStack()
        self._defects = Defects()

    async def __aenter__(self) -> Cluster:
        logging.getLogger("router").addHandler(self._defects)
        self._stack.callback(logging.getLogger("router").removeHandler, self._defects)
        self.addresses = await self.router.start()
        self._stack.push_async_callback(self.router.stop)
        channel = await self._stack.enter_async_context(grpc.aio.insecure_channel(self.addresses.grpc))
        self.stub = inference_pb2_grpc.InferenceStub(channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.router_side.heal()
            worker.peer_side.heal()
        await self._stack.aclose()

    def __getitem__(self, worker_id: str) -> Worker:
        return self.workers[worker_id]

    async def add(self, *worker_ids: str, **changes: Any) -> None:
        """Starts workers and registers them. changes: of their Spec."""
        specs = [replace(Spec(name, name.partition("-")[0]), **changes) for name in worker_ids]
        await asyncio.gather(*(self._start(spec) for spec in specs))
        for spec in specs:
            await self.register(spec.worker_id)
        await self.linked()

    async def revive(self, worker_id: str, **changes: Any) -> None:
        """Starts the next life of a worker, at the same addresses unless `changes` of its Spec say else."""
        last = self.workers[worker_id]
        changes = {"port": int(last.address.rpartition(":")[2]), **changes}
        await self._start(replace(last.spec, epoch=last.spec.epoch + 1, **changes))
        await self.register(worker_id)

    async def register(self, worker_id: str) -> None:
        """What the launcher does with a worker that serves, or serves again."""
        worker = self.workers[worker_id]
        await self.router.workers.register(
            Registration(worker_id, worker.spec.epoch, Role(worker.spec.role), worker.router_side.address)
        )

    @property
    def live_requests(self) -> int:
        return len(self.router.dispatcher.live)

    @property
    def gated_requests(self) -> int:
        """Those that wait in the router for a pair."""
        return self.router.dispatcher.live.gated

    async def linked(self) -> None:
        """Until all pairs are that can be."""
        table = self.router.pool.pairs
        pairs = [Pair(p.id, d.id) for p in self.of("prefill") for d in self.of("decode")]

        def settled(pair: Pair) -> bool:
            link = table.get(pair)
            return link is not None and link.state in (LinkState.LINKED, LinkState.MISMATCHED)

        await self.eventually(lambda: all(map(settled, pairs)))

    def is_up(self, worker_id: str) -> bool:
        """Whether the router has not given the worker up."""
        return any(link.up for link in self.router.workers.links() if link.worker_id == worker_id)

    def ask(
        self,
        prompt: Sequence[int],
        wanted: inference_pb2.SamplingParams | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Ask:
        return Ask(self.stub, prompt, sampling() if wanted is None else wanted, deadline_s)

    def ask_all(self, wishes: Sequence[Wish], deadline_s: float = DEADLINE_S) -> list[Ask]:
        return [self.ask(*wish, deadline_s) for wish in wishes]

    async def tell(self, role: str, line: str) -> None:
        """To all workers of a role that live; see fake_worker.py."""
        await asyncio.gather(*(worker.tell(line) for worker in self.of(role)))

    def of(self, role: str) -> list[Worker]:
        """The workers of a role that live."""
        return [worker for worker in self.workers.values() if worker.spec.role == role and not worker.dead]

    async def all_is_well(self, *asks: Ask, code: grpc.StatusCode = OK) -> None:
        """The four assertions, on requests that end, or are ending, with `code`."""
        for ask in asks:
            await ask.end()
        for number, ask in enumerate(asks):
            where = f"request {number} of {len(asks)}: {ask.code} {ask.error}"
            assert ask.code is code, where
            assert ask.duration_s < ask.deadline_s + 1.0, where
            wanted = undisturbed(ask.prompt, ask.wanted)
            assert ask.tokens == (wanted if code is OK else wanted[: len(ask.tokens)]), where
            if code is OK:
                _finish_is_right(ask)
        await self.idle()

    async def idle(self, within_s: float = LEASE_S + 5.0) -> None:
        """Until nothing is held for any request, anywhere that lives."""
        await self.eventually(lambda: self.live_requests == 0, within_s)
        await asyncio.gather(*(w.idle(within_s) for w in self.workers.values() if not w.dead))
        defects = [*self._defects.seen, *(d for worker in self.workers.values() for d in worker.defects)]
        assert not defects, "\n".join(defects)

    async def eventually(self, condition: Callable[[], bool], within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def _start(self, spec: Spec) -> None:
        last = self.workers.get(spec.worker_id)
        if last is None:
            router_side = await self._stack.enter_async_context(FaultProxy("127.0.0.1:0"))
            peer_side = await self._stack.enter_async_context(FaultProxy("127.0.0.1:0"))
        else:
            router_side, peer_side = last.router_side, last.peer_side
        spec = replace(spec, peer_address=peer_side.address)
        reader, writer = await self._nursery.birth(spec)
        self._stack.callback(writer.close)
        line = await reader.readline()
        assert line, f"{spec.worker_id} did not start: what it wrote to standard error says why"
        ready = json.loads(line)
        router_side.to = peer_side.to = ready["address"]
        worker = Worker(spec, ready, reader, writer, router_side, peer_side)
        self.workers[spec.worker_id] = worker
        self._stack.push_async_callback(worker.kill)


def _finish_is_right(ask: Ask) -> None:
    usage, details = ask.finish.usage, ask.finish.details
    assert usage.prompt_tokens == len(ask.prompt)
    assert usage.completion_tokens == len(ask.tokens)
    seconds = [stage.ToNanoseconds() / 1e9 for stage in details.stages.values()]
    assert abs(sum(seconds) - details.duration.ToNanoseconds() / 1e9) < 1e-6
    if ask.wanted.HasField("logprobs"):
        scored = [one for message in ask.messages for one in message.logprobs]
        whole = ask.prompt + ask.tokens
        at = range(len(ask.prompt), len(whole))
        expected = [fake_logprobs(whole, index, ask.wanted.logprobs) for index in at]
        assert [(got.token_id, got.logprob, got.rank) for got in scored] == [
            (one.token_id, one.logprob, one.rank) for one in expected
        ]
        assert [[(top.token_id, top.logprob) for top in got.top] for got in scored] == [
            list(one.top) for one in expected
        ]
