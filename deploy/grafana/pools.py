"""What workers are busy with: queues, batches, steps, KV blocks."""

from __future__ import annotations

from panels import Dashboard, Panel, Query, Row, Variable
from promql import mean, of_all_routers, quantiles, rate

WORKER = 'role=~"$role", worker=~"$worker"'

_WORKERS = Row(
    "Workers",
    (
        Panel(
            "Up",
            "1 while the worker is attached and shows signs of life.",
            "bool_yes_no",
            (Query(of_all_routers("prelay_worker_up", "role, worker", WORKER), "{{worker}}"),),
            "state-timeline",
            width=12,
            at_most=1,
        ),
        Panel(
            "Lives",
            "Times that each worker was started again in the last hour.",
            "short",
            (
                Query(
                    of_all_routers(f"changes(prelay_worker_epoch{{{WORKER}}}[1h])", "role, worker"),
                    "{{worker}}",
                ),
            ),
            width=12,
        ),
    ),
    height=6,
)

_LOAD = Row(
    "Load",
    (
        Panel(
            "Waiting at the gate",
            "Requests that wait in the router until a worker has a place for them.",
            "short",
            (Query("sum(prelay_gated_requests)", "requests"),),
        ),
        Panel(
            "Waiting at workers",
            "Requests that a worker has accepted, not yet in its batch.",
            "short",
            (Query(f"sum by (role, worker) (prelay_queue_requests{{{WORKER}}})", "{{worker}}"),),
        ),
        Panel(
            "Prompt tokens not yet computed",
            "By worker.",
            "short",
            (Query(f"sum by (role, worker) (prelay_queue_tokens{{{WORKER}}})", "{{worker}}"),),
        ),
        Panel(
            "Running",
            "Requests in the batch.",
            "short",
            (Query(f"sum by (role, worker) (prelay_running_requests{{{WORKER}}})", "{{worker}}"),),
        ),
        Panel(
            "Tokens computed",
            "Per second, of prompts and answers.",
            "short",
            (Query(rate("prelay_batch_tokens_sum", "role, worker", WORKER), "{{worker}}"),),
        ),
        Panel(
            "Busy",
            "Share of the time in which the engine computes a step.",
            "percentunit",
            (Query(rate("prelay_step_seconds_sum", "role, worker", WORKER), "{{worker}}"),),
            at_most=1,
        ),
    ),
)

_STEPS = Row(
    "Steps",
    (
        Panel(
            "Step time",
            "By what the step held: prompt chunks (prefill), answers (decode), both (mixed).",
            "s",
            quantiles("prelay_step_seconds", "phase", WORKER, (50, 99)),
            width=12,
        ),
        Panel(
            "Tokens per step",
            "Mean, by role.",
            "short",
            (Query(mean("prelay_batch_tokens", "role", WORKER), "{{role}}"),),
            width=12,
        ),
    ),
)

_KV = Row(
    "KV cache",
    (
        Panel(
            "KV blocks",
            "By state, of the workers chosen: owned by sequences, leased to hand-offs, cached prefixes "
            "(can be had at once), free.",
            "short",
            (Query(f"sum by (state) (prelay_kv_blocks{{{WORKER}}})", "{{state}}"),),
            stacked=True,
        ),
        Panel(
            "KV available",
            "Share of a worker's blocks that is free or cached.",
            "percentunit",
            (Query(f"worker:prelay_kv_available:ratio{{{WORKER}}}", "{{worker}}"),),
            at_most=1,
        ),
        Panel(
            "Preemptions",
            "Per second: sequences that gave up their KV to older ones, and are computed again.",
            "short",
            (Query(rate("prelay_preemptions_total", "role, worker", WORKER), "{{worker}}"),),
        ),
        Panel(
            "Prefix cache hits",
            "Tokens per second that need not be computed or moved.",
            "short",
            (Query(rate("prelay_prefix_cache_hit_tokens_total", "role, worker", WORKER), "{{worker}}"),),
            width=12,
        ),
        Panel(
            "Prefix index",
            "Cached blocks of all workers that the router knows of when it places requests.",
            "short",
            (Query("max(prelay_prefix_index_blocks)", "blocks"),),
            width=12,
        ),
    ),
)

POOLS = Dashboard(
    "prelay-pools",
    "prelay: pools",
    "Queues, batches, steps and KV blocks of the workers.",
    (Variable("role", "prelay_worker_up"), Variable("worker", "prelay_worker_up")),
    (_WORKERS, _LOAD, _STEPS, _KV),
)
