"""A decode worker's core over a fake engine, for tests that drive it by hand."""

from __future__ import annotations

import numpy as np

from decode_worker.scheduler import DecodeScheduler
from decode_worker.sequences import DecodeTask, PromptRead
from engine.block_pool import BlockPool, Holder
from engine.fake import FakeRunner, fake_answer, fake_logprobs
from engine.latency import LatencyModel, OnlineLatency
from engine.prefix_cache import PrefixCache
from engine.reservation import has_room, reserved_blocks
from engine.sequence import RequestKey, ScheduledChunk, TokenSampling
from engine.urgency import Urgency

BLOCK_SIZE = 4


def key(name: object) -> RequestKey:
    return RequestKey(str(name), 0)


def limited(
    max_tokens: int, presence_penalty: float = 0.0, prompt_logprobs: int | None = None
) -> TokenSampling:
    return TokenSampling(
        0.0,
        0,
        1.0,
        0,
        max_tokens,
        0,
        frozenset({7}),
        presence_penalty=presence_penalty,
        prompt_logprobs=prompt_logprobs,
    )


class Bench:
    """Prompts come with their KV in place, as by a hand-off (`arrive`), or are read here (`read`)."""

    def __init__(
        self,
        num_blocks: int = 64,
        max_num_seqs: int = 2,
        max_batch_tokens: int = 16,
        model: LatencyModel | None = None,
    ) -> None:
        self.generations = [0] * num_blocks
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, self.generations)
        self.cache = PrefixCache(self.pool, "model")
        self.model = model or LatencyModel.unknown()
        latency = OnlineLatency(self.model)
        self.scheduler = DecodeScheduler(self.pool, self.cache, max_num_seqs, max_batch_tokens, latency)
        self.runner = FakeRunner(np.zeros((num_blocks, BLOCK_SIZE * 8), dtype=np.uint8), BLOCK_SIZE)
        self.max_batch_tokens = max_batch_tokens
        self.answers: dict[RequestKey, list[int]] = {}
        self.prompts: dict[RequestKey, tuple[list[int], TokenSampling]] = {}
        self.queue_s: dict[RequestKey, float] = {}
        self.reads: dict[RequestKey, PromptRead] = {}
        self.chunks: list[ScheduledChunk] = []

    def reserve(
        self,
        name: object,
        prompt: list[int],
        sampling: TokenSampling,
        holder: Holder = Holder.TRANSFER,
    ) -> list[int] | None:
        """The blocks, leased to a hand-off; None if there is no room now."""
        num_blocks = reserved_blocks(BLOCK_SIZE, len(prompt), sampling.max_tokens)
        requests = self.scheduler.num_waiting + self.scheduler.num_running
        if self.scheduler.lacks_blocks or not has_room(num_blocks, self.pool.num_available, requests):
            return None
        self.prompts[key(name)] = (prompt, sampling)
        return self.pool.allocate(num_blocks, holder)

    def arrive(
        self, name: object, blocks: list[int], now: float = 0.0, urgency: Urgency | None = None
    ) -> None:
        prompt, sampling = self.prompts[key(name)]
        first = fake_answer(prompt, sampling)[0]
        self.runner.step([ScheduledChunk(prompt, 0, blocks, None, 0)])
        self.pool.add(blocks, Holder.SEQUENCE)
        self.pool.drop(blocks, Holder.TRANSFER)
        self.answers[key(name)] = [first]
        task = DecodeTask(key(name), prompt, 0, sampling, "", urgency, self.cache.digests(prompt, ""))
        self.scheduler.add(task, first, blocks, now)

    def add(
        self,
        name: object,
        num_tokens: int,
        max_tokens: int,
        now: float = 0.0,
        urgency: Urgency | None = None,
    ) -> None:
        prompt = list(range(100, 100 + num_tokens))
        blocks = self.reserve(name, prompt, limited(max_tokens))
        assert blocks is not None
        self.arrive(name, blocks, now, urgency)

    def read(
        self,
        name: object,
        prompt: list[int],
        sampling: TokenSampling,
        now: float = 0.0,
        urgency: Urgency | None = None,
    ) -> bool:
        """Whether there was room for it."""
        blocks = self.reserve(name, prompt, sampling, Holder.SEQUENCE)
        if blocks is None:
            return False
        self.answers[key(name)] = []
        task = DecodeTask(key(name), prompt, 0, sampling, "", urgency, self.cache.digests(prompt, ""))
        self.scheduler.read(task, blocks, 0, now)
        return True

    def step(self, now: float = 0.0, done_s: float | None = None) -> list[RequestKey]:
        """Who ended. done_s: when the step is over; as long after `now` as the model says, if not given."""
        self.chunks = self.scheduler.schedule(now)
        done_s = now + self.model.step_s(self.scheduler.shape) if done_s is None else done_s
        assert sum(len(chunk.token_ids) for chunk in self.chunks) <= self.max_batch_tokens
        ended: list[RequestKey] = []
        for decoded in self.scheduler.complete(self.runner.step(self.chunks), now, done_s):
            answer = self.answers[decoded.key]
            prompt, sampling = self.prompts[decoded.key]
            assert decoded.index == len(answer)
            answer.append(decoded.token_id)
            if decoded.decode_queue_s is not None:
                self.queue_s[decoded.key] = decoded.decode_queue_s
            assert (decoded.read is not None) == (decoded.index == 0)
            if decoded.read is not None:
                self.reads[decoded.key] = decoded.read
                asked = sampling.prompt_logprobs
                scored = (
                    [] if asked is None else [fake_logprobs(prompt, i, asked) for i in range(1, len(prompt))]
                )
                assert list(decoded.read.prompt_logprobs) == scored
            if decoded.stop_reason is not None:
                assert answer == fake_answer(prompt, sampling)
                ended.append(decoded.key)
        return ended

    def check(self) -> None:
        self.pool.check()
        assert self.pool.num_references(Holder.SEQUENCE) == self.scheduler.num_blocks
        assert self.pool.num_references(Holder.CACHE) == len(self.cache)
