"""Gate and admission of the goodput policy in a model: readers as servers, prompts as jobs, no real time.

Each reader computes one prompt at a time and has one staged. Prompts come at random, at a rate that is a
multiple of what the readers can do. Their lengths are such that the few long ones are a third of the work.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, deque
from dataclasses import dataclass

import pytest

from engine.sequence import TokenSampling
from router.admission.base import Refusal
from router.admission.goodput import GoodputAdmission
from router.admission.structural import StructuralAdmission
from router.estimates import DecodeEstimate, PrefillEstimate
from router.gate.fairness import length_bin
from router.gate.fcfs import FcfsGateQueue
from router.gate.goodput import GoodputGateQueue
from router.gate.readers import Readers
from router.pair_table import LinkState, Pair, PairLink
from router.pool_view import PoolView, Role, WorkerCapacity, WorkerView
from router.prefix_index import PrefixIndex
from router.requests import Request
from router.slo import Slo, SloLimits

TOKEN_S = 1e-4
LIMITS = SloLimits(ttft_s=3.0, tpot_s=0.1)
SAMPLING = TokenSampling(
    temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=1, min_tokens=0, stop_token_ids=frozenset()
)
LENGTHS = ((100, 512, 0.5), (512, 2048, 0.3), (2048, 8192, 0.15), (8192, 14000, 0.05))
PROMPT = tuple(range(14000))


def draw_tokens(rng):
    low, high, _ = rng.choices(LENGTHS, [share for _, _, share in LENGTHS])[0]
    return rng.randrange(low, high)


MEAN_S = TOKEN_S * sum((low + high) / 2 * share for low, high, share in LENGTHS)


@dataclass
class Reader:
    view: WorkerView
    jobs: deque  # (request, when its reading ends)

    def busy_until(self, now):
        return self.jobs[-1][1] if self.jobs else now


class ModelEstimates:
    """Predictions that are off by a factor."""

    only_read = True

    def __init__(self, readers, bias):
        self.readers, self.bias = readers, bias

    def read_s(self, request):
        return self.bias * TOKEN_S * request.num_tokens

    def prefill(self, worker, request, now):
        wait_s = max(0.0, self.readers[worker.worker_id].busy_until(now) - now)
        return PrefillEstimate(self.bias * wait_s, self.read_s(request), 0)

    def idle(self, request):
        return self.read_s(request), 0.01

    def decode(self, worker, request, in_s, now):
        return DecodeEstimate(0.01, 0.1, 1, request.num_tokens)

    def outgrows(self, worker, request):
        return False


class Model:
    """Runs arrivals through gate, admission and readers."""

    def __init__(self, policy, num_readers=1, bias=1.0, max_gated_requests=1024):
        pool = PoolView()
        pool.add(WorkerView("d", 1, Role.DECODE, WorkerCapacity(16, 10**6, 100, 2048)))
        self.readers = {}
        for index in range(num_readers):
            view = WorkerView(f"p{index}", 1, Role.PREFILL, WorkerCapacity(16, 10**6, 0, 2048))
            pool.add(view)
            pool.pairs.put(Pair(view.worker_id, "d"), PairLink(LinkState.LINKED))
            self.readers[view.worker_id] = Reader(view, deque())
        estimates = ModelEstimates(self.readers, bias)
        if policy == "goodput":
            self.gate = GoodputGateQueue(Readers(pool, estimates, PrefixIndex(pool)))
            self.admission = GoodputAdmission(pool, self.gate, estimates, max_gated_requests, 1.0)
        else:
            self.gate = FcfsGateQueue()
            self.admission = StructuralAdmission(pool, self.gate, 10**6, 1.0)
        self.done = {}  # request id: time to first token
        self.refused = []
        self.in_vain = 0

    def run(self, arrivals):
        events = [(request.arrived_at, index, request) for index, request in enumerate(arrivals)]
        heapq.heapify(events)
        number = len(events)
        while events:
            now, _, event = heapq.heappop(events)
            if isinstance(event, Reader):
                request, _ = event.jobs.popleft()
                self.done[request.request_id] = now - request.arrived_at
            else:
                verdict = self.admission.judge(event, now, 0, overdue=False)
                if isinstance(verdict, Refusal):
                    self.refused.append(event)
                else:
                    self.gate.add(verdict)
            while placed := self.place(now):
                number += 1
                heapq.heappush(events, (placed.busy_until(now), number, placed))
            self.in_vain += self.admission.could_have_served(now)
        assert len(self.gate) == 0
        return self

    def place(self, now):
        free = [one for one in self.readers.values() if len(one.jobs) < 2]
        for request in self.gate.next(now):
            if free:
                reader = min(free, key=lambda one: one.busy_until(now))
                self.gate.placed(request.request_id)
                reader.jobs.append((request, reader.busy_until(now) + TOKEN_S * request.num_tokens))
                return reader
        return None


def poisson(load, duration_s, num_readers=1, seed=0, start=0.0, tenant="", draw=draw_tokens):
    """load: multiple of what the readers can do of the usual lengths."""
    rng = random.Random(seed)
    now, requests = start, []
    while (now := now + rng.expovariate(load * num_readers / MEAN_S)) < start + duration_s:
        name, prompt = f"{tenant}{start}-{len(requests)}", PROMPT[: draw(rng)]
        requests.append(Request(name, prompt, SAMPLING, (), Slo("default", LIMITS), tenant, now, now + 600))
    return requests


class Result:
    """What became of requests. work_share: time that readers spent on those in time, of `duration_s`."""

    def __init__(self, model, requests, duration_s):
        good = [one for one in requests if model.done.get(one.request_id, math.inf) <= LIMITS.ttft_s]
        self.goodput = len(good) / duration_s
        self.attainment = len(good) / len(requests)
        work_s = sum(TOKEN_S * one.num_tokens for one in good)
        self.work_share = work_s / duration_s / len(model.readers)
        self._good = Counter(length_bin(one.num_tokens) for one in good)
        self._sent = Counter(length_bin(one.num_tokens) for one in requests)

    def of_bin(self, length):
        return self._good[length] / self._sent[length]


def run(policy, load, num_readers=1, bias=1.0, seed=1):
    duration_s = 150 if num_readers == 1 else 60
    arrivals = poisson(load, duration_s, num_readers, seed)
    model = Model(policy, num_readers, bias).run(arrivals)
    return model, Result(model, arrivals, duration_s)


@pytest.fixture(scope="module")
def peak():
    """By the number of readers: the goodput at the highest load that is no overload, and the share of their
    time that they then spend on requests in time."""
    found = {}
    for num_readers in (1, 4):
        _, result = run("goodput", 1.0, num_readers)
        found[num_readers] = result.goodput, result.work_share
    return found


@pytest.mark.parametrize("load", [1.5, 3.0])
@pytest.mark.parametrize("num_readers", [1, 4])
def test_in_overload_goodput_stays_and_long_prompts_get_their_part(num_readers, load, peak):
    model, result = run("goodput", load, num_readers)
    goodput, work_share = peak[num_readers]
    assert result.goodput >= 0.9 * goodput
    assert result.work_share >= 0.9 * work_share
    assert result.of_bin(3) >= 0.7 * result.attainment
    assert model.in_vain <= 0.02 * len(model.refused)


def test_first_come_first_served_collapses_in_the_same_model(peak):
    assert run("fcfs", 0.7)[1].attainment > 0.99
    assert run("fcfs", 1.5)[1].goodput < 0.1 * peak[1][0]


def test_below_saturation_nobody_is_given_up():
    for policy in ("goodput", "fcfs"):
        model, result = run(policy, 0.7, num_readers=4)
        assert result.attainment > 0.995
        assert model.refused == []


@pytest.mark.parametrize("bias", [0.6, 1.6])
@pytest.mark.parametrize("num_readers", [1, 4])
def test_predictions_that_are_off_cost_little(num_readers, bias):
    _, right = run("goodput", 1.5, num_readers)
    _, biased = run("goodput", 1.5, num_readers, bias)
    assert biased.goodput >= 0.9 * right.goodput
    assert biased.of_bin(3) >= 0.7 * biased.attainment


def test_overload_leaves_no_trace_for_those_who_come_after_it():
    before = poisson(3.0, 60, seed=5)
    after = poisson(0.7, 60, seed=6, start=60.0)
    for policy, recovers in (("goodput", True), ("fcfs", False)):
        overloaded, rested = (Model(policy).run(arrivals) for arrivals in (before + after, after))
        normal = Result(rested, after, 60).attainment
        assert normal > 0.9
        assert (Result(overloaded, after, 60).attainment >= normal - 0.02) is recovers
        # Late ones are not forgotten: all that were let in have been served.
        assert len(overloaded.done) + len(overloaded.refused) == len(before + after)


def test_a_small_tenant_gets_what_it_asks_for_beside_one_that_asks_for_too_much():
    small = poisson(0.2, 100, seed=7, tenant="small")
    large = poisson(3.0, 100, seed=8, tenant="large")
    arrivals = sorted(small + large, key=lambda one: one.arrived_at)
    model = Model("goodput").run(arrivals)
    assert Result(model, small, 100).attainment > 0.9
    assert Result(model, large, 100).attainment < 0.5
    assert Result(model, arrivals, 100).work_share > 0.85


def test_a_gate_that_is_full_of_late_ones_lets_those_in_who_can_be_in_time():
    arrivals = poisson(3.0, 100, seed=9)
    model = Model("goodput", max_gated_requests=16).run(arrivals)
    assert Result(model, arrivals, 100).work_share > 0.85
