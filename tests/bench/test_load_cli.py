"""`prelay bench serve` as it is typed."""

from __future__ import annotations

import asyncio
import csv
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from bench import cli
from bench.load.client_use import ClientUse

Run = Callable[..., int]
SYNTHETIC = ["--dataset", "synthetic:prompt=8-20,answer=3"]
LIMITS = ["--slo", "ttft=60,tpot=60"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def start(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", "serve", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return start


class Server:
    """In a thread, as the command has an event loop of its own. Prompts of more than 18 tokens are refused
    while `sheds`."""

    def __init__(self) -> None:
        self.url = ""
        self.sheds = False
        self.headers: list[dict[str, str]] = []
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Server:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._complete),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._ended.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": 64}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        body = await request.json()
        if self.sheds and len(body["prompt"]) > 18:
            return web.json_response({"error": {"message": "too much to do"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for at in range(body["max_tokens"]):
            is_last = at + 1 == body["max_tokens"]
            choice = {"text": "x", "finish_reason": "length" if is_last else None}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def test_everything_it_can_write(
    run: Run, server: Server, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot, rows = tmp_path / "serve.png", tmp_path / "rows.csv"
    arguments = ["--url", server.url, *SYNTHETIC, *LIMITS, "--rates", "400,200", "--requests", "10"]
    outputs = ["--json", "--plot", str(plot), "--requests-out", str(rows)]
    assert run(*arguments, "--seeds", "2", "--warmup", "0.01", "--devices", "2", *outputs) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["url"] == server.url
    assert (result["dataset"], result["model"], result["devices"]) == (SYNTHETIC[1], "fake", 2)
    assert (result["slo"]["ttft_s"], result["slo"]["tpot_s"]) == (60, 60)
    assert [rate["rate"] for rate in result["rates"]] == [200, 400]
    assert [rate["requests"] for rate in result["rates"]] == [20, 20]
    assert [found["target"] for found in result["crossings"]] == [0.9, 0.99]
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader(rows.read_text().splitlines()))
    assert len(table) == 2 * (12 + 14)
    assert sum(row["judged"] == "1" for row in table) == 40
    assert {row["outcome"] for row in table} == {"good"}
    assert all(float(row["ttft_s"]) <= float(row["end_s"]) for row in table)
    assert {headers["x-slo-ttft-ms"] for headers in server.headers if "x-slo-ttft-ms" in headers} == {
        "60000.000"
    }


def test_for_people(run: Run, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.sheds = True
    arguments = ["--url", server.url, *LIMITS, "--rates", "100,200", "--requests", "20", "--no-send-slo"]
    assert run(*arguments, "--dataset", "synthetic:prompt=17-20,answer=3") == 1
    assert "sent alone, rejected: HTTP 429: too much to do" in capfd.readouterr().err
    server.sheds = False
    assert run(*arguments, *SYNTHETIC) == 0
    table = " ".join(capfd.readouterr().out.split())
    assert "fake, TTFT <= 60 s, TPOT <= 60 s synthetic:prompt=8-20,answer=3" in table
    assert "90% up to >= 200 req/s" in table
    assert "<512" in table
    assert not any("x-slo-ttft-ms" in headers for headers in server.headers)


def test_a_starved_client_warns(
    run: Run, server: Server, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.load.serve.ClientMeter.use", lambda meter, rows: ClientUse(0.95, 0.001, 0.001))
    arguments = ["--url", server.url, *SYNTHETIC, *LIMITS, "--rate", "400", "--requests", "4"]
    assert run(*arguments, "--json") == 0
    captured = capfd.readouterr()
    assert "prelay: warning: the client took 95% of a core" in captured.err
    result = json.loads(captured.out)
    assert result["client_cpu_share"] == 0.95
    assert "bottleneck" in result["client"]["warning"]


def test_limits_that_nothing_can_meet_are_refused(
    run: Run, server: Server, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "rows.csv"
    arguments = [
        "--url",
        server.url,
        *SYNTHETIC,
        "--rate",
        "4",
        "--requests",
        "4",
        "--requests-out",
        str(out),
    ]
    assert run(*arguments, "--slo", "ttft=0.000001,tpot=1") == 1
    assert "ttft is 1e-06 s, but a request alone on this server takes" in capfd.readouterr().err
    assert not out.exists()


def test_requests_that_do_not_fit_are_refused_with_what_to_do(
    run: Run, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--url", server.url, "--dataset", "synthetic:prompt=63,answer=2", "--rate", "4"]
    assert run(*arguments, "--requests", "4") == 2
    assert "leave them out with --max-tokens 64" in " ".join(capfd.readouterr().err.split())


TRACE = "arrival_s,prompt_tokens,output_tokens\n0,10,3\n0.5,12,3\n1,14,3\n"


def test_a_trace_at_its_own_pace(
    run: Run, server: Server, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    arguments = ["--url", server.url, "--trace", str(trace), *LIMITS, "--json"]
    assert run(*arguments, "--time-scale", "0.1", "--length-scale", "2", "--duration", "0.3") == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["arrivals"], result["time_scale"], result["length_scale"]) == ("trace", 0.1, 2)
    assert (result["rate"], result["requests"], result["dataset"]) == (None, 6, f"trace:{trace}")
    assert run(*arguments, "--rate", "60", "--requests", "9", "--max-tokens", "16") == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["arrivals"], result["requests"], result["left_out"]) == ("poisson", 9, 1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (SYNTHETIC, "Missing option '--url'"),
        (["--url", "x", *SYNTHETIC, "--rate", "1"], "give http(s)://HOST:PORT or grpc(s)://HOST:PORT"),
        (["--url", "URL", "--rate", "1"], "give either --trace FILE or --dataset"),
        (["--url", "URL", *SYNTHETIC, "--trace", "x", "--rate", "1"], "give either --trace FILE or"),
        (["--url", "URL", *SYNTHETIC], "--rate R or --rates A,B,C is missing"),
        (["--url", "URL", *SYNTHETIC, "--rate", "0"], "--rate '0.0': requests per second, greater than 0"),
        (["--url", "URL", *SYNTHETIC, "--rate", "nan"], "--rate 'nan'"),
        (["--url", "URL", *SYNTHETIC, "--rates", "1,,2"], "--rates ''"),
        (["--url", "URL", *SYNTHETIC, "--rates", "1,x"], "--rates 'x'"),
        (["--url", "URL", *SYNTHETIC, "--rates", "1,1"], "a rate is there twice"),
        (["--url", "URL", *SYNTHETIC, "--rates", "1", "--rate", "1"], "either --rate or --rates"),
        (["--url", "URL", *SYNTHETIC, "--rate", "1", "--duration", "0"], "--duration 0: a number greater"),
        (["--url", "URL", *SYNTHETIC, "--rate", "1", "--length-scale", "-1"], "--length-scale -1"),
        (
            ["--url", "URL", *SYNTHETIC, "--rate", "1", "--duration", "1", "--requests", "1"],
            "either --duration or --requests",
        ),
        (["--url", "URL", "--dataset", "alpaca", "--rate", "1"], "--dataset 'alpaca': there are synthetic"),
        (["--url", "URL", "--trace", "/no/such", "--rate", "1"], "/no/such: No such file"),
        (["--url", "URL", *SYNTHETIC, "--rate", "1", "--slo", "ttft=1"], "tpot is missing"),
        (["--url", "URL", *SYNTHETIC, "--rate", "1", "--arrivals", "uniform"], "--arrivals 'uniform'"),
        (["--url", "URL", *SYNTHETIC, "--rate", "1", "--arrivals", "trace"], "no arrivals of its own"),
        (["--url", "URL", *SYNTHETIC, "--rate", "1", "--time-scale", "2"], "for a trace's own pace"),
        (["--url", "URL", *SYNTHETIC, "--rate", "1", "--header", "x"], "write it as NAME:VALUE"),
        (["--url", "URL", *SYNTHETIC, "--rate", "1", "--plot", "/no/such/x.png"], "no directory /no/such"),
        (["--url", "URL", *SYNTHETIC, "--rate", "1", "--requests-out", "/no/such/x"], "no directory"),
    ],
)
def test_nonsense_is_refused_before_anything_is_sent(
    run: Run, capfd: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    # Nothing listens there: whoever asks it ends with 1.
    assert run(*("http://127.0.0.1:1" if one == "URL" else one for one in arguments)) == 2
    captured = capfd.readouterr()
    assert complaint in captured.err
    assert captured.err.startswith("prelay: error: ")
    assert not captured.out


def test_where_nothing_listens(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--url", "http://127.0.0.1:1", *SYNTHETIC, "--rate", "1") == 1
    assert "http://127.0.0.1:1/v1/models gives no OpenAI-compatible answer" in capfd.readouterr().err
