"""The load generator against a real router over fake workers, through both of its doors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from prelay.v1 import worker_pb2

from bench.load.connect import connect
from bench.load.run import run_load
from bench.load.serve import Measured, ServePlan, measure
from cluster.workload.arrivals import Arrivals
from cluster.workload.datasets import Synthetic
from cluster.workload.drawing import WorkloadSpec
from cluster.workload.jobs import Job, Status
from cluster.workload.judge import Outcome
from cluster.workload.slo import Slo
from router.app import Addresses, Router
from router.fake_fleet import FakeFleet
from router.fake_model import FakeModel
from router.fake_worker import Hold
from router.settings import RouterSettings
from router.worker_link import ROLE_OF_PROTO, Registration

VOCAB_SIZE = 257
SLO = Slo.fixed(60.0, 60.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights, whose tokens are ASCII letters."""
    path = tmp_path_factory.mktemp("checkpoint")
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": VOCAB_SIZE, "eos_token_id": 256,
        "max_position_embeddings": 512, "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    vocabulary = {chr(33 + token): token for token in range(VOCAB_SIZE)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@dataclass
class Served:
    """A router with a prefill and a decode worker."""

    router: Router
    addresses: Addresses
    fleet: FakeFleet

    def url(self, door: str) -> str:
        return f"{door}://{getattr(self.addresses, door)}"

    def worker(self, worker_id: str) -> Any:
        return next(one for one in self.fleet.workers.values() if one.info.worker_id == worker_id)


@pytest.fixture
async def served(checkpoint: Path, request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    settings = RouterSettings(
        str(checkpoint), "fake", http="127.0.0.1:0", grpc="127.0.0.1:0", metrics="127.0.0.1:0",
        admin="127.0.0.1:0", stop_grace_s=0.05, liveness_timeout_s=60.0, policy="least_loaded",
        **getattr(request, "param", {}),
    )  # fmt: skip
    router = Router(settings)
    fleet = FakeFleet(FakeModel(low=32, high=127, eos_token_id=256, max_model_len=512, vocab_size=VOCAB_SIZE))
    served = Served(router, await router.start(), fleet)
    for role, worker_id in ((worker_pb2.ROLE_PREFILL, "p0"), (worker_pb2.ROLE_DECODE, "d0")):
        info = (await fleet.start(role, worker_id, num_blocks=4096)).info
        await router.workers.register(
            Registration(info.worker_id, info.epoch, ROLE_OF_PROTO[info.role], info.address)
        )
    await until(lambda: router.dispatcher.serving)
    yield served
    await router.stop()
    await fleet.stop()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 (there is no event for it)
        await asyncio.sleep(0)


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_every_request_is_answered_and_timed(served: Served, door: str) -> None:
    jobs = [Job(0.001 * at, range(10, 30 + at), 4 + at % 3) for at in range(20)]
    async with connect(served.url(door), vocabulary=range(10, 200)) as target:
        info = await target.check()
        rows = await run_load(target, jobs, SLO, lambda *_: None)
    assert (info.model, info.max_model_len) == ("fake", 512)
    assert info.vocab_size == (VOCAB_SIZE if door == "grpc" else None)
    assert [row.status for row in rows] == [Status.COMPLETE] * 20
    assert [row.prompt_tokens for row in rows] == [20 + at for at in range(20)]
    assert [row.output_tokens for row in rows] == [4 + at % 3 for at in range(20)]
    for row in rows:
        assert row.ttft_s is not None
        assert row.last_s is not None
        assert 0 < row.ttft_s <= row.last_s
        assert {"gate", "prefill", "decode"} <= row.stages.keys()
        # The server's account begins later and ends earlier than the client's.
        assert sum(row.stages.values()) <= row.last_s


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_the_router_judges_by_the_limits_that_it_is_sent(served: Served, door: str) -> None:
    async with connect(served.url(door), vocabulary=range(10, 200)) as target:
        await target.check()
        # Over HTTP a limit has a microsecond at least.
        for slo in (Slo.fixed(1e-6, 60.0), Slo.fixed(60.0, 1e-6), SLO):
            await run_load(target, [Job(0.0, [40, 41], 8)], slo, lambda *_: None)

    def outcomes(name: str) -> float:
        labels = {"slo_class": "default", "outcome": name}
        return served.router.registry.get_sample_value("prelay_requests_total", labels) or 0.0

    assert outcomes("ttft_miss") == 1
    assert outcomes("tpot_miss") == 1


@pytest.mark.parametrize("served", [{"max_gated_requests": 2}], indirect=True)
@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_refusals_and_hanging_requests_stay_in_the_rows(served: Served, door: str) -> None:
    async with connect(served.url(door), vocabulary=range(10, 200)) as target:
        await target.check()
        served.worker("p0").hold(Hold.PREFILL)
        jobs = [Job(0.0, range(10, 250), 4)] * 8
        rows = await run_load(target, jobs, SLO, lambda *_: None, timeout_s=1.0)
        served.worker("p0").let_go(Hold.PREFILL)
    statuses = [row.status for row in rows]
    assert set(statuses) == {Status.REJECTED, Status.TIMED_OUT}
    assert statuses.count(Status.REJECTED) >= 3
    refusal = next(row for row in rows if row.status is Status.REJECTED)
    assert refusal.error.startswith("HTTP 429" if door == "http" else "RESOURCE_EXHAUSTED")
    assert refusal.ttft_s is None


async def test_wrong_requests_fail_over_grpc(served: Served) -> None:
    async with connect(served.url("grpc")) as target:
        await target.check()
        (row,) = await run_load(target, [Job(0.0, [9999], 4)], SLO, lambda *_: None)
    assert row.status is Status.FAILED
    assert row.error.startswith("INVALID_ARGUMENT")


def plan(**changed: Any) -> ServePlan:
    values: dict[str, Any] = {
        "spec": WorkloadSpec(Synthetic((16, 32), (4, 6)), Arrivals.parse("poisson"), range(1), salt=3),
        "rates": [400.0, 800.0],
        "seeds": 2,
        "duration_s": None,
        "count": 20,
        "warmup_s": 0.01,
        "slo": SLO,
        "timeout_s": 60.0,
        "send_slo": True,
        "vocab_size": 200,
        "devices": 2,
    }
    return ServePlan(**values | changed)


async def measured(served: Served, door: str, **changed: Any) -> Measured:
    async with connect(served.url(door), vocabulary=range(20, 200)) as target:
        return await measure(target, plan(**changed), lambda *_: None)


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_rates_and_seeds_side_by_side(served: Served, door: str) -> None:
    found = await measured(served, door)
    assert [(run.seed, run.rate) for run in found.runs] == [(0, 400), (0, 800), (1, 400), (1, 800)]
    assert [(len(run.rows), len(run.judged)) for run in found.runs] == [(24, 20), (28, 20)] * 2
    result = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [rate["rate"] for rate in result["rates"]] == [400, 800]
    for rate in result["rates"]:
        assert (rate["requests"], rate["outcomes"]["good"], rate["attainment"]) == (40, 40, 1.0)
        assert rate["goodput"] == pytest.approx(rate["rate"]) == 2 * rate["goodput_per_device"]
        assert [seed["requests"] for seed in rate["by_seed"]] == [20, 20]
        assert rate["stages_s"].keys() >= {"gate", "decode"}
        assert rate["client_cpu_share"] > 0
    assert [(found["rate"], found["bound"]) for found in result["crossings"]] == [(800, ">=")] * 2
    assert len(result["slo"]["idle"]) == 2
    assert "attainment" not in result


async def test_one_rate_stands_at_the_top_too(served: Served) -> None:
    found = await measured(served, "grpc", rates=[500.0], seeds=1, slo=Slo.parse("ttft=3x,tpot=10000x"))
    result = found.to_json()
    assert result["crossings"] == []
    assert (result["requests"], result["client_cpu_share"]) == (20, result["rates"][0]["client_cpu_share"])
    idle = result["slo"]["idle"]
    assert 1 < len(idle) <= 5
    # The limits that were sent depend on the prompt.
    limits = found.slo.limits(16)
    assert limits.ttft_s == pytest.approx(3 * found.slo.idle.at(16).ttft_s)  # type: ignore[union-attr]
    assert set(result["outcomes"]) == {outcome.value for outcome in Outcome}


async def test_a_duration_is_judged_after_the_warm_up(served: Served) -> None:
    spec = WorkloadSpec(Synthetic((16, 16), (4, 4)), Arrivals.parse("constant"), range(1))
    found = await measured(
        served, "grpc", spec=spec, rates=[100.0], seeds=1, count=None, duration_s=0.25, warmup_s=0.25
    )
    (run,) = found.runs
    assert (len(run.rows), len(run.judged)) == (50, 25)
    assert run.judged[0].arrival_s == 0.25
    assert found.judgement(100.0).goodput == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"rates": [0.01], "count": None, "duration_s": 1.0}, "no request arrives within 1 s"),
        ({"rates": [None]}, "--requests needs a --rate"),
        (
            {"spec": WorkloadSpec(Synthetic((600, 600), (1, 1)), Arrivals.parse("constant"), range(1))},
            r"are longer than the 512 tokens of fake \(the longest has 601\)",
        ),
    ],
)
async def test_what_cannot_be_measured_is_refused_before_anything_is_sent(
    served: Served, changed: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        await measured(served, "grpc", **changed)
    assert served.worker("p0").prefills == []
