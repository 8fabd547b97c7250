"""An authority of one's own, and a certificate of it: for deployments that have nobody who gives them any."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.errors import ConfigError
from engine.tls import AUTHORITIES, CERTIFICATE, INTERNAL_NAME, KEY

AUTHORITY_KEY = "ca.key"

_AUTHORITY_DAYS = 3650
_BACKDATED = datetime.timedelta(hours=1)
"""Clocks of hosts differ."""


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(directory: Path, names: Sequence[str], days: int) -> bool:
    """Writes tls.crt and tls.key, and before them ca.crt and ca.key if neither is there. Returns whether it
    did that.

    names: DNS names and IP addresses of the certificate, beside the one of a deployment's own processes.
    Raises ConfigError, and has then written nothing but perhaps the authority.
    """
    others = [_name(name) for name in names]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        made = not (directory / AUTHORITIES).exists() and not (directory / AUTHORITY_KEY).exists()
        authority = _new_authority(directory) if made else _read_authority(directory)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder("prelay", authority.certificate.subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(INTERNAL_NAME), *others]), critical=False
            )
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
            )
            .sign(authority.key, hashes.SHA256())
        )
        _write(directory / KEY, _pem_of(key))
        _write(directory / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from error
    return made


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not text or any(not (char.isascii() and (char.isalnum() or char in ".-*")) for char in text):
        raise ConfigError(
            f"{text!r} is neither a host's name nor an IP address: give one, as in prelay.example.com"
        )
    return x509.DNSName(text)


def _builder(
    name: str, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _new_authority(directory: Path) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    name = "prelay authority"
    certificate = (
        _builder(name, _subject(name), key.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(directory / AUTHORITY_KEY, _pem_of(key))
    _write(directory / AUTHORITIES, certificate.public_bytes(serialization.Encoding.PEM))
    return _Authority(certificate, key)


def _read_authority(directory: Path) -> _Authority:
    try:
        certificate = x509.load_pem_x509_certificate((directory / AUTHORITIES).read_bytes())
        key = serialization.load_pem_private_key((directory / AUTHORITY_KEY).read_bytes(), None)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error.filename} is missing, while the other half of the authority is there: bring it, or give "
            "an empty directory"
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the authority in {directory} cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(
            f"{directory / AUTHORITY_KEY} is not the key of {directory / AUTHORITIES}, or none that `prelay "
            "certificates` has made"
        )
    return _Authority(certificate, key)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    """At once, so that nobody reads half of it, and for nobody else's eyes."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    draft.replace(path)
