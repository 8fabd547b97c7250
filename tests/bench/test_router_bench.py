"""`prelay bench router`: tokens that say when they were sent, what is carried, a small run of it all."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prelay.v1 import worker_pb2

from bench.router import Point, climb, notes
from bench.router_clients import Crowd, EventReader
from bench.router_decisions import BusyCluster, measure
from bench.router_stamp import (
    EOS,
    NUM_STAMPS,
    VOCAB_SIZE,
    age_of_token,
    ages_in_text,
    token_of,
    write_checkpoint,
)
from bench.router_workers import LeanWorker, worker_info
from engine.config import ModelConfig
from engine.tokenizer import Tokenizer

MANY = 200  # points after which a climb is taken to have no end


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path)
    assert ModelConfig.from_pretrained(path).vocab_size == VOCAB_SIZE
    return Tokenizer.from_pretrained(path)


@given(sent=st.lists(st.integers(0, 10**12), min_size=1, max_size=8), late=st.integers(0, NUM_STAMPS // 2))
def test_a_token_says_when_it_was_sent_as_an_id_and_as_text(tokenizer, sent, late):
    now = max(sent) + late
    ids = [token_of(ticks) for ticks in sent]
    assert all(EOS < token_id < VOCAB_SIZE for token_id in ids)
    ages = [(now - ticks) % NUM_STAMPS for ticks in sent]
    assert [age_of_token(token_id, now) for token_id in ids] == ages
    detokenizer = tokenizer.detokenizer()
    text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    event = (
        'data: {"id":"cmpl-1","choices":[{"text":"'
        + text
        + '","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
    )
    assert ages_in_text(event.encode(), now) == ages


def piece(*tokens, last=False):
    """A chunk of an HTTP answer with one event."""
    text = "".join(f" {word}" for word in tokens)
    data = f'data: {{"choices":[{{"text":"{text}"}}]}}\n\n' + ("data: [DONE]\n\n" if last else "")
    return f"{len(data):x}\r\n{data}\r\n" + ("0\r\n\r\n" if last else "")


HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nDate: Sat, 21 Nov 2026\r\n\r\n"


@pytest.mark.parametrize("cut", [1, 7, 1000])
async def test_a_reader_counts_tokens_however_the_socket_cuts_them(cut):
    crowd = Crowd("", "", "")
    reader = EventReader(crowd)
    answer = (HEAD + piece("aab") + piece("aac", "aad") + piece("aae", last=True)).encode()
    for turn in (1, 2):  # the connection is used again
        done = reader.expect()
        for start in range(0, len(answer), cut):
            assert not done.done()
            reader.data_received(answer[start : start + cut])
        assert done.done()
        assert len(crowd.counters.ages) == 4 * turn


async def test_a_reader_does_not_take_a_refusal_for_an_answer():
    reader = EventReader(Crowd("", "", ""))
    done = reader.expect()
    reader.data_received(b'HTTP/1.1 429 Too Many Requests\r\n\r\n{"error":{"message":"later"}}')
    with pytest.raises(RuntimeError, match="429 Too Many"):
        await done


async def test_a_reader_says_when_it_is_cut_off():
    reader = EventReader(Crowd("", "", ""))
    done = reader.expect()
    reader.connection_lost(None)
    with pytest.raises(EOFError):
        await done


def point(sent, arrived, router=0.5, others=0.5):
    return Point(sent, arrived, 0.0, 1.0, 1.0, 2.0, router, others)


@pytest.mark.parametrize("capacity", [100.0, 5_000.0, 60_000.0])
@pytest.mark.parametrize("first", [200.0, 5_000.0, 90_000.0])
def test_a_climb_ends_near_what_is_carried(capacity, first):
    points = []

    def at(rate):
        points.append(point(rate, min(rate, capacity)))
        assert len(points) < MANY
        return points[-1]

    found = climb(at, first)
    best = max(one.tokens_s for one in found if one.is_carried)
    assert capacity / 1.35 < best <= capacity
    assert found == points


def test_a_climb_ends_where_the_workers_send_no_faster():
    count = 0

    def at(rate):
        nonlocal count
        count += 1
        assert count < MANY
        sent = min(rate, 10_000.0 - count)
        return point(sent, sent)

    assert climb(at, 4_000.0)[-1].sent_s < 10_000.0


def test_a_climb_ends_where_nothing_is_carried():
    assert not any(one.is_carried for one in climb(lambda rate: point(rate, 0.0), 4_000.0))


def test_notes_say_whose_limit_it_was():
    assert notes({"grpc": [point(1, 1, router=1.0, others=0.95)]}) == []
    assert "carries more" in notes({"grpc": [point(1, 1, router=0.6, others=0.95)]})[0]
    assert "quiet machine" in notes({"http": [point(1, 1, router=0.6, others=0.3)]})[0]


def test_decisions_are_timed_and_made():
    times = measure(10, 30, seed=1)
    assert 0 < times.decision_p50 <= times.decision_p99
    assert times.decision_p50 < times.turn_p50


async def test_the_busy_cluster_is_busy():
    cluster = BusyCluster(20, random.Random(0))
    for _ in range(400):
        cluster.submit(cluster.next_request())
        cluster.go_on()
        await asyncio.sleep(0)
    view = cluster.pool
    waiting = sum(len(worker.reading) for worker in view if worker.role.reads)
    writing = sum(worker.live_requests for worker in view if worker.role.writes)
    cluster.close()
    assert 2 <= waiting <= 40
    assert 0.5 * cluster.most_live <= writing <= 1.1 * cluster.most_live


async def test_a_lean_worker_sends_one_message_a_step():
    workers: dict[str, LeanWorker] = {}
    prefill = LeanWorker(worker_info(worker_pb2.ROLE_PREFILL, 0), workers)
    decode = LeanWorker(worker_info(worker_pb2.ROLE_DECODE, 0), workers)
    decode.info.address = "d"
    workers["d"] = decode
    sampling = worker_pb2.TokenSampling(max_tokens=3)
    for name in ("a", "b"):
        decode.take(
            worker_pb2.RouterMessage(
                reserve=worker_pb2.Reserve(request_id=name, attempt=1, sampling=sampling)
            )
        )
        prefill.take(
            worker_pb2.RouterMessage(
                prefill=worker_pb2.Prefill(
                    request_id=name, attempt=1, sampling=sampling, decode=worker_pb2.PeerRef(address="d")
                )
            )
        )
    assert [message.WhichOneof("message") for message in decode.unsent()] == ["reserved", "reserved"]
    (first,) = prefill.unsent()
    assert [(one.request_id, one.first_index) for one in first.step.sequences] == [("a", 0), ("b", 0)]
    decode.take(worker_pb2.RouterMessage(pause=worker_pb2.Pause(request_id="b", attempt=1)))
    decode.step()
    decode.take(worker_pb2.RouterMessage(resume=worker_pb2.Resume(request_id="b", attempt=1)))
    decode.step()
    decode.step()
    decode.step()
    said = [
        [
            (one.request_id, one.first_index, one.HasField("times"), one.stop_reason)
            for one in message.step.sequences
        ]
        for message in decode.unsent()
    ]
    goes_on, ends = worker_pb2.STOP_REASON_UNSPECIFIED, worker_pb2.STOP_REASON_LENGTH
    assert said == [
        [("a", 1, True, goes_on)],
        [("a", 2, False, ends), ("b", 1, True, goes_on)],
        [("b", 2, False, ends)],
    ]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench", "router", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workers", "1"], "numbers of at least 2"),
        (["--workers", "ten"], "numbers of at least 2"),
        (["--rounds", "0"], "--rounds"),
        (["--streams", "0"], "--streams"),
        (["--plot", "/nowhere/x.png"], "there is no directory"),
    ],
)
def test_wrong_command_lines_are_told_in_one_line(arguments, said):
    ran = run(*arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="it needs two cores")
def test_a_small_run_gives_the_figures_and_a_picture(tmp_path: Path):
    plot = tmp_path / "router.png"
    ran = run(
        *("--rounds", "1", "--seconds", "0.3", "--streams", "8", "--answer", "32"),
        *("--workers", "10,20", "--decisions", "20", "--json", "--plot", str(plot)),
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["requests_s"] > 0
    assert set(result["tokens_s"]) == {"grpc", "http"}
    assert min(result["tokens_s"].values()) >= 0
    assert 0 < result["added_ms"]["p50"] <= result["added_ms"]["p99"]
    assert set(result["decision_ms_p99"]) == {"10", "20"}
    assert plot.stat().st_size > 1000
