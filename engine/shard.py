"""Which part of a model one rank of a worker holds: heads, columns, vocabulary rows, layers. No torch here.

Tensor parallelism (Shoeybi et al. 2019, "Megatron-LM") splits every matrix of a layer over `tp_size` ranks:
query, key, value, gate and up projections by rows of their outputs, attention-out and down projections by
columns of their inputs. Pipeline parallelism gives each of `pp_size` stages a run of whole layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.config import ModelConfig
from engine.errors import UnsupportedModelError


class KvDimensions(Protocol):
    """What the split of KV over ranks depends on: a ModelConfig has it, and the layout of a worker's KV."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's place in its worker. The rank's number is pp_rank * tp_size + tp_rank."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.tp_rank < self.tp_size and 0 <= self.pp_rank < self.pp_size):
            raise ValueError(
                f"rank {self.tp_rank} of {self.tp_size} tensor-parallel and {self.pp_rank} of {self.pp_size} "
                "pipeline-parallel ranks: there is no such rank"
            )

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def check(self, model: ModelConfig) -> None:
        """Raises UnsupportedModelError, naming what does not divide, if the model cannot be split so."""
        for name, count in (
            ("num_attention_heads", model.num_heads),
            ("intermediate_size", model.intermediate_size),
        ):
            if count % self.tp_size:
                raise UnsupportedModelError(
                    f"tensor parallelism over {self.tp_size} ranks needs {name} to be a multiple of it; "
                    f"it is {count}"
                )
        if model.num_kv_heads % self.tp_size and self.tp_size % model.num_kv_heads:
            raise UnsupportedModelError(
                f"tensor parallelism over {self.tp_size} ranks needs num_key_value_heads, "
                f"{model.num_kv_heads}, to be a multiple or a divisor of it"
            )
        if self.pp_size > model.num_layers:
            raise UnsupportedModelError(
                f"pipeline parallelism over {self.pp_size} stages needs as many layers; there are "
                f"{model.num_layers}"
            )

    def layers(self, model: KvDimensions) -> range:
        """The layers of this stage; where they do not divide, the earlier stages have one more."""
        return _part(model.num_layers, self.pp_rank, self.pp_size)

    def heads(self, model: ModelConfig) -> range:
        """The query heads of this rank."""
        return _part(model.num_heads, self.tp_rank, self.tp_size)

    def kv_heads(self, model: KvDimensions) -> range:
        """The KV heads that this rank's query heads use; replicated if there are more ranks than KV heads."""
        if self.tp_size <= model.num_kv_heads:
            return _part(model.num_kv_heads, self.tp_rank, self.tp_size)
        head = self.tp_rank * model.num_kv_heads // self.tp_size
        return range(head, head + 1)

    def intermediate(self, model: ModelConfig) -> range:
        """The MLP's inner columns of this rank."""
        return _part(model.intermediate_size, self.tp_rank, self.tp_size)

    def vocabulary(self, model: ModelConfig) -> range:
        """The token ids whose embeddings and logits this rank computes; the last ranks may have fewer."""
        size = -(-model.vocab_size // self.tp_size)
        first = min(self.tp_rank * size, model.vocab_size)
        return range(first, min(first + size, model.vocab_size))


WHOLE = Shard()
"""The shard of a worker with one rank: everything."""


def _part(count: int, rank: int, size: int) -> range:
    """The rank-th of `size` runs of 0 .. count-1, of which the earlier ones are one longer if need be."""
    each, more = divmod(count, size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))
