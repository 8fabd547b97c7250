"""The first dashboard to open: are requests good, and where does their time go?"""

from __future__ import annotations

from panels import Dashboard, Panel, Query, Row, Variable
from promql import mean, quantiles, rate

CLASS = 'slo_class=~"$slo_class"'
TTFT_STAGES = 'stage=~"gate|prefill_queue|prefill|first_token"'
REQUESTS = "prelay_requests_total"
GOOD = f'outcome="good", {CLASS}'
JUDGED = f'outcome!="cancelled", {CLASS}'
TOKENS = rate("prelay_tokens_total")

_NOW = Row(
    "Now",
    (
        Panel(
            "Joint attainment",
            "Good requests over all but those that their clients cancelled, over five minutes. Refused and "
            "failed ones count against it.",
            "percentunit",
            (
                Query(
                    f"sum(slo_class:prelay_requests_good:rate5m{{{CLASS}}})"
                    f" / sum(slo_class:prelay_requests_judged:rate5m{{{CLASS}}})"
                ),
            ),
            "stat",
            width=4,
        ),
        Panel(
            "Error budget burn",
            "How fast the worst class uses up what may be bad: at 1 it just may go on like this.",
            "short",
            (Query(f"max(slo_class:prelay_budget_burn:ratio_rate5m{{{CLASS}}})"),),
            "stat",
            width=4,
            limits=((1, "orange"), (2, "red")),
        ),
        Panel(
            "Goodput per device",
            "Good requests per second over all devices that the deployment holds.",
            "reqps",
            (Query("prelay:goodput_per_device:rate5m"),),
            "stat",
            width=4,
        ),
        Panel("Good requests", "Per second.", "reqps", (Query(rate(REQUESTS, where=GOOD)),), "stat", width=4),
        Panel(
            "Judged requests",
            "Per second: all that ended, but for cancelled ones.",
            "reqps",
            (Query(rate(REQUESTS, where=JUDGED)),),
            "stat",
            width=4,
        ),
        Panel("Tokens", "Of answers, per second.", "short", (Query(TOKENS),), "stat", width=4),
    ),
    height=5,
)

_GOODNESS = Row(
    "Goodness",
    (
        Panel(
            "Joint attainment by class",
            "TTFT and TPOT both within the request's limits. The target is that of "
            "deploy/prometheus/slo_rules.py.",
            "percentunit",
            (
                Query(
                    f"{rate(REQUESTS, 'slo_class', GOOD)} / {rate(REQUESTS, 'slo_class', JUDGED)}",
                    "{{slo_class}}",
                ),
                Query("prelay:attainment_target:ratio", "target"),
            ),
            at_most=1,
        ),
        Panel(
            "How requests end",
            "Those that ended, per second.",
            "reqps",
            (Query(rate(REQUESTS, "outcome", CLASS), "{{outcome}}"),),
            stacked=True,
        ),
        Panel(
            "Goodput per device",
            "Over five minutes. Devices of all pools count.",
            "reqps",
            (Query("prelay:goodput_per_device:rate5m", "good requests per device"),),
        ),
        Panel(
            "Error budget burn",
            "Above 1 more is bad than may be; the alerts go by the longer windows.",
            "short",
            tuple(
                Query(f"max(slo_class:prelay_budget_burn:ratio_rate{window}{{{CLASS}}})", window)
                for window in ("5m", "1h", "6h", "3d")
            ),
            limits=((1, "red"),),
        ),
        Panel(
            "Devices",
            "That the workers of each role hold.",
            "short",
            (Query("role:prelay_devices:max", "{{role}}"),),
            stacked=True,
        ),
        Panel(
            "Tokens",
            "Of answers, per second.",
            "short",
            (Query(TOKENS, "tokens"),),
        ),
    ),
)

_TIMES = Row(
    "Times",
    (
        Panel(
            "Time to first token",
            "From arrival; the limits are those of the classes.",
            "s",
            (
                *quantiles("prelay_time_to_first_token_seconds", "slo_class", CLASS),
                Query(
                    f'max by (slo_class) (prelay_slo_limit_seconds{{limit="ttft", {CLASS}}})',
                    "limit {{slo_class}}",
                ),
            ),
        ),
        Panel(
            "Time per output token",
            "(last token - first token) / (tokens - 1) of each answer.",
            "s",
            (
                *quantiles("prelay_request_time_per_output_token_seconds", "slo_class", CLASS),
                Query(
                    f'max by (slo_class) (prelay_slo_limit_seconds{{limit="tpot", {CLASS}}})',
                    "limit {{slo_class}}",
                ),
            ),
        ),
        Panel(
            "Inter-token latency",
            "Between consecutive tokens.",
            "s",
            quantiles("prelay_inter_token_latency_seconds", "slo_class", CLASS),
        ),
        Panel(
            "Where the first token's time goes",
            "Mean seconds of each stage up to the first token, of all classes.",
            "s",
            (Query(mean("prelay_stage_seconds", "stage", TTFT_STAGES), "{{stage}}"),),
            stacked=True,
        ),
        Panel(
            "Where requests' time goes",
            "Share of each stage in the time of all requests.",
            "percentunit",
            (Query("stage:prelay_stage_seconds:share_rate5m", "{{stage}}"),),
            stacked=True,
            at_most=1,
        ),
        Panel(
            "Duration",
            "From arrival to the end.",
            "s",
            quantiles("prelay_request_duration_seconds", "slo_class", CLASS),
        ),
    ),
)

GOODPUT = Dashboard(
    "prelay-goodput",
    "prelay: goodput",
    "Requests that meet both of their limits, and where their time goes.",
    (Variable("slo_class", "prelay_requests_total"),),
    (_NOW, _GOODNESS, _TIMES),
)
