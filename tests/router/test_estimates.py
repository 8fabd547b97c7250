"""What is expected of a placement, against the formulas written out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from engine.latency import LatencyModel, StepShape
from engine.prefix_digests import prefix_digests, short
from engine.sequence import RequestKey
from router.estimates import MIN_CHUNK, PROMPTS_BESIDE, Estimates
from router.lengths import OutputLengths
from router.pair_table import Pair
from router.placement.base import Decision, Kind
from router.pool_view import Load, PoolView, Role, WorkerCapacity, WorkerView
from router.prefix_index import PrefixIndex
from router.slo import Slo, SloLimits

STEP, ROW, ATTENTION, CONTEXT = 0.004, 1e-4, 2e-8, 1e-6
MODEL = LatencyModel.from_coefficients(
    {"step": STEP, "rows": ROW, "prefill_attention": ATTENTION, "decode_context": CONTEXT}
)
CAPACITY = WorkerCapacity(16, 1000, 64, 256, "model")


def read_s(new, cached=0):
    """Of one chunk; longer prompts take several."""
    return STEP + ROW * new + ATTENTION * new * (cached + new / 2)


def decode_s(batch, context):
    return STEP + ROW * batch + CONTEXT * context


class Scene:
    """One worker of each role; all that this router knows of them."""

    def __init__(self, model=MODEL):
        self.pool = PoolView()
        for name, role in (("p", Role.PREFILL), ("d", Role.DECODE), ("m", Role.MIXED)):
            self.pool.add(WorkerView(name, 1, role, CAPACITY, model))
        self.p, self.d, self.m = (self.pool[name] for name in "pdm")
        self.prefixes = PrefixIndex(self.pool)
        self.lengths = OutputLengths()
        self.estimates = Estimates(self.pool, self.prefixes, self.lengths)

    def place(self, request, now=0.0, prefill="p", decode="d"):
        kind = Kind.LOCAL if prefill is None else Kind.DISAGGREGATED
        key = RequestKey(request.request_id, 1)
        self.estimates.credit(key, request, Decision(kind, prefill, decode), now)
        return key

    def hold(self, worker_id, request, num_blocks):
        digests = prefix_digests("model", "", 16, request.prompt_token_ids)[:num_blocks]
        self.prefixes.stored(worker_id, map(short, digests))


@pytest.fixture
def scene():
    return Scene()


def limits(request, ttft_s=1.0, tpot_s=0.1, priority=0):
    return replace(request, slo=Slo("default", SloLimits(ttft_s, tpot_s), priority))


def test_an_idle_prefill_worker_reads_at_once(scene, make_request):
    estimate = scene.estimates.prefill(scene.p, make_request(prompt_tokens=200), 5.0)
    assert estimate.wait_s == 0.0
    assert estimate.ttft_s == pytest.approx(read_s(200))
    assert (estimate.cached_tokens, estimate.spare_s) == (0, math.inf)


def test_a_long_prompt_is_read_in_steps(scene, make_request):
    estimate = scene.estimates.prefill(scene.p, make_request(prompt_tokens=700), 0.0)
    assert estimate.compute_s == pytest.approx(read_s(256) + read_s(256, 256) + read_s(188, 512))


def test_what_is_cached_is_not_read(scene, make_request):
    request = make_request(prompt_tokens=200)
    scene.hold("p", request, 10)
    estimate = scene.estimates.prefill(scene.p, request, 0.0)
    assert estimate.cached_tokens == 160
    assert estimate.compute_s == pytest.approx(read_s(40, 160))
    # Only tokens that are computed have log-probabilities.
    scored = replace(request, sampling=replace(request.sampling, prompt_logprobs=0))
    assert scene.estimates.prefill(scene.p, scored, 0.0).compute_s == pytest.approx(read_s(200))
    assert scene.estimates.cached_tokens(scene.p, scored) == 160


def test_prompts_wait_for_those_before_them(scene, make_request):
    one, other = (limits(make_request(name, 200), ttft_s) for name, ttft_s in (("a", 0.5), ("b", 0.9)))
    scene.place(one)
    scene.place(other)
    both_s = 2 * read_s(200)
    ask = scene.estimates.prefill
    assert ask(scene.p, limits(make_request(prompt_tokens=200), 2.0), 0.0).wait_s == pytest.approx(both_s)
    between = ask(scene.p, limits(make_request(prompt_tokens=200), 0.7), 0.0)
    assert between.wait_s == pytest.approx(read_s(200))
    assert between.spare_s == pytest.approx(0.9 - both_s)
    first = ask(scene.p, limits(make_request(prompt_tokens=200), 0.1), 0.0)
    assert first.wait_s == pytest.approx(read_s(256) / 2)  # what is left of the step under way
    assert first.spare_s == pytest.approx(0.5 - read_s(200))
    important = ask(scene.p, limits(make_request(prompt_tokens=200), 2.0, priority=1), 0.0)
    assert important.wait_s == first.wait_s
    goes_on = limits(make_request(prompt_tokens=190, arrived_at=-9.0), 0.1).going_on(range(10))
    assert ask(scene.p, goes_on, 0.0).wait_s == first.wait_s
    # Who is late already goes last.
    late = limits(make_request(prompt_tokens=200), read_s(200) / 2)
    assert ask(scene.p, late, 0.0).wait_s == pytest.approx(both_s)
    # Workers that are not told read in the order of arrival.
    fcfs = ask(scene.p, limits(make_request(prompt_tokens=200), 0.1), 0.0, told=False)
    assert (fcfs.wait_s, fcfs.spare_s) == (pytest.approx(both_s), math.inf)
    # Time passes.
    later = ask(scene.p, limits(make_request(prompt_tokens=200), 2.0), 0.01)
    assert later.wait_s == pytest.approx(both_s - 0.01)


def test_nobody_waits_for_who_is_late_already(scene, make_request):
    scene.place(limits(make_request("late", 256, arrived_at=-9.0), 1.0))
    scene.place(limits(make_request("late too", 256, arrived_at=-9.0), 1.0))
    request = limits(make_request(prompt_tokens=200), 1.0)
    estimate = scene.estimates.prefill(scene.p, request, 0.0)
    assert estimate.wait_s == pytest.approx(read_s(256) / 2)  # what is left of the step under way
    assert estimate.spare_s == math.inf


def test_steps_correct_what_is_expected(scene, make_request):
    request = make_request(prompt_tokens=200)
    for _ in range(400):
        for new in (100, 256):
            scene.p.observe(StepShape(((new, 0),)), 2 * read_s(new))
    assert scene.estimates.prefill(scene.p, request, 0.0).compute_s == pytest.approx(
        2 * read_s(200), rel=0.03
    )


def test_the_decode_batch_is_that_of_the_hand_off(scene, make_request):
    """Those that will have ended are gone, those that will have arrived are there."""
    for _ in range(50):
        scene.lengths.observe(make_request(), 20)
    (tokens, _, _) = scene.lengths.quantiles(make_request())
    ends = [scene.place(make_request(f"e{index}", 100)) for index in range(3)]
    for key in ends * 5:
        scene.p.release(key)
        scene.d.emitted(key, 1)
    comes = scene.place(make_request("c", 150), now=1.0)
    request = limits(make_request(prompt_tokens=300), tpot_s=0.05)
    mine = 300 + 1 + tokens // 2
    soon = scene.estimates.decode(scene.d, request, 0.0, 1.0)
    assert (soon.batch, soon.context) == (4, 3 * 105 + mine)
    assert soon.step_s == pytest.approx(decode_s(4, 315 + mine))
    assert (soon.limit_s, soon.is_feasible) == (0.05, True)
    step_s = decode_s(3, 315)
    later = scene.estimates.decode(scene.d, request, 10 * step_s, 1.0)
    assert (later.batch, later.context) == (5, 3 * 115 + 150 + mine)
    last = scene.estimates.decode(scene.d, request, 30 * step_s, 1.0)
    assert (last.batch, last.context) == (2, 150 + mine)
    scene.d.release(comes)
    assert scene.estimates.decode(scene.d, request, 30 * step_s, 1.0).batch == 1


def test_a_mixed_worker_keeps_room_for_the_prompts_that_it_reads_beside(scene, make_request):
    request = limits(make_request(), tpot_s=0.3)
    decode, mixed = (scene.estimates.decode(worker, request, 0.0, 0.0) for worker in (scene.d, scene.m))
    assert mixed.step_s == decode.step_s
    assert PROMPTS_BESIDE > 1
    assert mixed.limit_s == pytest.approx(decode.limit_s / PROMPTS_BESIDE)


def test_the_tightest_limit_counts(scene, make_request):
    decode = scene.estimates.decode
    request = limits(make_request(), tpot_s=0.3)
    assert decode(scene.d, request, 0.0, 0.0).limit_s == 0.3
    scene.place(limits(make_request("tight"), tpot_s=0.02))
    assert decode(scene.d, request, 0.0, 0.0).limit_s == 0.02
    tight = limits(make_request(), tpot_s=0.001)
    assert not decode(scene.d, tight, 0.0, 0.0).is_feasible
    # Of other routers' requests only the worker knows the limits.
    scene.d.snapshot(Load(0, 5, 0, 900, 1, 5, 500, 0.01), 0.0)
    assert decode(scene.d, request, 0.0, 0.0).limit_s == 0.01
    assert decode(scene.d, request, 0.0, 0.0).batch == 6
    # What no step can do anyway is no limit for others.
    scene.d.snapshot(Load(0, 5, 0, 900, 2, 5, 500, STEP / 2), 0.0)
    assert decode(scene.d, request, 0.0, 0.0).limit_s == 0.02


def test_an_idle_mixed_worker_reads_as_a_prefill_worker_does(scene, make_request):
    estimate = scene.estimates.local(scene.m, make_request(prompt_tokens=700), 0.0)
    assert estimate.ttft_s == pytest.approx(read_s(256) + read_s(256, 256) + read_s(188, 512))
    assert estimate.slack_tokens == 256
    assert estimate.step_s == pytest.approx(estimate.compute_s / 3)


def decoding(scene, make_request, count, tpot_s, context=100):
    for index in range(count):
        key = scene.place(
            limits(make_request(f"d{index}", context - 2), 9.0, tpot_s), prefill=None, decode="m"
        )
        scene.m.emitted(key, 1)
        scene.m.emitted(key, 1)


def test_a_mixed_worker_reads_what_its_steps_have_room_for(scene, make_request):
    decoding(scene, make_request, 4, tpot_s=0.01)
    request = make_request(prompt_tokens=100)
    estimate = scene.estimates.local(scene.m, request, 0.0)
    chunk = estimate.slack_tokens
    room = (0.01 - decode_s(4, 400)) / ROW
    assert room * 0.93 - 1 <= chunk <= room
    steps = -(-100 // chunk)
    assert estimate.compute_s == pytest.approx(steps * decode_s(4, 400) + ROW * 100, rel=0.01)
    assert estimate.wait_s == pytest.approx(decode_s(4, 400) / 2)  # what is left of the step under way
    # Who is not told of limits reads as much as a step takes.
    at_once = scene.estimates.local(scene.m, request, 0.0, told=False)
    assert at_once.compute_s == pytest.approx(decode_s(4, 400) + ROW * 100, rel=0.01)


def test_a_mixed_worker_spends_what_its_answers_are_ahead(scene, make_request):
    decoding(scene, make_request, 4, tpot_s=0.01)
    request = make_request(prompt_tokens=200)

    snapshots = itertools.count(1)

    def estimate(ahead_s):
        scene.m.snapshot(Load(9, 4, 0, 900, next(snapshots), 4, 400, 0.01, ahead_s), 0.0)
        return scene.estimates.local(scene.m, request, 0.0)

    nothing, something, plenty = (estimate(ahead_s) for ahead_s in (0.0, 100 * ROW, 1000 * ROW))
    assert nothing.compute_s > something.compute_s > plenty.compute_s
    at_once = scene.estimates.local(scene.m, request, 0.0, told=False)
    assert plenty.compute_s == pytest.approx(at_once.compute_s)
    assert plenty.slack_tokens == nothing.slack_tokens, "which is what each step has room for"
    # Whose prompt goes before it has spent that.
    scene.place(limits(make_request("before", 100), 9.0, 1.0), prefill=None, decode="m")
    assert estimate(1000 * ROW).compute_s == pytest.approx(nothing.compute_s, rel=0.01)


def test_without_room_prompts_progress_a_little(scene, make_request):
    decoding(scene, make_request, 4, tpot_s=0.0045)
    estimate = scene.estimates.local(scene.m, make_request(prompt_tokens=40), 0.0)
    assert estimate.slack_tokens == 0
    assert estimate.compute_s == pytest.approx(40 / MIN_CHUNK * decode_s(4, 400) + ROW * 40, rel=0.01)


def test_a_mixed_workers_prompt_is_read_and_then_written_there(scene, make_request):
    request = make_request(prompt_tokens=100, max_tokens=10)
    key = scene.place(request, prefill=None, decode="m")
    assert scene.m.outstanding_tokens == 100
    assert scene.estimates.local(scene.m, make_request("b"), 0.0).wait_s == pytest.approx(read_s(100))
    assert scene.m.free_blocks == 1000 - CAPACITY.reserved_blocks(100, 10)
    assert scene.estimates.decode(scene.m, make_request("b"), 1.0, 0.0).batch == 2
    scene.m.emitted(key, 1)
    assert scene.m.outstanding_tokens == 0
    assert scene.estimates.local(scene.m, make_request("b"), 0.0).wait_s == pytest.approx(
        decode_s(1, 101) / 2
    )
    scene.m.release(key)
    assert scene.estimates.local(scene.m, make_request("b"), 0.0).wait_s == 0.0
    assert scene.m.live_requests == 0


def test_what_is_placed_counts_before_any_snapshot(scene, make_request):
    """A herd would need a worker that looks idle to each of them."""
    request = make_request(prompt_tokens=200)
    for index in range(5):
        assert scene.estimates.prefill(scene.p, request, 0.0).wait_s == pytest.approx(index * read_s(200))
        assert scene.estimates.decode(scene.d, request, 1.0, 0.0).batch == index + 1
        scene.place(make_request(f"r{index}", 200))
        # A snapshot of a worker that has not heard of it changes nothing.
        scene.p.snapshot(Load(0, 0, 0, 1000), 0.0)
        scene.d.snapshot(Load(0, 0, 0, 1000), 0.0)


def test_a_request_joins_when_it_is_read_and_has_travelled(scene, make_request):
    scene.hold("d", make_request(prompt_tokens=160), 5)
    for tokens in (10, 80, 160):
        scene.estimates.transfers.observe(Pair("p", "d"), tokens, tokens / 160)
    scene.place(make_request("r", 160), now=2.0)
    joins_at = 2.0 + read_s(160) + scene.estimates.transfer_s(scene.p, scene.d, 80)
    ask = scene.estimates.decode
    assert ask(scene.d, make_request("b"), joins_at - 2.0 - 1e-6, 2.0).batch == 1
    assert ask(scene.d, make_request("b"), joins_at - 2.0 + 1e-6, 2.0).batch == 2


def test_what_transfers_take_is_learned(scene):
    assert scene.estimates.transfer_s(scene.p, scene.d, 100) == 0.0
    scene.estimates.transfers.observe(Pair("p", "d"), 100, 0.02)
    assert scene.estimates.transfer_s(scene.p, scene.d, 100) == pytest.approx(0.02)


def test_the_best_that_an_idle_cluster_can_do(scene, make_request):
    request = make_request(prompt_tokens=300)
    expected = read_s(256) + read_s(44, 256), decode_s(1, 301)
    assert scene.estimates.idle(request) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    decoding(scene, make_request, 30, tpot_s=0.01)
    assert scene.estimates.idle(request) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert scene.estimates.read_s(request) == pytest.approx(expected[0])
    # The fastest of each role.
    fast = LatencyModel.from_coefficients({"step": STEP / 2, "rows": ROW / 2})
    scene.pool.add(WorkerView("fast", 1, Role.PREFILL, CAPACITY, fast))
    assert scene.estimates.read_s(request) == pytest.approx(STEP + ROW * 150)
    scene.pool["fast"].up = False
    assert scene.estimates.read_s(request) == pytest.approx(expected[0])


def test_without_a_word_of_their_steps_workers_take_no_time(make_request):
    scene, request = Scene(model=None), make_request(prompt_tokens=300)
    assert scene.estimates.idle(request) is None
    assert scene.estimates.read_s(request) == 0.0
    scene.place(make_request("a", 200))
    assert scene.estimates.prefill(scene.p, request, 0.0).ttft_s == 0.0
    assert scene.estimates.local(scene.m, request, 0.0).ttft_s == 0.0
    estimate = scene.estimates.decode(scene.d, request, 1.0, 0.0)
    assert (estimate.batch, estimate.step_s, estimate.is_feasible) == (2, 0.0, True)
