"""The leader's side of a worker with several ranks: starts them, broadcasts steps, and ends with any of them.

The life of the ranks:
  1. The leader opens the store, and starts a process for every other rank, each with a socket to the leader.
  2. All load their shards; what the others say of it comes over the sockets. They meet in their groups.
  3. For every step the leader sends its micro-batches to all, computes its own part, and gets the logits.
  4. `close` sends STOP, and the ranks end by themselves.
A rank that dies closes its socket, at any point: the leader learns of it at once, ends all others, which
breaks whatever operation it waits in itself, and says so (`on_death`, RankDiedError). So it goes with a rank
that is loaded and then silent, as a stopped process is: it beats from a thread of its own, whatever step it
is in. A rank that only finds its connection to another one broken says that, and stays, so that it is not
taken for the one that died. A leader whose own part of a step fails ends the others, too, as they are in the
middle of that step; one that dies closes all sockets, and every rank ends itself.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from engine.batch import FlatBatch
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import GroupBrokenError, RankDiedError
from engine.layout import KvLayout
from engine.loading import fingerprint_of
from engine.model_runner import ModelRunner
from engine.parallel.build import BuiltStage, build_stage
from engine.parallel.channel import Channel, ChannelClosedError
from engine.parallel.codec import STOP, encode
from engine.parallel.groups import RankGroups, open_store
from engine.parallel.micro_batches import split
from engine.parallel.rank import BROKEN, FAILED, PROGRESS, READY, RankPlace
from engine.parallel.shared_memory import SharedMemory
from engine.shard import Shard

_LOOPBACK = "127.0.0.1"
_STOP_TIMEOUT_S = 10.0
_BLAME_TIMEOUT_S = 10.0
_SILENCE_S = 5.0

_log = logging.getLogger(__name__)


class _Follower:
    """A rank's process, its channel, and what it has said of its loading."""

    def __init__(self, place: RankPlace) -> None:
        memory = () if place.memory is None else (place.memory.descriptor,)
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "engine.parallel.rank"),
                    *(place.to_json(), str(theirs.fileno())),
                ],
                pass_fds=(theirs.fileno(), *memory),
                stdin=subprocess.DEVNULL,
            )
        self.place = place
        self.channel = Channel(ours)
        self.listener: threading.Thread | None = None
        self.loaded = 0.0
        self.is_ready = False


class ParallelExecutor:
    """engine.executor.Executor over ranks in processes of this host, this process being rank 0.

    cores: those of each rank, in order. memory: of each rank's KV cache, in order; None is memory of their
    own. on_death: called once when a rank has died that was loaded, from the thread that finds out: one of
    this object's own, or the one that runs the step.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: EngineConfig,
        tp_size: int,
        pp_size: int,
        cores: Sequence[Sequence[int]],
        memory: Sequence[SharedMemory] | None,
        on_progress: Callable[[float], None],
        on_death: Callable[[RankDiedError], None],
    ) -> None:
        """Start and load all ranks. Raises RankDiedError, or what Engine.load raises."""
        model_config = ModelConfig.from_pretrained(checkpoint)
        Shard(0, tp_size, 0, pp_size).check(model_config)
        shards = [
            Shard(tp_rank, tp_size, pp_rank, pp_size)
            for pp_rank, tp_rank in product(range(pp_size), range(tp_size))
        ]
        memories = [None] * len(shards) if memory is None else memory
        self._pp_size = pp_size
        self._on_death = on_death
        self._on_progress = on_progress
        self._changed = threading.Condition()
        self._death: RankDiedError | None = None
        self._is_closing = False
        self._is_loaded = False
        self._own_progress = 0.0
        self._store = open_store(_LOOPBACK, 0, is_leader=True)
        places = [
            RankPlace(
                checkpoint.absolute(),
                config,
                shard,
                _LOOPBACK,
                self._store.port,
                _LOOPBACK,
                tuple(own_cores),
                own_memory,
            )
            for shard, own_cores, own_memory in zip(shards, cores, memories, strict=True)
        ]
        self._place = places[0]
        self._followers = [_Follower(place) for place in places[1:]]
        for rank, follower in enumerate(self._followers, start=1):
            name = f"prelay-rank-{rank}"
            follower.listener = threading.Thread(
                target=self._listen, args=(rank, follower), name=name, daemon=True
            )
            follower.listener.start()
        try:
            self.built: BuiltStage = build_stage(self._place, model_config, self._meet, self._own)
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or all(f.is_ready for f in self._followers))
                self._is_loaded = not self._is_over
            self._raise_if_over()
        except GroupBrokenError as error:
            death = self._death_of_a_rank(error)
            self.close()
            raise death from error
        except BaseException:
            self.close()
            raise

    def logits(self, batch: FlatBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Raises RankDiedError; nothing can be computed any more then.

        on_layer: told if all ranks have all layers; of those of other stages the leader knows the end only.
        """
        self._raise_if_over()
        batches = split(batch, self._pp_size)
        message = encode(batches)
        try:
            for follower in self._followers:
                follower.channel.send(message)
            logits = self.built.stage.run(batches, on_layer)
        except (ChannelClosedError, GroupBrokenError) as error:
            raise self._death_of_a_rank(error) from error
        except Exception as error:
            self._bury(0, self._place, f"{type(error).__name__}: {error}")
            raise self._death_of_a_rank(error) from error
        except BaseException:
            self._end_all()
            raise
        assert logits is not None
        return logits

    @property
    def pids(self) -> list[int]:
        """Of the other ranks' processes, in order of rank."""
        return [follower.process.pid for follower in self._followers]

    def close(self) -> None:
        """End the other ranks; waits for them. May be called again, and from `on_death`."""
        with self._changed:
            is_over = self._is_over
            self._is_closing = True
            self._changed.notify_all()
        if self._is_loaded and not is_over:
            self._stop_all()
        self._end_all()
        for follower in self._followers:
            if follower.listener is not None and follower.listener is not threading.current_thread():
                follower.listener.join()

    def _stop_all(self) -> None:
        """Let the ranks end by themselves, as long as they take no longer than they may."""
        for follower in self._followers:
            # Who is gone already need not be told.
            with contextlib.suppress(ChannelClosedError):
                follower.channel.send(STOP)
        give_up = time.monotonic() + _STOP_TIMEOUT_S
        for follower in self._followers:
            try:
                follower.process.wait(max(0.0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning("event=rank_not_stopped pid=%d: it is killed", follower.process.pid)

    def _meet(self, device: torch.device) -> RankGroups:
        """In a thread of its own: nothing ends the wait for a rank that dies before it comes."""
        met: list[RankGroups | GroupBrokenError] = []

        def meet() -> None:
            found: RankGroups | GroupBrokenError
            try:
                found = RankGroups.open(self._store, self._place.shard, device, self._place.host)
            except GroupBrokenError as error:
                found = error
            with self._changed:
                met.append(found)
                self._changed.notify_all()

        threading.Thread(target=meet, name="prelay-meet", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or met)
        self._raise_if_over()
        (found,) = met
        if isinstance(found, GroupBrokenError):
            raise found
        return found

    def _own(self, fraction: float) -> None:
        self._raise_if_over()
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
                        follower.channel.expect_signs_of_life(_SILENCE_S)
                    elif kind == FAILED:
                        why = text
                    elif kind == BROKEN:
                        # Whose end has broken it is about to be heard of; if not, it counts as this one's.
                        self._changed.wait_for(lambda: self._is_over, _BLAME_TIMEOUT_S)
                        why = text
                        break
                    self._changed.notify_all()
        except ChannelClosedError as error:
            if isinstance(error.__cause__, TimeoutError):
                why = f"it has been silent for {_SILENCE_S:g} s"
        except Exception as error:
            why = f"what it says cannot be taken in: {type(error).__name__}: {error}"
        self._bury(rank, follower.place, why)
        follower.channel.close()

    def _bury(self, rank: int, place: RankPlace, why: str) -> None:
        with self._changed:
            if self._is_over:
                return
            shard = place.shard
            self._death = RankDiedError(
                f"rank {rank} (tensor {shard.tp_rank} of {shard.tp_size}, stage {shard.pp_rank} of "
                f"{shard.pp_size}) is gone: {why}"
            )
            is_loaded = self._is_loaded
            self._changed.notify_all()
        _log.error("event=rank_died rank=%d why=%r", rank, why)
        self._end_all()
        if is_loaded:
            self._on_death(self._death)

    def _end_all(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for follower in self._followers:
            follower.process.kill()
        for follower in self._followers:
            follower.process.wait()

    @property
    def _is_over(self) -> bool:
        """With `_changed` held."""
        return self._is_closing or self._death is not None

    def _raise_if_over(self) -> None:
        with self._changed:
            if self._is_over:
                raise self._death or RankDiedError("the ranks have been ended")

    def _death_of_a_rank(self, error: Exception) -> RankDiedError:
        """An operation broke: which rank has died is known as soon as its socket is read."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over, _BLAME_TIMEOUT_S)
        self._bury(0, self._place, str(error))
        return self._death or RankDiedError(f"the ranks have been ended: {error}")


def load_parallel(
    checkpoint: Path,
    config: EngineConfig,
    tp_size: int,
    pp_size: int,
    cores: Sequence[Sequence[int]],
    memory: Sequence[SharedMemory] | None,
    on_progress: Callable[[float], None],
    on_death: Callable[[RankDiedError], None],
) -> tuple[Engine, ParallelExecutor]:
    """An engine whose steps run on tp_size * pp_size ranks of this host, and what closes them.

    The engine's cache and layout are those of rank 0's shard. Arguments and errors as of ParallelExecutor.
    """
    executor = ParallelExecutor(checkpoint, config, tp_size, pp_size, cores, memory, on_progress, on_death)
    model_config = ModelConfig.from_pretrained(checkpoint)
    layout = KvLayout.of(model_config, config, replace(Shard(), tp_size=tp_size, pp_size=pp_size))
    runner = ModelRunner(executor, config.block_size, config.num_blocks, model_config.vocab_size)
    fingerprint = fingerprint_of(checkpoint, config)
    engine = Engine(model_config, config, layout, executor.built.cache, executor, runner, fingerprint)
    return engine, executor
