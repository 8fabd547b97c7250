"""The same steps with Hugging Face transformers: what most people have, and what ratios are taken against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class TransformersUnavailableError(Exception):
    """transformers is not installed."""


class TransformersBaseline:
    """The model of a config.json with random weights. Raises TransformersUnavailableError."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise TransformersUnavailableError(
                "transformers is not installed: pip install 'prelay[bench]', or give --no-transformers"
            ) from error
        config = AutoConfig.from_pretrained(checkpoint)
        torch.manual_seed(0)
        models: Any = AutoModelForCausalLM  # untyped
        self._model = models.from_config(config, dtype=getattr(torch, dtype)).eval()
        self._vocab_size: int = config.vocab_size

    @torch.inference_mode()
    def prefill(self, num_tokens: int) -> None:
        """One prompt, with logits after its last token and a cache for what would follow."""
        self._model(self._tokens(1, num_tokens), use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def context(self, batch: int, context: int) -> Any:
        """A cache of `context` - 1 tokens for each of `batch` sequences."""
        # What the cache holds does not matter for the time: one sequence is computed, and repeated.
        cache = self._model(self._tokens(1, context - 1), use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(batch)
        return cache

    @torch.inference_mode()
    def decode(self, cache: Any, batch: int) -> None:
        """One more token for each sequence of a cache, which is as long afterwards as it was before."""
        self._model(self._tokens(batch, 1), past_key_values=cache, use_cache=True)
        cache.crop(-1)

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        return torch.randint(self._vocab_size, (batch, length))
