"""The first message each way on a link: who we are, what our KV looks like, how it can be reached.

Two workers fit if they speak the same version of the protocol (minor versions may differ) and cache the same
model in the same dtype. How each spreads that over ranks and blocks is its own affair (layout.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prelay.v1 import transfer_pb2, worker_pb2

from transfer.base import Backend
from transfer.errors import PeerMismatchError, PeerUnreachableError
from transfer.handoff import Peer
from transfer.host_id import host_id
from transfer.layout import WorkerLayout

_MODEL_FIELDS = ("num_layers", "num_kv_heads", "head_dim", "dtype")
_SPREAD_FIELDS = ("block_size", "tp_size", "pp_size")


def our_handshake(
    info: worker_pb2.WorkerInfo, layout: WorkerLayout, backends: Iterable[str], digest_share: float
) -> transfer_pb2.Handshake:
    """backends: names of those that we have, best first. digest_share: of the requests, 0 to 1."""
    fields = (*_MODEL_FIELDS, *_SPREAD_FIELDS)
    return transfer_pb2.Handshake(
        protocol_version=info.protocol_version,
        protocol_minor=info.protocol_minor,
        worker_id=info.worker_id,
        epoch=info.epoch,
        model_fingerprint=info.model_fingerprint,
        layout=transfer_pb2.KvLayout(**{name: getattr(layout, name) for name in fields}),
        backends=backends,
        digest_share=digest_share,
        host_id=host_id(),
    )


def check_fits(ours: transfer_pb2.Handshake, theirs: transfer_pb2.Handshake) -> None:
    """Raises PeerMismatchError, naming the first field in which the two workers differ."""
    for name in ("protocol_version", "model_fingerprint"):
        _same(name, getattr(ours, name), getattr(theirs, name), ours, theirs)
    for name in _MODEL_FIELDS:
        _same(f"layout.{name}", getattr(ours.layout, name), getattr(theirs.layout, name), ours, theirs)
    for name in _SPREAD_FIELDS:
        if not getattr(theirs.layout, name):
            raise PeerMismatchError(f"layout.{name}: {theirs.worker_id} does not say its own")


def layout_of(handshake: transfer_pb2.Handshake) -> WorkerLayout:
    """The layout that a handshake describes."""
    fields = (*_MODEL_FIELDS, *_SPREAD_FIELDS)
    return WorkerLayout(**{name: getattr(handshake.layout, name) for name in fields})


def choose_backend(ours: Sequence[Backend], worker_id: str, theirs: transfer_pb2.Handshake) -> Backend:
    """The first backend of the puller's list (`theirs`) that the offerer, worker_id, has and that reaches
    it. Raises PeerMismatchError."""
    by_name = {backend.name: backend for backend in ours}
    for name in theirs.backends:
        if name in by_name and by_name[name].reaches(theirs):
            return by_name[name]
    raise PeerMismatchError(
        f"backends: {theirs.worker_id} can use {list(theirs.backends)}, {worker_id} serves {list(by_name)}, "
        "and none of both reaches from the one to the other"
    )


def check_is(peer: Peer, theirs: transfer_pb2.Handshake) -> None:
    """Raises PeerUnreachableError if another worker, or another life of it, answered."""
    if Peer(theirs.worker_id, theirs.epoch) != peer:
        raise PeerUnreachableError(
            f"{theirs.worker_id}@{theirs.epoch} answers at the address of {peer}: it has been replaced"
        )


def _same(
    name: str, our: object, their: object, ours: transfer_pb2.Handshake, theirs: transfer_pb2.Handshake
) -> None:
    if our != their:
        raise PeerMismatchError(f"{name}: {our!r} at {ours.worker_id}, {their!r} at {theirs.worker_id}")
