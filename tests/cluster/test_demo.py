"""The demo's parts: its prompts, and that it notices every kind of difference. The whole demo is `slow`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.demo.clients import Answer, Served
from cluster.demo.prompts import FrontEnd, demo_prompts
from cluster.demo.reference import Reference
from cluster.demo.report import Typewriter, answers_json, print_answers
from cluster.demo.run import complaints_about, demo_config
from cluster.sections import SloClass

SERVED = Served("prefill-0", "decode-0", 4096, 0.1, 0.01, 0.2, {"prefill": 0.1, "decode": 0.1}, "good")
REFERENCE = Reference(prompt_tokens=3, token_ids=(5, 6, 1), text="One day", finish_reason="stop")


def answer(front_end: FrontEnd) -> Answer:
    """One that equals the reference."""
    prompt = next(prompt for prompt in demo_prompts() if prompt.front_end is front_end)
    token_ids = REFERENCE.token_ids if front_end is FrontEnd.GRPC else None
    return Answer(prompt, REFERENCE.text, token_ids, "stop", 3, 3, SERVED)


def test_24_different_prompts_half_through_each_front_end() -> None:
    prompts = demo_prompts()
    assert [prompt.number for prompt in prompts] == list(range(1, 25))
    assert len({prompt.text for prompt in prompts}) == 24
    kinds = [(prompt.front_end, prompt.chat, prompt.seed is None) for prompt in prompts]
    assert len(set(kinds)) == 4
    assert sum(front_end is FrontEnd.HTTP for front_end, *_ in kinds) == 12
    assert sum(chat for _, chat, _ in kinds) == 12
    assert sum(greedy for *_, greedy in kinds) == 12
    # The two that are shown come through different front ends.
    assert {prompts[0].front_end, prompts[1].front_end} == set(FrontEnd)


def test_equal_answers_are_not_complained_about() -> None:
    assert complaints_about([answer(FrontEnd.GRPC), answer(FrontEnd.HTTP)], [REFERENCE, REFERENCE]) == []


@pytest.mark.parametrize(
    ("served", "complaint"),
    [
        (replace(answer(FrontEnd.GRPC), token_ids=(5, 7, 1)), "[5, 7, 1]"),
        (replace(answer(FrontEnd.GRPC), token_ids=(5, 6)), "[5, 6, 1]"),
        (replace(answer(FrontEnd.HTTP), text="One night"), "'One night'"),
        (replace(answer(FrontEnd.HTTP), finish_reason="length"), "'length'"),
        (replace(answer(FrontEnd.HTTP), completion_tokens=2), "2 tokens were served, 3 expected"),
        (replace(answer(FrontEnd.HTTP), prompt_tokens=4), "prompt_tokens"),
    ],
)
def test_a_different_answer_is_shown(served: Answer, complaint: str) -> None:
    (found,) = complaints_about([served], [REFERENCE])
    assert found.startswith(f"request {served.prompt.number}: ")
    assert complaint in found


@pytest.mark.parametrize("width", [100, 160])
def test_the_report_fits_the_terminal(width: int) -> None:
    out = io.StringIO()
    answers = [
        answer(FrontEnd.GRPC),
        replace(answer(FrontEnd.HTTP), served=replace(SERVED, outcome="ttft_miss")),
    ]
    print_answers(Console(file=out, width=width), answers, "standard", SloClass(ttft_s=2.0, tpot_s=0.2))
    text = out.getvalue()
    assert "Attainment 50%: 1 of 2 requests" in text
    for shown in ("prefill-0", "decode-0", "200.0", "transfer", "story greedy"):
        assert shown in text
    assert max(map(len, text.splitlines())) <= width


def test_answers_are_typed_word_by_word_within_the_width() -> None:
    out = io.StringIO()
    typewriter = Typewriter(Console(file=out, width=30))
    served = answer(FrontEnd.HTTP)
    typewriter.begin(served.prompt)
    for piece in ("One d", "ay, a very hun", "gry bear went to the river.\nThe", " end"):
        typewriter.text(piece)
    typewriter.end(served)
    lines = out.getvalue().splitlines()
    assert "One day, a very hungry bear " in lines
    assert "went to the river." in lines
    assert "The end" in lines


def test_the_demo_runs_beside_anything_else() -> None:
    router = demo_config().router
    assert {address.rpartition(":")[2] for address in (router.http, router.grpc, router.metrics)} == {"0"}


def test_results_for_a_program() -> None:
    results = answers_json([answer(FrontEnd.GRPC)], "standard", SloClass(ttft_s=2.0, tpot_s=0.2), equal=True)
    assert json.loads(json.dumps(results))["requests"][0]["stages"] == {"prefill": 0.1, "decode": 0.1}


@pytest.mark.slow
@pytest.mark.ray
def test_the_whole_demo() -> None:
    command = [sys.executable, "-m", "cluster.cli", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["equal_to_one_process"]
    assert len(results["requests"]) == 24
    for request in results["requests"]:
        assert request["kv_bytes"] > 0
        assert sum(request["stages"].values()) == pytest.approx(request["duration_s"], abs=1e-6)
