"""What is left of a request's SLO, as its workers are told. A core."""

from __future__ import annotations

from dataclasses import dataclass

from router.requests import Request


@dataclass(frozen=True, slots=True)
class Urgency:
    """ttft_left_s: until its first token is due, negative if it is late; None if that is out. tpot_s: limit
    on the average time between the tokens to come. priority: the greater goes first."""

    ttft_left_s: float | None
    tpot_s: float
    priority: int


def urgency(request: Request, now: float, first_token_at: float | None, tokens_to_come: int) -> Urgency:
    """tokens_to_come: as many as are expected of the rest of the answer.

    An answer that was interrupted has used up some of its limit S: of its n tokens in all, those to come may
    take S (n - 1) less the time since the first one, on average

        S_eff = (S (n - 1) - elapsed) / tokens to come

    One that would have to go more than twice as fast is hardly to be saved, and whoever shares a batch with
    it would suffer: it is treated like any other.
    """
    limits = request.slo.limits
    if first_token_at is None:
        left_s = request.arrived_at + limits.ttft_s - now
        return Urgency(left_s, limits.tpot_s, request.slo.priority)
    num_tokens = len(request.answered) + tokens_to_come
    left_s = (limits.tpot_s * (num_tokens - 1) - (now - first_token_at)) / tokens_to_come
    return Urgency(None, left_s if left_s >= limits.tpot_s / 2 else limits.tpot_s, request.slo.priority)
