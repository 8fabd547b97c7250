"""`pytest -m gpu`: CUDA against the CPU, FlashInfer against torch, recorded steps against eager ones."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.attention import flashinfer_fake
from engine.attention.flashinfer import FlashInferAttention
from engine.attention.sdpa import SdpaAttention
from engine.batch import FlatBatch
from engine.config import EngineConfig, ModelConfig
from engine.cuda import CudaBackend, import_flashinfer
from engine.cuda_memory import measure_memory
from engine.engine import Engine
from engine.executor import Executor
from engine.generate import generate
from engine.kernels.cuda import FlashInferKernels
from engine.kernels.torch_ops import TorchKernels
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.loading import weights_of
from engine.model import LlamaModel
from engine.parallel.base import Solo
from engine.sampler import Draw, sample
from engine.sequence import ScheduledChunk, TokenSampling
from engine.shard import WHOLE
from engine.staging import to_device

# The first use of each FlashInfer kernel compiles it, which takes up to a minute. Its imports may warn.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

CONFIG = EngineConfig(num_blocks=64, block_size=16, max_batch_tokens=64, dtype="bfloat16", device="cuda")
GREEDY = TokenSampling(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    max_tokens=50,
    min_tokens=0,
    stop_token_ids=frozenset(),
)


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def flashinfer() -> Any:
    module = import_flashinfer()
    if module is None:
        pytest.skip("flashinfer-python is not installed")
    return module


@pytest.fixture(scope="module", params=["llama", "qwen3_windows"])
def wide_heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with heads that FlashInfer computes, one with windows and head norms; random, small."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    keys: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    path = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if request.param == "llama":
            model = LlamaForCausalLM(LlamaConfig(**keys))
        else:
            windows = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
            model = Qwen3ForCausalLM(Qwen3Config(**keys, **windows))
    model.save_pretrained(path)
    return path


def random_chunks(dice: random.Random, lengths: Sequence[int]) -> list[ScheduledChunk]:
    blocks = dice.sample(range(64), 64)
    return [
        ScheduledChunk(
            [dice.randrange(160) for _ in range(length)],
            dice.randint(0, 30),
            blocks[index * 5 : index * 5 + 5],
            GREEDY,
            0,
        )
        for index, length in enumerate(lengths)
    ]


def test_the_stand_in_has_the_interface_of_the_library(flashinfer: Any) -> None:
    functions = [
        "append_paged_kv_cache",
        "rmsnorm",
        "fused_add_rmsnorm",
        "silu_and_mul",
        "apply_rope_with_cos_sin_cache_inplace",
    ]
    wrappers = ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"]
    pairs = [(getattr(flashinfer, name), getattr(flashinfer_fake, name)) for name in functions]
    for name in wrappers:
        real, fake = getattr(flashinfer, name), getattr(flashinfer_fake, name)
        pairs += [(getattr(real, method), getattr(fake, method)) for method in ("__init__", "plan", "run")]
    for real, fake in pairs:
        known = inspect.signature(real).parameters
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
        missing = set(inspect.signature(fake).parameters) - set(known)
        assert takes_any or not missing, f"{real}: no {missing}"


def test_arrays_arrive_on_the_device_as_they_are(cuda: torch.device) -> None:
    arrays = [np.arange(7), np.arange(5, dtype=np.int32)[:, None], np.empty(0, dtype=np.int64)]
    for _ in range(50):
        for array, tensor in zip(arrays, to_device(cuda, *arrays), strict=True):
            assert tensor.device == cuda
            assert np.array_equal(tensor.cpu().numpy(), array)


def test_float32_gives_the_tokens_of_the_cpu(
    random_checkpoint: Path, load_engine: Callable[..., Engine]
) -> None:
    prompt = list(range(20, 60))
    engines = [load_engine(random_checkpoint, device=device) for device in ("cpu", "cuda")]
    chunk = ScheduledChunk(prompt, 0, range(8), GREEDY, 0)
    batch = FlatBatch.of([chunk], 8, 64, 160)
    on_cpu, on_cuda = (engine.executor.logits(batch).cpu() for engine in engines)
    torch.testing.assert_close(on_cuda, on_cpu, atol=1e-3, rtol=1e-3)
    assert generate(engines[1], prompt, GREEDY) == generate(engines[0], prompt, GREEDY)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (8, 2), (7, 1), (14, 2)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [(1,) * 7, (1, 9, 1, 33), (5,)], ids=["decode", "mixed", "prefill"])
def test_flashinfer_attends_like_torch(
    flashinfer: Any,
    cuda: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    lengths: Sequence[int],
) -> None:
    windows = (None, 11)
    layout = KvLayout(len(windows), num_kv_heads, head_dim, block_size=16, dtype="bfloat16")
    caches = [KvCache(layout, 64, device=cuda, num_spare=1) for _ in range(2)]
    generator = torch.Generator(cuda).manual_seed(0)
    caches[0].data.normal_(generator=generator)
    caches[1].data.copy_(caches[0].data)
    batch = FlatBatch.of(random_chunks(random.Random(1), lengths), 16, 64, 160)
    steps = [
        FlashInferAttention(flashinfer, caches[0], windows, num_heads, max_pages=64).plan(batch),
        SdpaAttention(caches[1], windows).plan(batch),
    ]

    def random_heads(count: int) -> torch.Tensor:
        shape = (sum(lengths), count, head_dim)
        return torch.randn(shape, device=cuda, generator=generator).to(torch.bfloat16)

    for layer in range(len(windows)):
        queries, keys, values = (random_heads(n) for n in (num_heads, num_kv_heads, num_kv_heads))
        attended, expected = (step.attend(queries, keys, values, layer) for step in steps)
        torch.testing.assert_close(attended, expected, atol=2e-2, rtol=2e-2)
        assert torch.equal(caches[0].data, caches[1].data)


@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_flashinfers_kernels_are_torchs(flashinfer: Any, cuda: torch.device, num_heads: int) -> None:
    generator = torch.Generator(cuda).manual_seed(1)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=cuda, generator=generator).to(torch.bfloat16)

    kernels, torchs = FlashInferKernels(flashinfer, 7, cuda), TorchKernels()
    hidden, delta, weight, head_weight = rows(7, 128), rows(7, 128), rows(128), rows(64)
    qkv = rows(7, num_heads + 3, 64)
    heads = qkv[:, 1 : 1 + num_heads]
    angles = torch.randn((7, 32), device=cuda, generator=generator)
    turned = qkv.clone()
    pairs = [
        (kernels.rms_norm(hidden, weight, 1e-5), torchs.rms_norm(hidden, weight, 1e-5)),
        (kernels.rms_norm(heads, head_weight, 1e-5), torchs.rms_norm(heads, head_weight, 1e-5)),
        (kernels.gated_silu(hidden), torchs.gated_silu(hidden)),
        *zip(
            kernels.add_rms_norm(hidden.clone(), delta.clone(), weight, 1e-5),
            torchs.add_rms_norm(hidden, delta, weight, 1e-5),
            strict=True,
        ),
        (
            kernels.rotate(turned[:, 1 : 1 + num_heads], angles.cos(), angles.sin()),
            torchs.rotate(heads, angles.cos(), angles.sin()),
        ),
    ]
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, atol=5e-2, rtol=2e-2)
    assert torch.equal(turned[:, :1], qkv[:, :1])
    assert torch.equal(turned[:, 1 + num_heads :], qkv[:, 1 + num_heads :])


def loaded(checkpoint: Path, device: torch.device) -> tuple[CudaBackend, LlamaModel]:
    model_config = ModelConfig.from_pretrained(checkpoint)
    backend = CudaBackend.of(model_config, CONFIG, device)
    weights = weights_of(checkpoint, model_config, CONFIG, lambda fraction: None)
    return backend, LlamaModel(model_config, WHOLE, weights, backend.kernels(), Solo())


def test_recorded_steps_are_the_eager_ones_and_near_torchs(
    flashinfer: Any, cuda: torch.device, wide_heads: Path
) -> None:
    backend, model = loaded(wide_heads, cuda)
    assert backend.recorder is not None
    executors: list[tuple[Executor, KvCache]] = []
    for choice in (
        backend,
        replace(backend, recorder=None),
        replace(backend, flashinfer=None, recorder=None),
    ):
        cache = backend.cache(CONFIG.num_blocks)
        executors.append((choice.executor(model, cache), cache))
    assert not executors[0][1].data[: CONFIG.num_blocks].any(), "recording wrote outside of the spare block"
    dice = random.Random(2)
    lengths = [0] * 12
    for _ in range(40):
        step = []
        for index in dice.sample(range(12), dice.randint(1, 12)):
            length = dice.choice([1, 2, 5]) if lengths[index] < 6 else 1
            if lengths[index] + length <= 5 * CONFIG.block_size:
                table = range(index * 5, index * 5 + 5)
                tokens = [dice.randrange(160) for _ in range(length)]
                step.append(ScheduledChunk(tokens, lengths[index], table, GREEDY, 0))
                lengths[index] += length
        if not step:
            continue
        batch = FlatBatch.of(step, CONFIG.block_size, CONFIG.num_blocks, 160)
        recorded, eager, plain = (executor.logits(batch).clone() for executor, _ in executors)
        scale = float(plain.abs().max())
        torch.testing.assert_close(recorded, eager, atol=0.02 * scale, rtol=0.02)
        torch.testing.assert_close(recorded, plain, atol=0.05 * scale, rtol=0.05)


def test_draws_from_logits_on_the_device_are_those_of_the_cpu(cuda: torch.device) -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 3
    choices = [
        GREEDY,
        *(replace(GREEDY, temperature=0.8, top_p=p, top_k=k) for p in (1.0, 0.9) for k in (0, 5)),
    ]
    draws = [
        Draw(replace(choices[row % 5], seed=row), position=row, num_output_tokens=0) for row in range(64)
    ]
    assert sample(logits.to(cuda), draws) == sample(logits, draws)


def test_memory_is_measured_and_given_back(cuda: torch.device, wide_heads: Path) -> None:
    backend, model = loaded(wide_heads, cuda)
    before = torch.cuda.memory_allocated(cuda)
    memory = measure_memory(backend, model, max_num_seqs=8)
    # What libraries keep for themselves after their first use stays.
    assert torch.cuda.memory_allocated(cuda) - before < 128 * 2**20
    assert 0 < memory.step_nbytes < memory.total_nbytes
    assert 0 < memory.for_kv_cache(0.9) < memory.total_nbytes * 0.9


def test_an_engine_answers(wide_heads: Path, load_engine: Callable[..., Engine]) -> None:
    engine = load_engine(wide_heads, device="cuda", dtype="bfloat16", block_size=16)
    answer = generate(engine, list(range(30)), GREEDY)
    assert len(answer) == GREEDY.max_tokens
    assert answer == generate(engine, list(range(30)), GREEDY)
