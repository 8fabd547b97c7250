"""KV on its way between workers, and what fails."""

from __future__ import annotations

from panels import Dashboard, Panel, Query, Row, Variable
from promql import of_all_routers, quantiles, rate

WORKER = 'role=~"$role", worker=~"$worker"'
FIRING = 'alertname=~"Prelay.*", alertstate="firing"'

_HANDOFFS = Row(
    "Hand-offs",
    (
        Panel(
            "KV moved",
            "Bytes per second, by backend.",
            "Bps",
            (Query(rate("prelay_transfer_bytes_total", "backend", WORKER), "{{backend}}"),),
            stacked=True,
        ),
        Panel(
            "Copy time",
            "Of one offer's KV; a long prompt's KV comes in several.",
            "s",
            quantiles("prelay_transfer_seconds", "backend", WORKER),
        ),
        Panel(
            "Exposed transfer",
            "From the end of a prompt's prefill to the end of its KV's last copy: what a request waits for.",
            "s",
            quantiles("prelay_transfer_exposed_seconds", where=WORKER),
        ),
        Panel(
            "Hand-offs by state",
            "Of both sides, as each sees them.",
            "short",
            (Query(f"sum by (role, state) (prelay_leases{{{WORKER}}})", "{{role}} {{state}}"),),
        ),
        Panel(
            "Failed hand-offs",
            "Per second, by reason.",
            "short",
            (Query(rate("prelay_transfer_failures_total", "reason", WORKER), "{{reason}}"),),
            stacked=True,
        ),
        Panel(
            "Failed hand-offs, share",
            "Of those that were begun, over five minutes.",
            "percentunit",
            (Query("prelay:handoffs_failed:ratio_rate5m", "failed"),),
            limits=((0.01, "red"),),
        ),
        Panel(
            "Leases that ended by themselves",
            "In the last 10 minutes, without news from the peer.",
            "short",
            (
                Query(
                    f"sum by (role, worker) (increase(prelay_lease_expirations_total{{{WORKER}}}[10m]))",
                    "{{worker}}",
                ),
            ),
            width=12,
        ),
        Panel(
            "Checked copies",
            "Per second: offers whose copy was compared with its original.",
            "short",
            (Query(rate("prelay_transfer_digests_total", "outcome", WORKER), "{{outcome}}"),),
            width=12,
            stacked=True,
        ),
    ),
)

_FAULTS = Row(
    "Faults",
    (
        Panel(
            "Placements made up for",
            "Per second: lost placements whose request got another one, by what was the matter.",
            "short",
            (Query(rate("prelay_recoveries_total", "cause"), "{{cause}}"),),
            stacked=True,
        ),
        Panel(
            "Streams that went on",
            "Complete answers that had lost a worker after their first token, in the last 10 minutes.",
            "short",
            (Query("sum(increase(prelay_recovered_streams_total[10m]))", "streams"),),
        ),
        Panel(
            "Requests that failed",
            "Share of the judged ones that ended with an error, over five minutes.",
            "percentunit",
            (Query("prelay:failed:ratio_rate5m", "failed"),),
            limits=((0.01, "red"),),
        ),
        Panel(
            "Suspected",
            "1 while the worker is silent but not given up: nothing new goes there.",
            "bool_yes_no",
            (Query(of_all_routers("prelay_worker_suspected", "role, worker", WORKER), "{{worker}}"),),
            "state-timeline",
            width=12,
            at_most=1,
        ),
        Panel(
            "Alerts that fire",
            "By name.",
            "short",
            (Query(f"count by (alertname) (ALERTS{{{FIRING}}})", "{{alertname}}"),),
            width=12,
            stacked=True,
        ),
    ),
)

HANDOFFS = Dashboard(
    "prelay-handoffs",
    "prelay: hand-offs and faults",
    "KV between workers, what fails, and what is made up for.",
    (Variable("role", "prelay_worker_up"), Variable("worker", "prelay_worker_up")),
    (_HANDOFFS, _FAULTS),
)
