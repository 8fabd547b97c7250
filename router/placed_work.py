"""What a placement gives the workers to do, as far as it can be told when the request is placed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlacedWork:
    """Times on the router's clock, seconds.

    at: when it was placed. read_s: how long its prompt takes to read, once it is its turn. deadline: by when
    its first token has to be there; -inf if its answer has begun, as nothing is more urgent; inf if it is
    late already, as everything is. priority: the greater goes first. joins_at: when it is expected to join
    the batch of who writes the answer. is_local: whether that is who reads the prompt. context: tokens before
    the first one to come. outputs: p10, p50, p90 of the tokens to come; are_learned: of answers that were
    seen, where they are most_outputs otherwise, which they never exceed. tpot_s: limit on the average time
    between them.
    """

    at: float
    read_s: float
    deadline: float
    priority: int
    joins_at: float
    is_local: bool
    context: int
    outputs: tuple[int, int, int]
    most_outputs: int
    tpot_s: float
    are_learned: bool = True
