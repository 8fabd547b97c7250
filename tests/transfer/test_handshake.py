"""Which workers fit together: every field that must agree, and every one that need not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prelay.v1 import transfer_pb2, worker_pb2

from transfer.errors import PeerMismatchError, PeerUnreachableError
from transfer.handoff import LinkId, Peer
from transfer.handshake import check_fits, check_is, choose_backend, layout_of, our_handshake
from transfer.layout import Route, WorkerLayout
from transfer.memory import MemoryPull

LAYOUT = WorkerLayout(
    num_layers=4, num_kv_heads=2, head_dim=8, block_size=16, dtype="bfloat16", tp_size=2, pp_size=1
)


def handshake(worker_id: str = "prefill-0", layout: WorkerLayout = LAYOUT) -> transfer_pb2.Handshake:
    info = worker_pb2.WorkerInfo(
        worker_id=worker_id, epoch=7, protocol_version=1, protocol_minor=3, model_fingerprint="abc"
    )
    return our_handshake(info, layout, ["ipc", "nixl"], 0.25)


class Named:
    """A backend that can only say its name, and whom it reaches."""

    def __init__(self, name: str, *, reaches: bool) -> None:
        self.name = name
        self._reaches = reaches

    def reaches(self, theirs: transfer_pb2.Handshake) -> bool:
        return self._reaches

    def offer(self, link: LinkId, theirs: transfer_pb2.Handshake, answer: transfer_pb2.Handshake) -> None:
        raise NotImplementedError

    def end_offer(self, link: LinkId) -> None:
        raise NotImplementedError

    def connect(self, theirs: transfer_pb2.Handshake, route: Route) -> MemoryPull:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def test_a_handshake_says_who_we_are_and_what_our_kv_looks_like() -> None:
    ours = handshake()
    assert (ours.worker_id, ours.epoch, ours.protocol_version, ours.protocol_minor) == ("prefill-0", 7, 1, 3)
    assert (ours.model_fingerprint, list(ours.backends), ours.digest_share) == ("abc", ["ipc", "nixl"], 0.25)
    assert ours.host_id
    assert layout_of(transfer_pb2.Handshake.FromString(ours.SerializeToString())) == LAYOUT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol_version", 2),
        ("model_fingerprint", "abd"),
        ("layout.num_layers", 5),
        ("layout.num_kv_heads", 4),
        ("layout.head_dim", 16),
        ("layout.dtype", "float32"),
    ],
)
def test_what_must_agree_is_named_with_both_values_and_workers(field: str, value: object) -> None:
    ours, theirs = handshake(), handshake("decode-0")
    *within, name = field.split(".")
    holder = theirs.layout if within else theirs
    ours_value = getattr(ours.layout if within else ours, name)
    setattr(holder, name, value)
    with pytest.raises(PeerMismatchError) as refused:
        check_fits(ours, theirs)
    assert str(refused.value) == f"{field}: {ours_value!r} at prefill-0, {value!r} at decode-0"
    with pytest.raises(PeerMismatchError, match=f"^{field}:"):
        check_fits(theirs, ours)


def set_layout(name: str, value: int) -> Callable[[transfer_pb2.Handshake], None]:
    return lambda theirs: setattr(theirs.layout, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda theirs: setattr(theirs, "protocol_minor", 9),
        lambda theirs: setattr(theirs, "protocol_minor", 0),
        lambda theirs: setattr(theirs, "epoch", 100),
        lambda theirs: setattr(theirs, "digest_share", 1.0),
        lambda theirs: setattr(theirs, "host_id", "another host"),
        lambda theirs: theirs.ClearField("backends"),  # choose_backend's affair
        set_layout("block_size", 64),
        set_layout("tp_size", 1),
        set_layout("pp_size", 4),
    ],
)
def test_what_need_not_agree(change: Callable[[transfer_pb2.Handshake], None]) -> None:
    """Rolling upgrades, other hosts, other layouts."""
    theirs = handshake("decode-0")
    change(theirs)
    check_fits(handshake(), theirs)
    check_fits(theirs, handshake())


def test_a_field_of_a_later_minor_version_is_no_obstacle() -> None:
    unknown_field = bytes([0xFA, 0x3F, 3]) + b"new"  # number 1023, three bytes
    theirs = transfer_pb2.Handshake.FromString(handshake("decode-0").SerializeToString() + unknown_field)
    check_fits(handshake(), theirs)


@pytest.mark.parametrize("name", ["block_size", "tp_size", "pp_size"])
def test_a_layout_that_is_not_told_is_refused(name: str) -> None:
    theirs = handshake("decode-0")
    theirs.layout.ClearField(name)
    with pytest.raises(PeerMismatchError, match=f"^layout.{name}: decode-0 does not say its own$"):
        check_fits(handshake(), theirs)


def test_the_first_backend_of_the_pullers_list_that_reaches_it_is_chosen() -> None:
    theirs = handshake("decode-0")
    ipc, nixl = Named("ipc", reaches=True), Named("nixl", reaches=True)
    assert choose_backend([nixl, ipc], "prefill-0", theirs) is ipc
    assert choose_backend([nixl, Named("ipc", reaches=False)], "prefill-0", theirs) is nixl
    theirs.backends[:] = ["unheard of", "nixl"]
    assert choose_backend([ipc, nixl], "prefill-0", theirs) is nixl


@pytest.mark.parametrize("ours", [[], [Named("torchdist", reaches=True)], [Named("ipc", reaches=False)]])
def test_no_backend_in_common_names_what_both_have(ours: list[Named]) -> None:
    with pytest.raises(PeerMismatchError) as refused:
        choose_backend(ours, "prefill-0", handshake("decode-0"))
    assert str(refused.value).startswith("backends: decode-0 can use ['ipc', 'nixl'], prefill-0 serves")


@pytest.mark.parametrize("asked", [Peer("prefill-0", 6), Peer("prefill-1", 7)])
def test_another_worker_or_life_at_the_address_is_not_the_peer(asked: Peer) -> None:
    check_is(Peer("prefill-0", 7), handshake())
    with pytest.raises(PeerUnreachableError, match=f"prefill-0@7 answers at the address of {asked}"):
        check_is(asked, handshake())
