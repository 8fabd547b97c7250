"""The compiled kernels against torch's, at even and odd sizes, and the promise that a row's bits do not
depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch

from engine.errors import KernelsUnavailableError
from engine.kernels.native import NativeKernels
from engine.kernels.torch_ops import TorchKernels

TOLERANCES = {"float32": {"atol": 1e-5, "rtol": 1e-4}, "bfloat16": {"atol": 3e-2, "rtol": 3e-2}}


@pytest.fixture(params=[("float32", 1), ("bfloat16", 1), ("float32", 3), ("bfloat16", 3)], ids=str)
def setting(request: pytest.FixtureRequest) -> tuple[str, NativeKernels]:
    """A number type, and kernels for it on one thread or on three."""
    dtype, threads = request.param
    try:
        return dtype, NativeKernels(dtype, threads)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


def randn(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 1), (5, 31), (16, 32), (67, 100), (130, 576)])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 9, 16, 30, 200])
def test_linear_is_that_of_torch(
    setting: tuple[str, NativeKernels], num_rows: int, num_outputs: int, num_inputs: int, with_bias: bool
) -> None:
    dtype, kernels = setting
    rows = randn(dtype, num_rows, num_inputs)
    weight = randn(dtype, num_outputs, num_inputs, seed=1) / num_inputs**0.5
    bias = randn(dtype, num_outputs, seed=2) if with_bias else None
    expected = TorchKernels().linear(rows, weight, bias)
    torch.testing.assert_close(kernels.linear(rows, weight, bias), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(19, 45), (64, 576)])
def test_a_row_gets_the_same_bits_in_every_batch(
    setting: tuple[str, NativeKernels], num_outputs: int, num_inputs: int
) -> None:
    dtype, kernels = setting
    rows = randn(dtype, 40, num_inputs)
    weight, bias = randn(dtype, num_outputs, num_inputs, seed=1), randn(dtype, num_outputs, seed=2)
    whole = kernels.linear(rows, weight, bias)
    for size in (1, 2, 3, 4, 5, 6, 7, 11, 24):
        for first in (0, 1, 40 - size):
            part = kernels.linear(rows[first : first + size], weight, bias)
            assert torch.equal(part, whole[first : first + size]), f"{size} rows from {first}"


@pytest.mark.parametrize("width", [1, 16, 45, 576])
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_norms_are_those_of_torch(setting: tuple[str, NativeKernels], num_rows: int, width: int) -> None:
    dtype, kernels = setting
    hidden, delta = randn(dtype, num_rows, width), randn(dtype, num_rows, width, seed=1)
    weight = randn(dtype, width, seed=2)
    expected = TorchKernels().rms_norm(hidden, weight, 1e-5)
    torch.testing.assert_close(kernels.rms_norm(hidden, weight, 1e-5), expected, **TOLERANCES[dtype])
    total, normed = TorchKernels().add_rms_norm(hidden.clone(), delta.clone(), weight, 1e-5)
    own_total, own_normed = kernels.add_rms_norm(hidden, delta, weight, 1e-5)
    assert torch.equal(own_total, total)
    torch.testing.assert_close(own_normed, normed, **TOLERANCES[dtype])


def test_norm_of_heads_cut_out_of_wider_rows(setting: tuple[str, NativeKernels]) -> None:
    dtype, kernels = setting
    queries = randn(dtype, 5, 9, 24)[:, 2:5]
    weight = randn(dtype, 24, seed=1)
    expected = TorchKernels().rms_norm(queries, weight, 1e-6)
    torch.testing.assert_close(kernels.rms_norm(queries, weight, 1e-6), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("head_dim", [2, 24, 64, 128])
def test_rotation_is_that_of_torch_and_leaves_neighbours_alone(
    setting: tuple[str, NativeKernels], head_dim: int
) -> None:
    dtype, kernels = setting
    heads = randn(dtype, 20, 6, head_dim)
    angles = torch.arange(20)[:, None] * torch.rand(head_dim // 2, generator=torch.Generator().manual_seed(1))
    before = heads.clone()
    expected = TorchKernels().rotate(heads[:, 1:4], angles.cos(), angles.sin())
    turned = kernels.rotate(heads[:, 1:4], angles.cos(), angles.sin())
    torch.testing.assert_close(turned, expected, **TOLERANCES[dtype])
    assert torch.equal(heads[:, 4:], before[:, 4:])
    assert torch.equal(heads[:, :1], before[:, :1])


@pytest.mark.parametrize("width", [1, 30, 1536])
def test_gated_silu_is_that_of_torch(setting: tuple[str, NativeKernels], width: int) -> None:
    dtype, kernels = setting
    gate_up = randn(dtype, 20, 2 * width) * 4
    gate_up[0, 0], gate_up[1, 0] = 200.0, -200.0
    expected = TorchKernels().gated_silu(gate_up)
    torch.testing.assert_close(kernels.gated_silu(gate_up), expected, **TOLERANCES[dtype])
