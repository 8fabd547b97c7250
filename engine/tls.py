"""Who a process is towards others, and whom it believes: certificates in PEM files. No torch here.

A directory has them, with the names of a Kubernetes secret for TLS: `tls.crt` (our certificate, and those
between it and its authority), `tls.key`, and `ca.crt` (the authorities of others). Files that were replaced
count for all connections made from then on; those that cannot be used do not, so half a replacement does no
harm.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from engine.errors import TlsError

INTERNAL_NAME = "prelay"
"""The DNS name in the certificates of a deployment's own processes. Each expects it of whom it dials,
wherever that is: addresses of workers are not known beforehand."""

CERTIFICATE, KEY, AUTHORITIES = "tls.crt", "tls.key", "ca.crt"

_log = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]
_Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The files of one moment. authorities: empty without ca.crt. context: a server's, for HTTP."""

    certificate: bytes
    key: bytes
    authorities: bytes
    context: ssl.SSLContext


class Identity:
    """For all connections of a process; may be used from any thread."""

    def __init__(self, directory: Path | str, *, asks_clients: bool = True) -> None:
        """asks_clients: as a server it takes only clients with a certificate of one of the authorities.

        Raises TlsError if a file is missing or cannot be used, or key and certificate do not belong together.
        """
        self._directory = Path(directory)
        self._asks_clients = asks_clients
        self._lock = threading.Lock()
        self._complaint = ""
        self._stamp = self._stamped()
        self._loaded = self._load()

    def server_credentials(self) -> grpc.ServerCredentials:
        """For gRPC."""
        given = self._current()

        def fetch() -> Any:  # grpcio's types know nothing of None, which means that nothing has changed
            nonlocal given
            current = self._current()
            if current is given:
                return None
            given = current
            return self._configuration(current)

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(given), fetch, require_client_authentication=self._asks_clients
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For gRPC to a process of the same deployment."""
        current = self._current()
        return grpc.ssl_channel_credentials(current.authorities, current.key, current.certificate)

    def http_context(self) -> ssl.SSLContext:
        """A server's, for HTTP."""
        context = self._make_context()

        def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self._current().context

        context.sni_callback = choose
        return context

    def _configuration(self, loaded: _Loaded) -> grpc.ServerCertificateConfiguration:
        authorities = loaded.authorities if self._asks_clients else None
        return grpc.ssl_server_certificate_configuration(
            [(loaded.key, loaded.certificate)], root_certificates=authorities
        )

    def _current(self) -> _Loaded:
        with self._lock:
            try:
                stamp = self._stamped()
                if stamp != self._stamp:
                    self._loaded, self._stamp = self._load(), stamp
                    _log.info("event=certificates_read_again directory=%s", self._directory)
                self._complaint = ""
            except TlsError as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    _log.warning("event=certificates_not_usable why=%r: those from before stay", str(error))
            return self._loaded

    def _stamped(self) -> _Stamp:
        """What changes when the files do."""
        try:
            stats = [(self._directory / name).stat() for name in self._names]
        except OSError as error:
            raise TlsError(
                f"{error.filename} cannot be read ({error.strerror}): a directory for TLS has {CERTIFICATE}, "
                f"{KEY} and {AUTHORITIES}; `prelay certificates DIR` makes one"
            ) from error
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

    @property
    def _names(self) -> tuple[str, ...]:
        return (CERTIFICATE, KEY, AUTHORITIES) if self._asks_clients else (CERTIFICATE, KEY)

    def _load(self) -> _Loaded:
        before = self._stamped()
        context = self._make_context()
        try:
            certificate, key, *others = ((self._directory / name).read_bytes() for name in self._names)
        except OSError as error:
            raise TlsError(f"{error.filename} cannot be read: {error.strerror}") from error
        if self._stamped() != before:
            raise TlsError(f"the files in {self._directory} are being replaced")
        return _Loaded(certificate, key, b"".join(others), context)

    def _make_context(self) -> ssl.SSLContext:
        """Of the files as they are; also finds out whether they can be used."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate, key, authorities = (self._directory / name for name in (CERTIFICATE, KEY, AUTHORITIES))
        try:
            # Without a password given, that of an encrypted key would be asked for on the terminal.
            context.load_cert_chain(certificate, key, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise TlsError(
                f"{certificate} and {key} cannot be used: they have to be a certificate in PEM and its key, "
                f"without a password ({_reason(error)})"
            ) from error
        if self._asks_clients:
            try:
                context.load_verify_locations(authorities)
            except OSError as error:
                raise TlsError(
                    f"{authorities} cannot be used: it has to hold certificates in PEM ({_reason(error)})"
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
            # A session that is resumed shows no certificate: who is not believed any more could go on with an
            # old one. Before TLS 1.3 there is no way to do without.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        return context


def listen(server: grpc.aio.Server, address: str, identity: Identity | None) -> int:
    """The port that a gRPC server listens on from its start. identity: None is without TLS. Raises
    RuntimeError when the address is taken, or not ours."""
    if identity is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, identity.server_credentials())


def dial(address: str, identity: Identity | None, options: _Options = ()) -> grpc.aio.Channel:
    """To a process of the same deployment. identity: None is without TLS."""
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, identity.channel_credentials(), options=(*options, _EXPECTED))


def dial_blocking(address: str, identity: Identity | None, options: _Options = ()) -> grpc.Channel:
    """`dial` without asyncio."""
    if identity is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, identity.channel_credentials(), options=(*options, _EXPECTED))


_EXPECTED = ("grpc.ssl_target_name_override", INTERNAL_NAME)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
