"""What limits do for a mixed worker, in virtual time: chunks that follow from them against fixed ones."""

from __future__ import annotations

import random
from dataclasses import dataclass

from decode_worker.scheduler import DecodeScheduler
from decode_worker.sequences import DecodeTask
from engine.block_pool import BlockPool, Holder
from engine.latency import LatencyModel, OnlineLatency
from engine.prefix_cache import PrefixCache
from engine.sequence import ChunkResult, RequestKey, TokenSampling
from engine.urgency import Urgency

CORE = LatencyModel(
    {
        "step": 0.008,
        "rows": 0.0011,
        "decode_sequences": 0.0003,
        "prefill_attention": 2e-7,
        "decode_context": 1e-6,
    }
)
"""About what a CPU core takes for a model of 135 M parameters."""

TTFT_S, TPOT_S = 2.0, 0.030


@dataclass
class Request:
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    num_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def is_good(self) -> bool:
        tpot_s = (self.last_s - self.first_s) / (self.output_tokens - 1)
        return self.first_s - self.arrived_s <= TTFT_S and tpot_s <= TPOT_S


def workload(rate: float, seed: int, count: int = 80) -> list[Request]:
    """Poisson arrivals; prompts of about 512 tokens, answers of about 64."""
    rng = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        length = min(400, max(2, round(rng.expovariate(1 / 64))))
        requests.append(Request(now, round(512 * rng.lognormvariate(0, 0.3)), length))
    return requests


def attainment(requests: list[Request], max_batch_tokens: int, *, is_told: bool) -> float:
    """Of one mixed worker; is_told: of the limits. Steps take up to a quarter longer than the model says."""
    rng = random.Random(0)
    pool = BlockPool(4000, 16, [0] * 4000)
    cache = PrefixCache(pool, "model")
    latency = OnlineLatency(CORE)
    scheduler = DecodeScheduler(pool, cache, min(64, max_batch_tokens), max_batch_tokens, latency)
    alive: dict[RequestKey, Request] = {}
    coming, now = list(enumerate(requests)), 0.0
    while coming or alive:
        while coming and coming[0][1].arrived_s <= now:
            number, request = coming.pop(0)
            key = RequestKey(str(number), 0)
            urgency = Urgency(request.arrived_s + TTFT_S, TPOT_S) if is_told else None
            # Nobody knows how long the answer will be: max_tokens is far more.
            sampling = TokenSampling(0.0, 0, 1.0, 0, 512, 0, frozenset())
            task = DecodeTask(key, [0] * request.prompt_tokens, 0, sampling, "", urgency, [])
            blocks = pool.allocate(pool.num_blocks_for(request.prompt_tokens) + 1, Holder.SEQUENCE)
            scheduler.read(task, blocks, 0, request.arrived_s)
            alive[key] = request
        chunks = scheduler.schedule(now)
        if not chunks:
            now = coming[0][1].arrived_s
            continue
        began_s, now = now, now + CORE.step_s(scheduler.shape) * rng.uniform(1.0, 1.25)
        results = [ChunkResult(None if chunk.sampling is None else 1) for chunk in chunks]
        for decoded in scheduler.complete(results, began_s, now):
            request = alive[decoded.key]
            request.num_tokens += 1
            request.last_s = now
            if request.num_tokens == 1:
                request.first_s = now
            if request.num_tokens == request.output_tokens:
                scheduler.cancel(decoded.key)
                del alive[decoded.key]
    return sum(request.is_good for request in requests) / len(requests)


def test_limits_serve_more_requests_well_than_the_best_fixed_chunk() -> None:
    told = [attainment(workload(0.6, seed), 512, is_told=True) for seed in range(2)]
    fixed = [
        [attainment(workload(0.6, seed), tokens, is_told=False) for seed in range(2)]
        for tokens in (16, 64, 512)
    ]
    assert sum(told) > 1.4
    assert sum(told) > 1.35 * max(map(sum, fixed))


def test_limits_that_are_loose_cost_nothing() -> None:
    """A quarter of that rate: whatever the chunks, there is hardly ever more than one request."""
    told = attainment(workload(0.15, 3), 512, is_told=True)
    assert told >= attainment(workload(0.15, 3), 512, is_told=False)
    assert told > 0.95
