"""What a router process is told when it starts, as JSON on its command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from router.errors import SettingsError
from router.policies import POLICIES
from router.slo import SloClass


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Addresses are "host:port"; port 0 lets the system choose.

    checkpoint: directory with the model's config and tokenizer. model_name: what clients call it.
    max_model_len: most tokens of prompt and answer; None means what the checkpoint's config says.
    slo_classes, default_slo_class: SLO classes by name, and the class of requests that name none.
    policy: a name of `policies.POLICIES`.
    suspect_after_s: a worker without a snapshot for this long gets nothing new; None means half of
    liveness_timeout_s, after which it is down and what it had is placed again.
    max_attempts: placements of one request that may be lost until it ends with an error.
    retry_budget, retry_burst: so many requests may be placed again for each one that is let in, and so many
    beyond that.
    recovery_wait_s: how long requests wait at the gate while there is no pair of workers.
    stream_buffer_tokens: of a streamed answer that may be unread before its decode worker is paused; it ends
    with an error when they are for slow_reader_timeout_s.
    max_body_bytes: of an HTTP body and of a gRPC message.
    max_choices: answers that one HTTP call may ask for.
    max_gated_requests: that may wait for a worker; more are refused, to come again after retry_after_s.
    request_timeout_s: a request that is not complete by then ends with an error.
    stop_grace_s: how long live streams may go on when the router is told to stop.
    log_level: DEBUG, INFO, WARNING or ERROR.
    tenants: file of who may ask (tenants.py); None lets everybody.
    internal_tls: directory of the certificates (engine.tls) for the admin port and the links to workers.
    client_tls: of those for HTTP and gRPC; client_certificates: clients need one, too. None is without TLS.
    tokenizer_threads: for tokenisation and chat templates, which stay off the event loop.
    """

    checkpoint: str
    model_name: str
    max_model_len: int | None = None
    http: str = "127.0.0.1:8000"
    grpc: str = "127.0.0.1:8001"
    metrics: str = "127.0.0.1:9090"
    admin: str = "127.0.0.1:0"
    slo_classes: dict[str, SloClass] = field(default_factory=lambda: {"default": SloClass(2.0, 0.2)})
    default_slo_class: str = "default"
    policy: str = "goodput"
    suspect_after_s: float | None = None
    liveness_timeout_s: float = 1.5
    max_attempts: int = 6
    retry_budget: float = 1.0
    retry_burst: int = 256
    recovery_wait_s: float = 60.0
    stream_buffer_tokens: int = 256
    slow_reader_timeout_s: float = 30.0
    max_body_bytes: int = 4 * 1024 * 1024
    max_choices: int = 64
    max_gated_requests: int = 1024
    retry_after_s: float = 1.0
    request_timeout_s: float = 600.0
    stop_grace_s: float = 1.0
    tokenizer_threads: int = 2
    log_level: str = "INFO"
    tenants: str | None = None
    internal_tls: str | None = None
    client_tls: str | None = None
    client_certificates: bool = False

    @classmethod
    def from_json(cls, text: str) -> RouterSettings:
        """Reads what `to_json` wrote. Raises SettingsError naming the field that is wrong."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise SettingsError(f"the settings are not JSON: {error}") from error
        if not isinstance(given, dict):
            raise SettingsError(f"the settings must be a JSON object, not {type(given).__name__}")
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise SettingsError(f"unknown settings {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if missing := sorted({"checkpoint", "model_name"} - given.keys()):
            raise SettingsError(f"missing settings: {', '.join(missing)}")
        if "slo_classes" in given:
            given["slo_classes"] = _slo_classes(given["slo_classes"])
        return cls(**given)

    def to_json(self) -> str:
        """For `python -m router`."""
        return json.dumps(asdict(self))

    def __post_init__(self) -> None:
        for name in ("checkpoint", "model_name", "http", "grpc", "metrics", "admin", "default_slo_class"):
            _require(name, getattr(self, name), str)
        for name in (
            "liveness_timeout_s", "retry_after_s", "request_timeout_s", "stop_grace_s", "recovery_wait_s",
            "slow_reader_timeout_s",
        ):  # fmt: skip
            _require(name, getattr(self, name), (int, float))
        for name in (
            "max_body_bytes", "max_choices", "max_gated_requests", "tokenizer_threads", "max_attempts",
            "stream_buffer_tokens",
        ):  # fmt: skip
            _require(name, getattr(self, name), int)
        _require("retry_budget", self.retry_budget, (int, float), zero=True)
        _require("retry_burst", self.retry_burst, int, zero=True)
        if self.suspect_after_s is not None:
            _require("suspect_after_s", self.suspect_after_s, (int, float))
            if self.suspect_after_s > self.liveness_timeout_s:
                raise SettingsError(
                    f"suspect_after_s is {self.suspect_after_s!r}, but liveness_timeout_s is "
                    f"{self.liveness_timeout_s!r}: a worker must be suspected before it is given up"
                )
        if self.policy not in POLICIES:
            raise SettingsError(f"policy is {self.policy!r}; give one of {', '.join(sorted(POLICIES))}")
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise SettingsError(f"log_level is {self.log_level!r}; give DEBUG, INFO, WARNING or ERROR")
        for name in ("tenants", "internal_tls", "client_tls"):
            if (path := getattr(self, name)) is not None:
                _require(name, path, str)
        if not isinstance(self.client_certificates, bool):
            raise SettingsError(f"client_certificates is {self.client_certificates!r}; give true or false")
        if self.max_model_len is not None:
            _require("max_model_len", self.max_model_len, int)
        for name in ("http", "grpc", "metrics", "admin"):
            split_address(name, getattr(self, name))


def split_address(setting: str, address: str) -> tuple[str, int]:
    """(host, port) of "host:port"; an IPv6 host stands in brackets. Raises SettingsError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"{setting} is {address!r}; give host:port, for example 127.0.0.1:8000")
    return host.strip("[]"), int(port)


def _require(name: str, value: Any, kind: type | tuple[type, ...], *, zero: bool = False) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SettingsError(f"{name} is {value!r}, which has the wrong type")
    if isinstance(value, int | float) and not (value > 0 or (zero and value == 0)):
        raise SettingsError(f"{name} is {value!r}; it must be {'at least' if zero else 'greater than'} 0")


def _slo_classes(given: Any) -> dict[str, SloClass]:
    try:
        return {name: _slo_class(one) for name, one in given.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            f"slo_classes is {given!r}; give {{name: {{ttft_s: seconds, tpot_s: seconds, priority: whole "
            "number, downgrade_to: name or null}}, the last two if you like"
        ) from error


def _slo_class(given: Any) -> SloClass:
    if unknown := given.keys() - {entry.name for entry in fields(SloClass)}:
        raise ValueError(f"unknown: {sorted(unknown)}")
    priority, downgrade_to = given.get("priority", 0), given.get("downgrade_to")
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise TypeError(f"priority is {priority!r}")
    if not (downgrade_to is None or isinstance(downgrade_to, str)):
        raise TypeError(f"downgrade_to is {downgrade_to!r}")
    return SloClass(float(given["ttft_s"]), float(given["tpot_s"]), priority, downgrade_to)
