"""Statuses as a router tells them."""

from __future__ import annotations

from prelay.v1 import admin_pb2, worker_pb2


def worker(worker_id: str, role: worker_pb2.Role, up: bool = True, **load: int) -> admin_pb2.WorkerStatus:
    info = worker_pb2.WorkerInfo(
        worker_id=worker_id,
        epoch=7,
        role=role,
        address="127.0.0.1:1",
        metrics_address="127.0.0.1:2",
        model="storyteller",
        block_size=16,
        num_blocks=100,
        pid=42,
    )
    return admin_pb2.WorkerStatus(info=info, up=up, load=worker_pb2.Snapshot(**load), live_requests=3)


def busy_status() -> admin_pb2.GetStatusResponse:
    """Three pools, a suspected and a dead worker, two classes of which one was never asked for."""
    decode = worker("decode-10", worker_pb2.ROLE_DECODE, owned_blocks=50, leased_blocks=3, cached_blocks=20)
    decode.load.decoding_requests, decode.load.decode_context = 2, 1234
    decode.load.steps.add(decode_requests=2, seconds=0.012)
    decode.load.steps.add(decode_requests=2, seconds=0.0171)
    suspected = worker("decode-2", worker_pb2.ROLE_DECODE)
    suspected.suspected = True
    return admin_pb2.GetStatusResponse(
        workers=[
            decode,
            worker("mixed-0", worker_pb2.ROLE_MIXED),
            suspected,
            worker("prefill-0", worker_pb2.ROLE_PREFILL, queue_requests=4, queue_tokens=2048),
            worker("prefill-1", worker_pb2.ROLE_PREFILL, up=False),
        ],
        gated_requests=5,
        live_requests=11,
        outcomes={"good": 6, "ttft_miss": 1, "rejected": 1, "cancelled": 2},
        policy="goodput",
        classes={
            "standard": admin_pb2.ClassOutcomes(
                outcomes={"good": 6, "ttft_miss": 1, "rejected": 1, "cancelled": 2},
                ttft_limit_s=2.0,
                tpot_limit_s=0.2,
            ),
            "batch": admin_pb2.ClassOutcomes(ttft_limit_s=30.0, tpot_limit_s=1.0),
        },
        ttft=admin_pb2.LatencyQuantiles(p50_s=0.2, p90_s=0.5, p99_s=1.75),
        tokens=4321,
        uptime_s=3725.0,
    )
