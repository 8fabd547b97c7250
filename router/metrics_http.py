"""The metrics port: this process's metrics, and where Prometheus finds the workers'."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from router.workers import Workers


def metrics_application(registry: CollectorRegistry, workers: Workers) -> web.Application:
    """GET /metrics, and GET /targets in the format of Prometheus' http_sd."""

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def targets(request: web.Request) -> web.Response:
        return web.json_response(
            [
                {
                    "targets": [link.info.metrics_address],
                    "labels": {"role": link.role.value, "worker": link.worker_id},
                }
                for link in workers.links()
                if link.info.metrics_address
            ]
        )

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/targets", targets)])
    return app
