"""Brings requests to a chosen stage of their life, all of them, and keeps them there until `let_go`."""

from __future__ import annotations

import asyncio
from enum import Enum

from tests.faults.harness import Ask, Cluster, mixed


class Stage(Enum):
    QUEUE = "queue"  # behind others, at the prefill workers or at the gate
    PREFILL = "prefill"  # half of the prompt is computed, and what there is has been offered
    HANDOFF = "handoff"  # the client has its first token, and the decode worker has not got all of the KV
    DECODE = "decode"


REQUESTS = 6
LONG = 300
"""Tokens of a prompt that takes several chunks."""


async def bring_to(cluster: Cluster, stage: Stage, max_tokens: int = 40) -> list[Ask]:
    """REQUESTS requests of every kind, half of them with each worker of a role."""
    match stage:
        case Stage.QUEUE:
            await cluster.tell("prefill", "hold")
            plugs = cluster.ask_all(
                [([index] * LONG, w) for index, (_, w) in enumerate(mixed(2, 1, max_tokens), 3)]
            )
            await _all_stand(cluster)
            return plugs + await _sent(cluster, mixed(REQUESTS - 2, 2, max_tokens), 2)
        case Stage.PREFILL:
            await cluster.tell("prefill", "hold")
            wishes = [(prompt * LONG, wanted) for prompt, wanted in mixed(REQUESTS, 3, max_tokens, longest=1)]
            asks = await _sent(cluster, wishes, 0)
            await _all_stand(cluster)
            await cluster.tell("prefill", "pass 1")
            await _all_stand(cluster)
            return asks
        case Stage.HANDOFF:
            await cluster.tell("prefill", "hold")
            asks = await _sent(cluster, mixed(REQUESTS, 4, max_tokens, longest=30), 0)
            await _all_stand(cluster)
            for worker in cluster.of("prefill"):
                worker.peer_side.partition()
            await cluster.tell("prefill", "go")
        case Stage.DECODE:
            await cluster.tell("decode", "pace 0.03")
            asks = cluster.ask_all(mixed(REQUESTS, 5, max_tokens, longest=30))
    await asyncio.gather(*(ask.reaches(1 if stage is Stage.HANDOFF else 5) for ask in asks))
    return asks


async def let_go(cluster: Cluster) -> None:
    """Everything that lives goes on at full speed."""
    await cluster.tell("prefill", "go")
    await cluster.tell("decode", "go")
    await cluster.tell("decode", "pace 0.002")
    for worker in cluster.workers.values():
        worker.router_side.heal()
        worker.peer_side.heal()


async def _sent(cluster: Cluster, wishes: list, before: int) -> list[Ask]:
    asks = cluster.ask_all(wishes)
    wanted = before + len(asks)
    await cluster.eventually(lambda: cluster.live_requests == wanted)
    return asks


async def _all_stand(cluster: Cluster) -> None:
    await asyncio.gather(*(worker.held() for worker in cluster.of("prefill")))
