"""From a URL to a target."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import aiohttp
import grpc.aio

from bench.load.grpc_target import GrpcTarget
from bench.load.http_target import HttpTarget
from bench.load.target import Target
from cluster.workload.errors import BadInputError


def check_url(url: str) -> None:
    """Raises BadInputError for what is neither http(s):// nor grpc(s)://HOST:PORT."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    is_grpc = parts.scheme in ("grpc", "grpcs") and bool(port) and not parts.path.strip("/")
    is_http = parts.scheme in ("http", "https") and port != 0
    if not parts.hostname or not (is_grpc or is_http):
        raise BadInputError(f"--url {url!r}: give http(s)://HOST:PORT or grpc(s)://HOST:PORT")


@asynccontextmanager
async def connect(
    url: str,
    *,
    model: str | None = None,
    prompts: str = "auto",
    vocabulary: range = range(100, 1000),
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[Target]:
    """The target at a URL, closed on leaving. model, prompts, vocabulary: for HTTP (see HttpTarget).

    Raises BadInputError; whether anything is there, Target.check says.
    """
    check_url(url)
    parts = urlsplit(url)
    if parts.scheme in ("grpc", "grpcs"):
        # A channel of its own for each target, even to the same address.
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with (
            grpc.aio.insecure_channel(parts.netloc, options=options)
            if parts.scheme == "grpc"
            else grpc.aio.secure_channel(parts.netloc, grpc.ssl_channel_credentials(), options=options)
        ) as channel:
            yield GrpcTarget(channel, parts.netloc, headers or {})
        return
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield HttpTarget(session, url, model, prompts, vocabulary, headers or {})
