"""A Prometheus of the test's own: the configuration of deploy/, only faster, and for one deployment."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"

Sample = tuple[dict[str, str], float]


class Prometheus:
    """To be asked; `address` is HOST:PORT."""

    def __init__(self, address: str, log: Path) -> None:
        self.address = address
        self._log = log

    async def ask(self, query: str) -> list[Sample]:
        """What an instant query finds: labels and values."""
        result = await self._get("query", query=query)
        if result["resultType"] == "scalar":
            return [({}, float(result["result"][1]))]
        return [(each["metric"], float(each["value"][1])) for each in result["result"]]

    async def shown(self, query: str) -> list[float]:
        """All values that a graph of the last five minutes has."""
        now = time.time()
        result = await self._get("query_range", query=query, start=str(now - 300), end=str(now), step="1")
        return [float(value) for each in result["result"] for _, value in each["values"]]

    async def series_names(self, job: str) -> set[str]:
        """Names of all that was ever scraped from the targets of a job."""
        return set(await self._get("label/__name__/values", **{"match[]": f'{{job="{job}"}}'}))

    async def until(self, query: str, wanted: float, within_s: float = 60.0) -> None:
        """Waits for the only sample of a query to have this value."""
        end = time.monotonic() + within_s
        while True:
            seen = await self.ask(query)
            if [value for _, value in seen] == [wanted]:
                return
            assert time.monotonic() < end, f"{query} is {seen}, not {wanted}; {self._log.read_text()[-2000:]}"
            await asyncio.sleep(0.2)

    async def _get(self, what: str, **parameters: str) -> Any:
        async with (
            aiohttp.ClientSession(f"http://{self.address}") as http,
            http.get(f"/api/v1/{what}", params=parameters) as response,
        ):
            answer = await response.json()
            assert answer["status"] == "success", (parameters, answer)
            return answer["data"]


@contextmanager
def prometheus(folder: Path, router_metrics: str) -> Iterator[Prometheus]:
    """Runs in `folder` and watches the deployment whose router has its metrics there."""
    config = yaml.safe_load(
        (PROMETHEUS / "prometheus.yml").read_text().replace("127.0.0.1:9090", router_metrics)
    )
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / pattern) for pattern in config["rule_files"]]
    for job in config["scrape_configs"]:
        for discovery in job.get("http_sd_configs", ()):
            discovery["refresh_interval"] = "1s"
    file, log = folder / "prometheus.yml", folder / "log"
    file.write_text(yaml.safe_dump(config))
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Prometheus(_listening(process, log), log)
    finally:
        process.terminate()
        process.wait()


def _listening(process: subprocess.Popen[bytes], log: Path) -> str:
    """Waits until it can be asked."""
    while "Server is ready" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    (listener,) = [
        connection.laddr
        for connection in psutil.Process(process.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    return f"{listener.ip}:{listener.port}"
