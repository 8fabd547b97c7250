"""Policies beside each other on two cores in virtual time (`pool_model.py`), with the lengths of a trace.

    python -m tests.router.in_virtual_time sharegpt:LENGTHS.csv --rates 0.3,0.57,0.8 --seeds 11,12,13
    python -m tests.router.in_virtual_time synthetic:prompt=512,answer=64 --ttft 1.1 --tpot 0.018 --rates 1,2

prints the share of good requests for each rate and deployment: least, median and greatest of the seeds. What
is chosen by the figures of some seeds is to be reported with those of others.
"""

from __future__ import annotations

import argparse
from statistics import median

import numpy as np

from cluster.workload.datasets import load_dataset
from cluster.workload.errors import BadInputError
from engine.latency import LatencyModel
from engine.sequence import TokenSampling
from router.pool_view import Role
from router.requests import Request
from router.slo import Slo, SloLimits
from tests.router.pool_model import Job, Machine, Pools

CORE = LatencyModel(
    {
        "step": 0.0095, "rows": 0.00068, "decode_sequences": 0.0009, "decode_context": 4e-7,
        "prefill_attention": 1e-7, "prefill_context": 1e-7,
    }
)  # fmt: skip
"""About a CPU core with SmolLM2-135M's shape: 0.7 ms a prompt token, 12 ms for a step of one sequence."""
NOISE = 0.15
MAX_TOKENS = 2048
DEPLOYMENTS = {
    "goodput, prefill + decode": ("goodput", {"p": 1, "d": 1}),
    "least_loaded, prefill + decode": ("least_loaded", {"p": 1, "d": 1}),
    "goodput, prefill + mixed": ("goodput", {"p": 1, "m": 1}),
    "goodput, two mixed": ("goodput", {"m": 2}),
    "colocated, two mixed": ("colocated", {"m": 2}),
}
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}


def attainment(
    name: str, dataset: str, limits: SloLimits, rate: float, seed: int, count: int, spells: float
) -> float:
    """The share of good requests of a deployment. rate: requests/s, arrivals are Poisson. spells: share of
    the time in which machines are slow."""
    policy, workers = DEPLOYMENTS[name]
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    shapes = load_dataset(dataset, max_tokens=MAX_TOKENS - 1).shapes(rng, arrivals)
    jobs = [
        Job(_request(f"r{index}", shape.prompt_tokens, limits, float(at)), shape.output_tokens)
        for index, (shape, at) in enumerate(zip(shapes, arrivals, strict=True))
    ]
    machine = Machine(CORE, noise=NOISE, slow_spells=spells)
    machines = {
        f"{role}{index}": (ROLES[role], machine) for role, many in workers.items() for index in range(many)
    }
    Pools(machines, policy, seed).run(jobs, until=float(arrivals[-1]) + 200)
    return sum(job.is_good for job in jobs) / count


def _request(request_id: str, prompt_tokens: int, limits: SloLimits, arrived_at: float) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(range(prompt_tokens)),
        sampling=TokenSampling(
            temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=MAX_TOKENS, min_tokens=0,
            stop_token_ids=frozenset(),
        ),
        stop=(),
        slo=Slo("default", limits),
        tenant="",
        arrived_at=arrived_at,
        deadline=arrived_at + 600,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", help="as --dataset of `prelay bench serve`")
    parser.add_argument("--rates", default="0.3,0.57,0.8", help="requests/s")
    parser.add_argument("--seeds", default="11,12,13")
    parser.add_argument("--ttft", type=float, default=3.0, help="limit, seconds")
    parser.add_argument("--tpot", type=float, default=0.0191, help="limit, seconds")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument(
        "--slow-spells", type=float, default=0.0, help="share of the time that a machine is slow"
    )
    parser.add_argument("--only", default="", help="deployments whose names begin so")
    chosen = parser.parse_args()
    try:
        load_dataset(chosen.dataset, max_tokens=MAX_TOKENS - 1)
    except BadInputError as error:
        parser.error(str(error))
    limits = SloLimits(chosen.ttft, chosen.tpot)
    for rate in map(float, chosen.rates.split(",")):
        for name in (name for name in DEPLOYMENTS if name.startswith(chosen.only)):
            found = [
                attainment(name, chosen.dataset, limits, rate, seed, chosen.requests, chosen.slow_spells)
                for seed in map(int, chosen.seeds.split(","))
            ]
            print(
                f"{rate:g}/s  {name:31} {median(found):.2f} ({min(found):.2f}-{max(found):.2f})", flush=True
            )


if __name__ == "__main__":
    main()
