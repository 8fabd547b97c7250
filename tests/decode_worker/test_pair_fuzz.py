"""Nonsense at the workers' own doors, from a router and from a peer that have gone mad: whoever is in their
senses is served as ever, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from prelay.v1 import transfer_pb2, worker_pb2

from engine.fake import fake_answer
from engine.sequence import RequestKey, TokenSampling
from tests.decode_worker.pair_client import Router
from tests.decode_worker.test_pair_faults import all_free, started
from tests.fuzz_seeds import FUZZ_SEEDS
from transfer.handshake import our_handshake
from transfer.layout import WorkerLayout

_ATTACH = "/prelay.v1.Worker/Attach"
_LINK = "/prelay.v1.KvTransfer/Link"


def spoilt(dice: random.Random, message: Message) -> bytes:
    """A message that is right in most of its bytes, or in none."""
    data = bytearray(message.SerializeToString())
    if dice.random() < 0.1:
        return dice.randbytes(dice.randrange(100))
    for _ in range(dice.randint(0, 3)):
        if data:
            data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


async def say(address: str, method: str, messages: Sequence[bytes]) -> int:
    """All of them on one stream, whose answers are thrown away; how many there were."""
    answers = 0

    async def requests() -> AsyncIterator[bytes]:
        for message in messages:
            yield message
            await asyncio.sleep(0)

    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(method)(requests(), timeout=10)

        async def listen() -> None:
            nonlocal answers
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    answers += 1

        listening = asyncio.create_task(listen())
        await asyncio.wait([listening], timeout=0.3)  # a stream that is in order goes on until we end it
        call.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    return answers


async def right_answers(router: Router, sampling: Callable[..., TokenSampling]) -> None:
    """For whoever is in their senses."""
    for number in range(6):
        prompt, wanted = [number + 1] * 9, sampling(6, seed=number)
        answer = await router.submit(RequestKey(f"sane{number}", 0), prompt, wanted)
        async with asyncio.timeout(30):
            await answer.done.wait()
        assert answer.failed is None, answer.failed
        assert answer.token_ids == fake_answer(prompt, wanted)


def commands(dice: random.Random, peers: Sequence[worker_pb2.PeerRef]) -> list[worker_pb2.RouterMessage]:
    """What a router says, in no good order."""
    prompt = [dice.randrange(2048) for _ in range(dice.randint(1, 30))]
    name: dict[str, Any] = {"request_id": f"mad{dice.randrange(5)}", "attempt": dice.randrange(3)}
    wanted = worker_pb2.TokenSampling(temperature=1.0, top_p=1.0, max_tokens=dice.randint(1, 20))
    peer = dice.choice(peers)
    kinds: list[dict[str, Message]] = [
        {"reserve": worker_pb2.Reserve(**name, token_ids=prompt, sampling=wanted, prefill=peer)},
        {"prefill": worker_pb2.Prefill(**name, token_ids=prompt, sampling=wanted, decode=peer)},
        {"cancel": worker_pb2.Cancel(**name)},
        {"pair": worker_pb2.Pair(prefill=peer)},
        {"unpair": worker_pb2.Unpair(prefill=peer)},
        {"pause": worker_pb2.Pause(**name)},
        {"resume": worker_pb2.Resume(**name)},
        {"hello": worker_pb2.RouterHello(router_id="mad")},
        {},
    ]
    return [worker_pb2.RouterMessage(seq=dice.randrange(5), **kind) for kind in dice.choices(kinds, k=20)]


@pytest.mark.parametrize("seed", FUZZ_SEEDS)
@pytest.mark.parametrize("is_mixed", [False, True])
async def test_a_router_gone_mad(pair, make_router, sampling, seed: int, is_mixed: bool) -> None:
    prefill = await pair.prefill()
    decode = await pair.decode(is_mixed=is_mixed, latency={"decode_fixed": 1e-3} if is_mixed else None)
    router = await make_router(prefill, decode)
    dice = random.Random(seed)
    nowhere = worker_pb2.PeerRef(worker_id="nobody", epoch=1, address="127.0.0.1:1")
    peers = [prefill.ref, decode.ref, nowhere, worker_pb2.PeerRef()]

    async def rave(worker) -> None:
        hello = worker_pb2.RouterMessage(
            seq=1,
            hello=worker_pb2.RouterHello(
                router_id="mad", protocol_version=worker_pb2.PROTOCOL_VERSION_CURRENT, epoch=worker.info.epoch
            ),
        )
        for _ in range(6):
            first = spoilt(dice, hello) if dice.random() < 0.3 else hello.SerializeToString()
            await say(
                worker.info.address, _ATTACH, [first, *(spoilt(dice, one) for one in commands(dice, peers))]
            )

    raving = asyncio.gather(rave(prefill), rave(decode))
    await right_answers(router, sampling)
    await raving
    await all_free(pair, router)


@pytest.mark.parametrize("seed", FUZZ_SEEDS)
async def test_a_peer_gone_mad(pair, make_router, sampling, seed: int) -> None:
    prefill, decode, router = await started(pair, make_router)
    dice = random.Random(seed)
    mad = worker_pb2.WorkerInfo()
    mad.CopyFrom(decode.info)
    mad.worker_id = "mad"
    right = our_handshake(mad, WorkerLayout.of(pair.layout), ["memory"], 1.0)
    pair.memories["mad"] = pair.memories["decode-0"]  # else it could not be linked at all
    answers = 0

    async def rave() -> None:
        nonlocal answers
        for _ in range(12):
            handshake = transfer_pb2.PullerMessage(handshake=right)
            # Of requests that are another's, too.
            key = transfer_pb2.HandoffKey(request_id=f"sane{dice.randrange(6)}", attempt=0)
            messages = [
                transfer_pb2.PullerMessage(acknowledge=key),
                transfer_pb2.PullerMessage(drop=key),
                transfer_pb2.PullerMessage(renew=transfer_pb2.Renew(keys=[key])),
                handshake,
                transfer_pb2.PullerMessage(),
            ]
            first = spoilt(dice, handshake) if dice.random() < 0.7 else handshake.SerializeToString()
            said = [first, *(spoilt(dice, one) for one in dice.choices(messages, k=20))]
            answers += await say(prefill.info.address, _LINK, said)

    raving = asyncio.create_task(rave())
    await right_answers(router, sampling)
    await raving
    await all_free(pair, router)
    assert answers, "some were linked, and went mad after that"
