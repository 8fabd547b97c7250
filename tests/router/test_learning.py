"""What the router learns from workers and requests, through the whole of it: snapshots, block events, tokens,
hand-offs and ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import aiohttp
import pytest
from prelay.v1 import worker_pb2

from engine.latency import StepShape
from engine.prefix_digests import prefix_digests, short
from router.errors import WorkerRefusedError
from router.fake_holds import Hold
from router.fake_model import FakeModel
from router.pair_table import Pair
from router.placement.base import Expected
from router.policies import POLICIES
from router.policy import Policy
from router.slo import SloClass

PREFILL, DECODE = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE
PROMPT = "x" * 40  # two full blocks and a half
EOS, VOCAB_SIZE, MAX_MODEL_LEN = 256, 257, 512  # as in conftest.py
LATENCY = {"step": 0.01, "rows": 0.001}


class Predicting:
    """A placement that predicts the same for all."""

    def __init__(self, placement, expected):
        self._placement = placement
        self._expected = expected

    def choose(self, request, avoid, now):
        decision = self._placement.choose(request, avoid, now)
        return decision and replace(decision, expected=self._expected)


class Learned:
    """Keeps what a policy is made from, to look at what has been learned."""

    def __init__(self, expected=None):
        self.inputs = None
        self._expected = expected

    def __call__(self, inputs):
        self.inputs = inputs
        made = POLICIES["least_loaded"](inputs)
        placement = Predicting(made.placement, self._expected)
        return Policy("test", made.admission, made.gate, placement, tells_urgency=False)

    @property
    def estimates(self):
        return self.inputs.estimates


async def complete(cluster, prompt=PROMPT, max_tokens=5, **headers):
    body = {"prompt": prompt, "max_tokens": max_tokens}
    async with cluster.http() as http, http.post("/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200


async def test_steps_correct_the_latency_that_a_worker_says(start_cluster):
    cluster = await start_cluster(prefill={"latency": LATENCY})
    view = cluster.router.pool["p0"]
    shape = StepShape(prefill=((100, 20),), decode_batch=3, decode_context=60)
    assert view.latency.expect_s(shape) == pytest.approx(0.01 + 0.001 * 103)
    cluster.prefill.say_steps(
        *[
            worker_pb2.StepTime(
                new_tokens=[100], cached_tokens=[20], decode_requests=3, decode_context=60, seconds=0.3
            )
        ]
        * 50
    )
    await cluster.until(lambda: view.latency.expect_s(shape) > 0.2)


async def test_a_latency_that_is_no_time_is_refused(cluster):
    worker = await cluster.fleet.start(DECODE, "d1", latency={"step": -1.0})
    with pytest.raises(WorkerRefusedError, match="worker d1 does not say how long its steps take"):
        await cluster.register(worker)


async def test_loads_come_with_snapshots(start_cluster):
    cluster = await start_cluster()
    cluster.decode.hold(Hold.DECODE)
    asking = asyncio.create_task(complete(cluster))
    await cluster.decode.waiting_at(Hold.DECODE)
    view = cluster.router.pool["d0"]
    await cluster.until(lambda: view.writing.now.size == 1)
    cluster.decode.let_go(Hold.DECODE)
    await asking
    await cluster.until(lambda: view.writing.now.size == 0)


async def test_blocks_come_and_go(start_cluster, make_request):
    learned = Learned()
    cluster = await start_cluster(policy=learned)
    request = replace(make_request(), prompt_token_ids=tuple(PROMPT.encode()))
    first, second = (short(one) for one in prefix_digests("fake", "", 16, list(PROMPT.encode())))
    view = cluster.router.pool["p0"]

    def cached():
        return learned.estimates.cached_tokens(view, request)

    assert cached() == 0
    cluster.prefill.say_blocks(stored=[first, second])
    await cluster.until(lambda: cached() == 32)
    assert cluster.sample("prelay_prefix_index_blocks") == 2
    cluster.prefill.say_blocks(removed=[second])
    await cluster.until(lambda: cached() == 16)
    cluster.prefill.break_stream()
    await cluster.until(lambda: not view.up)
    assert cluster.sample("prelay_prefix_index_blocks") == 0
    await cluster.register(cluster.prefill)  # the same life: it says again what it has
    view = cluster.router.pool["p0"]
    await cluster.until(lambda: cached() == 16)
    assert cluster.router.workers.remove("p0", 1)
    assert cluster.sample("prelay_prefix_index_blocks") == 0


async def test_lengths_of_complete_answers(start_cluster, make_request):
    learned = Learned()
    cluster = await start_cluster(policy=learned)
    lengths = cluster.router.lengths
    assert lengths.quantiles(make_request(max_tokens=100)) == (100, 100, 100)
    for _ in range(3):
        await complete(cluster, max_tokens=7)
    assert lengths.quantiles(make_request(max_tokens=100)) == (7, 7, 7)


class Transfers:
    """What would be learned from."""

    def __init__(self):
        self.observed = []

    def placed(self, pair):
        pass

    def observe(self, pair, num_tokens, seconds):
        self.observed.append((pair, num_tokens, seconds))

    def expect_s(self, pair, num_tokens):
        return 0.0


@pytest.mark.parametrize(("caches", "num_tokens"), [(False, len(PROMPT)), (True, 1)])
async def test_transfers_are_learned_of_what_travelled(start_cluster, caches, num_tokens):
    learned = Learned()
    model = FakeModel(eos_token_id=EOS, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, caches=caches)
    cluster = await start_cluster(policy=learned, model=model)
    transfers = learned.estimates.transfers = Transfers()
    await complete(cluster)
    await complete(cluster, max_tokens=1)  # nothing is handed over
    assert transfers.observed == [(Pair("p0", "d0"), num_tokens, 1e-6)]


async def test_predictions_are_compared_with_what_came(start_cluster):
    learned = Learned(Expected(ttft_s=1e9, tpot_s=1e-12, transfer_s=1e-6))
    cluster = await start_cluster(policy=learned)
    await complete(cluster)

    def ratios(what, le):
        return cluster.sample("prelay_prediction_error_ratio_bucket", what=what, le=le)

    for what, below, within in (("ttft", "0.0", "0.1"), ("tpot", "10.0", "+Inf"), ("transfer", "0.9", "1.1")):
        assert ratios(what, below) == 0
        assert ratios(what, within) == 1


async def test_an_answer_that_was_interrupted_says_nothing_of_predictions(start_cluster):
    learned = Learned(Expected(ttft_s=1e9, tpot_s=1e9, transfer_s=1e9))
    cluster = await start_cluster(policy=learned)
    await cluster.add(DECODE, "d1")
    cluster.decode.hold(Hold.DECODE)
    asking = asyncio.create_task(complete(cluster))
    await cluster.decode.waiting_at(Hold.DECODE)
    (live,) = cluster.router.dispatcher.live
    await cluster.until(lambda: len(live.record.token_ids) == 2)
    cluster.decode.break_stream()
    await asking
    assert cluster.sample("prelay_prediction_error_ratio_count", what="ttft") == 2  # of each placement
    assert cluster.sample("prelay_prediction_error_ratio_count", what="tpot") == 0


async def test_who_predicts_nothing_is_not_judged(cluster):
    await complete(cluster)
    assert cluster.sample("prelay_prediction_error_ratio_count", what="ttft") == 0


async def test_metrics_of_the_router_as_a_whole(start_cluster):
    cluster = await start_cluster(
        slo_classes={"default": SloClass(30.0, 30.0), "batch": SloClass(60.0, 0.5)}, max_gated_requests=5
    )
    assert cluster.sample("prelay_slo_limit_seconds", slo_class="batch", limit="ttft") == 60.0
    assert cluster.sample("prelay_slo_limit_seconds", slo_class="batch", limit="tpot") == 0.5
    await complete(cluster)
    assert cluster.sample("prelay_tokens_total") == 5
    assert cluster.router.workers.remove("d0", 1)
    cluster.decode = await cluster.add(DECODE, "d1", num_blocks=4)
    cluster.decode.hold(Hold.DECODE)
    first = asyncio.create_task(complete(cluster))
    await cluster.decode.waiting_at(Hold.DECODE)
    second = asyncio.create_task(complete(cluster))
    await cluster.until(lambda: cluster.sample("prelay_gated_requests") == 1)
    cluster.decode.let_go(Hold.DECODE)
    await asyncio.gather(first, second)
    assert cluster.sample("prelay_gated_requests") == 0


async def test_they_are_on_the_metrics_port(cluster):
    async with aiohttp.ClientSession(f"http://{cluster.addresses.metrics}") as http:
        text = await (await http.get("/metrics")).text()
    for line in (
        'prelay_placement_total{kind="deflected"} 0.0',
        'prelay_admission_total{decision="rejected",reason="late"} 0.0',
        'prelay_admission_total{decision="rejected",reason="slo_impossible"} 0.0',
        'prelay_admission_total{decision="downgraded",reason="late"} 0.0',
        "prelay_could_have_served_total 0.0",
        "prelay_gated_requests 0.0",
        "prelay_prefix_index_blocks 0.0",
        "prelay_tokens_total 0.0",
    ):
        assert line in text
