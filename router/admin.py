"""`RouterAdmin`: how the launcher and operators talk to the router, on a private port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import grpc.aio
from prelay.v1 import admin_pb2, admin_pb2_grpc

from router.errors import InvalidRequestError, RouterError
from router.grpc_errors import abort
from router.live_requests import LiveRequests
from router.requests import Outcome
from router.slo import SloPolicy
from router.tally import Quantiles
from router.worker_link import ROLE_OF_PROTO, Registration
from router.workers import Workers

_Context = grpc.aio.ServicerContext[Any, Any]


class AdminApi(admin_pb2_grpc.RouterAdminServicer):
    """The servicer."""

    def __init__(
        self,
        workers: Workers,
        live: LiveRequests,
        slo: SloPolicy,
        policy_name: str,
        clock: Callable[[], float],
    ) -> None:
        self._workers = workers
        self._live = live
        self._slo = slo
        self._policy_name = policy_name
        self._clock = clock
        self._started_at = clock()
        self._controller = ""

    async def RegisterWorker(
        self, request: admin_pb2.RegisterWorkerRequest, context: _Context
    ) -> admin_pb2.RegisterWorkerResponse:
        """Returns when the worker is attached."""
        try:
            role = ROLE_OF_PROTO.get(request.role)
            if role is None or not request.worker_id or not request.address:
                raise InvalidRequestError("worker_id, role and address must be given")
            registration = Registration(
                request.worker_id, request.epoch, role, request.address, request.proof
            )
            # A caller that hangs up must not leave half an attachment behind.
            await asyncio.shield(self._workers.register(registration))
        except RouterError as error:
            await abort(context, error)
        return admin_pb2.RegisterWorkerResponse()

    async def RemoveWorker(
        self, request: admin_pb2.RemoveWorkerRequest, context: _Context
    ) -> admin_pb2.RemoveWorkerResponse:
        """Forgets that life of the worker."""
        if not self._workers.remove(request.worker_id, request.epoch, comes_back=request.comes_back):
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"no worker {request.worker_id!r} with epoch {request.epoch} is registered",
            )
        return admin_pb2.RemoveWorkerResponse()

    async def DrainWorker(
        self, request: admin_pb2.DrainWorkerRequest, context: _Context
    ) -> admin_pb2.DrainWorkerResponse:
        """That life of the worker gets nothing new, or does again."""
        live_requests = self._workers.drain(request.worker_id, request.epoch, draining=request.draining)
        if live_requests is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"no worker {request.worker_id!r} with epoch {request.epoch} is attached",
            )
        return admin_pb2.DrainWorkerResponse(live_requests=live_requests)

    async def SetController(
        self, request: admin_pb2.SetControllerRequest, context: _Context
    ) -> admin_pb2.SetControllerResponse:
        """Who asks for the status is told of it."""
        self._controller = request.address
        return admin_pb2.SetControllerResponse()

    async def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: _Context
    ) -> admin_pb2.GetStatusResponse:
        """Workers, load, and what became of the requests so far."""
        tally = self._live.tally
        by_class = tally.by_class()
        return admin_pb2.GetStatusResponse(
            workers=[
                admin_pb2.WorkerStatus(
                    info=link.info,
                    up=link.up,
                    load=link.last_snapshot,
                    suspected=self._workers.suspected(link),
                    live_requests=self._workers.live_requests(link),
                    draining=self._workers.draining(link),
                )
                for link in self._workers.links()
            ],
            gated_requests=self._live.gated,
            live_requests=len(self._live),
            outcomes=_counts(tally.outcomes),
            policy=self._policy_name,
            classes={
                name: admin_pb2.ClassOutcomes(
                    outcomes=_counts(by_class.get(name, {})), ttft_limit_s=one.ttft_s, tpot_limit_s=one.tpot_s
                )
                for name, one in self._slo.classes.items()
            },
            ttft=_quantiles(tally.ttft.quantiles()),
            tpot=_quantiles(tally.tpot.quantiles()),
            tokens=tally.tokens,
            uptime_s=self._clock() - self._started_at,
            controller=self._controller,
        )

    async def GetWorkload(
        self, request: admin_pb2.GetWorkloadRequest, context: _Context
    ) -> admin_pb2.GetWorkloadResponse:
        """What has come lately, and what of it has changed."""
        now = self._clock()
        seen = self._live.workload.seen(now)
        return admin_pb2.GetWorkloadResponse(
            seconds=seen.seconds,
            rate=seen.rate,
            hit_share=seen.hit_share,
            shapes=[
                admin_pb2.RequestShape(prompt_tokens=prompt, answer_tokens=answer)
                for prompt, answer in seen.shapes
            ],
            drifts=[
                admin_pb2.Drift(trait=one.trait.value, before=one.before, now=one.now)
                for one in self._live.workload.drifts(now)
            ],
            latest_rate=seen.latest_rate,
            num_latest=seen.num_latest,
        )


def _counts(outcomes: Mapping[Outcome, int]) -> dict[str, int]:
    return {outcome.value: count for outcome, count in outcomes.items()}


def _quantiles(quantiles: Quantiles) -> admin_pb2.LatencyQuantiles:
    return admin_pb2.LatencyQuantiles(p50_s=quantiles.p50_s, p90_s=quantiles.p90_s, p99_s=quantiles.p99_s)
