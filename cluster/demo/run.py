"""`prelay demo`, in the process that runs the deployment: the main job on real input, shown and checked.

1. One prefill and one decode worker come up, by the same code as in `prelay serve`.
2. Two prompts one after the other, streamed visibly: one through gRPC, one through HTTP.
3. Sixteen prompts at once, then six one after the other, through both.
4. How each was served, and the attainment of the SLO.
5. All 24 again in this process, without hand-off: every answer must be the same.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console

from cluster.config import ServeConfig
from cluster.demo.clients import Answer, DemoClients
from cluster.demo.prompts import DemoPrompt, demo_prompts
from cluster.demo.reference import Reference, compute_references, difference
from cluster.demo.report import Typewriter, answers_json, print_answers
from cluster.errors import DemoError
from cluster.launch import Deployment, Ready
from cluster.orders import Order
from cluster.reporter import reporter_for

_NUM_VISIBLE = 2
_NUM_TOGETHER = 16


def demo_config() -> ServeConfig:
    """The defaults on free ports, resolved: the demo runs beside whatever else there is."""
    free = "127.0.0.1:0"
    ports = {"http": free, "grpc": free, "metrics": free, "admin": free}
    return ServeConfig.model_validate({"router": ports}).resolved()


async def demo(order: Order, run_directory: Path) -> None:
    """Raises ClusterError if the deployment fails, DemoError if a request fails or an answer differs."""
    config, console = order.config, Console(quiet=order.as_json)
    slo_name, slo = config.slo.default, config.slo.classes[config.slo.default]
    reporter = reporter_for(Console(stderr=True))
    router_log = reporter.event if order.debug else _ignore
    deployment = Deployment(config, run_directory, reporter, router_log)
    try:
        ready = await deployment.start()
        reporter.close()
        console.print(f"One prefill and one decode worker are up after {ready.startup_s:.1f} s.\n")
        prompts = demo_prompts()
        answers = await deployment.run_while(_ask_all(ready, prompts, console))
        print_answers(console, answers, slo_name, slo)
        with closing(reporter_for(Console(stderr=True))) as checking:
            references = await asyncio.to_thread(
                compute_references,
                Path(str(config.model.path)),
                prompts,
                lambda done: checking.progress("check", "the same in one process", done / len(prompts)),
            )
        complaints = complaints_about(answers, references)
        if order.as_json:
            print(json.dumps(answers_json(answers, slo_name, slo, equal=not complaints)), flush=True)
        if complaints:
            raise DemoError(
                "\n".join([f"{len(complaints)} complaints about {len(answers)} answers:", *complaints])
            )
        console.print(
            f"[bold green]All {len(answers)} answers are equal[/] to those of one process without hand-off."
        )
    finally:
        reporter.close()
        await deployment.stop()


def complaints_about(answers: Sequence[Answer], references: Sequence[Reference]) -> list[str]:
    """A text for each answer that is not what it must be, and for each time that does not add up."""
    found = (
        (answer, difference(answer, reference)) for answer, reference in zip(answers, references, strict=True)
    )
    wrong = [f"request {answer.prompt.number}: {what}" for answer, what in found if what is not None]
    for answer in answers:
        stages_s, duration_s = sum(answer.served.stages.values()), answer.served.duration_s
        if not math.isclose(stages_s, duration_s, abs_tol=1e-6):
            number = answer.prompt.number
            wrong.append(f"request {number}: its stages take {stages_s:.6f} s, it took {duration_s:.6f} s")
    return wrong


async def _ask_all(ready: Ready, prompts: Sequence[DemoPrompt], console: Console) -> list[Answer]:
    """The answers in the order of the prompts."""
    visible, rest = prompts[:_NUM_VISIBLE], prompts[_NUM_VISIBLE:]
    together, in_turn = rest[:_NUM_TOGETHER], rest[_NUM_TOGETHER:]
    model = str(ready.config.model.name)
    answers = []
    assert ready.addresses is not None
    async with DemoClients(ready.addresses.http, ready.addresses.grpc, model) as clients:
        for prompt in visible:
            typewriter = Typewriter(console)
            typewriter.begin(prompt)
            answers.append(await clients.ask(prompt, typewriter.text))
            typewriter.end(answers[-1])
        console.print(f"{len(together)} more at once, then {len(in_turn)} one after the other ...\n")
        answers += await asyncio.gather(*(clients.ask(prompt, _ignore) for prompt in together))
        for prompt in in_turn:
            answers.append(await clients.ask(prompt, _ignore))
    return answers


def _ignore(line: str) -> None:
    """Not shown."""
