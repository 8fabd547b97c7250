"""Clients that do not read: their stream alone is paused, and ended in the end; nothing piles up."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from prelay.v1 import inference_pb2, inference_pb2_grpc, worker_pb2

from router.errors import SlowReaderError
from router.fake_holds import Hold
from router.fake_model import FakeModel

LENGTH = 16384
MAX_TOKENS = 4000
PROMPT = "tell me"


@pytest.fixture
def long_checkpoint(checkpoint, tmp_path):
    """A model with room for answers that no socket's buffers hold."""
    path = tmp_path / "long"
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LENGTH}))
    return path


@pytest.fixture
async def long_cluster(start_cluster, long_checkpoint):
    async def start(**settings):
        return await start_cluster(
            model=FakeModel(eos_token_id=256, max_model_len=LENGTH, vocab_size=257),
            decode={"num_blocks": 2048},
            checkpoint=str(long_checkpoint),
            **settings,
        )

    return start


def submit(cluster, make_request, **sampling):
    """An answer that the test reads itself."""
    return cluster.router.dispatcher.live.submit(make_request(**sampling))


async def test_a_stream_that_nobody_reads_is_paused_and_goes_on(start_cluster, make_request):
    cluster = await start_cluster(clock=lambda: 0.0, stream_buffer_tokens=8)
    answer = submit(cluster, make_request, max_tokens=400)
    await cluster.decode.until(lambda: cluster.decode.paused_requests == 1)
    other = submit(cluster, make_request, request_id="other", max_tokens=400)
    assert sum([len(delta.token_ids) async for delta in other]) == 400
    # What was under way has come by now; more does not.
    assert 8 < answer.unread_tokens < 400
    assert len(cluster.router.dispatcher.live) == 1
    tokens = []
    async for delta in answer:
        tokens += delta.token_ids
    undisturbed = submit(cluster, make_request, request_id="again", max_tokens=400)
    assert tokens == [token async for delta in undisturbed for token in delta.token_ids]
    pauses, resumes = cluster.decode.received["pause"], cluster.decode.received["resume"]
    assert resumes >= 1
    assert 0 <= pauses - resumes <= 3  # the end of each answer may have been under way
    assert cluster.sample("prelay_paused_streams_total") == pauses
    await cluster.settled()


async def test_a_reader_who_is_waited_for_in_vain(start_cluster, make_request):
    cluster = await start_cluster(clock=lambda: 0.0, stream_buffer_tokens=8, slow_reader_timeout_s=0.1)
    answer = submit(cluster, make_request, max_tokens=400)
    await cluster.until(lambda: len(cluster.router.dispatcher.live) == 0)
    await cluster.settled()
    delta = await anext(answer)
    assert delta.finish is None
    with pytest.raises(SlowReaderError, match=f"{len(delta.token_ids)} tokens .* not read within 0.1 s"):
        await anext(answer)


async def test_a_reader_who_comes_back_in_time_is_not_ended(start_cluster, make_request):
    cluster = await start_cluster(clock=lambda: 0.0, stream_buffer_tokens=8, slow_reader_timeout_s=2.0)
    answer = submit(cluster, make_request, max_tokens=400)
    await cluster.decode.until(lambda: cluster.decode.paused_requests == 1)
    cluster.decode.hold(Hold.DECODE)
    while answer.unread_tokens or cluster.decode.paused_requests:
        await (anext(answer) if answer.unread_tokens else asyncio.sleep(0))
    await cluster.decode.waiting_at(Hold.DECODE)
    assert answer.unread_tokens <= 8
    await asyncio.sleep(2.2)  # the limit that was running must not fire
    cluster.decode.let_go(Hold.DECODE)
    assert [delta async for delta in answer][-1].finish is not None


async def test_a_paused_stream_whose_worker_is_lost_is_paused_where_it_goes_on(start_cluster, make_request):
    cluster = await start_cluster(clock=lambda: 0.0, stream_buffer_tokens=8)
    d1 = await cluster.add(worker_pb2.ROLE_DECODE, "d1")
    answer = submit(cluster, make_request, max_tokens=400)
    await cluster.decode.until(lambda: cluster.decode.paused_requests == 1)
    cluster.decode.break_stream()
    await d1.until(lambda: d1.paused_requests == 1)
    tokens = [token async for delta in answer for token in delta.token_ids]
    undisturbed = submit(cluster, make_request, request_id="again", max_tokens=400)
    assert tokens == [token async for delta in undisturbed for token in delta.token_ids]
    assert d1.received["resume"] >= 1
    await cluster.settled()


async def test_whole_answers_are_never_paused(start_cluster):
    cluster = await start_cluster(stream_buffer_tokens=1)
    payload = {"prompt": PROMPT, "max_tokens": 300, "n": 2}
    async with cluster.http() as http, http.post("/v1/completions", json=payload) as response:
        choices = (await response.json())["choices"]
    assert [choice["text"] for choice in choices] == [cluster.answer(PROMPT, 300)] * 2
    assert cluster.decode.received["pause"] == 0


async def request_over_http(cluster):
    """A streamed chat with log-probabilities over a connection of which little is read ahead."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    host, port = cluster.addresses.http.split(":")
    await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
    body = json.dumps({
        "messages": [{"role": "user", "content": PROMPT}], "max_tokens": MAX_TOKENS, "stream": True,
        "logprobs": True, "top_logprobs": 20,
    }).encode()  # fmt: skip
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    await asyncio.get_running_loop().sock_sendall(client, head.encode() + body)
    return client


async def rest_of(client):
    data = bytearray()
    while piece := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
        data += piece
    client.close()
    return bytes(data)


def events_of(data):
    """Of a chunked HTTP response."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    text, rest = b"", body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        text, rest = text + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return [event.removeprefix("data: ") for event in text.decode().split("\n\n") if event]


async def test_http_a_client_that_does_not_read_and_then_does(long_cluster):
    cluster = await long_cluster()
    client = await request_over_http(cluster)
    await cluster.decode.until(lambda: cluster.decode.paused_requests == 1)
    events = events_of(await rest_of(client))
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == cluster.answer(f"<user>{PROMPT}\n<assistant>", MAX_TOKENS)
    assert cluster.decode.received["resume"] >= 1
    await cluster.settled()


async def test_http_a_client_that_never_reads(long_cluster):
    cluster = await long_cluster(slow_reader_timeout_s=0.1)
    client = await request_over_http(cluster)
    await cluster.decode.until(lambda: cluster.decode.received["reserve"] == 1)
    await cluster.until(lambda: len(cluster.router.dispatcher.live) == 0)
    await cluster.settled()
    events = events_of(await rest_of(client))
    assert events[-1] == "[DONE]"
    error = json.loads(events[-2])["error"]
    assert (error["code"], error["type"]) == ("slow_reader", "timeout_error")
    assert "not read within 0.1 s" in error["message"]
    assert cluster.sample("prelay_requests_total", slo_class="default", outcome="error") == 1


@asynccontextmanager
async def stub_of(cluster):
    """A client that reads little ahead: by default gRPC takes some megabytes."""
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
    async with grpc.aio.insecure_channel(cluster.addresses.grpc, options=options) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def generate():
    sampling = inference_pb2.SamplingParams(max_tokens=MAX_TOKENS, temperature=0, logprobs=20)
    return inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling)


async def test_grpc_a_client_that_does_not_read_and_then_does(long_cluster):
    cluster = await long_cluster()
    async with stub_of(cluster) as stub:
        call = stub.Generate(generate())
        first = await call.read()
        await cluster.decode.until(lambda: cluster.decode.paused_requests == 1)
        text = first.text
        while (message := await call.read()) is not grpc.aio.EOF:
            text += message.text
    assert text == cluster.answer(PROMPT, MAX_TOKENS)
    assert cluster.decode.received["resume"] >= 1
    await cluster.settled()


async def test_grpc_a_client_that_never_reads(long_cluster):
    cluster = await long_cluster(slow_reader_timeout_s=0.1)
    async with stub_of(cluster) as stub:
        call = stub.Generate(generate())
        await call.read()
        await cluster.until(lambda: len(cluster.router.dispatcher.live) == 0)
        await cluster.settled()
        with pytest.raises(grpc.aio.AioRpcError, match="not read within") as caught:
            await drain(call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def drain(call):
    while await call.read() is not grpc.aio.EOF:
        pass
