"""What is sent: datasets, prompts that share beginnings, and jobs as a function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.workload.arrivals import Arrivals
from cluster.workload.datasets import Lengths, Mix, Shape, Synthetic, TimedRows, load_dataset
from cluster.workload.drawing import WorkloadSpec, workload
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import Job
from cluster.workload.prompts import PromptWriter

WORDS = range(100, 1000)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def spec(dataset: object, arrivals: str = "poisson", **changed: float) -> WorkloadSpec:
    return WorkloadSpec(dataset, Arrivals.parse(arrivals), WORDS, **changed)  # type: ignore[arg-type]


def contents(jobs: Sequence[Job]) -> set[tuple[int, ...]]:
    return {tuple(job.prompt_token_ids) for job in jobs}


# Datasets


def test_synthetic_lengths() -> None:
    fixed = load_dataset("synthetic:prompt=512,answer=64")
    assert fixed.shapes(rng(), np.zeros(3)) == [Shape(512, 64)] * 3
    ranged = load_dataset("synthetic:answer=10,prompt=4-6", length_scale=2.0)
    shapes = ranged.shapes(rng(), np.zeros(200))
    assert {shape.prompt_tokens for shape in shapes} == {8, 9, 10, 11, 12}
    assert {shape.output_tokens for shape in shapes} == {20}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("alpaca", "there are synthetic:"),
        ("sharegpt:", "there are synthetic:"),
        ("synthetic:", "write it as synthetic:prompt=512"),
        ("synthetic:prompt=512", "answer=N is missing"),
        ("synthetic:prompt=512,answer=64,prompt=1", "write it as"),
        ("synthetic:prompt=0,answer=64", "must be at least 1"),
        ("synthetic:prompt=9-8,answer=64", "the smaller number first"),
        ("synthetic:prompt=90,answer=64", "up to 154 tokens, but --max-tokens is 100"),
        ("mix:a,b", "mix:FILE,FILE,period=SECONDS"),
        ("mix:a,b,period=0", "mix:FILE,FILE,period=SECONDS"),
        ("trace:/no/such/file", "No such file"),
    ],
)
def test_datasets_that_are_none(text: str, complaint: str) -> None:
    with pytest.raises(BadInputError) as refused:
        load_dataset(text, max_tokens=100)
    assert complaint in str(refused.value)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.csv"
    rows = "".join(f"{at},{100 + at},{10 + at}\n" for at in range(8))
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    return path


def test_rows_that_are_too_long_after_scaling_are_left_out_and_counted(plain: Path) -> None:
    dataset = load_dataset(f"trace:{plain}", length_scale=0.5, max_tokens=57)
    assert isinstance(dataset, TimedRows)
    # Halves are rounded to even: 50 + 5, 50 + 6, 51 + 6.
    assert [(shape.prompt_tokens, shape.output_tokens) for shape in dataset.pool] == [
        (50, 5), (50, 6), (51, 6),
    ]  # fmt: skip
    assert dataset.left_out == 5
    with pytest.raises(BadInputError, match="all 8 rows have more than --max-tokens 9"):
        load_dataset(f"trace:{plain}", max_tokens=9)


def test_lengths_without_arrivals_are_drawn_at_random(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n7,2\n8,3\n")
    for text in (f"sharegpt:{path}", f"trace:{path}"):
        dataset = load_dataset(text)
        assert isinstance(dataset, Lengths)
        drawn = dataset.shapes(rng(), np.zeros(100))
        assert 30 < sum(shape == Shape(7, 2) for shape in drawn) < 70


def test_rows_of_a_trace_keep_their_order(plain: Path) -> None:
    dataset = load_dataset(f"trace:{plain}")
    found = [shape.prompt_tokens for shape in dataset.shapes(rng(3), np.zeros(20))]
    assert all((after - before) % 8 == 1 for before, after in pairwise(found))


def test_a_mix_swings_from_one_to_the_other() -> None:
    mix = Mix(Synthetic((1, 1), (1, 1)), Synthetic((2, 2), (1, 1)), period_s=100.0)
    arrivals = np.linspace(0, 100, 10_000, endpoint=False)
    second = np.array([shape.prompt_tokens == 2 for shape in mix.shapes(rng(), arrivals)])
    assert second[:500].mean() < 0.05
    assert second[4750:5250].mean() > 0.95
    assert second[-500:].mean() < 0.05


# Prompts


@given(st.floats(0.02, 1.5), st.lists(st.integers(0, 3), min_size=1, max_size=4), st.data())
def test_prompts_share_what_their_ids_share(scale: float, ids: list[int], data: st.DataObject) -> None:
    common = data.draw(st.integers(0, len(ids)))
    others = [*ids[:common], *(1000 + one for one in ids[common:])]
    block = 512 * scale
    length = data.draw(st.integers(1, max(1, int(block * len(ids)))))
    writer = PromptWriter((5,), WORDS)
    first, second = (list(writer.prompt(Shape(length, 1, tuple(which), block))) for which in (ids, others))
    assert len(first) == len(second) == length
    assert all(token in WORDS for token in first)
    shared = min(length, int(common * block))
    assert first[:shared] == second[:shared]
    # Beyond, two tokens in a row that happen to be equal are one in 810,000.
    assert length - shared < 3 or first[shared:] != second[shared:]


def test_prompts_without_ids_share_nothing_and_keys_neither() -> None:
    writer, other = PromptWriter((5,), WORDS), PromptWriter((6,), WORDS)
    shape, unique = Shape(20, 1, (1,), 20), Shape(20, 1)
    prompts = [writer.prompt(shape), other.prompt(shape), writer.prompt(unique), writer.prompt(unique)]
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 4
    assert writer.prompt(shape) == prompts[0]


# Jobs


@given(st.integers(0, 50), st.sampled_from([0.5, 2.0, 7.0]))
def test_jobs_are_a_function_of_seed_and_rate(seed: int, rate: float) -> None:
    made = spec(Synthetic((8, 12), (1, 4)))
    jobs = workload(made, seed, rate, count=10)
    again = workload(made, seed, rate, count=10)
    assert [(j.arrival_s, *j.prompt_token_ids, j.output_tokens) for j in jobs] == [
        (j.arrival_s, *j.prompt_token_ids, j.output_tokens) for j in again
    ]
    assert not contents(jobs) & contents(workload(made, seed + 1, rate, count=10))
    assert not contents(jobs) & contents(workload(made, seed, rate * 2, count=10))


def test_salt_changes_what_prompts_say_and_nothing_else() -> None:
    one, two = (workload(spec(Synthetic((8, 12), (1, 4)), salt=salt), 0, 2.0, count=30) for salt in (1, 2))
    for mine, other in zip(one, two, strict=True):
        assert mine.arrival_s == other.arrival_s
        assert mine.output_tokens == other.output_tokens
        assert len(mine.prompt_token_ids) == len(other.prompt_token_ids)
    assert not contents(one) & contents(two)


def test_a_trace_at_a_rate_keeps_its_rhythm() -> None:
    rows = TimedRows([Shape(at + 1, 1) for at in range(4)], [0.0, 1.0, 3.0, 6.0])
    jobs = workload(spec(rows, "trace"), 0, 2.0, count=4)
    # A round takes 8 s (6 s, and a mean gap of 2 s); four requests at 2/s take 2 s.
    starts = {1: 0.0, 2: 0.25, 3: 0.75, 4: 1.5}
    offset = starts[len(jobs[0].prompt_token_ids)]
    for job in jobs:
        assert job.arrival_s == pytest.approx((starts[len(job.prompt_token_ids)] - offset) % 2.0)
    assert [job.arrival_s for job in jobs] == sorted(job.arrival_s for job in jobs)
    assert len(workload(spec(rows, "trace"), 0, 2.0, duration_s=50.0)) == 100


def test_a_trace_at_its_own_pace_is_scaled_in_time() -> None:
    rows = TimedRows([Shape(1, 1)] * 5, [0.0, 1.0, 2.0, 3.0, 4.0])
    jobs = workload(spec(rows, "trace", time_scale=0.5), 0, None, duration_s=6.0)
    assert [job.arrival_s for job in jobs] == pytest.approx([0.5 * at for at in range(12)])


@given(st.integers(0, 200), st.integers(2, 40))
def test_rows_that_share_a_time_are_spread_until_the_next(seed: int, count: int) -> None:
    rows = TimedRows([Shape(at + 1, 1) for at in range(6)], [0.0, 0.0, 0.0, 3.0, 6.0, 6.0], coarse=True)
    times, shapes = rows.exactly(rng(seed), count, 10.0)
    assert len(times) == len(shapes) == count
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    assert times[-1] < 10.0


def test_equal_times_of_other_traces_stay_equal() -> None:
    rows = TimedRows([Shape(1, 1)] * 4, [0.0, 0.0, 5.0, 5.0])
    times, _ = rows.during(rng(1), 20.0, 1.0)
    assert len(set(times.tolist())) < len(times)


@pytest.mark.parametrize(
    ("dataset", "arrivals", "how", "complaint"),
    [
        (Synthetic((1, 1), (1, 1)), "poisson", {"rate": None, "count": 1}, "a rate is needed"),
        (Synthetic((1, 1), (1, 1)), "poisson", {"rate": 1.0}, "either a duration or a number"),
        (Synthetic((1, 1), (1, 1)), "trace", {"rate": 1.0, "count": 1}, "no arrivals of its own"),
        (TimedRows([Shape(1, 1)], [0.0]), "trace", {"rate": None, "count": 1}, "for a duration"),
        (TimedRows([Shape(1, 1)], [0.0]), "trace", {"rate": None, "duration_s": 1.0}, "at one moment"),
        (TimedRows([Shape(1, 1)], [0.0]), "trace", {"rate": 1.0, "duration_s": 1.0}, "at one moment"),
    ],
)
def test_what_cannot_be_drawn(dataset: object, arrivals: str, how: dict[str, float], complaint: str) -> None:
    rate = how.pop("rate")
    with pytest.raises(BadInputError, match=complaint):
        workload(spec(dataset, arrivals), 0, rate, **how)  # type: ignore[arg-type]
