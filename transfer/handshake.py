"""The first message each way on a link: who we are, what our KV looks like, how it can be reached."""

from __future__ import annotations

from collections.abc import Sequence

from prelay.v1 import transfer_pb2, worker_pb2

from engine.layout import KvLayout
from transfer.errors import PeerMismatchError, PeerUnreachableError
from transfer.handoff import Peer
from transfer.ipc import SegmentRef

_LAYOUT_FIELDS = ("num_layers", "num_kv_heads", "head_dim", "block_size", "dtype")


def our_handshake(
    info: worker_pb2.WorkerInfo, layout: KvLayout, backends: Sequence[str], segment: SegmentRef | None
) -> transfer_pb2.Handshake:
    """backends: those that we can use (puller, best first) or serve (offerer). segment: the offerer's
    shared memory."""
    message = transfer_pb2.Handshake(
        protocol_version=info.protocol_version,
        worker_id=info.worker_id,
        epoch=info.epoch,
        model_fingerprint=info.model_fingerprint,
        layout=transfer_pb2.KvLayout(**{name: getattr(layout, name) for name in _LAYOUT_FIELDS}),
        backends=backends,
    )
    if segment is not None:
        message.ipc.CopyFrom(
            transfer_pb2.IpcSegment(
                pid=segment.pid, fd=segment.fd, num_bytes=segment.num_bytes, host_id=segment.host_id
            )
        )
    return message


def check_fits(ours: transfer_pb2.Handshake, theirs: transfer_pb2.Handshake) -> None:
    """Raises PeerMismatchError, naming the first field in which the two workers differ."""
    for name in ("protocol_version", "model_fingerprint"):
        _same(name, getattr(ours, name), getattr(theirs, name), ours, theirs)
    for name in _LAYOUT_FIELDS:
        _same(f"layout.{name}", getattr(ours.layout, name), getattr(theirs.layout, name), ours, theirs)


def choose_backend(ours: transfer_pb2.Handshake, theirs: transfer_pb2.Handshake) -> str:
    """The first backend of the puller's list (`theirs`) that the offerer serves. Raises PeerMismatchError."""
    for name in theirs.backends:
        if name in ours.backends:
            return name
    raise PeerMismatchError(
        f"backends: {theirs.worker_id} can use {list(theirs.backends)}, "
        f"{ours.worker_id} serves {list(ours.backends)}"
    )


def check_is(peer: Peer, theirs: transfer_pb2.Handshake) -> None:
    """Raises PeerUnreachableError if another worker, or another life of it, answered."""
    if Peer(theirs.worker_id, theirs.epoch) != peer:
        raise PeerUnreachableError(
            f"{theirs.worker_id}@{theirs.epoch} answers at the address of {peer}: it has been replaced"
        )


def segment_ref(theirs: transfer_pb2.Handshake) -> SegmentRef:
    """Where the offerer's shared memory is."""
    return SegmentRef(theirs.ipc.pid, theirs.ipc.fd, theirs.ipc.num_bytes, theirs.ipc.host_id)


def _same(
    name: str, our: object, their: object, ours: transfer_pb2.Handshake, theirs: transfer_pb2.Handshake
) -> None:
    if our != their:
        raise PeerMismatchError(f"{name}: {our!r} at {ours.worker_id}, {their!r} at {theirs.worker_id}")
