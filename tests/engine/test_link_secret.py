"""A worker's door: open to those who know the secret."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from prelay.v1 import worker_pb2, worker_pb2_grpc

from engine.link_secret import SecretInterceptor, metadata_of, proof_of


class Worker(worker_pb2_grpc.WorkerServicer):
    def __init__(self) -> None:
        self.calls = 0

    async def Attach(self, request_iterator: Any, context: Any) -> AsyncIterator[worker_pb2.WorkerMessage]:
        self.calls += 1
        async for _ in request_iterator:
            yield worker_pb2.WorkerMessage()


@pytest.mark.parametrize(
    ("metadata", "is_let_in"),
    [
        (metadata_of(proof_of("the secret", "decode-0", 7)), True),
        (metadata_of(proof_of("another", "decode-0", 7)), False),
        (metadata_of(proof_of("the secret", "decode-0", 6)), False),
        (metadata_of(proof_of("the secret", "decode-1", 7)), False),
        (metadata_of(proof_of("", "decode-0", 7)), False),
        ((("x-prelay-proof", ""),), False),
        ((("x-prelay-proof", "the secret"),), False),
    ],
)
async def test_only_who_knows_the_secret_is_let_in(
    metadata: tuple[tuple[str, str], ...], is_let_in: bool
) -> None:
    worker, server = Worker(), grpc.aio.server(interceptors=[SecretInterceptor("the secret", "decode-0", 7)])
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Attach(metadata=metadata)
        if is_let_in:
            await call.write(worker_pb2.RouterMessage())
            assert await call.read() == worker_pb2.WorkerMessage()
            call.cancel()
        else:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await server.stop(0)
    assert worker.calls == is_let_in
