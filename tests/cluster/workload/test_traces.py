"""Traces as they are published, and what is said of those that are broken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.workload.errors import BadInputError, TraceError
from cluster.workload.traces import Trace, TraceRow, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}

{"timestamp": 6000, "input_length": 512, "output_length": 9, "hash_ids": [0]}
"""
LENGTHS = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
74,918,992,0.08
"""
PLAIN = """arrival_s,prompt_tokens,output_tokens
10,100,5
10.5,200,6
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "trace"),
    [
        (AZURE, Trace([TraceRow(0.0, 374, 44), TraceRow(pytest.approx(4.314579), 396, 109)], timed=True)),
        (
            MOONCAKE,
            Trace([TraceRow(0.0, 600, 5, (0, 7)), TraceRow(3.0, 512, 9, (0,))], timed=True, coarse=True),
        ),
        (LENGTHS, Trace([TraceRow(0.0, 74, 918)], timed=False)),
        (PLAIN, Trace([TraceRow(0.0, 100, 5), TraceRow(0.5, 200, 6)], timed=True)),
        ("\ufeff" + PLAIN.replace("\n", "\r\n"), Trace([TraceRow(0, 100, 5), TraceRow(0.5, 200, 6)], True)),
    ],
    ids=["azure", "mooncake", "lengths", "plain", "plain from a spreadsheet"],
)
def test_the_formats_of_the_field(tmp_path: Path, text: str, trace: Trace) -> None:
    assert read_trace(write(tmp_path, text)) == trace


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (PLAIN + "11,x,5\n", "line 4, prompt_tokens: 'x'; expected a whole number of at least 1"),
        (PLAIN + "11,0,5\n", "line 4, prompt_tokens: '0'; expected a whole number of at least 1"),
        (PLAIN + "11,7,-5\n", "line 4, output_tokens: '-5'; expected a whole number of at least 1"),
        (PLAIN + "nan,7,5\n", "line 4, arrival_s: 'nan'; expected seconds, 0 or more"),
        (PLAIN + "11,7\n", "line 4, all 2 columns: '11,7'; expected 3 columns"),
        (PLAIN + "9,7,5\n", "line 4, arrival_s: '1.5 s before the row above'; expected rows in the order"),
        (AZURE + "yesterday,7,5\n", "line 4, TIMESTAMP: 'yesterday'; expected a date and a time"),
        (LENGTHS + "1.5,7,5,1\n", "line 3, num_prefill_tokens: '1.5'; expected a whole number"),
        (MOONCAKE + "{\n", "line 4, the whole line: '{'; expected a JSON object"),
        (MOONCAKE + "[1]\n", "line 4, the whole line: '[1]'; expected a JSON object"),
        (MOONCAKE.replace("3000", '"x"'), "line 1, timestamp: 'x'; expected a whole number of at least 0"),
        (MOONCAKE.replace("600", "0"), "line 1, input_length: 0; expected a whole number of at least 1"),
        (MOONCAKE.replace("[0, 7]", "[0]"), "line 1, hash_ids: [0]; expected 2 ids, one for each 512 tokens"),
        (MOONCAKE.replace("[0, 7]", '[0, "7"]'), "line 1, hash_ids: [0, '7']; expected 2 ids"),
        (MOONCAKE.replace("6000", "2999"), "line 3, timestamp: '0.001 s before the row above'"),
        ("prompt,answer\n1,2\n", "line 1: the columns prompt, answer are those of no trace that is known"),
        ("", "line 1: the columns (none) are those of no trace"),
        ("arrival_s,prompt_tokens,output_tokens\n", "has no rows"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(BadInputError) as refused:
        read_trace(write(tmp_path, text))
    assert complaint in str(refused.value)


def test_a_long_value_is_shown_in_part() -> None:
    assert len(str(TraceError(Path("f"), 1, "c", "x" * 5000, "less"))) < 150


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="No such file"):
        read_trace(tmp_path / "nothing")
    with pytest.raises(BadInputError, match="directory"):
        read_trace(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="not text in UTF-8"):
        read_trace(tmp_path / "binary")


@pytest.mark.parametrize(
    ("name", "rows", "timed", "first"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19366, True, (374, 44)),
        ("AzureLLMInferenceTrace_code.csv", 8819, True, (4808, 10)),
        ("conversation_trace.jsonl", 12031, True, (6758, 500)),
        ("sharegpt_8k_filtered_stats_llama2_tokenizer.csv", 30731, False, (74, 918)),
    ],
)
def test_the_published_files(name: str, rows: int, timed: bool, first: tuple[int, int]) -> None:
    """PRELAY_TRACES: a directory that has them; they are not part of the repository."""
    path = Path(os.environ.get("PRELAY_TRACES", ""), name)
    if not path.exists():
        pytest.skip(f"PRELAY_TRACES names no directory with {name}")
    trace = read_trace(path)
    assert (len(trace.rows), trace.timed) == (rows, timed)
    assert (trace.rows[0].prompt_tokens, trace.rows[0].output_tokens) == first
