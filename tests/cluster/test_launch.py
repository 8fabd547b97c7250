"""What a configuration becomes: the workers' specs and the router's settings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from prelay.v1 import worker_pb2

from cluster.config import ServeConfig
from cluster.config_file import load_config, parse_assignment
from cluster.errors import ConfigError
from cluster.orders import Order
from cluster.pool_changes import can_serve
from cluster.preflight import check_model, token_nbytes, with_kv_sizes
from cluster.router_config import router_settings
from cluster.worker_specs import worker_specs
from engine.config import ModelConfig

PREFILL, DECODE, MIXED = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED


def configured(*assignments: str) -> ServeConfig:
    return check_model(load_config(None, [parse_assignment(text) for text in assignments]).resolved())


def test_every_worker_has_slots_of_its_own() -> None:
    specs = worker_specs(configured("prefill.replicas=2", "prefill.threads=2", "decode.replicas=2"))
    assert [(spec.worker_id, spec.first_slot, spec.threads) for spec in specs] == [
        ("prefill-0", 0, 2),
        ("prefill-1", 2, 2),
        ("decode-0", 4, 1),
        ("decode-1", 5, 1),
    ]
    assert {spec.slots for spec in specs} == {6}
    assert [spec.role for spec in specs] == [PREFILL, PREFILL, DECODE, DECODE]


def test_mixed_workers_come_last_and_pools_without_workers_take_no_memory() -> None:
    prefill, mixed = worker_specs(
        configured(
            "decode.replicas=0", "mixed.replicas=1", "mixed.max_num_seqs=7", "mixed.max_batch_tokens=70"
        )
    )
    assert (mixed.role, mixed.worker_id, mixed.first_slot) == (MIXED, "mixed-0", 1)
    assert (mixed.max_num_seqs, mixed.max_batch_tokens) == (7, 70)
    # Two share what is there.
    assert mixed.num_blocks == pytest.approx(prefill.num_blocks, rel=0.01)
    only = worker_specs(configured("prefill.replicas=0", "decode.replicas=0", "mixed.replicas=2"))
    assert [(spec.worker_id, spec.slots) for spec in only] == [("mixed-0", 2), ("mixed-1", 2)]


@pytest.mark.parametrize(
    ("roles", "can"),
    [("PD", True), ("M", True), ("PM", True), ("DM", True), ("P", False), ("D", False), ("", False)],
)
def test_workers_can_serve_together_if_somebody_reads_for_somebody_who_writes(roles: str, can: bool) -> None:
    by_letter = {"P": PREFILL, "D": DECODE, "M": MIXED}
    assert can_serve({by_letter[letter] for letter in roles}) is can


def test_a_profile_saves_the_workers_measuring(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"latency": {"version": 1, "coefficients": {"step": 0.25}}}))
    assert [dict(spec.latency) for spec in worker_specs(configured())] == [{}, {}]
    specs = worker_specs(configured(f"model.profile={profile}"))
    assert [dict(spec.latency) for spec in specs] == [{"step": 0.25}] * 2
    profile.write_text(json.dumps({"version": 1, "coefficients": {"step": 0.5}}))
    assert worker_specs(configured(f"model.profile={profile}"))[0].latency == {"step": 0.5}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "a latency model of version 1 is needed"),
        ('{"latency": {"version": 99}}', "version 1 is needed, not 99"),
        ('{"version": 1, "coefficients": {"step": -1}}', "coefficient step is -1"),
        ('{"version": 1, "coefficients": {}}', "has no coefficients"),
    ],
)
def test_a_profile_that_says_nothing_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        configured(f"model.profile={profile}")
    assert str(caught.value).startswith(f"model.profile is {profile}, which ")


def test_simulated_workers_take_no_memory_and_are_never_split(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"version": 1, "coefficients": {"step": 0.25}}))
    simulated = ("model.load=simulated", f"model.profile={profile}")
    configured(*simulated, "decode.kv_cache_tokens=1000000000000")
    with pytest.raises(ConfigError, match=r"decode\.tensor_parallel is 2 .* leave both at 1"):
        configured(*simulated, "decode.tensor_parallel=2")


def test_a_worker_of_several_ranks_has_slots_for_the_threads_of_each() -> None:
    specs = worker_specs(
        configured(
            "prefill.replicas=2",
            "prefill.tensor_parallel=2",
            "prefill.pipeline_parallel=3",
            "prefill.threads=2",
            "decode.pipeline_parallel=2",
        )
    )
    assert [(spec.first_slot, spec.num_ranks, spec.threads, spec.num_cpus) for spec in specs] == [
        (0, 6, 2, 12),
        (12, 6, 2, 12),
        (24, 2, 1, 2),
    ]
    assert {spec.slots for spec in specs} == {26}
    assert [(spec.tp_size, spec.pp_size) for spec in specs] == [(2, 3), (2, 3), (1, 2)]


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        (
            "prefill.tensor_parallel=5",
            "as prefill.tensor_parallel, 5, and prefill.pipeline_parallel, 1, say: tensor parallelism over 5 "
            "ranks needs num_attention_heads to be a multiple of it; it is 8",
        ),
        (
            "decode.pipeline_parallel=7",
            "pipeline parallelism over 7 stages needs as many layers; there are 6",
        ),
    ],
)
def test_a_model_that_cannot_be_split_so_is_refused_before_anything_starts(
    assignment: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        configured(assignment)


def test_kv_blocks_cover_the_tokens_and_snapshots_beat_the_timeout() -> None:
    config = configured("decode.kv_cache_tokens=1030", "kv.block_size=100", "router.liveness_timeout_s=3.0")
    prefill, decode = worker_specs(config)
    assert decode.num_blocks == 11
    assert prefill.max_batch_tokens == config.prefill.max_batch_tokens
    assert decode.max_batch_tokens == config.decode.max_batch_tokens
    assert decode.max_num_seqs == config.decode.max_num_seqs
    assert prefill.heartbeat_s == 0.5


def test_the_models_own_limit_is_the_default() -> None:
    assert configured().model.max_model_len == 1024
    assert configured("model.max_model_len=100").model.max_model_len == 100


def test_every_key_of_the_routers_section_reaches_it() -> None:
    config = configured(
        "router.http=127.0.0.1:1",
        "router.suspect_after_s=1.5",
        "router.liveness_timeout_s=2.0",
        "router.max_attempts=8",
        "router.retry_budget=0.25",
        "router.retry_burst=9",
        "router.recovery_wait_s=10.5",
        "router.stream_buffer_tokens=11",
        "router.slow_reader_timeout_s=12.0",
        "router.request_timeout_s=3.0",
        "router.retry_after_s=4.0",
        "router.max_gated_requests=5",
        "router.max_choices=6",
        "router.max_body_bytes=7000",
        "slo.default=batch",
        "slo.classes.standard.priority=3",
        "router.policy=round_robin",
    )
    settings = asdict(router_settings(config, "ERROR"))
    section = config.router.model_dump()
    for where in ("external", "actors", "resources", "labels"):  # routers are, and not what they do
        del section[where]
    assert section.items() <= settings.items()
    assert settings["default_slo_class"] == "batch"
    assert settings["slo_classes"]["standard"] == {
        "ttft_s": 2.0,
        "tpot_s": 0.2,
        "priority": 3,
        "downgrade_to": "batch",
    }


def test_kv_caches_that_no_memory_could_hold_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"decode 1,000,000,000,000 tokens of 6\.0 KiB"):
        configured("decode.kv_cache_tokens=1000000000000")


def test_an_order_survives_its_way_to_the_child() -> None:
    order = Order(configured("slo.classes.fast={ttft_s: 1, tpot_s: 1}"), as_json=True, debug=False)
    assert Order.from_json(order.to_json()) == order
    assert b"\n" not in order.to_json()


def test_kv_caches_of_no_given_size_share_the_memory_that_is_there() -> None:
    path = configured().model.path
    assert path is not None
    model = ModelConfig.from_pretrained(path)
    asked = load_config(
        None, [parse_assignment("decode.replicas=3"), parse_assignment("kv.memory_share=0.5")]
    )
    sized = with_kv_sizes(asked, model, 1024, available=2**30)
    # 6 KiB a token, an eighth of a GiB for each of four workers.
    assert sized.prefill.kv_cache_tokens == sized.decode.kv_cache_tokens == 2**27 // (6 * 1024) // 16 * 16
    given = load_config(None, [parse_assignment("decode.kv_cache_tokens=2000")])
    sized = with_kv_sizes(given, model, 1024, available=2**30)
    assert sized.decode.kv_cache_tokens == 2000
    assert sized.prefill.kv_cache_tokens == int(2**30 * 0.1) // (6 * 1024) // 16 * 16


def test_a_share_that_holds_no_sequence_says_what_to_do() -> None:
    path = configured().model.path
    assert path is not None
    with pytest.raises(ConfigError, match=r"0\.1 of 0\.1 GiB .* \(1024 tokens\): raise kv\.memory_share"):
        with_kv_sizes(ServeConfig(), ModelConfig.from_pretrained(path), 1024, available=2**26)


def test_heads_that_several_ranks_hold_take_memory_on_each() -> None:
    path = configured().model.path
    assert path is not None
    model = replace(ModelConfig.from_pretrained(path), num_kv_heads=2)
    assert model.num_heads == 8
    split = load_config(None, [parse_assignment("decode.tensor_parallel=8")])
    sized = with_kv_sizes(split, model, 1024, available=2**30)
    assert sized.prefill.kv_cache_tokens is not None
    assert sized.decode.kv_cache_tokens is not None
    # Two workers share; each of the two heads lies on four of eight ranks.
    assert token_nbytes(split, split.decode, model) == 4 * token_nbytes(split, split.prefill, model)
    assert sized.decode.kv_cache_tokens == pytest.approx(sized.prefill.kv_cache_tokens / 4, abs=16)
    pipeline = load_config(None, [parse_assignment("decode.pipeline_parallel=3")])
    assert token_nbytes(pipeline, pipeline.decode, model) == token_nbytes(split, split.prefill, model)
