"""The sections of the configuration, one mapping of the file each: every key, its default and its limits."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def parse_host_port(value: str) -> tuple[str, int]:
    """The parts of HOST:PORT or [IPV6]:PORT. Raises ValueError with the remedy."""
    host, colon, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif "://" in value:
        raise ValueError(f"{value!r} has a scheme: write only HOST:PORT, as in 127.0.0.1:8000")
    elif ":" in host:
        raise ValueError(f"{value!r} is ambiguous: write an IPv6 address in brackets, as in [::1]:8000")
    if not colon or not host or not port.isascii() or not port.isdigit():
        raise ValueError(f"{value!r} is not HOST:PORT, as in 127.0.0.1:8000 (port 0 picks a free one)")
    if int(port) > 65535:
        raise ValueError(f"{value!r} has a port beyond 65535")
    return host, int(port)


def _checked_host_port(value: str) -> str:
    parse_host_port(value)
    return value


def _known_policy(value: str) -> str:
    from router.policies import POLICIES  # takes longer than all else here, and few configurations name one

    if value not in POLICIES:
        close = difflib.get_close_matches(value, POLICIES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(POLICIES)}"
        raise ValueError(f"{value!r} is not a policy; {hint}")
    return value


def _one_name(value: str) -> str:
    if not value or value != value.strip() or any(not char.isprintable() for char in value):
        raise ValueError(f"{value!r} is not a name: it must be printable, without blanks around it")
    return value


HostPort = Annotated[str, AfterValidator(_checked_host_port)]
Name = Annotated[str, AfterValidator(_one_name)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Replicas = Annotated[int, Field(ge=0, le=1024)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Ranks = Annotated[int, Field(ge=1, le=64)]


class Section(BaseModel):
    """One mapping of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """path: checkpoint directory, None is the demo model; name: what clients call it, None is the
    directory's name; load: the checkpoint's weights, random ones for its config.json, or none at all: then
    steps only take the time that `profile` says, and answers are made up; max_model_len: longest prompt and
    answer together, None is the model's own limit; profile: file that says how long the steps of a worker
    take, as `prelay profile --json` writes it, None measures that when a worker starts.
    """

    path: Annotated[Path | None, Field(strict=False)] = None
    name: Name | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    load: Literal["weights", "dummy", "simulated"] = "weights"
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    profile: Annotated[Path | None, Field(strict=False)] = None

    @model_validator(mode="after")
    def _simulation_has_a_profile(self) -> Self:
        if self.load == "simulated" and self.profile is None:
            raise ValueError(
                "model.load is simulated, but model.profile is not given: simulated engines need a file that "
                "says how long their steps take; `prelay profile --json` writes one"
            )
        return self


class PoolSection(Section):
    """What all pools have. replicas: workers of the pool. tensor_parallel, pipeline_parallel: into how many
    parts each splits every layer's heads, and the layers; it has a rank, which is a process, for each part.
    threads: CPU threads (and cores) of each rank. kv_cache_tokens: room of each worker, None is its part of
    kv.memory_share. resources, labels: of the nodes of a Ray cluster that a worker may be on."""

    replicas: Replicas = 1
    tensor_parallel: Ranks = 1
    pipeline_parallel: Ranks = 1
    threads: Threads = 1
    kv_cache_tokens: Count | None = None
    resources: dict[Name, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    labels: dict[Name, str] = Field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        """Of one worker."""
        return self.tensor_parallel * self.pipeline_parallel


class PrefillSection(PoolSection):
    """max_batch_tokens: most prompt tokens in one step."""

    max_batch_tokens: Count = 512


class WritingSection(PoolSection):
    """max_num_seqs: most sequences in one step; max_batch_tokens: most tokens in one step, those included
    that are computed again for a sequence that had to give up its KV blocks, and of a mixed worker those of
    the prompts that it reads."""

    section: ClassVar[str]
    max_num_seqs: Count = 64
    max_batch_tokens: Count = 512

    @model_validator(mode="after")
    def _every_sequence_has_a_token(self) -> Self:
        if self.max_batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"{self.section}.max_batch_tokens is {self.max_batch_tokens}, less than one token for each "
                f"of {self.section}.max_num_seqs, {self.max_num_seqs}: raise the one or lower the other"
            )
        return self


class DecodeSection(WritingSection):
    """Workers that write answers to prompts which prefill workers have read."""

    section: ClassVar[str] = "decode"


class MixedSection(WritingSection):
    """Decode workers that can also read prompts themselves."""

    section: ClassVar[str] = "mixed"
    replicas: Replicas = 0


class KvSection(Section):
    """block_size: tokens in one KV block, the unit of allocation and of the hand-off. memory_share: of the
    memory that is available at the start, for the KV caches of all workers whose kv_cache_tokens is not
    given, in equal parts. The default keeps the start short: fresh memory comes at about 0.7 s a GiB."""

    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    memory_share: Annotated[float, Field(gt=0, le=0.9)] = 0.1


class TransferSection(Section):
    """backend: how KV blocks move, auto is for each pair the best way that both workers have; lease_s: how
    long blocks are kept for a peer that shows no progress; digest_share: of the requests whose KV is compared
    after its way, 0 to 1."""

    backend: Literal["auto", "ipc", "nixl", "torchdist"] = "auto"
    lease_s: Seconds = 10.0
    digest_share: Annotated[float, Field(ge=0, le=1)] = 0.05


class RouterSection(Section):
    """Where the router listens, its policy and its limits.

    policy: how requests are admitted, in which order they wait, and where they are placed. suspect_after_s:
    silence after which a worker gets nothing new, None is half of liveness_timeout_s; liveness_timeout_s:
    silence after which it counts as dead and its requests are placed again. max_attempts: placements of one
    request that may be lost. retry_budget, retry_burst: so many requests are placed again for each one that
    is let in, and so many beyond that. recovery_wait_s: how long requests wait for a pair of workers when
    there is none. stream_buffer_tokens: of a streamed answer that may be unread before it is paused;
    slow_reader_timeout_s: how long they may be before it is ended. request_timeout_s: longest life of a
    request. max_gated_requests: most requests that wait; more are told to come again after retry_after_s.
    max_choices: most answers that one HTTP call may ask for. max_body_bytes: of an HTTP body or gRPC message.
    tenants: file of who may ask, with keys and limits (router/tenants.py); None lets everybody. external:
    admin ports of routers that run elsewhere (`prelay router`), to be used instead of one of our own.
    actors: instead, so many routers as actors of the Ray cluster, on nodes with these resources and labels.
    """

    http: HostPort = "127.0.0.1:8000"
    grpc: HostPort = "127.0.0.1:8001"
    metrics: HostPort = "127.0.0.1:9090"
    admin: HostPort = "127.0.0.1:9091"
    external: list[HostPort] = Field(default_factory=list)
    actors: Annotated[int, Field(ge=0, le=64)] = 0
    resources: dict[Name, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    labels: dict[Name, str] = Field(default_factory=dict)
    policy: Annotated[str, AfterValidator(_known_policy)] = "goodput"
    suspect_after_s: Seconds | None = None
    liveness_timeout_s: Annotated[float, Field(ge=0.2, allow_inf_nan=False)] = 1.5
    max_attempts: Count = 6
    retry_budget: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    retry_burst: Annotated[int, Field(ge=0)] = 256
    recovery_wait_s: Seconds = 60.0
    stream_buffer_tokens: Count = 256
    slow_reader_timeout_s: Seconds = 30.0
    request_timeout_s: Seconds = 600.0
    retry_after_s: Seconds = 1.0
    max_gated_requests: Count = 1024
    max_choices: Count = 64
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 * 2**20
    tenants: Annotated[Path | None, Field(strict=False)] = None

    @model_validator(mode="after")
    def _suspicion_comes_before_death(self) -> Self:
        longest = self.liveness_timeout_s
        if self.suspect_after_s is not None and not longest / 3 <= self.suspect_after_s <= longest:
            raise ValueError(
                f"router.suspect_after_s is {self.suspect_after_s}, but it must be between a third of "
                f"router.liveness_timeout_s ({longest}), the time of two signs of life, and all of it"
            )
        return self

    @model_validator(mode="after")
    def _routers_are_of_one_kind(self) -> Self:
        if self.external and self.actors:
            raise ValueError(
                f"router.external names routers, and router.actors is {self.actors}: use one of the two"
            )
        if (self.resources or self.labels) and not self.actors:
            raise ValueError(
                "router.resources and router.labels choose the nodes of routers that are actors, but "
                "router.actors is 0: raise it"
            )
        return self

    @model_validator(mode="after")
    def _listeners_differ(self) -> Self:
        seen: dict[int, tuple[str, str]] = {}
        for key in ("http", "grpc", "metrics", "admin"):
            host, port = parse_host_port(getattr(self, key))
            if port and port in seen:
                other_key, other_host = seen[port]
                if host == other_host or {host, other_host} & {"0.0.0.0", "::"}:
                    raise ValueError(
                        f"router.{other_key} and router.{key} both want port {port} on {host}: "
                        "give one of them another port, or port 0 for a free one"
                    )
            seen.setdefault(port, (key, host))
        return self


class SloClass(Section):
    """A request is good if its first token comes within ttft_s and the others tpot_s apart on average.

    priority: the greater goes first, whatever the limits. downgrade_to: the class that a request is served
    as when it would be late in this one and its client would rather have that than a refusal.
    """

    ttft_s: Seconds
    tpot_s: Seconds
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    downgrade_to: Name | None = None


class SloSection(Section):
    """default: the class of requests that name none."""

    default: Name = "standard"
    classes: dict[Name, SloClass] = Field(
        default_factory=lambda: {
            "interactive": SloClass(ttft_s=0.45, tpot_s=0.04, downgrade_to="standard"),
            "standard": SloClass(ttft_s=2.0, tpot_s=0.2, downgrade_to="batch"),
            "batch": SloClass(ttft_s=30.0, tpot_s=1.0),
        }
    )

    @model_validator(mode="after")
    def _default_exists(self) -> Self:
        if self.default not in self.classes:
            raise ValueError(
                f"slo.default is {self.default!r}, which is not a class under slo.classes: "
                f"use one of {', '.join(self.classes) or '(there is none: define one)'}"
            )
        return self

    @model_validator(mode="after")
    def _downgrades_come_to_an_end(self) -> Self:
        for name in self.classes:
            chain = [name]
            while (below := self.classes[chain[-1]].downgrade_to) is not None:
                if below not in self.classes:
                    raise ValueError(
                        f"slo.classes.{chain[-1]}.downgrade_to is {below!r}, which is not a class under "
                        f"slo.classes: use one of {', '.join(self.classes)}"
                    )
                if below in chain:
                    raise ValueError(
                        f"slo.classes.{chain[-1]}.downgrade_to is {below!r}, from which it comes "
                        f"({' -> '.join([*chain, below])}): a downgrade has to end somewhere"
                    )
                chain.append(below)
        return self


class ControllerSection(Section):
    """mode: none; observe, which says when it would change a worker's role; act, which does so.

    min_workers, max_workers: within which it also removes and adds workers, where Ray has room for them; None
    is as many as there are at first. target: attainment for which it does.
    """

    mode: Literal["none", "observe", "act"] = "none"
    min_workers: Count | None = None
    max_workers: Count | None = None
    target: Annotated[float, Field(gt=0, le=0.99)] = 0.9


class TlsSection(Section):
    """Directories of certificates, with tls.crt, tls.key and ca.crt (engine/tls.py); None is without TLS.

    internal: of router, workers, controller and operators, at the same path on all hosts. clients: what the
    router shows clients, over HTTP and gRPC. client_certificates: clients need one, too, of an authority in
    that directory's ca.crt.
    """

    internal: Annotated[Path | None, Field(strict=False)] = None
    clients: Annotated[Path | None, Field(strict=False)] = None
    client_certificates: bool = False

    @model_validator(mode="after")
    def _clients_see_ours(self) -> Self:
        if self.client_certificates and self.clients is None:
            raise ValueError(
                "tls.client_certificates is true, but tls.clients is not given: who asks for "
                "certificates has to show one; give its directory"
            )
        return self


class RaySection(Section):
    """address: HOST:PORT of a running Ray cluster; None starts a private one on this machine. wait_s: how
    long to wait for nodes of a running one that are still to join it. detached: name of a deployment that
    lives in that cluster without whoever started it, until `prelay stop`; None ends with `prelay serve`."""

    address: HostPort | None = None
    wait_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    detached: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")] | None = None
