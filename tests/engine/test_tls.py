"""Certificates: who gets in with which, what a replacement changes, and what files are refused."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest
from aiohttp import web
from cryptography import x509
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.certificates import make_certificates
from engine.errors import TlsError
from engine.tls import INTERNAL_NAME, Identity, dial, dial_blocking, listen


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "ours", ["127.0.0.1"], 1)
    return tmp_path / "ours"


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Of an authority that nobody here knows."""
    make_certificates(tmp_path / "others", ["127.0.0.1"], 1)
    return tmp_path / "others"


@asynccontextmanager
async def serving(identity: Identity | None) -> AsyncIterator[str]:
    """The address of a gRPC server."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = listen(server, "127.0.0.1:0", identity)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def gets_in(address: str, identity: Identity | None) -> bool:
    async with dial(address, identity, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code() is not grpc.StatusCode.UNAVAILABLE
        return True


def serial_of(address: str, client: Path) -> int:
    """Of the certificate that a server shows."""
    context = ssl.create_default_context(cafile=client / "ca.crt")
    context.load_cert_chain(client / "tls.crt", client / "tls.key")
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname=INTERNAL_NAME) as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def serial_in(directory: Path) -> int:
    return x509.load_pem_x509_certificate((directory / "tls.crt").read_bytes()).serial_number


async def test_only_those_of_the_same_authority_get_in(ours: Path, others: Path) -> None:
    async with serving(Identity(ours)) as address:
        assert await gets_in(address, Identity(ours))
        assert not await gets_in(address, Identity(others))
        assert not await gets_in(address, None)
        knows_us = grpc.ssl_channel_credentials((ours / "ca.crt").read_bytes())
        named = (("grpc.ssl_target_name_override", INTERNAL_NAME),)
        async with grpc.aio.secure_channel(address, knows_us, named) as channel:  # and shows nothing
            check = health_pb2_grpc.HealthStub(channel).Check
            with pytest.raises(grpc.aio.AioRpcError):
                await check(health_pb2.HealthCheckRequest(), timeout=5)


async def test_nobody_is_told_anything_who_is_not_who_was_dialled(ours: Path, others: Path) -> None:
    async with serving(Identity(others)) as address:
        assert not await gets_in(address, Identity(ours))
    async with serving(None) as address:
        assert not await gets_in(address, Identity(ours))
        assert await gets_in(address, None)


async def test_dialling_without_asyncio(ours: Path) -> None:
    async with serving(Identity(ours)) as address:

        def check() -> Any:
            with dial_blocking(address, Identity(ours)) as channel:
                return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)

        assert (await asyncio.to_thread(check)).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_certificate_that_is_replaced_counts_from_then_on(ours: Path) -> None:
    identity = Identity(ours)
    async with serving(identity) as address:
        before = serial_in(ours)
        assert await asyncio.to_thread(serial_of, address, ours) == before
        make_certificates(ours, ["127.0.0.1"], 1)
        assert serial_in(ours) != before
        assert await asyncio.to_thread(serial_of, address, ours) == serial_in(ours)
        assert await gets_in(address, identity)


async def test_an_authority_that_is_replaced_lets_nobody_else_in_any_more(ours: Path, others: Path) -> None:
    mine, former = Identity(ours), ours.with_name("former")
    shutil.copytree(ours, former)
    async with serving(mine) as address:
        assert await gets_in(address, Identity(former))
        for name in ("tls.key", "tls.crt", "ca.crt"):
            shutil.copy(others / name, ours / name)
        assert await gets_in(address, mine)
        assert not await gets_in(address, Identity(former))


async def test_half_a_replacement_changes_nothing_and_is_told(
    ours: Path, others: Path, caplog: pytest.LogCaptureFixture
) -> None:
    identity, former = Identity(ours), ours.with_name("former")
    shutil.copytree(ours, former)
    async with serving(identity) as address:
        shutil.copy(others / "tls.key", ours / "tls.key")
        with caplog.at_level(logging.WARNING):
            assert await gets_in(address, Identity(former))
            assert await gets_in(address, identity)
            (ours / "tls.key").unlink()
            assert await gets_in(address, identity)
    told = [line for line in caplog.messages if "certificates_not_usable" in line]
    assert len(told) == 2, "each state of the files is told once"


@asynccontextmanager
async def serving_http(identity: Identity) -> AsyncIterator[str]:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    application = web.Application()
    application.router.add_get("/", hello)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=identity.http_context()).start()
    yield f"127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def hello(address: str, authority: Path, client: Path | None) -> str | None:
    """What is answered, None if we are not let in."""
    context = ssl.create_default_context(cafile=authority / "ca.crt")
    if client is not None:
        context.load_cert_chain(client / "tls.crt", client / "tls.key")
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"https://{address}/", ssl=context) as answer,
        ):
            return await answer.text()
    except aiohttp.ClientError:
        return None


async def test_http_with_and_without_certificates_of_clients(ours: Path, others: Path) -> None:
    async with serving_http(Identity(ours, asks_clients=False)) as address:
        assert await hello(address, ours, None) == "hello"
        assert await hello(address, others, None) is None
    async with serving_http(Identity(ours)) as address:
        assert await hello(address, ours, ours) == "hello"
        assert await hello(address, ours, others) is None
        assert await hello(address, ours, None) is None


async def test_http_takes_what_is_replaced(ours: Path, others: Path) -> None:
    former = ours.with_name("former")
    shutil.copytree(ours, former)
    async with serving_http(Identity(ours)) as address:
        assert await hello(address, ours, ours) == "hello"
        for name in ("tls.key", "tls.crt", "ca.crt"):
            shutil.copy(others / name, ours / name)
        assert await hello(address, others, others) == "hello"
        assert await hello(address, former, former) is None
        assert await hello(address, others, former) is None


async def test_a_session_from_before_does_not_go_on_after_its_authority(ours: Path, others: Path) -> None:
    former = ours.with_name("former")
    shutil.copytree(ours, former)
    context = ssl.create_default_context(cafile=former / "ca.crt")
    context.load_verify_locations(others / "ca.crt")
    context.load_cert_chain(former / "tls.crt", former / "tls.key")

    def ask(address: str, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None]:
        """Whether we are let in, and what could be resumed."""
        host, port = address.split(":")
        with (
            socket.create_connection((host, int(port))) as plain,
            context.wrap_socket(plain, server_hostname=host, session=session) as connection,
        ):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            try:
                return connection.recv(100).startswith(b"HTTP/1.1 200"), connection.session
            except (ssl.SSLError, ConnectionError):
                return False, None

    async with serving_http(Identity(ours)) as address:
        is_in, session = await asyncio.to_thread(ask, address, None)
        assert is_in
        for name in ("tls.key", "tls.crt", "ca.crt"):
            shutil.copy(others / name, ours / name)
        is_in, _ = await asyncio.to_thread(ask, address, session)
        assert not is_in
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # which knows no way to do without sessions
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(ask, address, None)


async def test_authorities_are_needed_only_for_those_who_ask(ours: Path) -> None:
    (ours / "ca.crt").unlink()
    Identity(ours, asks_clients=False)
    with pytest.raises(TlsError, match=r"ca\.crt cannot be read \(No such file"):
        Identity(ours)


def test_files_that_cannot_be_used_are_named(ours: Path, others: Path, tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"nowhere/tls\.crt .*`prelay certificates DIR` makes one"):
        Identity(tmp_path / "nowhere")
    (ours / "ca.crt").write_text("not a certificate")
    with pytest.raises(TlsError, match=r"ca\.crt cannot be used: it has to hold certificates in PEM"):
        Identity(ours)
    (ours / "tls.crt").write_text("")
    with pytest.raises(TlsError, match=r"tls\.crt and .*tls\.key cannot be used"):
        Identity(ours)
    shutil.copy(ours / "tls.key", others / "tls.key")
    with pytest.raises(TlsError, match="a certificate in PEM and its key, without a password"):
        Identity(others)


def test_a_key_with_a_password_is_refused_and_not_asked_about(ours: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key((ours / "tls.key").read_bytes(), None)
    (ours / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with pytest.raises(TlsError, match="without a password"):
        Identity(ours)
