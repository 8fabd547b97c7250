"""The command line: help worth reading, and every early failure as one line with its exit code."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click.testing
import pytest

from cluster.cli import cli, main
from cluster.config import ServeConfig, demo_model_path
from cluster.config_file import load_config


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, arguments, standalone_mode=False)


def failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["prelay", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    written = capsys.readouterr()
    assert written.out == ""
    assert isinstance(caught.value.code, int)
    return caught.value.code, written.err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model without its weights, which are not looked at before a worker loads them."""
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path() / name, copy)
    (copy / "model.safetensors").touch()
    return copy


@pytest.mark.parametrize("command", ["serve", "config", "demo"])
def test_help_has_an_example_and_the_exit_codes(command: str) -> None:
    text = run(command, "--help").output
    assert f"  prelay {command}" in text
    for code in range(5):
        assert re.search(rf"^ +{code}  ", text, re.MULTILINE)


def test_help_and_version() -> None:
    assert re.search(r"prelay, version \d", run("--version").output)
    assert {"serve", "config", "demo"} <= set(re.findall(r"^  (\w+) ", run("--help").output, re.MULTILINE))


def test_config_show_prints_a_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "prelay.yaml"
    file.write_text(
        run("config", "--show", "--prefill", "2", "--http", "0.0.0.0:80", "--set", "kv.block_size=8").output
    )
    config = load_config(file)
    assert (config.prefill.replicas, config.router.http, config.kv.block_size) == (2, "0.0.0.0:80", 8)
    assert config.model.path == demo_model_path()
    file.write_text(run("config", "--show").output)
    assert load_config(file) == ServeConfig().resolved()


def test_config_says_that_a_file_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "prelay.yaml"
    file.write_text("decode: {replicas: 2}")
    assert f"{file} is valid" in run("config", str(file)).output


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["serv"], 2, "No such command 'serv'"),
        (["serve", "--prefil", "2"], 2, "--prefil"),
        (["serve", "--prefill", "two"], 2, "--prefill"),
        (["serve", "--decode", "-1"], 2, "decode.replicas (from --decode -1): -1 is too small"),
        (["serve", "--decode", "0"], 2, "so no worker could write answers"),
        (["serve", "--mixed", "1", "--prefill", "0"], 2, "decode.replicas is 1, but prefill.replicas is 0"),
        (["serve", "--policy", "best"], 2, "router.policy (from --policy best): 'best' is not a policy"),
        (["serve", "--set", "model.profile=gone.json"], 2, "gone.json, which is not there"),
        (["serve", "--dtype", "int4"], 2, "model.dtype (from --dtype int4): 'int4' is not supported"),
        (["serve", "--http", "80"], 2, "router.http (from --http 80): '80' is not HOST:PORT"),
        (["serve", "--http", "a:1", "--grpc", "a:1"], 2, "both want port 1"),
        (["serve", "--slo-class", "best"], 2, "slo.default is 'best'"),
        (["serve", "--max-model-len", "4096"], 2, "model.max_model_len is 4096"),
        (["serve", "--set", "decode.kv_cache_tokens=100"], 2, "decode.kv_cache_tokens is 100, too few"),
        (["serve", "nowhere.yaml"], 2, "there is no configuration file nowhere.yaml"),
        (["serve", "--model", "/nowhere"], 4, "/nowhere"),
    ],
)
def test_an_early_failure_is_one_message_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    complaint: str,
) -> None:
    exit_code, message = failure(capsys, monkeypatch, *arguments)
    assert exit_code == code
    assert message.startswith("prelay: error: ")
    assert complaint in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", '{"architectures": ["GPT2LMHeadModel"]}', "LlamaForCausalLM"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("model.safetensors", None, "no .safetensors file"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    file: str,
    content: str | None,
    complaint: str,
) -> None:
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    exit_code, message = failure(capsys, monkeypatch, "serve", "--model", str(model))
    assert exit_code == 4
    assert message.startswith("prelay: error: the model cannot be served: ")
    assert complaint in message
