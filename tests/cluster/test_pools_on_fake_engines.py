"""A few workers of each role behind a real router, in one process: all but the model is real.

A fake engine's answer is a hash of its whole context as it stands in the KV blocks, so an equal answer means
that the right blocks were handed over, whatever was cancelled beside it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from prelay.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from prometheus_client import CollectorRegistry

from cluster.roles import ROLE_NAMES
from decode_worker.servicer import DecodeService, DecodeSettings
from engine.fake import FakeRunner, fake_answer, fake_logprobs
from engine.layout import KvLayout
from engine.sequence import TokenSampling
from prefill_worker.servicer import PrefillService, PrefillSettings
from router.app import Router
from router.settings import RouterSettings
from router.slo import SloClass
from router.worker_link import ROLE_OF_PROTO, Registration
from transfer.base import KvMemory
from transfer.ipc import IpcBackend, SharedSegment
from transfer.layout import WorkerLayout

STORYTELLER = Path(__file__).parents[2] / "deploy" / "models" / "storyteller"
LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32")
NUM_BLOCKS = 128
EPOCH = 1
PREFILL, DECODE, MIXED = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED
TWO_AND_TWO = (PREFILL, PREFILL, DECODE, DECODE)

Service = PrefillService | DecodeService


@asynccontextmanager
async def worker(
    role: worker_pb2.Role, worker_id: str
) -> AsyncIterator[tuple[worker_pb2.WorkerInfo, CollectorRegistry]]:
    segment = SharedSegment.create(LAYOUT, NUM_BLOCKS, EPOCH)
    registry = CollectorRegistry()
    server = grpc.aio.server()
    info = worker_pb2.WorkerInfo(
        worker_id=worker_id, epoch=EPOCH, role=role, model="fake", model_fingerprint="fake",
        max_model_len=1024, block_size=LAYOUT.block_size, num_blocks=NUM_BLOCKS, max_num_seqs=16,
        max_batch_tokens=256, protocol_version=worker_pb2.PROTOCOL_VERSION_CURRENT,
    )  # fmt: skip
    memory = KvMemory(WorkerLayout.of(LAYOUT), (segment.blocks,), segment.generations)
    backends = [IpcBackend(memory, [segment])]
    runner = FakeRunner(segment.blocks.numpy(), LAYOUT.block_size, num_layers=LAYOUT.num_layers)
    service: Service
    fatal: list[BaseException] = []
    if role == worker_pb2.ROLE_PREFILL:
        prefill = PrefillSettings(max_batch_tokens=256, heartbeat_s=0.1, lease_s=5.0, digest_share=1.0)
        service = PrefillService(info, runner, memory, backends, registry, prefill, on_fatal=fatal.append)
    else:
        decode = DecodeSettings(
            max_num_seqs=16, max_batch_tokens=256, heartbeat_s=0.1, lease_s=5.0, digest_share=1.0
        )
        service = DecodeService(info, runner, memory, backends, registry, decode, on_fatal=fatal.append)
    service.add_to(server)
    info.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await service.start()
    try:
        yield info, registry
    finally:
        await service.stop()
        await server.stop(0)
        assert not fatal


@asynccontextmanager
async def pools(
    router: Router, address: str, roles: Sequence[worker_pb2.Role] = TWO_AND_TWO
) -> AsyncIterator[tuple[inference_pb2_grpc.InferenceStub, list[CollectorRegistry]]]:
    """A worker of each of `roles` behind the router; a client's stub and the workers' metrics."""
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(worker(role, f"{ROLE_NAMES[role]}-{index}"))
            for index, role in enumerate(roles)
        ]
        for info, _ in workers:
            await router.workers.register(
                Registration(info.worker_id, EPOCH, ROLE_OF_PROTO[info.role], info.address)
            )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield inference_pb2_grpc.InferenceStub(channel), [registry for _, registry in workers]


@asynccontextmanager
async def routed(policy: str) -> AsyncIterator[tuple[Router, str]]:
    """A router and its gRPC address. Nothing is ever late."""
    anywhere = {door: "127.0.0.1:0" for door in ("http", "grpc", "metrics", "admin")}
    lenient = {"default": SloClass(ttft_s=600.0, tpot_s=600.0)}
    settings = RouterSettings(str(STORYTELLER), "fake", slo_classes=lenient, policy=policy, **anywhere)
    router = Router(settings)
    addresses = await router.start()
    yield router, addresses.grpc
    await router.stop()


@pytest.fixture
async def router() -> AsyncIterator[tuple[Router, str]]:
    async with routed("goodput") as router:
        yield router


def free_blocks(registry: CollectorRegistry) -> float:
    """Those that only the prefix cache holds included."""
    states = [registry.get_sample_value("prelay_kv_blocks", {"state": state}) for state in ("free", "cached")]
    return sum(state or 0.0 for state in states)


async def ask(
    stub: inference_pb2_grpc.InferenceStub, prompt: list[int], max_tokens: int, leave_after: int | None
) -> list[int] | None:
    """The answer's tokens; None if the call was cancelled, after `leave_after` tokens."""
    call = stub.Generate(
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
        )
    )
    tokens: list[int] = []
    try:
        if leave_after == 0:
            call.cancel()
        async for message in call:
            tokens += message.token_ids
            if leave_after is not None and len(tokens) >= leave_after:
                call.cancel()
    except asyncio.CancelledError:
        return None
    return tokens


@pytest.mark.parametrize(
    ("policy", "roles"),
    [
        ("least_loaded", TWO_AND_TWO),
        ("goodput", TWO_AND_TWO),
        ("goodput", [PREFILL, MIXED]),
        ("goodput", [PREFILL, DECODE, MIXED]),
        ("colocated", [MIXED, MIXED]),
    ],
)
async def test_200_at_once_with_cancellations_leave_right_answers_and_no_blocks(
    policy: str, roles: Sequence[worker_pb2.Role]
):
    rng = random.Random(1)
    async with routed(policy) as (app, address), pools(app, address, roles) as (stub, registries):
        prompts = [[rng.randrange(3, 2000) for _ in range(rng.randint(1, 200))] for _ in range(200)]
        lengths = [rng.randint(1, 60) for _ in prompts]
        leaves = [rng.randrange(length) if rng.random() < 0.4 else None for length in lengths]
        answers = await asyncio.gather(
            *(ask(stub, *call) for call in zip(prompts, lengths, leaves, strict=True))
        )
        for prompt, length, leave, answer in zip(prompts, lengths, leaves, answers, strict=True):
            if leave is None or answer is not None:
                assert answer == fake_answer(prompt, TokenSampling(0.0, 0, 1.0, 0, length, 0, frozenset()))
        assert answers.count(None) > 40
        async with asyncio.timeout(10):  # cancellations are still on their way
            while (  # noqa: ASYNC110
                any(free_blocks(registry) != NUM_BLOCKS for registry in registries) or app.dispatcher.live
            ):
                await asyncio.sleep(0)


async def test_penalties_and_log_probabilities_go_all_the_way(router: tuple[Router, str]):
    """With penalties a fake engine's answer depends on the history that its scheduler keeps."""
    app, address = router
    rng = random.Random(2)

    async def one(stub: inference_pb2_grpc.InferenceStub) -> None:
        prompt, length = [rng.randrange(3, 2000) for _ in range(rng.randint(1, 300))], rng.randint(1, 12)
        wanted = inference_pb2.SamplingParams(
            max_tokens=length, temperature=0, ignore_eos=True, presence_penalty=rng.choice([0.0, 1.0]),
            logprobs=2, prompt_logprobs=rng.choice([None, 1]),
        )  # fmt: skip
        token_ids = inference_pb2.TokenIds(ids=prompt)
        call = stub.Generate(inference_pb2.GenerateRequest(token_ids=token_ids, sampling=wanted))
        messages = [message async for message in call]
        answer = [token for message in messages for token in message.token_ids]
        sampling = TokenSampling(
            0.0, 0, 1.0, 0, length, 0, frozenset(), presence_penalty=wanted.presence_penalty
        )
        assert answer == fake_answer(prompt, sampling)
        whole = prompt + answer
        of_prompt = range(1, len(prompt)) if wanted.HasField("prompt_logprobs") else range(0)
        for scored, indices, num_top in (
            ([one for message in messages for one in message.prompt_logprobs], of_prompt, 1),
            ([one for message in messages for one in message.logprobs], range(len(prompt), len(whole)), 2),
        ):
            expected = [fake_logprobs(whole, index, num_top) for index in indices]
            assert [(got.token_id, got.logprob, got.rank) for got in scored] == [
                (want.token_id, want.logprob, want.rank) for want in expected
            ]
            assert [[(top.token_id, top.logprob) for top in got.top] for got in scored] == [
                list(want.top) for want in expected
            ]

    async with pools(app, address) as (stub, _):
        await asyncio.gather(*(one(stub) for _ in range(30)))
