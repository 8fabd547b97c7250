"""The leader's side of a worker with several ranks: starts them, broadcasts steps, and ends with any of them.

The life of the ranks:
  1. The leader opens the store, and starts a process for every other rank, each with a socket to the leader.
  2. All load their shards; what the others say of it comes over the sockets. They meet in their groups.
  3. For every step the leader sends its micro-batches to all, computes its own part, and gets the logits.
  4. `close` sends STOP, and the ranks end by themselves.
A rank that dies closes its socket, at any point: the leader learns of it at once, ends all others, which
breaks whatever operation it waits in itself, and says so (`on_death`, RankDiedError). A leader that dies
closes all sockets, and every rank ends itself.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.batch import FlatBatch
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import RankDiedError
from engine.layout import KvLayout
from engine.loading import fingerprint_of
from engine.parallel.build import BuiltStage, build_stage
from engine.parallel.channel import Channel, ChannelClosedError
from engine.parallel.codec import STOP, encode
from engine.parallel.groups import open_store
from engine.parallel.micro_batches import split
from engine.parallel.rank import FAILED, PROGRESS, READY, RankPlace
from engine.runner import ModelRunner
from engine.shard import Shard

_LOOPBACK = "127.0.0.1"
_STOP_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


class _Follower:
    """A rank's process, its channel, and what it has said of its loading."""

    def __init__(self, place: RankPlace) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "engine.parallel.rank"),
                    *(place.to_json(), str(theirs.fileno())),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        self.place = place
        self.channel = Channel(ours)
        self.listener: threading.Thread | None = None
        self.loaded = 0.0
        self.is_ready = False


class ParallelExecutor:
    """engine.executor.Executor over ranks in processes of this host, this process being rank 0.

    cores: [tp_size * pp_size * config.threads], the ranks' in order. on_death: called once, from another
    thread, when a rank has died.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: EngineConfig,
        tp_size: int,
        pp_size: int,
        cores: Sequence[int],
        on_progress: Callable[[float], None],
        on_death: Callable[[RankDiedError], None],
    ) -> None:
        """Start and load all ranks. Raises RankDiedError, or what Engine.load raises."""
        model_config = ModelConfig.from_pretrained(checkpoint)
        Shard(0, tp_size, 0, pp_size).check(model_config)
        if len(cores) != tp_size * pp_size * config.threads:
            raise ValueError(
                f"{tp_size} x {pp_size} ranks of {config.threads} threads need as many cores, "
                f"not {len(cores)}"
            )
        self._pp_size = pp_size
        self._on_death = on_death
        self._on_progress = on_progress
        self._changed = threading.Condition()
        self._death: RankDiedError | None = None
        self._is_closing = False
        self._is_loaded = False
        self._own_progress = 0.0
        store = open_store(_LOOPBACK, 0, is_leader=True)
        places = [
            RankPlace(
                checkpoint.absolute(),
                config,
                Shard(tp_rank, tp_size, pp_rank, pp_size),
                _LOOPBACK,
                store.port,
                _LOOPBACK,
                tuple(cores[rank * config.threads : (rank + 1) * config.threads]),
            )
            for rank, (pp_rank, tp_rank) in enumerate(
                (pp_rank, tp_rank) for pp_rank in range(pp_size) for tp_rank in range(tp_size)
            )
        ]
        self._followers = [_Follower(place) for place in places[1:]]
        for rank, follower in enumerate(self._followers, start=1):
            name = f"prelay-rank-{rank}"
            follower.listener = threading.Thread(
                target=self._listen, args=(rank, follower), name=name, daemon=True
            )
            follower.listener.start()
        try:
            self.built: BuiltStage = build_stage(places[0], model_config, store, self._own)
            with self._changed:
                self._changed.wait_for(lambda: self._death or all(f.is_ready for f in self._followers))
            self._raise_if_dead()
            self._is_loaded = True
        except RuntimeError as error:  # an operation that a rank's end has broken
            death = self._death_of_a_rank(error)
            self.close()
            raise death from error
        except BaseException:
            self.close()
            raise

    def logits(self, batch: FlatBatch) -> torch.Tensor:
        """Raises RankDiedError; nothing can be computed any more then."""
        self._raise_if_dead()
        batches = split(batch, self._pp_size)
        message = encode(batches)
        try:
            for follower in self._followers:
                follower.channel.send(message)
            logits = self.built.stage.run(batches)
        except (ChannelClosedError, RuntimeError) as error:
            raise self._death_of_a_rank(error) from error
        assert logits is not None
        return logits

    @property
    def pids(self) -> list[int]:
        """Of the other ranks' processes, in order of rank."""
        return [follower.process.pid for follower in self._followers]

    def close(self) -> None:
        """End the other ranks; waits for them."""
        with self._changed:
            self._is_closing = True
        for follower in self._followers if self._is_loaded else ():
            if follower.process.poll() is not None:
                continue
            try:
                follower.channel.send(STOP)
                follower.process.wait(_STOP_TIMEOUT_S)
            except (ChannelClosedError, subprocess.TimeoutExpired):
                _log.warning("event=rank_not_stopped pid=%d: it is killed", follower.process.pid)
        self._end_all()
        for follower in self._followers:
            if follower.listener is not None:
                follower.listener.join()

    def _own(self, fraction: float) -> None:
        with self._changed:
            self._own_progress = fraction
            self._report()

    def _report(self) -> None:
        """With `_changed` held: ranks load side by side, and their progress is told one at a time."""
        shares = [self._own_progress, *(follower.loaded for follower in self._followers)]
        self._on_progress(sum(shares) / len(shares))

    def _listen(self, rank: int, follower: _Follower) -> None:
        """A thread: what one rank says, until it is gone."""
        why = "its process has ended"
        try:
            while True:
                frame = follower.channel.receive()
                kind, text = frame[:1], frame[1:].decode(errors="replace")
                with self._changed:
                    if kind == PROGRESS:
                        follower.loaded = float(text)
                        self._report()
                    elif kind == READY:
                        follower.is_ready = True
                    elif kind == FAILED:
                        why = text
                    self._changed.notify_all()
        except ChannelClosedError:
            self._bury(rank, follower, why)
        finally:
            follower.channel.close()

    def _bury(self, rank: int, follower: _Follower, why: str) -> None:
        with self._changed:
            if self._is_closing or self._death is not None:
                return
            shard = follower.place.shard
            self._death = RankDiedError(
                f"rank {rank} (tensor {shard.tp_rank} of {shard.tp_size}, stage {shard.pp_rank} of "
                f"{shard.pp_size}) is gone: {why}"
            )
            self._changed.notify_all()
        _log.error("event=rank_died rank=%d why=%r", rank, why)
        self._end_all()
        self._on_death(self._death)

    def _end_all(self) -> None:
        with self._changed:
            self._is_closing = True
        for follower in self._followers:
            follower.process.kill()
            follower.process.wait()

    def _raise_if_dead(self) -> None:
        with self._changed:
            if self._death is not None:
                raise self._death

    def _death_of_a_rank(self, error: Exception) -> RankDiedError:
        """An operation broke: which rank has died is known as soon as its socket is read."""
        with self._changed:
            self._changed.wait_for(lambda: self._death is not None, _STOP_TIMEOUT_S)
            death = self._death
        self._end_all()
        return death or RankDiedError(f"an operation between ranks failed: {error}")


def load_parallel(
    checkpoint: Path,
    config: EngineConfig,
    tp_size: int,
    pp_size: int,
    cores: Sequence[int],
    on_progress: Callable[[float], None],
    on_death: Callable[[RankDiedError], None],
) -> tuple[Engine, ParallelExecutor]:
    """An engine whose steps run on tp_size * pp_size ranks of this host, and what closes them.

    The engine's cache and layout are those of rank 0's shard. Arguments and errors as of ParallelExecutor.
    """
    executor = ParallelExecutor(checkpoint, config, tp_size, pp_size, cores, on_progress, on_death)
    model_config = ModelConfig.from_pretrained(checkpoint)
    layout = KvLayout.of(model_config, config, replace(Shard(), tp_size=tp_size, pp_size=pp_size))
    runner = ModelRunner(executor, config.block_size, config.num_blocks, model_config.vocab_size)
    fingerprint = fingerprint_of(checkpoint, config)
    engine = Engine(model_config, config, layout, executor.built.cache, executor, runner, fingerprint)
    return engine, executor
