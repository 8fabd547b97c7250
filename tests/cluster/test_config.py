"""Configuration: what is accepted, how each mistake is answered, and that it survives being printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ServeConfig, child_environment
from cluster.config_file import Override, dump_config, load_config, parse_assignment
from cluster.errors import ConfigError
from cluster.sections import parse_host_port

EXAMPLE = Path(__file__).parents[2] / "deploy" / "prelay.example.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prelay.yaml"


def refusal(file: Path, text: str, *assignments: str) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, [parse_assignment(assignment) for assignment in assignments])
    return str(caught.value)


def test_the_example_file_says_the_defaults() -> None:
    assert load_config(EXAMPLE) == ServeConfig()


def test_an_empty_file_and_empty_sections_are_the_defaults(file: Path) -> None:
    file.write_text("prefill:\ndecode:\n  # replicas: 3\n")
    assert load_config(file) == ServeConfig()


def test_what_is_printed_reads_back_as_the_same(file: Path) -> None:
    config = load_config(
        None, [parse_assignment("slo.classes.fast.ttft_s=0.1"), parse_assignment("slo.classes.fast.tpot_s=1")]
    ).resolved()
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert config.slo.classes.keys() == {"interactive", "standard", "batch", "fast"}


def test_overrides_win_over_the_file(file: Path) -> None:
    file.write_text("decode: {replicas: 2, max_num_seqs: 8}\nmodel: {name: a}")
    overrides = [parse_assignment("decode.replicas=3"), Override(("model", "name"), "b", "--model-name b")]
    config = load_config(file, overrides)
    assert (config.decode.replicas, config.decode.max_num_seqs, config.model.name) == (3, 8, "b")


def test_a_models_path_counts_from_where_it_was_written(file: Path) -> None:
    file.write_text("model: {path: models/small}")
    assert load_config(file).model.path == file.parent / "models" / "small"
    config = load_config(file, [Override(("model", "path"), "here", "--model here")]).resolved()
    assert config.model.path == Path.cwd() / "here"
    assert config.model.name == "here"
    file.write_text("model: {profile: steps.json}")
    assert load_config(file).model.profile == file.parent / "steps.json"
    config = load_config(file, [Override(("model", "profile"), "steps.json", "--set")]).resolved()
    assert config.model.profile == Path.cwd() / "steps.json"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prefill: {replica: 2}", "prefill.replica: there is no such key; did you mean prefill.replicas?"),
        ("routr: {}", "routr: there is no such key; did you mean router?"),
        ("replicas: 2", "replicas: there is no such key here; did you mean prefill.replicas?"),
        ("kv: {size_of_all: 2}", "kv.size_of_all: there is no such key; there are block_size"),
        ("slo: {classes: {a: {ttft_s: 1, tpot: 2}}}", "did you mean slo.classes.a.tpot_s?"),
        ("decode: {replicas: -1}", "decode.replicas: -1 is too small; it must be at least 0"),
        ("prefill: {replicas: 0}", "prefill.replicas and mixed.replicas are both 0, so no worker could read"),
        ("decode: {replicas: 0}", "decode.replicas and mixed.replicas are both 0, so no worker could write"),
        ("prefill: {replicas: 0}\nmixed: {replicas: 1}", "decode.replicas is 1, but prefill.replicas is 0"),
        ("prefill: {replicas: 0}\ndecode: {replicas: 0}\nmixed: {replicas: 2}", None),
        ("decode: {replicas: 0}\nmixed: {replicas: 1}", None),
        (
            "mixed: {max_num_seqs: 600}",
            "mixed.max_batch_tokens is 512, less than one token for each of",
        ),
        ("router: {policy: least_load}", "'least_load' is not a policy; did you mean least_loaded?"),
        ("router: {policy: fastest}", "'fastest' is not a policy; there are "),
        ("router: {policy: colocated}", "colocated, which uses mixed workers only, but mixed.replicas is 0"),
        ("model: {load: simulated}", "model.load is simulated, but model.profile is not given"),
        (
            "model: {load: simulated, profile: a.json}\ntransfer: {backend: nixl}",
            "transfer.backend is nixl, but model.load is simulated",
        ),
        ("slo: {classes: {standard: {ttft_s: 1, tpot_s: 1, priority: 0.5}}}", "0.5 is not a whole number"),
        (
            "slo: {classes: {standard: {ttft_s: 1, tpot_s: 1, downgrade_to: slow}}}",
            "slo.classes.standard.downgrade_to is 'slow', which is not a class under slo.classes: use one of",
        ),
        (
            "slo: {classes: {standard: {ttft_s: 1, tpot_s: 1, downgrade_to: standard}}}",
            "slo.classes.standard.downgrade_to is 'standard', from which it comes (standard -> standard)",
        ),
        (
            "slo:\n  default: a\n  classes:\n"
            "    {c: {ttft_s: 1, tpot_s: 1, downgrade_to: a}, a: {ttft_s: 1, tpot_s: 1, downgrade_to: b},"
            " b: {ttft_s: 1, tpot_s: 1, downgrade_to: a}}",
            "slo.classes.b.downgrade_to is 'a', from which it comes (c -> a -> b -> a)",
        ),
        ("kv: {block_size: 2000}", "kv.block_size: 2000 is too large; it must be at most 1024"),
        ("transfer: {lease_s: 0}", "transfer.lease_s: 0 is too small; it must be greater than 0"),
        ("transfer: {lease_s: .inf}", "transfer.lease_s: inf is not a finite number"),
        (
            "transfer: {backend: rdma}",
            "transfer.backend: 'rdma' is not supported; it must be 'auto', 'ipc', 'nixl' or 'torchdist'",
        ),
        ("decode: {replicas: two}", "decode.replicas: 'two' is not a whole number"),
        ("decode: {replicas: true}", "decode.replicas: True is not a whole number"),
        ("decode: {tensor_parallel: 0}", "decode.tensor_parallel: 0 is too small; it must be at least 1"),
        ("prefill: {pipeline_paralel: 2}", "did you mean prefill.pipeline_parallel?"),
        ("transfer: {digest_share: 1.5}", "transfer.digest_share: 1.5 is too large; it must be at most 1"),
        ("decode: {threads: 1.5}", "decode.threads: 1.5 is not a whole number"),
        ("decode: 3", "decode: 3 is not a mapping of keys"),
        (
            "model: {dtype: float16}",
            "model.dtype: 'float16' is not supported; it must be 'float32' or 'bfloat16'",
        ),
        ("model: {name: ''}", "model.name: '' is not a name"),
        ("router: {http: 8000}", "router.http: 8000 is not a text"),
        ("router: {http: localhost}", "router.http: 'localhost' is not HOST:PORT, as in 127.0.0.1:8000"),
        ("router: {http: '1.2.3.4:70000'}", "router.http: '1.2.3.4:70000' has a port beyond 65535"),
        ("router: {http: '::1:80'}", "write an IPv6 address in brackets"),
        ("router: {http: 'a:8001'}", None),
        ("router: {http: '127.0.0.1:8001'}", "router.http and router.grpc both want port 8001 on 127.0.0.1"),
        ("router: {http: '0.0.0.0:8001'}", "router.http and router.grpc both want port 8001"),
        ("slo: {default: fast}", "slo.default is 'fast', which is not a class under slo.classes: use one of"),
        (
            "model: {max_model_len: 64}\nprefill: {kv_cache_tokens: 32}",
            "prefill.kv_cache_tokens is 32, too few",
        ),
        ("5: 2", "5: 5: Keys should be strings"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_remedy(file: Path, text: str, complaint: str | None) -> None:
    if complaint is None:
        file.write_text(text)
        load_config(file)
    else:
        assert complaint in refusal(file, text)


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    message = refusal(file, "decode: {replicas: -1}\nkv: {block_sise: 4}")
    assert "decode.replicas" in message
    assert "did you mean kv.block_size?" in message


def test_a_mistake_on_the_command_line_names_the_flag(file: Path) -> None:
    assert "decode.replicas (from --set decode.replicas=-1): -1" in refusal(file, "", "decode.replicas=-1")
    assert "kv.block_size.x" in refusal(file, "kv: {block_size: 4}", "kv.block_size.x=1")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kv:\n  block_size: [1", ":2:17: not valid YAML"),
        ("kv: a: b", ":1:6: not valid YAML: mapping values are not allowed here"),
        ("kv: {block_size: 1}\nkv: {}", ":2:1: not valid YAML: the key 'kv' is given twice"),
        ("- kv", "holds a list; a mapping of sections"),
        ("a: \x01", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_place(file: Path, text: str, complaint: str) -> None:
    assert complaint in refusal(file, text)


def test_files_that_cannot_be_read_are_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=f"there is no configuration file {file}"):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file.parent)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file)


@pytest.mark.parametrize("text", ["decode.replicas", "=3", ".a=3", "a=[1"])
def test_an_assignment_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_assignment(text)


def test_host_and_port_of_every_form() -> None:
    assert parse_host_port("localhost:0") == ("localhost", 0)
    assert parse_host_port("[::1]:8000") == ("::1", 8000)


def test_only_a_private_ray_is_kept_on_loopback() -> None:
    assert child_environment(local_ray=True)["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in child_environment(local_ray=False)
