"""What a deployment is made of: the configuration as a whole (its sections and their keys: `sections.py`).

The defaults fit two cores and 24 GB and serve the demo model. Files and flags are turned into a
`ServeConfig` by `config_file.py`. This is the only module that reads environment variables: those of Ray,
which has no other switch for some of its behaviour.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.sections import (
    ControllerSection,
    DecodeSection,
    KvSection,
    MixedSection,
    ModelSection,
    PoolSection,
    PrefillSection,
    RaySection,
    RouterSection,
    SloSection,
    TlsSection,
    TransferSection,
)

_HEAD_SILENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"


class ServeConfig(BaseModel):
    """The whole configuration. Unknown keys are refused, and values are taken as written, not guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: ModelSection = Field(default_factory=ModelSection)
    prefill: PrefillSection = Field(default_factory=PrefillSection)
    decode: DecodeSection = Field(default_factory=DecodeSection)
    mixed: MixedSection = Field(default_factory=MixedSection)
    kv: KvSection = Field(default_factory=KvSection)
    transfer: TransferSection = Field(default_factory=TransferSection)
    router: RouterSection = Field(default_factory=RouterSection)
    slo: SloSection = Field(default_factory=SloSection)
    controller: ControllerSection = Field(default_factory=ControllerSection)
    tls: TlsSection = Field(default_factory=TlsSection)
    ray: RaySection = Field(default_factory=RaySection)

    def resolved(self) -> ServeConfig:
        """The same configuration with the model's path and name filled in, and all paths absolute."""
        path = (self.model.path or demo_model_path()).absolute()
        profile = _absolute(self.model.profile)
        filled = {"path": path, "name": self.model.name or path.name, "profile": profile}
        tls = {"internal": _absolute(self.tls.internal), "clients": _absolute(self.tls.clients)}
        return self.model_copy(
            update={
                "model": self.model.model_copy(update=filled),
                "router": self.router.model_copy(update={"tenants": _absolute(self.router.tenants)}),
                "tls": self.tls.model_copy(update=tls),
            }
        )

    def check_kv_room(self, max_model_len: int) -> None:
        """Raises ValueError if a KV cache whose size is given cannot hold one sequence of `max_model_len`
        tokens."""
        for name, pool in self.pools.items():
            tokens = pool.kv_cache_tokens
            if pool.replicas and tokens is not None and tokens < max_model_len:
                raise ValueError(
                    f"{name}.kv_cache_tokens is {tokens}, too few for one sequence of {max_model_len} "
                    "tokens: raise it, or lower model.max_model_len"
                )

    @model_validator(mode="after")
    def _longest_sequence_fits(self) -> Self:
        if self.model.max_model_len is not None:
            self.check_kv_room(self.model.max_model_len)
        return self

    @model_validator(mode="after")
    def _workers_can_serve_together(self) -> Self:
        prefill, decode, mixed = self.prefill.replicas, self.decode.replicas, self.mixed.replicas
        if not prefill and not mixed:
            raise ValueError(
                "prefill.replicas and mixed.replicas are both 0, so no worker could read prompts: raise one "
                "of them"
            )
        if not decode and not mixed:
            raise ValueError(
                "decode.replicas and mixed.replicas are both 0, so no worker could write answers: raise one "
                "of them"
            )
        if decode and not prefill:
            raise ValueError(
                f"decode.replicas is {decode}, but prefill.replicas is 0: decode workers get their prompts "
                "from prefill workers, never from mixed ones; set decode.replicas to 0, or raise "
                "prefill.replicas"
            )
        if self.router.policy == "colocated" and not mixed:
            raise ValueError(
                "router.policy is colocated, which uses mixed workers only, but mixed.replicas is 0: raise it"
            )
        return self

    @model_validator(mode="after")
    def _controllers_see_all_that_comes(self) -> Self:
        routers = len(self.router.external) + self.router.actors
        if routers > 1 and self.controller.mode != "none":
            raise ValueError(
                f"controller.mode is {self.controller.mode}, but there are {routers} routers "
                f"({'router.external' if self.router.external else 'router.actors'}): the controller would "
                "know of the requests of one of them only; set it to none"
            )
        return self

    @model_validator(mode="after")
    def _controllers_have_bounds_that_hold(self) -> Self:
        least, most = self.controller.min_workers, self.controller.max_workers
        given = {"controller.min_workers": least, "controller.max_workers": most}
        names = " and ".join(name for name, value in given.items() if value is not None)
        if names and self.controller.mode == "none":
            raise ValueError(f"{names}: controller.mode is none, so nobody looks at it; set it to act")
        there = sum(pool.replicas for pool in self.pools.values())
        for name, bound, is_kept in (
            ("controller.min_workers", least, least is None or there >= least),
            ("controller.max_workers", most, most is None or there <= most),
        ):
            if not is_kept:
                raise ValueError(f"{name} is {bound}, but there are {there} workers: change one of the two")
        return self

    @model_validator(mode="after")
    def _detached_needs_nothing_of_this_process(self) -> Self:
        name = self.ray.detached
        if name is not None and self.ray.address is None:
            raise ValueError(
                f"ray.detached is {name!r}, but ray.address is not given: a private Ray ends with whoever "
                "starts it; start one with `ray start --head`, and give its address"
            )
        if name is not None and not self.router.external and not self.router.actors:
            raise ValueError(
                f"ray.detached is {name!r}, but router.actors is 0 and router.external names no router: one "
                "of our own would end with whoever starts it; set router.actors to 1, or start some with "
                "`prelay router`, and name their admin ports"
            )
        return self

    @model_validator(mode="after")
    def _actors_have_a_cluster(self) -> Self:
        if self.router.actors and self.ray.address is None:
            raise ValueError(
                f"router.actors is {self.router.actors}, but ray.address is not given: on this machine the "
                "router needs no Ray; leave router.actors out, or join a Ray cluster"
            )
        return self

    @model_validator(mode="after")
    def _simulated_workers_have_the_backend(self) -> Self:
        backend = self.transfer.backend
        if self.model.load == "simulated" and backend not in ("auto", "ipc"):
            raise ValueError(
                f"transfer.backend is {backend}, but model.load is simulated: simulated workers have only "
                "ipc; set transfer.backend to that, or to auto"
            )
        return self

    @property
    def pools(self) -> dict[str, PoolSection]:
        """By the names of their sections, which are those of the roles; those without a worker included."""
        return {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}

    @property
    def num_cpus(self) -> int:
        """CPUs that the workers of all pools take together."""
        return sum(pool.replicas * pool.num_ranks * pool.threads for pool in self.pools.values())


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


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
    if not local_ray:
        # Without the head of the Ray cluster, which serves nothing, we go on for a week, instead of a minute.
        switches[_HEAD_SILENCE] = os.environ.get(_HEAD_SILENCE, "604800")
    else:
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
