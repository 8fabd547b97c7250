"""Workers of several ranks, in real processes: the tokens of one, and an end at once when a rank dies."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import InvalidStepError, RankDiedError, UnsupportedModelError
from engine.generate import generate
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.parallel import ranks
from engine.parallel.channel import Channel, ChannelClosedError
from engine.parallel.rank import ALIVE, BROKEN, RankPlace
from engine.parallel.ranks import ParallelExecutor, load_parallel
from engine.parallel.shared_memory import SharedMemory
from engine.sequence import ScheduledChunk, TokenSampling
from engine.shard import Shard

GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=24, min_tokens=0, stop_token_ids=frozenset()
)
WARM = replace(GREEDY, temperature=0.9, top_p=0.95, seed=5)
CONFIG = EngineConfig(num_blocks=64, block_size=8, max_batch_tokens=16)
NewCheckpoint = Callable[..., Path]
Start = Callable[..., tuple[Engine, ParallelExecutor]]

MODELS = {
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "biases_tied": {"family": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qk_norm": {"family": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 161},
    "windows": {"family": "mistral", "num_key_value_heads": 2, "sliding_window": 9, "num_hidden_layers": 4},
}


def cores(count: int) -> list[tuple[int, ...]]:
    allowed = sorted(os.sched_getaffinity(0))
    return [(allowed[index % len(allowed)],) for index in range(count)]


@pytest.fixture
def start() -> Iterator[Start]:
    """load_parallel; what it has started is closed in the end."""
    started: list[ParallelExecutor] = []

    def load(
        path: Path,
        tp_size: int,
        pp_size: int,
        on_death: Callable[[RankDiedError], None] = lambda error: None,
        memory: Sequence[SharedMemory] | None = None,
    ) -> tuple[Engine, ParallelExecutor]:
        progress: list[float] = []
        count = tp_size * pp_size
        engine, executor = load_parallel(
            path, CONFIG, tp_size, pp_size, cores(count), memory, progress.append, on_death
        )
        started.append(executor)
        assert progress[-1] == 1.0
        return engine, executor

    yield load
    for executor in started:
        executor.close()
        assert not any(is_alive(pid) for pid in executor.pids)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def answers(engine: Engine) -> list[list[int]]:
    """Long and short prompts alone, then a mixture of chunks and decoding sequences in the same steps."""
    dice = random.Random(3)
    prompts = [[dice.randrange(160) for _ in range(length)] for length in (1, 5, 37)]
    found = [generate(engine, prompt, sampling) for prompt in prompts for sampling in (GREEDY, WARM)]
    tokens = [list(prompt) for prompt in prompts]
    computed = [0] * len(tokens)
    for step in range(30):
        chunks = []
        for index, sequence in enumerate(tokens):
            new = sequence[computed[index] : computed[index] + 1 + (step + index) % 7]
            is_last = computed[index] + len(new) == len(sequence)
            table = range(index * 16, index * 16 + 16)
            drawn = len(sequence) - len(prompts[index])
            chunks.append(ScheduledChunk(new, computed[index], table, GREEDY if is_last else None, drawn))
            computed[index] += len(new)
        for sequence, result in zip(tokens, engine.runner.step(chunks), strict=True):
            if result.token_id is not None:
                sequence.append(result.token_id)
    return [*found, *tokens]


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "model"),
    [
        (2, 1, "mqa"),
        (2, 1, "qk_norm"),
        (1, 2, "windows"),
        (2, 2, "biases_tied"),
        *(
            pytest.param(tp, pp, model, marks=pytest.mark.slow)
            for tp, pp, model in [(2, 2, "mqa"), (2, 2, "qk_norm"), (2, 2, "windows"), (1, 2, "biases_tied")]
        ),
    ],
)
def test_ranks_give_the_tokens_of_one_process(
    new_checkpoint: NewCheckpoint, start: Start, tp_size: int, pp_size: int, model: str
) -> None:
    path = new_checkpoint(**MODELS[model])
    engine, _ = start(path, tp_size, pp_size)
    assert answers(engine) == answers(Engine.load(path, CONFIG, None, lambda fraction: None))


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2)])
def test_the_leader_sees_the_kv_of_all_ranks_in_memory_that_it_gave_them(
    new_checkpoint: NewCheckpoint, start: Start, tp_size: int, pp_size: int
) -> None:
    path = new_checkpoint(**MODELS["biases_tied"])
    model = ModelConfig.from_pretrained(path)
    shards = [Shard(tp, tp_size, pp, pp_size) for pp, tp in product(range(pp_size), range(tp_size))]
    layouts = [KvLayout.of(model, CONFIG, shard) for shard in shards]
    memory = []
    for layout in layouts:
        descriptor = os.memfd_create("kv")
        memory.append(
            SharedMemory(descriptor, offset=4096, num_bytes=CONFIG.num_blocks * layout.block_nbytes)
        )
        os.ftruncate(descriptor, memory[-1].offset + memory[-1].num_bytes)
    engine, _ = start(path, tp_size, pp_size, memory=memory)
    alone = Engine.load(path, CONFIG, None, lambda fraction: None)
    chunk = ScheduledChunk(list(range(13)), 0, [5, 2], None, 0)
    for each in (engine, alone):
        each.runner.step([chunk])
    for shard, layout, each in zip(shards, layouts, memory, strict=True):
        # Through a mapping of its own, as the leader's transfers have one.
        found = KvCache(layout, CONFIG.num_blocks, each.map()).data[[5, 2]]
        layers, heads = shard.layers(model), shard.kv_heads(model)
        wanted = alone.cache.data[[5, 2], layers.start : layers.stop, :, :, heads.start : heads.stop]
        assert wanted.any(dim=-1).sum() == 13 * 2 * len(layers) * len(heads)
        torch.testing.assert_close(found, wanted)
        os.close(each.descriptor)


def test_layers_are_told_where_every_rank_has_all_of_them(
    new_checkpoint: NewCheckpoint, start: Start
) -> None:
    path = new_checkpoint(**MODELS["mqa"])
    for splits, wanted in (((2, 1), [1, 2, 3]), ((1, 2), [])):
        told: list[int] = []
        engine, _ = start(path, *splits)
        engine.runner.step([ScheduledChunk(list(range(13)), 0, [5, 2], None, 0)], told.append)
        assert told == wanted


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_taken_for_dead(
    new_checkpoint: NewCheckpoint, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = threading.Semaphore(0)

    class Heard(Channel):
        def receive(self) -> bytes:
            frame = super().receive()
            if frame[:1] == ALIVE:
                beats.release()
            return frame

    died: list[RankDiedError] = []
    gone = threading.Event()

    def on_death(error: RankDiedError) -> None:
        died.append(error)
        gone.set()

    monkeypatch.setattr(ranks, "Channel", Heard)
    monkeypatch.setattr(ranks, "_SILENCE_S", 2.5)
    _, executor = start(new_checkpoint(**MODELS["mqa"]), 2, 1, on_death)
    for _ in range(3):  # although it has nothing to do
        assert beats.acquire(timeout=60)
    os.kill(executor.pids[0], signal.SIGSTOP)
    assert gone.wait(60)
    assert "rank 1 (tensor 1 of 2, stage 0 of 1) is gone: it has been silent for 2.5 s" in str(died[0])


def test_an_idle_rank_that_dies_takes_the_others_and_every_later_step_with_it(
    new_checkpoint: NewCheckpoint, start: Start
) -> None:
    died = threading.Event()
    engine, executor = start(new_checkpoint(**MODELS["mqa"]), 2, 2, lambda error: died.set())
    os.kill(executor.pids[1], signal.SIGKILL)
    assert died.wait(60)
    with pytest.raises(RankDiedError, match=r"rank 2 \(tensor 0 of 2, stage 1 of 2\) is gone"):
        generate(engine, [1, 2, 3], GREEDY)
    assert not any(is_alive(pid) for pid in executor.pids)


def test_a_rank_that_dies_in_the_middle_of_a_step_ends_the_step(
    new_checkpoint: NewCheckpoint, start: Start
) -> None:
    engine, executor = start(new_checkpoint(**MODELS["mqa"]), 2, 1)
    generate(engine, [1, 2, 3], GREEDY)
    os.kill(executor.pids[0], signal.SIGSTOP)
    raised: list[BaseException] = []

    def step() -> None:
        try:
            generate(engine, [1, 2, 3], GREEDY)
        except RankDiedError as error:
            raised.append(error)

    waiting = threading.Thread(target=step)
    waiting.start()
    # Nobody answers: the step is under way for as long as the rank is stopped.
    waiting.join(0.2)
    assert waiting.is_alive()
    os.kill(executor.pids[0], signal.SIGKILL)
    waiting.join(60)
    assert [type(error) for error in raised] == [RankDiedError]


def test_the_rank_that_died_is_blamed_and_not_one_that_it_has_cut_off(
    new_checkpoint: NewCheckpoint, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader hears of the death only after the dead rank's peer has complained, or has been blamed."""
    complained = threading.Event()
    closed: list[Channel] = []

    class Late(Channel):
        def receive(self) -> bytes:
            try:
                frame = super().receive()
            except ChannelClosedError:
                closed.append(self)
                if closed[0] is self:
                    assert complained.wait(60)
                raise
            if frame[:1] == BROKEN:
                complained.set()
            return frame

    monkeypatch.setattr(ranks, "Channel", Late)
    engine, executor = start(new_checkpoint(**MODELS["mqa"]), 2, 2, lambda error: complained.set())
    generate(engine, [1, 2, 3], GREEDY)
    os.kill(executor.pids[1], signal.SIGSTOP)
    # Rank 3, of the same stage, waits for rank 2 when that dies.
    with ThreadPoolExecutor() as threads:
        step = threads.submit(generate, engine, [1, 2, 3], GREEDY)
        with pytest.raises(TimeoutError):
            step.result(0.2)
        os.kill(executor.pids[1], signal.SIGKILL)
        with pytest.raises(RankDiedError, match=r"^rank 2 .* is gone: its process has ended"):
            step.result(60)


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("wrong"), RuntimeError("torch's own")])
def test_a_leader_that_fails_in_its_part_of_a_step_ends_the_ranks_that_wait_for_it(
    new_checkpoint: NewCheckpoint, start: Start, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(batches: object, on_layer: object) -> None:
        raise error

    told: list[RankDiedError] = []
    engine, executor = start(new_checkpoint(**MODELS["mqa"]), 2, 1, told.append)
    monkeypatch.setattr(executor.built.stage, "run", fail)
    for _ in range(2):
        with pytest.raises(RankDiedError, match=rf"rank 0 .* is gone: {type(error).__name__}: {error}"):
            generate(engine, [1, 2, 3], GREEDY)
    assert len(told) == 1
    assert not any(is_alive(pid) for pid in executor.pids)


def test_a_step_that_cannot_be_sent_leaves_the_ranks_as_they_are(
    new_checkpoint: NewCheckpoint, start: Start
) -> None:
    engine, _ = start(new_checkpoint(**MODELS["mqa"]), 2, 1)
    answer = generate(engine, [1, 2, 3], GREEDY)
    with pytest.raises(InvalidStepError):
        generate(engine, [1, 2, 99999], GREEDY)
    assert generate(engine, [1, 2, 3], GREEDY) == answer


def test_ctrl_c_is_for_the_leader_alone(new_checkpoint: NewCheckpoint, start: Start) -> None:
    engine, executor = start(new_checkpoint(**MODELS["mqa"]), 2, 1)
    os.kill(executor.pids[0], signal.SIGINT)
    assert len(generate(engine, [1, 2, 3], GREEDY)) == GREEDY.max_tokens


def test_a_rank_that_dies_while_it_loads_ends_the_start(
    new_checkpoint: NewCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead(ranks._Follower):
        def __init__(self, place: RankPlace) -> None:
            super().__init__(place)
            self.process.kill()

    monkeypatch.setattr(ranks, "_Follower", Dead)
    arguments = (new_checkpoint(**MODELS["mqa"]), CONFIG, 2, 1, cores(2), None, lambda fraction: None)
    raised: list[RankDiedError] = []
    died: list[RankDiedError] = []

    def load() -> None:
        try:
            load_parallel(*arguments, died.append)
        except RankDiedError as error:
            raised.append(error)

    # A daemon: a start that waits for the dead rank would keep the tests from ending.
    loading = threading.Thread(target=load, daemon=True)
    loading.start()
    loading.join(60)
    assert [str(error).split(" is gone")[0] for error in raised] == ["rank 1 (tensor 1 of 2, stage 0 of 1)"]
    assert not died, "on_death is for what nobody waits for"


def test_ranks_are_closed_twice_and_from_on_death(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint(**MODELS["mqa"])
    closed: list[str] = []
    done = threading.Event()

    def on_death(error: RankDiedError) -> None:
        executor.close()
        closed.append(str(error))
        done.set()

    _, executor = load_parallel(path, CONFIG, 2, 1, cores(2), None, lambda fraction: None, on_death)
    os.kill(executor.pids[0], signal.SIGKILL)
    assert done.wait(60)
    executor.close()
    executor.close()
    assert len(closed) == 1

    engine, executor = load_parallel(path, CONFIG, 2, 1, cores(2), None, lambda fraction: None, on_death)
    executor.close()
    executor.close()
    with pytest.raises(RankDiedError, match="have been ended"):
        generate(engine, [1, 2, 3], GREEDY)
    assert len(closed) == 1


def test_ranks_end_with_their_leader(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint(**MODELS["mqa"])
    script = (
        "import sys, time; from pathlib import Path\n"
        "from engine.config import EngineConfig; from engine.parallel.ranks import load_parallel\n"
        f"config = EngineConfig(num_blocks=64, block_size=8)\n"
        f"arguments = (2, 1, {cores(2)}, None, lambda fraction: None, lambda error: None)\n"
        f"engine, executor = load_parallel(Path({str(path)!r}), config, *arguments)\n"
        "print(executor.pids[0], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as leader:
        assert leader.stdout is not None
        pid = int(leader.stdout.readline())
        watch = os.pidfd_open(pid)
        leader.kill()
        # Readable as soon as the process has ended.
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        assert poll.poll(60_000), "the rank has outlived its leader"
        os.close(watch)


def test_a_rank_that_cannot_load_says_why(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint(**MODELS["mqa"])
    (path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(Exception, match=r"truncated or not a safetensors file"):
        load_parallel(path, CONFIG, 2, 1, cores(2), None, lambda fraction: None, lambda error: None)


def test_what_cannot_be_split_is_refused_before_anything_starts(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint(**MODELS["mqa"])
    with pytest.raises(UnsupportedModelError, match="num_attention_heads"):
        load_parallel(path, CONFIG, 3, 1, cores(3), None, lambda fraction: None, lambda error: None)
