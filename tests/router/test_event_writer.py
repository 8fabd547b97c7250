"""Events are written at once, and where a client is behind the response's own task waits for it."""

from __future__ import annotations

import asyncio

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from router.event_writer import EventWriter

PIECE = b"x" * 100_000
MANY = 200


async def test_a_client_that_is_behind_is_waited_for_and_gets_everything():
    waits = []

    async def answer(request):
        response = web.StreamResponse()
        await response.prepare(request)
        writer = EventWriter(response)
        for _ in range(MANY):
            if not writer.write(PIECE):
                waits.append(1)
                await writer.finish()
            assert writer.write(b"")
            await writer.finish()  # of what is written there is nothing to wait for
        return response

    async with (
        served(answer) as server,
        ClientSession() as client,
        client.get(server.make_url("/")) as response,
    ):
        await asyncio.sleep(0.2)
        body = await response.read()
    assert body == PIECE * MANY
    assert waits


async def test_a_client_that_has_gone_is_not_waited_for():
    ended = asyncio.get_running_loop().create_future()

    async def answer(request):
        response = web.StreamResponse()
        await response.prepare(request)
        writer = EventWriter(response)
        try:
            while True:
                if not writer.write(PIECE):
                    await writer.finish()
                await asyncio.sleep(0)
        except (ConnectionError, asyncio.CancelledError) as error:
            ended.set_result(error)
            raise
        return response

    async with served(answer) as server:
        async with ClientSession() as client, client.get(server.make_url("/")) as response:
            await response.content.readany()
        await asyncio.wait_for(ended, 10)


def served(answer):
    app = web.Application()
    app.router.add_get("/", answer)
    return TestServer(app)
