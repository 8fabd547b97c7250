"""The sampler against plain references: known random numbers, exact filters, honest frequencies."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.sampler import CANDIDATES, Draw, philox4x32, sample, uniforms
from engine.sequence import TokenHistory, TokenSampling

PLAIN = TokenSampling(
    temperature=1.0, top_k=0, top_p=1.0, seed=11, max_tokens=100, min_tokens=0, stop_token_ids=frozenset()
)


def reference_logits(logits: list[float], draw: Draw, answer: list[int], prompt: list[int]) -> list[float]:
    """Penalties, bias and barred stop tokens, one token after the other."""
    sampling, adjusted = draw.sampling, []
    for token, logit in enumerate(logits):
        if token in prompt + answer:
            factor = sampling.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        logit -= sampling.frequency_penalty * answer.count(token)
        logit -= sampling.presence_penalty if token in answer else 0
        logit += dict(sampling.logit_bias).get(token, 0)
        if token in sampling.stop_token_ids and draw.num_output_tokens < sampling.min_tokens:
            logit = -np.inf
        adjusted.append(logit)
    return adjusted


def reference_probabilities(logits: list[float], sampling: TokenSampling) -> np.ndarray:
    """The distribution that a token is drawn from, worked out one token after the other."""
    weights = {
        token: np.exp((logit - max(logits)) / sampling.temperature) for token, logit in enumerate(logits)
    }
    ranked = sorted(weights, key=lambda token: (-logits[token], token))
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    total = sum(weights[token] for token in ranked)
    kept: list[int] = []
    mass = 0.0
    for token in ranked:
        if kept and mass >= sampling.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= sampling.min_p * weights[ranked[0]]]
    mass = sum(weights[token] for token in kept)
    probabilities = np.zeros(len(logits))
    probabilities[kept] = [weights[token] / mass for token in kept]
    return probabilities


def reference_token(logits: list[float], draw: Draw) -> int:
    """The token of the reference distribution that the draw's random number points at."""
    if draw.sampling.temperature == 0:
        return int(np.argmax(logits))
    seed, position = (np.array([value], dtype=np.uint64) for value in (draw.sampling.seed, draw.position))
    cumulated = reference_probabilities(logits, draw.sampling).cumsum()
    return int(np.searchsorted(cumulated / cumulated[-1], uniforms(seed, position)[0], side="right"))


def draw_many(logits: list[float], sampling: TokenSampling, count: int) -> np.ndarray:
    rows = torch.tensor(logits).expand(count, -1)
    tokens = sample(rows, [Draw(sampling, position, 0) for position in range(count)])
    return np.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    as_arrays = [np.array([word], dtype=np.uint64) for word in (*counter, *key)]
    assert tuple(int(word[0]) for word in philox4x32(as_arrays[:4], as_arrays[4:])) == words


def test_uniforms_depend_on_every_bit_of_seed_and_position() -> None:
    seeds = np.array([0, *(1 << bit for bit in range(64)), *[0] * 64], dtype=np.uint64)
    positions = np.array([0, *[0] * 64, *(1 << bit for bit in range(64))], dtype=np.uint64)
    drawn = uniforms(seeds, positions)
    assert len(set(drawn.tolist())) == 129
    assert drawn.min() >= 0
    assert drawn.max() < 1


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        replace(PLAIN, temperature=0.5),
        replace(PLAIN, top_k=3),
        replace(PLAIN, top_p=0.7),
        replace(PLAIN, temperature=2.0, top_k=6, top_p=0.9, seed=2**64 - 1),
        replace(PLAIN, min_p=0.2),
    ],
)
def test_frequencies_are_the_distribution(sampling: TokenSampling) -> None:
    logits = [0.3, -1.0, 2.0, 1.1, 1.0, -3.0, 0.0, 1.9]
    expected = reference_probabilities(logits, sampling) * 20_000
    counts = draw_many(logits, sampling, 20_000)
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    # The 99.9 % quantile for 7 degrees of freedom; fewer have a lower one.
    assert chi_square < 24.3


@given(
    logits=st.lists(st.integers(-32, 32).map(lambda eighths: eighths / 8), min_size=2, max_size=20),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.0101, 0.15, 1.0]),
    temperature=st.floats(0.1, 3.0),
)
def test_exactly_the_tokens_of_top_k_top_p_and_min_p_can_be_drawn(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    sampling = replace(PLAIN, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    expected = reference_probabilities(logits, sampling)
    # Where the kept mass meets top_p, or a ratio min_p, to the last bits of float32, rounding decides.
    ordered = np.sort(reference_probabilities(logits, replace(sampling, top_p=1.0, min_p=0.0)))[::-1]
    if np.abs(ordered.cumsum() - top_p).min() < 1e-6 and top_p < 1:
        return
    if np.abs(ordered / ordered[0] - min_p).min() < 1e-6 and min_p < 1:
        return
    drawn = draw_many(logits, sampling, 300)
    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected))
    assert set(np.flatnonzero(expected > 0.1)) <= set(np.flatnonzero(drawn))


def test_batches_of_all_kinds_draw_what_the_reference_draws() -> None:
    """A vocabulary larger than CANDIDATES, peaked and flat distributions, everything at once in one batch."""
    generator, dice = torch.Generator().manual_seed(5), np.random.default_rng(5)
    vocab_size = 5 * CANDIDATES
    rows, draws, expected = [], [], []
    for index in range(240):
        sampling = TokenSampling(
            temperature=dice.choice([0.0, 0.3, 1.0, 4.0]),
            top_k=int(dice.choice([0, 0, 1, 40, CANDIDATES, 300, vocab_size + 5])),
            top_p=dice.choice([1.0, 1.0, 0.5, 0.95]),
            min_p=dice.choice([0.0, 0.0, 0.05, 0.6]),
            seed=index,
            max_tokens=100,
            min_tokens=4,
            stop_token_ids=frozenset(dice.integers(0, vocab_size, 3).tolist()),
            presence_penalty=dice.choice([0.0, 1.5, -1.5]),
            frequency_penalty=dice.choice([0.0, 0.7]),
            repetition_penalty=dice.choice([1.0, 1.3, 0.8]),
            logit_bias=tuple((int(token), 2.5) for token in set(dice.integers(0, vocab_size, index % 3))),
        )
        logits = torch.randn(vocab_size, generator=generator) * float(dice.choice([0.01, 1, 5]))
        prompt, answer = (dice.integers(0, vocab_size, 60).tolist() for _ in range(2))
        answer += answer[:20]
        history = TokenHistory(prompt, answer) if sampling.needs_history else None
        draw = Draw(sampling, position=index, num_output_tokens=index % 8, history=history)
        rows.append(logits)
        draws.append(draw)
        adjusted = reference_logits(logits.tolist(), draw, answer, prompt)
        expected.append(reference_token(adjusted, draw))
    logits = torch.stack(rows)
    untouched = logits.clone()
    drawn = sample(logits, draws)
    # One may differ: the reference rounds in float64, and a number close to a border falls on its other side.
    differing = [row for row in range(240) if drawn[row] != expected[row]]
    assert len(differing) <= 1, differing
    assert torch.equal(logits, untouched)


@pytest.mark.parametrize("top_k", [3, CANDIDATES, CANDIDATES + 3])
def test_of_equals_the_lower_ids_stay_also_beyond_the_candidates(top_k: int) -> None:
    vocab_size = 3 * CANDIDATES
    logits = torch.zeros(vocab_size)
    logits[-2:] = 1.0
    drawn = draw_many(logits.tolist(), replace(PLAIN, top_k=top_k), 40 * top_k)
    assert set(np.flatnonzero(drawn)) == {*range(top_k - 2), vocab_size - 2, vocab_size - 1}


@pytest.mark.parametrize("filters", [{"top_p": 0.5}, {"min_p": 1.0}, {"top_p": 1e-9}, {"min_p": 0.5}])
def test_filters_hold_where_no_token_beyond_the_likeliest_few_can_be_drawn(filters: dict[str, float]) -> None:
    """top-k is beyond the candidates, and their last one has a probability of 0 in float32."""
    logits = [-60.0] * (2 * CANDIDATES)
    logits[5], logits[70], logits[200] = 1.0, 0.9, -1.0
    sampling = replace(PLAIN, temperature=0.5, top_k=CANDIDATES + 1, **filters)
    counts = draw_many(logits, sampling, 200)
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(reference_probabilities(logits, sampling)))


def test_penalties_are_those_of_the_answer_and_repetition_that_of_the_prompt_too() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.5]])
    history = TokenHistory([0], [1, 1, 2])

    def best_with(bias: tuple[tuple[int, float], ...] = (), **penalties: float) -> int:
        sampling = replace(PLAIN, temperature=0.0, logit_bias=bias, **penalties)
        return sample(logits, [Draw(sampling, 9, 3, history)])[0]

    # Token 1 after the penalty stands at 1 - 0.4, or at 1 - 2 * 0.4; a bias of the others shows where.
    assert best_with(presence_penalty=0.4, bias=((0, -9.0), (3, 0.09))) == 1
    assert best_with(presence_penalty=0.4, bias=((0, -9.0), (3, 0.11))) == 3
    assert best_with(frequency_penalty=0.4, bias=((0, -9.0), (3, -0.31))) == 1
    assert best_with(frequency_penalty=0.4, bias=((0, -9.0), (3, -0.29))) == 3
    # Token 0 is in the prompt only.
    assert best_with(frequency_penalty=2.0, presence_penalty=2.0) == 0
    assert best_with(repetition_penalty=3.9) == 0
    assert best_with(repetition_penalty=4.1) == 3
    # What is negative moves away from 0: token 2 stands at -2.
    assert best_with(repetition_penalty=2.0, bias=((0, -9.0), (1, -9.0), (3, -2.6))) == 2
    assert best_with(repetition_penalty=2.0, bias=((0, -9.0), (1, -9.0), (3, -2.4))) == 3


@given(prompt=st.lists(st.integers(0, 30)), answer=st.lists(st.integers(0, 60)), cut=st.integers(0, 60))
def test_a_history_counts_however_it_came_about(prompt: list[int], answer: list[int], cut: int) -> None:
    history = TokenHistory(prompt, answer[:cut])
    for token_id in answer[cut:]:
        history.append(token_id)
    counts = dict(zip(history.token_ids.tolist(), history.counts.tolist(), strict=True))
    assert counts == {token_id: answer.count(token_id) for token_id in prompt + answer}
    assert set(history.token_ids[: history.num_prompt].tolist()) == set(prompt)


@pytest.mark.parametrize(
    "sampling",
    [
        replace(PLAIN, top_k=1),
        replace(PLAIN, top_p=1e-9),
        replace(PLAIN, top_p=0.0),
        replace(PLAIN, min_p=1.0),
    ],
)
def test_the_narrowest_filters_leave_the_likeliest_token(sampling: TokenSampling) -> None:
    assert draw_many([0.0, 3.0, 2.9], sampling, 100).tolist() == [0, 100, 0]


@pytest.mark.parametrize("temperature", [1e-40, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert draw_many([0.0, 3.0, 2.9], replace(PLAIN, temperature=temperature), 100).tolist() == [0, 100, 0]


def test_a_draw_depends_on_its_own_row_seed_and_position_only() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 50, generator=generator)
    variants = [
        replace(PLAIN, temperature=0.0),
        PLAIN,
        replace(PLAIN, top_k=5, seed=4),
        replace(PLAIN, top_p=0.8, temperature=1.5, seed=2**63),
    ]
    draws = [Draw(variants[row % 4], position=row * 7, num_output_tokens=row) for row in range(12)]
    together = sample(logits, draws)
    assert together == [sample(logits[row : row + 1], [draws[row]])[0] for row in range(12)]
    backwards = sample(logits.flip(0), draws[::-1])
    assert together == backwards[::-1]
    assert together == sample(logits, draws)


def test_neighbouring_positions_and_seeds_draw_independently() -> None:
    logits = torch.zeros(400, 64)
    by_position = sample(logits, [Draw(PLAIN, position, 0) for position in range(400)])
    by_seed = sample(logits, [Draw(replace(PLAIN, seed=seed), 0, 0) for seed in range(400)])
    for tokens in (by_position, by_seed):
        repeats = sum(a == b for a, b in pairwise(tokens))
        assert repeats < 20
        assert len(set(tokens)) == 64


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_are_not_drawn_before_min_tokens(temperature: float) -> None:
    logits = [0.0, 9.0, 8.0, 0.5]
    sampling = replace(PLAIN, temperature=temperature, min_tokens=3, stop_token_ids=frozenset({1, 2, 99}))
    rows = torch.tensor(logits).expand(200, -1)
    early = sample(rows, [Draw(sampling, position, 2) for position in range(200)])
    assert not {1, 2} & set(early)
    late = sample(rows, [Draw(sampling, position, 3) for position in range(200)])
    assert 1 in late
    assert rows[0].tolist() == logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_any_token_left_still_gives_a_token_that_exists(temperature: float) -> None:
    sampling = replace(PLAIN, temperature=temperature, min_tokens=1, stop_token_ids=frozenset(range(4)))
    (token,) = sample(torch.zeros(1, 4), [Draw(sampling, 0, 0)])
    assert 0 <= token < 4
