"""A real Prometheus watches a real deployment of the demo model, to which everything happens that dashboards
show: each outcome, refusals and downgrades, a killed worker of each role.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
import yaml
from prelay.v1 import inference_pb2, inference_pb2_grpc

from tests.deploy.live_prometheus import Prometheus, prometheus
from tests.faults.harness import SMALL_WINDOW

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is missing: install Debian's package"
    ),
]

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
WORKERS = ("prefill-0", "decode-0", "mixed-0")

CONFIG: dict[str, Any] = {
    "prefill": {"kv_cache_tokens": 4096},
    "decode": {"kv_cache_tokens": 4096},
    "mixed": {"replicas": 1, "kv_cache_tokens": 4096},
    "transfer": {"digest_share": 1.0},
    "router": {"stream_buffer_tokens": 32, "slow_reader_timeout_s": 2.0},
    "slo": {
        "default": "easy",
        "classes": {
            "easy": {"ttft_s": 100.0, "tpot_s": 50.0},
            # No cluster can keep these, so they are served as they come, and missed.
            "no_ttft": {"ttft_s": 1e-6, "tpot_s": 50.0},
            "no_tpot": {"ttft_s": 100.0, "tpot_s": 1e-9},
            "neither": {"ttft_s": 1e-6, "tpot_s": 1e-9},
            "crowded": {"ttft_s": 0.5, "tpot_s": 50.0, "downgrade_to": "easy"},
        },
    },
}

ZERO_WITHOUT = {
    "Leases that ended by themselves": "a peer that hangs for transfer.lease_s without being noticed",
    "Preemptions": "many answers that outgrow a worker's KV",
    "Suspected": "a worker that is silent for a while and comes back",
    "Failed hand-offs": "a worker that dies in the middle of one",
    "Failed hand-offs, share": "the same",
}
"""Panels that may show nothing but zeros, and what it would take for another value."""


@dataclass(frozen=True)
class Asked:
    """What a client saw of its request. slo_class: as what it was served; ttft_s: None without a token; told:
    the outcome in the router's words, for a complete answer."""

    slo_class: str
    ended: str
    ttft_s: float | None = None
    told: str = ""

    @property
    def is_good(self) -> bool:
        """By the client's own clock, but where that may be close."""
        limits: dict[str, float] = CONFIG["slo"]["classes"][self.slo_class]
        if self.ended != "complete" or self.ttft_s is None or self.slo_class == "crowded":
            return self.told == "good"
        return self.ttft_s <= limits["ttft_s"] and limits["tpot_s"] > 1


class Client:
    """Asks, and remembers what became of it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.first_prompts_again()
        self.asked: list[Asked] = []

    def first_prompts_again(self) -> None:
        self._rng = random.Random(5)

    async def ask(
        self,
        count: int,
        slo_class: str,
        *,
        tokens: int = 8,
        prompt: int = 60,
        allow_downgrade: bool = False,
        handed_off: asyncio.Semaphore | None = None,
    ) -> None:
        """So many requests at once, each for exactly so many tokens. handed_off: released by each answer that
        has more than the one token of its reader."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            wishes = [self._wish(slo_class, tokens, prompt, allow_downgrade) for _ in range(count)]
            self.asked += await asyncio.gather(*(self._one(stub, wish, handed_off) for wish in wishes))

    async def leave(self, count: int) -> None:
        """So many requests that are cancelled after their first token."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for _ in range(count):
                call = stub.Generate(self._wish("easy", 300, 40))
                await call.read()
                call.cancel()

    async def not_read(self, watcher: Prometheus) -> None:
        """A request whose answer nobody reads, until the router gives it up."""
        async with grpc.aio.insecure_channel(self._address, options=SMALL_WINDOW) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            wish = self._wish("easy", 900, 40)
            wish.sampling.logprobs = 20  # long messages
            call = stub.Generate(wish)
            await call.read()
            await watcher.until('sum(prelay_requests_total{outcome="error"}) > bool 0', 1)
            with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
                await rest_of(call)
            self.asked.append(Asked("easy", "slow_reader"))

    def attainment(self) -> dict[str, float]:
        """By class, in the eyes of the clients."""
        by_class = defaultdict(list)
        for asked in self.asked:
            by_class[asked.slo_class].append(asked.is_good)
        return {name: sum(good) / len(good) for name, good in by_class.items()}

    def _wish(
        self, slo_class: str, tokens: int, prompt: int, allow_downgrade: bool = False
    ) -> inference_pb2.GenerateRequest:
        return inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[self._rng.randrange(3, 2000) for _ in range(prompt)]),
            sampling=inference_pb2.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
            slo=inference_pb2.Slo(slo_class=slo_class, allow_downgrade=allow_downgrade),
        )

    async def _one(
        self,
        stub: inference_pb2_grpc.InferenceStub,
        wish: inference_pb2.GenerateRequest,
        handed_off: asyncio.Semaphore | None,
    ) -> Asked:
        clock = asyncio.get_running_loop().time
        sent_at = clock()
        ttft_s = None
        num_tokens = 0
        try:
            async for message in stub.Generate(wish):
                if handed_off is not None and num_tokens < 2 <= num_tokens + len(message.token_ids):
                    handed_off.release()
                num_tokens += len(message.token_ids)
                if message.token_ids and ttft_s is None:
                    ttft_s = clock() - sent_at
                if message.HasField("finish"):
                    details = message.finish.details
                    return Asked(details.slo_class, "complete", ttft_s, details.outcome)
        except grpc.aio.AioRpcError as error:
            return Asked(wish.slo.slo_class, error.code().name)
        return Asked(wish.slo.slo_class, "without an end")


@dataclass(frozen=True)
class Watched:
    """A deployment that has been through everything, and who watched it."""

    client: Client
    prometheus: Prometheus


@pytest.fixture(scope="module")
def deployment(
    start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    config = tmp_path_factory.mktemp("watched") / "prelay.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    return start_server(str(config)).ready()


@pytest.fixture(scope="module")
def watched(deployment: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with prometheus(tmp_path_factory.mktemp("prometheus"), deployment["metrics"]) as watcher:
        client = Client(deployment["grpc"])
        asyncio.run(everything_happens(client, watcher, deployment))
        yield Watched(client, watcher)


async def everything_happens(client: Client, watcher: Prometheus, deployment: dict[str, Any]) -> None:
    await watcher.until("sum(up)", 1 + len(WORKERS))
    await watcher.until("count(prelay_requests_total offset 1s) > bool 0", 1)  # the zeros have been seen
    await client.ask(8, "easy", prompt=300, tokens=30)
    client.first_prompts_again()
    await client.ask(8, "easy", prompt=300, tokens=30)
    for slo_class in ("no_ttft", "no_tpot", "neither"):
        await client.ask(40, slo_class)
    await client.ask(150, "crowded", prompt=400)
    await client.ask(150, "crowded", prompt=400, allow_downgrade=True)
    await client.leave(5)
    await client.not_read(watcher)
    pids = {worker["worker_id"]: worker["pid"] for worker in deployment["workers"]}
    for killed in (("decode-0", "mixed-0"), ("prefill-0",)):  # some of the answers are on one of those two
        handed_off = asyncio.Semaphore(0)
        streams = asyncio.create_task(client.ask(12, "easy", tokens=600, handed_off=handed_off))
        for _ in range(6):
            await handed_off.acquire()
        for worker in killed:
            os.kill(pids[worker], signal.SIGKILL)
        await streams
        await watcher.until("sum(prelay_worker_up)", len(WORKERS))
        await watcher.until("sum(up)", 1 + len(WORKERS))
    await client.ask(8, "easy", prompt=300)
    judged = len(client.asked)
    await watcher.until('sum(prelay_requests_total{outcome!="cancelled"})', judged)
    await asyncio.sleep(3)  # scraped and evaluated once more


async def rest_of(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def queries() -> Iterator[tuple[str, str]]:
    """The title of each panel and its queries, as they are when everything is chosen."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                query = re.sub(r"\$(slo_class|role|worker)\b", ".*", target["expr"])
                yield panel["title"], query.replace("$__rate_interval", "5m")


async def test_every_query_of_every_panel_returns_data(watched: Watched) -> None:
    empty, zero = [], defaultdict(list)
    for title, query in queries():
        values = [value for value in await watched.prometheus.shown(query) if math.isfinite(value)]
        if not values:
            empty.append((title, query))
        zero[title].append(not any(values))
    assert empty == []
    assert {title for title, all_zero in zero.items() if all(all_zero)} <= set(ZERO_WITHOUT)
    assert set(ZERO_WITHOUT) <= set(zero)


async def test_recorded_attainment_is_what_the_clients_measured(watched: Watched) -> None:
    found = {
        labels["slo_class"]: value
        for labels, value in await watched.prometheus.ask("slo_class:prelay_attainment:ratio_rate5m")
    }
    assert found == pytest.approx(watched.client.attainment())
    assert found["no_ttft"] == found["no_tpot"] == found["neither"] == 0
    assert 0 < found["easy"] < 1
    assert 0 < found["crowded"] < 1
    ended = {
        labels["outcome"] for labels, value in await watched.prometheus.ask("prelay_requests_total") if value
    }
    assert ended == {"good", "ttft_miss", "tpot_miss", "both_miss", "rejected", "error", "cancelled"}


async def test_what_is_watched_is_exported_and_what_is_exported_is_documented(watched: Watched) -> None:
    exported = set()
    for job in ("prelay-router", "prelay-worker"):
        names = await watched.prometheus.series_names(job)
        exported |= {name for name in names if name.startswith("prelay_")}
    text = "\n".join(query for _, query in queries())
    for path in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"):
        rules = [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
        text += "\n".join(rule["expr"] for rule in rules)
    used = set(re.findall(r"(?<![\w:])prelay_\w+(?![\w:])", text))
    assert used - exported == set()
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}
    documented = set(re.findall(r"`(prelay_\w+)", (ROOT / "docs" / "monitoring.md").read_text()))
    assert families - documented == set()
    assert documented - families == set()


async def test_alerts_on_what_happened_fire(watched: Watched) -> None:
    fired = {labels["alertname"] for labels, _ in await watched.prometheus.ask('ALERTS{alertstate="firing"}')}
    assert {"PrelayBudgetBurnsFast"} <= fired
    assert fired.isdisjoint(
        {"PrelayRouterGone", "PrelayNobodyReads", "PrelayNobodyWrites", "PrelayKvDamaged"}
    )
