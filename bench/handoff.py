"""What a hand-off costs a request, and what it costs the sequences that are decoding beside it.

One decode worker and two prefill workers, real ones, in processes of their own; the decode worker on one
core, the others, of which one works at a time, on another, with the router's client. The prefill worker
`overlap` is as in production: what is computed of a prompt is offered by chunk and group of layers. The other
one, `whole`, computes the prompt in one step and offers it when that is over.

exposed        from the return of the prefill step that computed the prompt's last token (all its layers are
               computed and the first token is drawn) to the moment at which the decode worker's engine begins
               the first step that has the sequence in it. Copying, messages both ways between threads and
               processes, and waiting for the end of the decode step under way are all in it.
prefill        from the beginning of the prompt's first step to the end of its last.
decode step    the middle one of the steps in which the sequence was decoded, so of one sequence where the
               worker is idle otherwise, and of BATCH + 1 where it is busy.
slowdown       from the end of one step of BATCH sequences to the end of the next, the middle one of those in
               which a copy ran, over the middle one of those with nothing beside them. Prompts are read and
               fetched one after the other; the fetched sequences are held, so that the batch stays as it is.
               Beside a prefill of which nothing is copied at the moment steps may be slower too, for the
               cores share caches and memory: reported apart.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from prelay.v1 import worker_pb2

from bench.errors import MeasurementError
from bench.pair_router import PairRouter
from bench.pair_worker import Noted, Step, WorkerSpec, serve_worker
from bench.processes import Remote
from engine.config import ModelConfig
from prefill_worker.loop import LAYER_GROUPS

_Times: TypeAlias = tuple[float, float]
"""From, to."""

BATCH = 8
MODES = ("overlap", "whole")

_BLOCK_SIZE = 16
_CHUNK_TOKENS = 512
_DECODE_STEPS = 8
_FETCHES = 4
"""In a window with fetches."""
_ALONE_STEPS, _ALONE_S = 30, 0.2
"""At least so many and so long."""
_SETTLE_S = 0.05


@dataclass(frozen=True, slots=True)
class HandoffSettings:
    """prompt_tokens: lengths. background_tokens: of the prompts of the BATCH, and of those that are fetched
    beside it. cores: of prefill, of decode."""

    checkpoint: Path
    load: str
    backend: str
    prompt_tokens: Sequence[int]
    background_tokens: int
    rounds: int
    cores: tuple[int, int]


@dataclass(frozen=True, slots=True)
class HandOff:
    """One request's, in seconds. transfer_s, decode_queue_s: as the decode worker says (StageTimes)."""

    exposed_s: float
    prefill_s: float
    decode_step_s: float
    transfer_s: float
    decode_queue_s: float


@dataclass(frozen=True, slots=True)
class BatchSteps:
    """From the end of one step of BATCH sequences to the end of the next, the middle one: with nothing beside
    them, beside a prefill but no copy (None if there were none), beside a copy."""

    alone_s: float
    beside_prefill_s: float | None
    fetching_s: float


@dataclass(frozen=True, slots=True)
class Round:
    """hand_offs: by (prompt tokens, mode, whether BATCH sequences are decoding)."""

    hand_offs: dict[tuple[int, str, bool], HandOff]
    steps: BatchSteps


def measure_hand_offs(
    settings: HandoffSettings, runner: asyncio.Runner, on_round: Callable[[int], None]
) -> list[Round]:
    """A round before them warms up. runner: the same each time, as gRPC wants one event loop in a process.
    on_round: told which round comes. Raises MeasurementError."""
    workers = {spec.worker_id: _start(spec, settings) for spec in _specs(settings)}
    try:
        infos = {name: worker_pb2.WorkerInfo.FromString(each.take()) for name, each in workers.items()}
        return runner.run(_measure(settings, workers, infos, on_round))
    finally:
        for worker in workers.values():
            worker.stop()


def _specs(settings: HandoffSettings) -> list[WorkerSpec]:
    longest = max(*settings.prompt_tokens, settings.background_tokens)
    answer_tokens = _answer_tokens(settings)
    prompts = BATCH * settings.background_tokens + 4 * longest
    prefill_blocks, decode_blocks = (
        -(-prompts // _BLOCK_SIZE),
        -(-(prompts + BATCH * answer_tokens) // _BLOCK_SIZE),
    )
    common = (settings.checkpoint, settings.load, settings.backend, longest + answer_tokens)
    prefill, decode = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE
    return [
        WorkerSpec("decode", decode, *common, decode_blocks, _CHUNK_TOKENS, max_num_seqs=BATCH + 1),
        WorkerSpec("overlap", prefill, *common, prefill_blocks, _CHUNK_TOKENS, layer_groups=LAYER_GROUPS),
        WorkerSpec("whole", prefill, *common, prefill_blocks, longest, layer_groups=0),
    ]


def _answer_tokens(settings: HandoffSettings) -> int:
    """More than the batch decodes in a round, as far as the model goes."""
    limit = ModelConfig.from_pretrained(settings.checkpoint).max_position_embeddings
    return min(2048, limit - max(*settings.prompt_tokens, settings.background_tokens))


def _start(spec: WorkerSpec, settings: HandoffSettings) -> Remote:
    core = settings.cores[spec.role == worker_pb2.ROLE_DECODE]
    return Remote(spec.worker_id, core, serve_worker, spec)


async def _measure(
    settings: HandoffSettings,
    workers: dict[str, Remote],
    infos: dict[str, worker_pb2.WorkerInfo],
    on_round: Callable[[int], None],
) -> list[Round]:
    router = await PairRouter.attach([infos[mode] for mode in MODES], infos["decode"])
    try:
        pair = _Pair(settings, workers, router, infos["decode"].vocab_size)
        rounds = []
        for number in range(settings.rounds + 1):
            on_round(number)
            rounds.append(await pair.round())
        return rounds[1:]
    finally:
        await router.close()


class _Pair:
    """The workers, and what is done to them."""

    def __init__(
        self, settings: HandoffSettings, workers: dict[str, Remote], router: PairRouter, vocab_size: int
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._router = router
        self._vocab_size = vocab_size
        self._random = random.Random(0)
        # The same in all rounds: both sides' prefix caches have them then, and a batch is soon there.
        self._batch = [self._prompt(settings.background_tokens) for _ in range(BATCH)]

    async def round(self) -> Round:
        hand_offs = {}
        for is_busy in (False, True):
            names = await self._start_batch() if is_busy else []
            for num_tokens in self._settings.prompt_tokens:
                for mode in MODES:
                    found = await self._hand_off(num_tokens, mode, len(names))
                    hand_offs[num_tokens, mode, is_busy] = found
            if is_busy:
                steps = await self._steps(found.decode_step_s)
            for name in names:
                self._router.cancel(name)
        await asyncio.sleep(_SETTLE_S)
        return Round(hand_offs, steps)

    async def _start_batch(self) -> list[str]:
        names = []
        answers = []
        for prompt in self._batch:
            name, answer = await self._router.place("overlap", prompt, _answer_tokens(self._settings))
            names.append(name)
            answers.append(answer)
        for answer in answers:
            await answer.until(answer.decoding)
        return names

    async def _hand_off(self, num_tokens: int, mode: str, num_beside: int) -> HandOff:
        """num_beside: sequences that are decoding."""
        self._noted(mode), self._noted("decode")
        _, answer = await self._router.place(mode, self._prompt(num_tokens), _DECODE_STEPS + 1)
        await answer.until(answer.first)
        await answer.until(answer.done)
        prefill = self._noted(mode).steps
        prefilled_s = prefill[-1].end_s
        decode = [
            step
            for step in self._noted("decode").steps
            if step.num_seqs == num_beside + 1 and step.start_s > prefilled_s
        ]
        if sum(step.num_tokens for step in prefill) != num_tokens or not decode:
            raise MeasurementError(
                f"a prompt of {num_tokens} tokens was read in {prefill}, and decoded in {len(decode)} steps "
                f"of {num_beside + 1} sequences"
            )
        return HandOff(
            decode[0].start_s - prefilled_s,
            prefilled_s - prefill[0].start_s,
            statistics.median(step.seconds for step in decode),
            answer.times.transfer_s,
            answer.times.decode_queue_s,
        )

    async def _steps(self, step_s: float) -> BatchSteps:
        """The batch is decoding, in steps of about step_s."""
        self._noted("decode")
        await asyncio.sleep(max(_ALONE_S, _ALONE_STEPS * step_s))
        alone = self._noted("decode").steps
        self._noted("overlap")
        fetched: list[str] = []
        for _ in range(_FETCHES):
            prompt = self._prompt(self._settings.background_tokens)
            name, answer = await self._router.place("overlap", prompt, _DECODE_STEPS, is_held=True)
            await answer.until(answer.first)
            fetched.append(name)
        await asyncio.sleep(_SETTLE_S)  # until the last of it is copied
        beside = self._noted("decode")
        prefills = [(step.start_s, step.end_s) for step in self._noted("overlap").steps]
        for name in fetched:
            self._router.cancel(name)
        turns = _turns(beside.steps)
        copying = [turn for turn in turns if _meets(turn, beside.copies)]
        others = [turn for turn in turns if not _meets(turn, beside.copies) and _meets(turn, prefills)]
        quiet = _turns(alone)
        if not copying or not quiet:
            raise MeasurementError(
                f"of {len(turns)} steps of {BATCH} sequences {len(copying)} had a copy beside them, and "
                f"{len(quiet)} had nothing: there must be some of each"
            )
        return BatchSteps(_middle(quiet), _middle(others) if others else None, _middle(copying))

    def _noted(self, worker: str) -> Noted:
        noted: Noted = self._workers[worker].ask("noted")
        return noted

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(num_tokens)]


def _turns(steps: Sequence[Step]) -> list[_Times]:
    """From the end of the step before to the end of each that has all sequences of the batch."""
    return [
        (before.end_s, step.end_s)
        for before, step in pairwise(steps)
        if before.num_seqs == step.num_seqs == BATCH
    ]


def _meets(turn: _Times, others: Sequence[_Times]) -> bool:
    return any(start_s < turn[1] and end_s > turn[0] for start_s, end_s in others)


def _middle(turns: Sequence[_Times]) -> float:
    return statistics.median(end_s - start_s for start_s, end_s in turns)
