"""`prelay certificates`: an authority that stays, certificates that are renewed, and names that are none."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509

from cluster.certificates import make_certificates
from cluster.cli import cli
from cluster.errors import ConfigError


def test_the_authority_stays_and_the_certificate_is_new(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "tls"
    assert make_certificates(directory, [], 30)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert sorted(before) == ["ca.crt", "ca.key", "tls.crt", "tls.key"]
    assert not make_certificates(directory, [], 30)
    after = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"tls.crt", "tls.key"}


def test_nobody_else_can_read_keys(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], 30)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes["tls.key"] == modes["ca.key"] == 0o600


def test_names_and_days_are_in_the_certificate(tmp_path: Path) -> None:
    names = ["a.example", "*.b.example", "10.0.0.7"]
    result = CliRunner().invoke(cli, ["certificates", str(tmp_path), *names, "--days", "3"])
    assert result.exit_code == 0, result.output
    made = x509.load_pem_x509_certificate((tmp_path / "tls.crt").read_bytes())
    found = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == ["prelay", "a.example", "*.b.example"]
    assert [str(one) for one in found.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert 3 <= (made.not_valid_after_utc - made.not_valid_before_utc).total_seconds() / 86_400 < 4


@pytest.mark.parametrize("name", ["", "https://a.example", "a b", "ä.example"])
def test_what_is_no_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="neither a host's name nor an IP address"):
        make_certificates(tmp_path / "tls", [name], 30)
    assert not (tmp_path / "tls").exists()


def test_half_an_authority_is_refused(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], 30)
    certificate = (tmp_path / "tls.crt").read_bytes()
    key = (tmp_path / "ca.key").read_bytes()
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"ca\.key is missing, while the other half"):
        make_certificates(tmp_path, [], 30)
    (tmp_path / "ca.key").write_bytes((tmp_path / "tls.key").read_bytes())
    with pytest.raises(ConfigError, match=r"is not the key of .*ca\.crt"):
        make_certificates(tmp_path, [], 30)
    (tmp_path / "ca.key").write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_certificates(tmp_path, [], 30)
    assert (tmp_path / "tls.crt").read_bytes() == certificate
    (tmp_path / "ca.key").write_bytes(key)
    assert not make_certificates(tmp_path, [], 30)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli, ["certificates", str(tmp_path / "file")])
    assert result.exit_code == 2
    with pytest.raises(ConfigError, match=r"file.* cannot be written"):
        make_certificates(tmp_path / "file" / "tls", [], 30)
