"""`prelay plan --live`: asked of something that answers like a router."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc, worker_pb2

from bench import cli
from cluster.planner.errors import PlanError
from cluster.planner.live import Live, difference
from router.pool_view import Role

Run = Callable[..., int]
LATENCY = {"step": 0.01, "rows": 4e-4, "decode_context": 1e-6}


def worker(worker_id: str, role: worker_pb2.Role, *, up: bool = True, **info: Any) -> admin_pb2.WorkerStatus:
    said = {
        "latency": LATENCY, "num_devices": 1, "num_blocks": 2000, "block_size": 16, "kv_token_bytes": 40_000,
        **info,
    }  # fmt: skip
    return admin_pb2.WorkerStatus(
        info=worker_pb2.WorkerInfo(
            worker_id=worker_id, role=role, max_batch_tokens=512, max_num_seqs=64, **said
        ),
        up=up,
    )


class Router(admin_pb2_grpc.RouterAdminServicer):
    """Three workers, of which two read; prompts that are short, and answers that are long."""

    def __init__(self) -> None:
        self.workers = [
            worker("prefill-0", worker_pb2.ROLE_PREFILL),
            worker("prefill-1", worker_pb2.ROLE_PREFILL),
            worker("decode-0", worker_pb2.ROLE_DECODE),
            worker("decode-1", worker_pb2.ROLE_DECODE, up=False),
        ]
        self.num_answers = 200

    def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        idle = admin_pb2.ClassOutcomes(ttft_limit_s=9, tpot_limit_s=9)
        busy = admin_pb2.ClassOutcomes(ttft_limit_s=0.5, tpot_limit_s=0.0125, outcomes={"good": 100})
        return admin_pb2.GetStatusResponse(workers=self.workers, classes={"idle": idle, "busy": busy})

    def GetWorkload(
        self, request: admin_pb2.GetWorkloadRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetWorkloadResponse:
        shapes = [admin_pb2.RequestShape(prompt_tokens=50, answer_tokens=200)] * self.num_answers
        drift = admin_pb2.Drift(trait="answer", before=100.0, now=200.0)
        return admin_pb2.GetWorkloadResponse(
            seconds=300, rate=1.5, hit_share=0.2, shapes=shapes, drifts=[drift]
        )


@pytest.fixture
def router() -> Iterator[tuple[Router, str]]:
    servicer, server = Router(), grpc.server(ThreadPoolExecutor(2))
    admin_pb2_grpc.add_RouterAdminServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def start(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", "plan", "--count", "40", "--seeds", "1", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return start


def test_what_runs_and_what_it_has_seen(router: tuple[Router, str]) -> None:
    live = Live.ask(f"grpc://{router[1]}")
    (kind,) = live.kinds()
    assert (kind.devices, kind.kv_tokens, kind.kv_bytes) == (1, 32_000, 40_000)
    assert (kind.batch_tokens, kind.num_seqs) == (512, 64)
    assert kind.latency.prefill_s(500) == pytest.approx(0.21)
    now = live.plan()
    assert now is not None
    assert [(pool.role, pool.replicas) for pool in now.pools] == [(Role.PREFILL, 2), (Role.DECODE, 1)]
    assert live.hardware.count == 4, "of the one that is down, too"
    assert live.slo.limits(50).tpot_s == 0.0125
    assert {(one.prompt_tokens, one.output_tokens) for one in live.dataset.pool} == {(50, 200)}
    first, second, third = live.said()
    assert "1.5 requests/s" in first
    assert "20% of the prompts' tokens" in first
    assert "hand-offs are planned at 10 GB/s" in second
    assert third == "changed in the last minutes: answer, from 100 to 200"


def test_workers_of_other_sizes_are_other_kinds(router: tuple[Router, str]) -> None:
    staged = {"num_devices": 2, "tensor_parallel": 1, "pipeline_parallel": 2, "num_blocks": 900}
    router[0].workers += [
        worker("decode-2", worker_pb2.ROLE_DECODE, **staged),
        worker("decode-3", worker_pb2.ROLE_DECODE, **staged),
    ]
    live = Live.ask(router[1])
    assert [(kind.tp, kind.pp, kind.kv_tokens) for kind in live.kinds()] == [(1, 1, 32_000), (1, 2, 14_400)]
    assert live.hardware.count == 8
    now = live.plan()
    assert now is not None
    assert [str(pool) for pool in now.pools] == ["2 x prefill (device TP1)", "3 x decode (device TP1 PP2)"]


def test_what_cannot_serve_is_no_plan(router: tuple[Router, str]) -> None:
    router[0].workers = [worker("prefill-0", worker_pb2.ROLE_PREFILL)]
    assert Live.ask(router[1]).plan() is None


@pytest.mark.slow
def test_the_plan_is_held_against_what_runs(
    router: tuple[Router, str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--live", router[1], "--json") == 0
    result = json.loads(capsys.readouterr().out)
    now = {"prefill": 2, "decode": 1}
    assert {role: result["live"]["now"][role]["replicas"] for role in now} == now
    assert result["live"]["rate"] == 1.5
    assert result["live"]["drifts"] == [{"trait": "answer", "before": 100.0, "now": 200.0}]
    best = result["plans"][0]
    assert best["devices"] <= 4, "one that is down is there, too"
    # Two that read short prompts, and one that writes long answers: that is the wrong way round.
    assert best.get("prefill", {"replicas": 0})["replicas"] < 2
    assert any(line.startswith("prefill: 2 x device TP1 -> ") for line in result["live"]["changes"])
    assert run("--live", router[1]) == 0
    said = capsys.readouterr().out
    assert "now: 2 x prefill (device TP1) + 1 x decode (device TP1), good for" in said
    assert "planned: " in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--model", "llama-3.1-8b"), 2, "--model is for --gpus"),
        (("--mode", "distserve"), 2, "--mode distserve needs a --profile"),
        (("--objective", "cost"), 2, "--objective cost is for --gpus"),
        (("--max-tokens", "100"), 2, "--max-tokens is for --trace and --dataset"),
        (("--context-parallel", "2"), 2, "cannot split a prompt over devices by its context yet"),
    ],
)
def test_what_does_not_go_with_live(
    router: tuple[Router, str],
    run: Run,
    arguments: tuple[str, ...],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--live", router[1], *arguments) == code
    assert said in capsys.readouterr().err


def test_too_little_to_plan_for(
    router: tuple[Router, str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    router[0].num_answers = 3
    assert run("--live", router[1]) == 2
    assert "3 answers are complete so far, and a plan needs 50" in capsys.readouterr().err
    router[0].workers = router[0].workers[3:]
    with pytest.raises(PlanError, match="no worker is up there"):
        Live.ask(router[1])


def test_no_router_there(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--live", "127.0.0.1:1") == 1
    assert "no router answers at 127.0.0.1:1" in capsys.readouterr().err
    assert run("--live", "grpc://") == 2
    assert run() == 2
    assert "--gpus KIND:N is missing, or --live HOST:PORT" in capsys.readouterr().err


def test_only_what_changes_is_a_difference(router: tuple[Router, str]) -> None:
    live = Live.ask(router[1])
    now = live.plan()
    assert now is not None
    assert difference(now, now) == []
