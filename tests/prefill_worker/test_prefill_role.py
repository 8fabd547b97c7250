"""The prefill role event by event, without thread, stream or link, under a clock that a test moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from prelay.v1 import transfer_pb2, worker_pb2
from prometheus_client import CollectorRegistry

from engine.block_changes import BlockChanges
from engine.block_pool import BlockPool
from engine.fake import FakeRunner
from engine.latency import LatencyModel, OnlineLatency, StepShape
from engine.metrics import WorkerMetrics
from engine.prefix_cache import PrefixCache
from engine.prefix_digests import prefix_digests, short
from engine.router_messages import Command, Owner, RouterBatch
from engine.sequence import ScheduledChunk
from engine.step_log import Step
from prefill_worker.loop import PrefillOutput, PrefillRole
from transfer.handoff import Peer, SendComplete, SendOffer, SendWithdraw
from transfer.link import FromPuller, LinkUp
from transfer.metrics import LeaseMetrics

OWNER = Owner(1, "router")
DECODE = Peer("decode-0", 3)
VOCAB_SIZE = 100
NUM_BLOCKS = 16


class Bench:
    """A role, and what it said. step_s: how long a step takes by the clock."""

    def __init__(self, linked: bool = True, step_s: float = 1.0) -> None:
        self.now = 0.0
        self.during_step: Callable[[], None] = lambda: None
        self.commands = 0
        generations = [0] * NUM_BLOCKS
        memory = np.zeros((NUM_BLOCKS, 64), dtype=np.uint8)
        self.registry = CollectorRegistry()
        self.latency = OnlineLatency(LatencyModel({"step": 0.5}))
        self.batches: list[RouterBatch] = []

        pool = BlockPool(NUM_BLOCKS, 4, generations)

        def before_step(chunks: Sequence[ScheduledChunk]) -> None:
            self.during_step()
            self.now += step_s

        self.role = PrefillRole(
            FakeRunner(memory, 4, before_step),
            pool,
            PrefixCache(pool, "model"),
            generations,
            num_layers=1,
            max_batch_tokens=16,
            max_model_len=50,
            vocab_size=VOCAB_SIZE,
            lease_s=0.4,
            latency=self.latency,
            clock=lambda: self.now,
            metrics=WorkerMetrics(self.registry, "prefill"),
            leases=LeaseMetrics(self.registry),
        )
        if linked:
            self.role.handle(LinkUp(1, DECODE, "memory"))

    def command(
        self, name: str, token_ids: Sequence[int], urgency: worker_pb2.Urgency | None = None
    ) -> Command:
        """A Prefill that arrives now."""
        self.commands += 1
        prefill = worker_pb2.Prefill(
            request_id=name,
            token_ids=token_ids,
            sampling=worker_pb2.TokenSampling(max_tokens=4),
            decode=worker_pb2.PeerRef(worker_id=DECODE.worker_id, epoch=DECODE.epoch),
            urgency=urgency,
        )
        return Command(OWNER, worker_pb2.RouterMessage(seq=self.commands, prefill=prefill), self.now)

    def step(self) -> tuple[list[worker_pb2.SequenceTokens], list[worker_pb2.Failed], list[PrefillOutput]]:
        """Tokens, failures, and what is for links."""
        self.role.step(lambda: None)
        outputs = self.role.take_outputs()
        self.batches += [output for output in outputs if isinstance(output, RouterBatch)]
        messages = [
            message
            for output in outputs
            if isinstance(output, RouterBatch)
            for message in output.messages.get(OWNER.stream, [])
        ]
        return (
            [sequence for message in messages for sequence in message.step.sequences],
            [message.failed for message in messages if message.HasField("failed")],
            [output for output in outputs if not isinstance(output, RouterBatch)],
        )


def test_the_wait_for_a_step_that_runs_is_part_of_the_queue() -> None:
    bench = Bench(step_s=5.0)
    late: list[Command] = []
    bench.during_step = lambda: late.append(bench.command("late", [4, 5, 6]))
    bench.role.handle(bench.command("first", [1, 2, 3]))
    (first,), _, _ = bench.step()
    assert (first.times.prefill_queue_s, first.times.prefill_s) == (0.0, 5.0)
    bench.during_step = lambda: None
    bench.role.handle(late[0])
    (second,), _, _ = bench.step()
    assert (second.times.prefill_queue_s, second.times.prefill_s) == (5.0, 5.0)


def test_renewals_that_arrive_during_a_step_count_from_then() -> None:
    """The step takes five leases."""
    bench = Bench(step_s=2.0)
    bench.role.handle(bench.command("offered", [1, 2, 3]))
    _, _, links = bench.step()
    assert [type(output) for output in links] == [SendOffer, SendComplete]
    key = transfer_pb2.HandoffKey(request_id="router/offered")
    renew = transfer_pb2.PullerMessage(renew=transfer_pb2.Renew(keys=[key]))
    arrived: list[FromPuller] = []
    bench.during_step = lambda: arrived.extend(FromPuller(1, renew, bench.now + 0.1 * i) for i in range(20))
    bench.role.handle(bench.command("in the step", [4, 5, 6]))
    bench.step()
    for event in arrived:
        bench.role.handle(event)
    assert bench.step() == ([], [], [])
    assert bench.registry.get_sample_value("prelay_lease_expirations_total") == 0
    assert bench.registry.get_sample_value("prelay_leases", {"state": "offered"}) == 2


def test_a_token_id_that_the_model_does_not_have_fails_its_own_request_only() -> None:
    bench = Bench()
    bench.role.handle(bench.command("good", [1, 2, VOCAB_SIZE - 1]))
    bench.role.handle(bench.command("bad", [1, VOCAB_SIZE, 2]))
    bench.role.handle(bench.command("good too", [3]))
    tokens, (failed,), links = bench.step()
    assert [sequence.request_id for sequence in tokens] == ["good", "good too"]
    assert (failed.request_id, failed.reason) == ("bad", worker_pb2.FAILURE_REASON_INVALID)
    assert failed.message == "token id 100 in the prompt: the model's ids are below 100"
    # The decode worker, which has set blocks aside, is told.
    assert [output.key.request_id for output in links if isinstance(output, SendWithdraw)] == ["router/bad"]


def test_a_prompt_that_is_here_twice_leaves_the_first_promise_alone() -> None:
    bench = Bench()
    bench.role.handle(bench.command("a", [1, 2]))
    bench.role.handle(bench.command("a", [1, 2]))
    tokens, (failed,), links = bench.step()
    assert failed.reason == worker_pb2.FAILURE_REASON_INVALID
    assert len(tokens) == 1
    assert [type(output) for output in links] == [SendOffer, SendComplete]


def test_without_a_link_the_router_hears_of_that_and_of_no_token() -> None:
    bench = Bench(linked=False)
    bench.role.handle(bench.command("a", [1, 2, 3]))
    tokens, (failed,), links = bench.step()
    assert (tokens, links) == ([], [])
    assert (failed.request_id, failed.reason) == ("a", worker_pb2.FAILURE_REASON_PEER_UNREACHABLE)
    bench.role.check()
    assert bench.registry.get_sample_value("prelay_kv_blocks", {"state": "free"}) == NUM_BLOCKS


def test_the_urgent_overtake_who_came_before_them() -> None:
    bench = Bench(step_s=0.1)
    urgencies = {"relaxed": 60.0, "urgent": 2.0, "late": -1.0}
    for number, (name, left_s) in enumerate(urgencies.items()):
        urgency = worker_pb2.Urgency(ttft_left_s=left_s)
        bench.role.handle(bench.command(name, [number] * 16, urgency))
    done = [sequence.request_id for _ in range(3) for sequence in bench.step()[0]]
    assert done == ["urgent", "relaxed", "late"]


def test_routers_learn_what_a_step_took_and_what_it_left_in_the_cache() -> None:
    bench = Bench(step_s=2.0)
    bench.role.handle(bench.command("a", [1, 2, 3, 4, 5, 6]))
    bench.role.handle(bench.command("b", [9]))
    bench.step()
    (batch,) = bench.batches
    assert list(batch.steps) == [Step(StepShape(((6, 0), (1, 0))), 2.0)]
    first_block = prefix_digests("model", "", 4, [1, 2, 3, 4])
    assert batch.blocks == BlockChanges(tuple(map(short, first_block)))
    assert bench.latency.expect_s(StepShape(((1, 0),))) > 0.5, "it learns, too"
    bench.role.handle(bench.command("c", [1, 2, 3, 4, 7]))
    bench.step()
    assert list(bench.batches[1].steps) == [Step(StepShape(((1, 4),)), 2.0)]
    assert not bench.batches[1].blocks
