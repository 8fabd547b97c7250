"""A whole router in this process, on ports of the system's choice, with fake workers behind it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import openai
import pytest
import tokenizers
from prelay.v1 import inference_pb2_grpc, worker_pb2

from engine.sequence import TokenSampling
from router.app import Addresses, Router
from router.fake_fleet import FakeFleet
from router.fake_model import FakeModel, fake_answer
from router.fake_worker import FakeWorker
from router.pair_table import LinkState, Pair, PairLink
from router.policies import POLICIES, PolicyInputs
from router.policy import Policy
from router.pool_view import WRITERS, Role
from router.requests import Request
from router.settings import RouterSettings
from router.slo import Slo, SloClass, SloLimits
from router.worker_link import ROLE_OF_PROTO, Registration

EOS = 256
VOCAB_SIZE = 257
MAX_MODEL_LEN = 512


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and byte-level tokenizer of a model without weights: token id = byte, 256 = EOS."""
    path = tmp_path_factory.mktemp("checkpoint")
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": VOCAB_SIZE, "eos_token_id": EOS,
        "max_position_embeddings": MAX_MODEL_LEN, "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    # GPT-2's letters for bytes: those that print stand for themselves, the others follow from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(256 + index): byte for index, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={**vocabulary, "</s>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    return path


@dataclass
class Cluster:
    """The router, its fake workers, and clients for all of its ports."""

    router: Router
    addresses: Addresses
    fleet: FakeFleet
    prefill: FakeWorker
    decode: FakeWorker

    @property
    def base_url(self) -> str:
        return f"http://{self.addresses.http}"

    async def register(self, worker: FakeWorker) -> None:
        info = worker.info
        await self.router.workers.register(
            Registration(info.worker_id, info.epoch, ROLE_OF_PROTO[info.role], info.address)
        )
        await self.until(lambda: not self._linking())

    def _linking(self) -> bool:
        """Whether a decode worker has not yet said how it stands with a prefill worker."""
        pool = self.router.pool
        pairs = (Pair(p.worker_id, d.worker_id) for p in pool.up(Role.PREFILL) for d in pool.up(*WRITERS))
        return any(pool.pairs.get(pair) == PairLink(LinkState.LINKING) for pair in pairs)

    async def add(self, role: worker_pb2.Role, worker_id: str, **capacity: Any) -> FakeWorker:
        worker = await self.fleet.start(role, worker_id, **capacity)
        await self.register(worker)
        return worker

    @asynccontextmanager
    async def openai(self) -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(
            base_url=f"{self.base_url}/v1", api_key="none", max_retries=0
        ) as client:
            yield client

    @asynccontextmanager
    async def http(self) -> AsyncIterator[aiohttp.ClientSession]:
        async with aiohttp.ClientSession(self.base_url) as session:
            yield session

    @asynccontextmanager
    async def grpc(self) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
        async with grpc.aio.insecure_channel(self.addresses.grpc) as channel:
            yield inference_pb2_grpc.InferenceStub(channel)

    def answer(self, prompt: str, max_tokens: int, **sampling: Any) -> str:
        """What the fake workers answer to a prompt, as text."""
        wanted = worker_pb2.TokenSampling(max_tokens=max_tokens, stop_token_ids=[EOS], **sampling)
        tokens, _ = fake_answer(self.fleet.model, prompt.encode(), wanted)
        return bytes(token for token in tokens if token < EOS).decode()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Lets the event loop turn until `holds()`; the test's own timeout is the limit."""
        while not holds():  # noqa: ASYNC110 (there is no event for everything that a test may wait for)
            await asyncio.sleep(0)

    async def settled(self) -> None:
        """Returns when nothing is left of any request, on the workers and in the ledger."""
        for worker in self.fleet.workers.values():
            await worker.until(lambda worker=worker: worker.live_requests == 0)
            assert worker.free_blocks == worker.info.num_blocks
        assert len(self.router.dispatcher.live) == 0
        assert self.router.dispatcher.live.gated == 0
        assert all(worker.live_requests == 0 for worker in self.router.pool)

    def sample(self, name: str, **labels: str) -> float:
        """A value of the router's metrics; 0 where there is none yet."""
        return self.router.registry.get_sample_value(name, labels) or 0.0


StartCluster = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def start_cluster(checkpoint: Path) -> AsyncIterator[StartCluster]:
    """Starts clusters: keyword arguments are RouterSettings; `model`, `prefill` and `decode` are about the
    fakes. `policy` stands in for the one that `policy_name` names: of equals, least_loaded takes the first,
    so tests know who is asked."""
    running: list[Cluster] = []

    async def start(
        model: FakeModel | None = None, prefill: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None, clock: Callable[[], float] = time.monotonic,
        policy: Callable[[PolicyInputs], Policy] | None = None, policy_name: str = "least_loaded",
        **settings: Any,
    ) -> Cluster:  # fmt: skip
        base = RouterSettings(
            checkpoint=str(checkpoint), model_name="fake", http="127.0.0.1:0", grpc="127.0.0.1:0",
            metrics="127.0.0.1:0", admin="127.0.0.1:0", stop_grace_s=0.05, liveness_timeout_s=60.0,
            slo_classes={"default": SloClass(30.0, 30.0), "strict": SloClass(1e-9, 1e-9)},
            policy=policy_name,
        )  # fmt: skip
        policies = POLICIES if policy is None else {policy_name: policy}
        router = Router(replace(base, **settings), clock, policies, random.Random(len(running)))
        fleet = FakeFleet(
            model or FakeModel(eos_token_id=EOS, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)
        )
        cluster = Cluster(
            router=router,
            addresses=await router.start(),
            fleet=fleet,
            prefill=await fleet.start(worker_pb2.ROLE_PREFILL, "p0", **(prefill or {})),
            decode=await fleet.start(worker_pb2.ROLE_DECODE, "d0", **(decode or {})),
        )
        running.append(cluster)
        await cluster.register(cluster.prefill)
        await cluster.register(cluster.decode)
        return cluster

    yield start
    for cluster in running:
        await cluster.router.stop()
        await cluster.fleet.stop()


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> Cluster:
    """One prefill and one decode worker, limits that no machine is too slow for."""
    return await start_cluster()


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """Builds internal requests for tests of cores."""

    def make(
        request_id: str = "r", prompt_tokens: int = 4, stop: tuple[str, ...] = (), arrived_at: float = 0.0,
        limits: SloLimits | None = None, **sampling: Any,
    ) -> Request:  # fmt: skip
        defaults: dict[str, Any] = {
            "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "max_tokens": 100, "min_tokens": 0,
            "stop_token_ids": frozenset(),
        }  # fmt: skip
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(range(prompt_tokens)),
            sampling=TokenSampling(**{**defaults, **sampling}),
            stop=stop,
            slo=Slo("default", limits or SloLimits(1.0, 0.1)),
            tenant="",
            arrived_at=arrived_at,
            deadline=arrived_at + 60,
        )

    return make
