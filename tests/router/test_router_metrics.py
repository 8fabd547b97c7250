"""Metrics: outcomes, stages that add up, SLO limits as bucket edges, and what the metrics port shows."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.requests import Stage
from router.slo import SloClass

NAMES = {
    "prelay_requests", "prelay_time_to_first_token_seconds", "prelay_request_time_per_output_token_seconds",
    "prelay_inter_token_latency_seconds", "prelay_request_duration_seconds", "prelay_stage_seconds",
    "prelay_devices", "prelay_admission", "prelay_placement", "prelay_worker_up", "prelay_worker_epoch",
    "prelay_worker_suspected", "prelay_recoveries", "prelay_recovered_streams", "prelay_request_attempts",
    "prelay_paused_streams",
}  # fmt: skip


async def complete(cluster, **headers):
    async with (
        cluster.http() as http,
        http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 5}, headers=headers) as response,
    ):
        assert response.status == 200


async def test_counts_and_sums(cluster):
    await asyncio.gather(
        *(complete(cluster) for _ in range(4)), complete(cluster, **{"x-slo-class": "strict"})
    )
    sample = cluster.sample
    assert sample("prelay_requests_total", slo_class="default", outcome="good") == 4
    assert sample("prelay_requests_total", slo_class="strict", outcome="both_miss") == 1
    assert sample("prelay_requests_total", slo_class="strict", outcome="good") == 0
    assert sample("prelay_time_to_first_token_seconds_count", slo_class="default") == 4
    assert sample("prelay_request_time_per_output_token_seconds_count", slo_class="default") == 4
    assert sample("prelay_inter_token_latency_seconds_count", slo_class="default") == 16
    assert sample("prelay_placement_total", kind="disaggregated") == 5
    assert sample("prelay_admission_total", decision="accepted", reason="none") == 5
    stages = [sample("prelay_stage_seconds_sum", stage=stage) for stage in Stage]
    durations = [
        sample("prelay_request_duration_seconds_sum", slo_class=name) for name in ("default", "strict")
    ]
    assert sum(stages) == pytest.approx(sum(durations), abs=1e-9)
    assert sum(durations) > 0
    assert all(sample("prelay_stage_seconds_count", stage=stage) == 5 for stage in Stage)


async def test_counters_are_there_before_anything_happened(cluster):
    value = cluster.router.registry.get_sample_value
    assert value("prelay_admission_total", {"decision": "rejected", "reason": "gate_full"}) == 0
    assert value("prelay_placement_total", {"kind": "disaggregated"}) == 0
    assert value("prelay_recoveries_total", {"cause": "worker_lost"}) == 0
    assert value("prelay_worker_suspected", {"role": "decode", "worker": "d0"}) == 0


async def test_the_metrics_port(start_cluster):
    cluster = await start_cluster(slo_classes={"default": SloClass(0.333, 0.0444)})
    await complete(cluster)
    async with aiohttp.ClientSession(f"http://{cluster.addresses.metrics}") as http:
        async with http.get("/metrics") as response:
            families = {
                family.name: family for family in text_string_to_metric_families(await response.text())
            }
        async with http.get("/targets") as response:
            targets = await response.json()
    assert set(families) >= NAMES
    edges = {
        name: {sample.labels["le"] for sample in families[name].samples if "le" in sample.labels}
        for name in ("prelay_time_to_first_token_seconds", "prelay_inter_token_latency_seconds")
    }
    assert "0.333" in edges["prelay_time_to_first_token_seconds"]
    assert "0.0444" in edges["prelay_inter_token_latency_seconds"]
    up = {sample.labels["worker"]: sample.value for sample in families["prelay_worker_up"].samples}
    assert up == {"p0": 1, "d0": 1}
    assert [target["labels"] for target in targets] == [
        {"role": "prefill", "worker": "p0"},
        {"role": "decode", "worker": "d0"},
    ]
