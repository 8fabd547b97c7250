"""The engines that Ray Serve is given to be compared with prelay: the same work, in their order."""

from __future__ import annotations

import asyncio

from bench.ray_serve import DecodeEngine, PrefillEngine
from engine.latency import LatencyModel

STEP_S = 0.002


async def written(engine: DecodeEngine, context: int, count: int) -> int:
    return len([token async for token in engine.write(context, count)])


async def test_every_answer_gets_its_tokens_and_shares_its_steps() -> None:
    engine = DecodeEngine(LatencyModel({"step": STEP_S}), kv_cache_tokens=1000, max_num_seqs=8)
    assert await asyncio.gather(*(written(engine, 10, count) for count in (1, 5, 9))) == [1, 5, 9]
    assert engine.steps == 9
    assert await written(engine, 10, 2) == 2, "it starts again after it had nothing to do"


async def test_who_has_no_room_to_its_end_waits_for_it() -> None:
    engine = DecodeEngine(LatencyModel({"step": STEP_S}), kv_cache_tokens=30, max_num_seqs=8)
    await asyncio.gather(*(written(engine, 10, 10) for _ in range(2)))
    assert engine.steps == 20, "the second fits beside the first at no time"
    await written(engine, 100, 3)  # alone it is served however long it is


async def test_no_more_decode_at_a_time_than_may() -> None:
    engine = DecodeEngine(LatencyModel({"step": STEP_S}), kv_cache_tokens=1000, max_num_seqs=2)
    await asyncio.gather(*(written(engine, 1, 5) for _ in range(4)))
    assert engine.steps == 10


async def test_prompts_are_read_one_after_the_other() -> None:
    engine, ended = PrefillEngine(LatencyModel({"step": STEP_S})), list[int]()

    async def read(number: int) -> None:
        await engine.read(10)
        ended.append(number)

    await asyncio.gather(*map(read, range(5)))
    assert ended == [0, 1, 2, 3, 4]
