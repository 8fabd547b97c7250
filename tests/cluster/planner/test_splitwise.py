"""Splitwise's measurements as kinds of workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.planner.errors import NoPlanError, PlanError
from cluster.planner.hardware import Hardware, parse_devices
from cluster.planner.splitwise import SplitwiseKinds, SplitwiseProfile
from engine.config import ModelConfig

SHAPE = ModelConfig.from_pretrained(Path(__file__).parents[3] / "bench" / "shapes" / "llama2-70b")
HEAD = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"


def rows(hardware: str, faster: float, tp: int = 8) -> str:
    """Times that grow with the tokens; the largest batch did not fit."""
    found = ""
    for prompt, batch in ((128, 1), (512, 1), (512, 8), (2048, 1), (512, 64)):
        prompt_ms = (20 + 0.15 * prompt * batch) / faster if batch < 64 else 5.0
        token_ms = (40 + 0.2 * batch) / faster
        found += f"llama2-70b,{hardware},{prompt},{batch},128,{prompt_ms},{token_ms},{tp}\n" * 3
    return found


@pytest.fixture
def profile(tmp_path: Path) -> SplitwiseProfile:
    path = tmp_path / "runs.csv"
    path.write_text(HEAD + rows("a100-80gb", 1.0) + rows("h100-80gb", 2.0) + rows("h100-80gb-pcap", 1.5))
    return SplitwiseProfile.read(path)


def kinds(profile: SplitwiseProfile, gpus: str, model: str = "llama2-70b") -> SplitwiseKinds:
    return SplitwiseKinds(profile, model, SHAPE, Hardware(parse_devices(gpus)))


def test_times_are_those_of_the_file(profile: SplitwiseProfile) -> None:
    slow, fast, capped = kinds(profile, "a100-80g:8,h100-80g:8,h100-80g-capped:8").kinds(4096)
    assert (slow.tp, slow.devices, slow.is_measured) == (8, 8, True)
    assert slow.latency.prefill_s(1024) == pytest.approx(0.020 + 0.15e-3 * 1024, rel=0.15)
    assert slow.latency.decode_s(8, 8 * 576) == pytest.approx(0.0416, rel=0.15)
    for kind, faster in ((fast, 2.0), (capped, 1.5)):
        assert kind.latency.prefill_s(512) == pytest.approx(slow.latency.prefill_s(512) / faster, rel=0.01)
    # 80e9 * 8 * 0.9 less 138e9 of parameters, over 80 layers * 2 * 8 heads * 128 * 2 bytes.
    assert slow.kv_tokens == pytest.approx((8 * 80e9 * 0.9 - 138e9) / 327_680, rel=0.01)
    assert slow.kv_bytes == 327_680


def test_what_is_not_there_is_said(profile: SplitwiseProfile, tmp_path: Path) -> None:
    with pytest.raises(NoPlanError, match="it was measured on a100-80g, h100-80g, h100-80g-capped"):
        kinds(profile, "a100-80g:4").kinds(4096)
    with pytest.raises(PlanError, match="has llama2-70b; give one of these"):
        kinds(profile, "a100-80g:8", "bloom").kinds(4096)
    for text, said in (
        ("model,hardware\n", "it has no column batch_size"),
        (HEAD, "there is no row in it"),
        (HEAD + "a,b,many,1,1,1,1,8\n", "line 2: invalid literal"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(PlanError, match=said):
            SplitwiseProfile.read(tmp_path / "bad.csv")
    with pytest.raises(PlanError, match="No such file"):
        SplitwiseProfile.read(tmp_path / "none.csv")
