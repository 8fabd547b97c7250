"""What a rank does: load its shard, run the steps that the leader broadcasts, and end when the leader does.

`build_stage` is the same for the leader and the others. Whoever starts a rank (here `engine.parallel.ranks`,
with one process each on this host) gives it a RankPlace and a channel to the leader.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config import EngineConfig, ModelConfig
from engine.errors import GroupBrokenError
from engine.parallel.channel import Channel, ChannelClosedError
from engine.parallel.shared_memory import SharedMemory
from engine.shard import Shard

# Frames of a rank to the leader: a letter, then text. BROKEN: another rank has failed, not this one. ALIVE
# comes every BEAT_S once the rank is ready.
PROGRESS, READY, ALIVE, FAILED, BROKEN = b"P", b"R", b"A", b"F", b"B"
BEAT_S = 0.5


@dataclass(frozen=True, slots=True)
class RankPlace:
    """All that a rank needs to know before it starts.

    store_host, store_port: where ranks find each other. host: the address at which this one is reached.
    cores: that it may run on. memory: for its KV cache; None is memory of its own.
    """

    checkpoint: Path
    config: EngineConfig
    shard: Shard
    store_host: str
    store_port: int
    host: str
    cores: tuple[int, ...]
    memory: SharedMemory | None

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"checkpoint": str(self.checkpoint)})

    @classmethod
    def from_json(cls, text: str) -> RankPlace:
        raw = json.loads(text)
        return cls(
            checkpoint=Path(raw.pop("checkpoint")),
            config=EngineConfig(**raw.pop("config")),
            shard=Shard(**raw.pop("shard")),
            cores=tuple(raw.pop("cores")),
            memory=None if (memory := raw.pop("memory")) is None else SharedMemory(**memory),
            **raw,
        )


def serve_rank(place: RankPlace, channel: Channel) -> None:
    """Load, say so, and run steps until STOP. Raises what loading or a step raises."""
    from engine.parallel.build import build_stage
    from engine.parallel.codec import decode
    from engine.parallel.groups import RankGroups, open_store

    def progress(fraction: float) -> None:
        channel.send(PROGRESS + str(fraction).encode())

    built = build_stage(
        place,
        ModelConfig.from_pretrained(place.checkpoint),
        lambda device: RankGroups.open(
            open_store(place.store_host, place.store_port, is_leader=False), place.shard, device, place.host
        ),
        progress,
    )
    channel.send(READY)
    threading.Thread(target=_beat, args=(channel,), name="prelay-rank-beat", daemon=True).start()
    while batches := decode(channel.receive()):
        built.stage.run(batches)


def _beat(channel: Channel) -> None:
    """A thread: shows that this process is not stopped, whatever step it is in."""
    with contextlib.suppress(ChannelClosedError):
        while True:
            channel.send(ALIVE)
            time.sleep(BEAT_S)


def end_with(sock: socket.socket, end: Callable[[], None]) -> None:
    """Call `end` as soon as the other end of `sock` is gone, whatever this process waits for."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)

    def watch() -> None:
        poll.poll()
        end()

    threading.Thread(target=watch, name="prelay-leader-watch", daemon=True).start()


def main(text: str, descriptor: str) -> None:
    """A rank's process: its RankPlace, and the file descriptor of its socket."""
    # Ctrl-C reaches all processes of a terminal; it is the leader that ends the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    place = RankPlace.from_json(text)
    os.sched_setaffinity(0, place.cores)
    sock = socket.socket(fileno=int(descriptor))
    channel = Channel(sock)
    # Hard: an operation that waits for a dead leader would keep a clean exit waiting, too.
    end_with(sock, lambda: os._exit(1))
    try:
        serve_rank(place, channel)
    except ChannelClosedError:
        os._exit(1)
    except GroupBrokenError as error:
        channel.send(BROKEN + str(error).encode())
        # The leader ends all ranks. If this one went first, a third would be cut off by it, and so on.
        threading.Event().wait()
    except Exception as error:
        channel.send(FAILED + f"{type(error).__name__}: {error}".encode())
        os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
