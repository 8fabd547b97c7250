"""The demo's measure: every prompt again in one process, without pools, router or hand-off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.demo.clients import Answer
from cluster.demo.prompts import DemoPrompt
from engine.config import EngineConfig, ModelConfig
from engine.sequence import StopReason, TokenSampling
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Reference:
    """What the answer to one prompt must be."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


def compute_references(
    checkpoint: Path, prompts: Sequence[DemoPrompt], on_done: Callable[[int], None]
) -> list[Reference]:
    """Blocks for seconds; imports torch. on_done: told how many prompts are done."""
    from engine.engine import Engine
    from engine.generate import generate

    model = ModelConfig.from_pretrained(checkpoint)
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    config = EngineConfig(num_blocks=-(-model.max_position_embeddings // 16), block_size=16)
    engine = Engine.load(checkpoint, config, None, lambda fraction: None)
    references = []
    for prompt in prompts:
        if prompt.chat:
            prompt_ids = tokenizer.encode_chat([{"role": "user", "content": prompt.text}])
        else:
            prompt_ids = tokenizer.encode(prompt.text)
        sampling = token_sampling(prompt, frozenset(model.eos_token_ids))
        token_ids = tuple(generate(engine, prompt_ids, sampling))
        reason = sampling.stop_reason(token_ids[-1], len(token_ids))
        references.append(
            Reference(
                prompt_tokens=len(prompt_ids),
                token_ids=token_ids,
                text=tokenizer.decode(token_ids),
                finish_reason="stop" if reason is StopReason.STOP else "length",
            )
        )
        on_done(len(references))
    return references


def token_sampling(prompt: DemoPrompt, eos_token_ids: frozenset[int]) -> TokenSampling:
    """What the front ends make of the prompt's parameters."""
    greedy = prompt.seed is None
    return TokenSampling(
        temperature=0.0 if greedy else prompt.temperature,
        top_k=0 if greedy else prompt.top_k,
        top_p=1.0 if greedy else prompt.top_p,
        seed=prompt.seed or 0,
        max_tokens=prompt.max_tokens,
        min_tokens=0,
        stop_token_ids=eos_token_ids,
    )


def difference(answer: Answer, reference: Reference) -> str | None:
    """What differs between an answer and its reference, for a person; None if nothing does."""
    if answer.token_ids is not None and answer.token_ids != reference.token_ids:
        return (
            f"tokens differ:\n  served:   {list(answer.token_ids)}\n  expected: {list(reference.token_ids)}"
        )
    for name in ("text", "finish_reason", "prompt_tokens"):
        served, expected = getattr(answer, name), getattr(reference, name)
        if served != expected:
            return f"{name} differs:\n  served:   {served!r}\n  expected: {expected!r}"
    if answer.completion_tokens != len(reference.token_ids):
        return f"{answer.completion_tokens} tokens were served, {len(reference.token_ids)} expected"
    return None
