"""What a deployment is made of: every key of the configuration, with its default and its limits.

The defaults fit two cores and 24 GB and serve the demo model. Files and flags are turned into a
`ServeConfig` by `config_file.py`. This is the only module that reads environment variables: those of Ray,
which has no other switch for some of its behaviour.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class ServeConfig(BaseModel):
    """The whole configuration. Unknown keys are refused, and values are taken as written, not guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: ModelSection = Field(default_factory=lambda: ModelSection())
    prefill: PrefillSection = Field(default_factory=lambda: PrefillSection())
    decode: DecodeSection = Field(default_factory=lambda: DecodeSection())
    kv: KvSection = Field(default_factory=lambda: KvSection())
    transfer: TransferSection = Field(default_factory=lambda: TransferSection())
    router: RouterSection = Field(default_factory=lambda: RouterSection())
    slo: SloSection = Field(default_factory=lambda: SloSection())
    ray: RaySection = Field(default_factory=lambda: RaySection())

    def resolved(self) -> ServeConfig:
        """The same configuration with the model's path and name filled in."""
        path = (self.model.path or demo_model_path()).absolute()
        model = self.model.model_copy(update={"path": path, "name": self.model.name or path.name})
        return self.model_copy(update={"model": model})

    def check_kv_room(self, max_model_len: int) -> None:
        """Raises ValueError if a KV cache whose size is given cannot hold one sequence of `max_model_len`
        tokens."""
        for name, pool in self.pools.items():
            tokens = pool.kv_cache_tokens
            if tokens is not None and tokens < max_model_len:
                raise ValueError(
                    f"{name}.kv_cache_tokens is {tokens}, too few for one sequence of {max_model_len} "
                    "tokens: raise it, or lower model.max_model_len"
                )

    @model_validator(mode="after")
    def _longest_sequence_fits(self) -> Self:
        if self.model.max_model_len is not None:
            self.check_kv_room(self.model.max_model_len)
        return self

    @property
    def pools(self) -> dict[str, PoolSection]:
        """By the names of their sections."""
        return {"prefill": self.prefill, "decode": self.decode}

    @property
    def num_cpus(self) -> int:
        """CPUs that the workers of both pools take together."""
        return sum(pool.replicas * pool.num_ranks * pool.threads for pool in self.pools.values())


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


def _one_name(value: str) -> str:
    if not value or value != value.strip() or any(not char.isprintable() for char in value):
        raise ValueError(f"{value!r} is not a name: it must be printable, without blanks around it")
    return value


HostPort = Annotated[str, AfterValidator(_checked_host_port)]
Name = Annotated[str, AfterValidator(_one_name)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Replicas = Annotated[int, Field(ge=1, le=1024)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Ranks = Annotated[int, Field(ge=1, le=64)]


class Section(BaseModel):
    """One mapping of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """path: checkpoint directory, None is the demo model; name: what clients call it, None is the
    directory's name; load: the checkpoint's weights, or random ones for its config.json; max_model_len:
    longest prompt and answer together, None is the model's own limit.
    """

    path: Annotated[Path | None, Field(strict=False)] = None
    name: Name | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    load: Literal["weights", "dummy"] = "weights"
    max_model_len: Annotated[int, Field(ge=2)] | None = None


class PoolSection(Section):
    """What both pools have. tensor_parallel, pipeline_parallel: into how many parts a worker splits each
    layer's heads, and the layers; it has a rank, which is a process, for each part. threads: CPU threads
    (and cores) of each rank. kv_cache_tokens: room of each worker, None is its part of kv.memory_share."""

    replicas: Replicas = 1
    tensor_parallel: Ranks = 1
    pipeline_parallel: Ranks = 1
    threads: Threads = 1
    kv_cache_tokens: Count | None = None

    @property
    def num_ranks(self) -> int:
        """Of one worker."""
        return self.tensor_parallel * self.pipeline_parallel


class PrefillSection(PoolSection):
    """max_batch_tokens: most prompt tokens in one step."""

    max_batch_tokens: Count = 512


class DecodeSection(PoolSection):
    """max_num_seqs: most sequences in one step; max_batch_tokens: most tokens in one step, those included
    that are computed again for a sequence that had to give up its KV blocks."""

    max_num_seqs: Count = 64
    max_batch_tokens: Count = 512

    @model_validator(mode="after")
    def _every_sequence_has_a_token(self) -> Self:
        if self.max_batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"decode.max_batch_tokens is {self.max_batch_tokens}, less than one token for each of "
                f"decode.max_num_seqs, {self.max_num_seqs}: raise the one or lower the other"
            )
        return self


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
    """Where the router listens, and its limits.

    suspect_after_s: silence after which a worker gets nothing new, None is half of liveness_timeout_s;
    liveness_timeout_s: silence after which it counts as dead and its requests are placed again.
    max_attempts: placements of one request that may be lost. retry_budget, retry_burst: so many requests are
    placed again for each one that is let in, and so many beyond that. recovery_wait_s: how long requests wait
    for a pair of workers when there is none. stream_buffer_tokens: of a streamed answer that may be unread
    before it is paused; slow_reader_timeout_s: how long they may be before it is ended. request_timeout_s:
    longest life of a request. max_gated_requests: most requests that wait; more are told to come again after
    retry_after_s. max_choices: most answers that one HTTP call may ask for. max_body_bytes: of an HTTP body
    or gRPC message.
    """

    http: HostPort = "127.0.0.1:8000"
    grpc: HostPort = "127.0.0.1:8001"
    metrics: HostPort = "127.0.0.1:9090"
    admin: HostPort = "127.0.0.1:0"
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
    """A request is good if its first token comes within ttft_s and the others tpot_s apart on average."""

    ttft_s: Seconds
    tpot_s: Seconds


class SloSection(Section):
    """default: the class of requests that name none."""

    default: Name = "standard"
    classes: dict[Name, SloClass] = Field(
        default_factory=lambda: {
            "interactive": SloClass(ttft_s=0.45, tpot_s=0.04),
            "standard": SloClass(ttft_s=2.0, tpot_s=0.2),
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


class RaySection(Section):
    """address: HOST:PORT of a running Ray cluster; None starts a private one on this machine."""

    address: HostPort | None = None


def demo_model_path() -> Path:
    """Where the demo model is: inside the package in a wheel, under deploy/ in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "models" / "storyteller"
    return installed if installed.is_dir() else package.parent / "deploy" / "models" / "storyteller"


def child_environment(local_ray: bool) -> dict[str, str]:
    """The environment of the process that starts a deployment, and through it of all the others.

    local_ray: Ray is started here, for this deployment alone.
    """
    switches = {
        # Ray forks while gRPC runs in the same process; gRPC's own precautions for that made the two wait
        # for each other.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if local_ray:
        # Despite its name this is the switch, on every system, for "one machine only": with 0 all of Ray's
        # processes listen on loopback instead of on every interface.
        switches["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray's own fixed port would collide with any other Ray on the machine.
        switches["AUTOSCALER_METRIC_PORT"] = "0"
        # Ray would make its workers nicer than everything else on the machine, the router included.
        switches["RAY_worker_niceness"] = "0"
        # Ray would kill workers when other programs use the memory. Ours take what they need when they start.
        switches["RAY_memory_monitor_refresh_ms"] = "0"
    return {**os.environ, **switches}
