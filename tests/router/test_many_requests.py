"""Two hundred requests at once, some cancelled: the others are right, nothing is left; a stop under load."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import aiohttp
import grpc.aio
import pytest
from prelay.v1 import inference_pb2, worker_pb2

from router.fake_holds import Hold


@pytest.mark.slow
async def test_a_burst_of_thousands_is_refused_by_admission_or_not_at_all(start_cluster):
    """gRPC would cancel some of more than a thousand calls that nobody has looked at yet."""
    cluster = await start_cluster(max_gated_requests=1000)
    sampling = inference_pb2.SamplingParams(max_tokens=1)
    request = inference_pb2.GenerateRequest(text="tell me", sampling=sampling)
    async with cluster.grpc() as stub:

        async def code(call):
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
            return await call.code()

        calls = [stub.Generate(request) for _ in range(2500)]
        codes = Counter(await asyncio.gather(*map(code, calls)))
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert codes[grpc.StatusCode.OK] >= 1000
    await cluster.settled()


async def test_two_hundred_at_once_with_random_cancellations(start_cluster):
    cluster = await start_cluster(decode={"num_blocks": 96}, prefill={"max_batch_tokens": 64})
    await cluster.add(worker_pb2.ROLE_PREFILL, "p1", max_batch_tokens=64)
    await cluster.add(worker_pb2.ROLE_DECODE, "d1", num_blocks=96)
    rng = random.Random(20)
    async with cluster.grpc() as stub, cluster.http() as http:

        async def over_grpc(prompt, max_tokens, leave_after):
            sampling = inference_pb2.SamplingParams(max_tokens=max_tokens)
            call = stub.Generate(inference_pb2.GenerateRequest(text=prompt, sampling=sampling))
            text = ""
            try:
                async for message in call:
                    text += message.text
                    if leave_after is not None and len(text) >= leave_after:
                        call.cancel()
            except asyncio.CancelledError:
                return None
            return text

        async def over_http(prompt, max_tokens, leave_after):
            body = {"prompt": prompt, "max_tokens": max_tokens, "stream": leave_after is not None}
            async with http.post("/v1/completions", json=body) as response:
                assert response.status == 200
                if leave_after is None:
                    return (await response.json())["choices"][0]["text"]
                await response.content.readline()
                response.close()
                return None

        async def one(number):
            prompt = f"request {number} " * rng.randint(1, 6)
            max_tokens = rng.randint(1, 24)
            leave_after = rng.randint(0, max_tokens) if rng.random() < 0.4 else None
            ask = rng.choice((over_grpc, over_http))
            text = await ask(prompt, max_tokens, leave_after)
            if text is not None:
                assert text == cluster.answer(prompt, max_tokens)
            return text is not None

        complete = await asyncio.gather(*(one(number) for number in range(200)))
        assert 100 < sum(complete) < 200
        await cluster.until(lambda: len(cluster.router.dispatcher.live) == 0)
        await cluster.settled()
    outcomes = cluster.router.dispatcher.live.tally.outcomes
    assert sum(outcomes.values()) == 200
    assert outcomes["good"] >= sum(complete)
    assert outcomes["good"] + outcomes["cancelled"] == 200
    workers = list(cluster.router.pool)
    assert all(worker.outstanding_tokens == 0 for worker in workers)
    # With the next snapshots the view is what it was at the start.
    await cluster.until(lambda: all(worker.free_blocks == worker.capacity.num_blocks for worker in workers))
    assert all(worker.requests == 0 for worker in workers)


async def test_the_router_stops_with_live_streams(start_cluster):
    cluster = await start_cluster(request_timeout_s=30.0)
    cluster.decode.hold(Hold.DECODE)
    async with cluster.grpc() as stub, cluster.http() as http:
        call = stub.Generate(
            inference_pb2.GenerateRequest(text="hi", sampling=inference_pb2.SamplingParams(max_tokens=9))
        )
        async with http.post(
            "/v1/completions", json={"prompt": "hi", "max_tokens": 9, "stream": True}
        ) as response:
            await cluster.decode.waiting_at(Hold.DECODE, 2)
            stopping = asyncio.create_task(cluster.router.stop())
            lines = (await response.content.read()).decode().split("\n\n")
        assert lines[-2] == "data: [DONE]"
        assert "shutting down" in lines[-3]
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            [message async for message in call]
        await stopping
        assert not cluster.router.dispatcher.serving
        await cluster.decode.until(lambda: cluster.decode.live_requests == 0)
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get("/health")
