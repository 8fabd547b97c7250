"""What the router decides, and how right it is about the future."""

from __future__ import annotations

from panels import Dashboard, Panel, Query, Row
from promql import mean, quantiles, rate

_DECISIONS = Row(
    "Decisions",
    (
        Panel(
            "Admission",
            "Requests per second that are let in, let in as another SLO class, or refused, and why.",
            "reqps",
            (Query(rate("prelay_admission_total", "decision, reason"), "{{decision}} {{reason}}"),),
            stacked=True,
        ),
        Panel(
            "Refused",
            "Share of the judged requests, over five minutes.",
            "percentunit",
            (Query("prelay:refused:ratio_rate5m", "refused"),),
            at_most=1,
        ),
        Panel(
            "Refused in vain",
            "Per second: requests refused because they would be late, and those of them for which there "
            "was room after all.",
            "reqps",
            (
                Query(rate("prelay_could_have_served_total"), "could have been served"),
                Query(
                    rate("prelay_admission_total", where='decision="rejected", reason="late"'),
                    "refused as late",
                ),
            ),
        ),
        Panel(
            "Placement",
            "Per second, by kind. Local: a mixed worker reads the prompt because that is best; deflected: "
            "because the prefill workers would be late.",
            "reqps",
            (Query(rate("prelay_placement_total", "kind"), "{{kind}}"),),
            stacked=True,
        ),
        Panel(
            "Waiting at the gate",
            "Requests.",
            "short",
            (Query("sum(prelay_gated_requests)", "requests"),),
        ),
        Panel(
            "Time at the gate",
            "Of all requests, also those that did not wait.",
            "s",
            quantiles("prelay_stage_seconds", where='stage="gate"'),
        ),
    ),
)


def _predicted(what: str, name: str) -> Panel:
    return Panel(
        f"Observed over predicted: {name}",
        "1 is right, 2 twice as long as was thought. Only policies that predict are judged.",
        "short",
        quantiles("prelay_prediction_error_ratio", where=f'what="{what}"', of=(10, 50, 90)),
        limits=((1, "text"),),
    )


_PREDICTIONS = Row(
    "Predictions",
    (
        _predicted("ttft", "time to first token"),
        _predicted("tpot", "time per output token"),
        _predicted("transfer", "exposed transfer"),
    ),
)

_ATTEMPTS = Row(
    "Attempts",
    (
        Panel(
            "Placements per request",
            "Mean; above 1, placements were lost and made up for, below 1, requests ended at the gate.",
            "short",
            (Query(mean("prelay_request_attempts"), "placements"),),
            width=12,
        ),
        Panel(
            "Paused streams",
            "Per second: streams that were paused because their client did not read.",
            "short",
            (Query(rate("prelay_paused_streams_total"), "pauses"),),
            width=12,
        ),
    ),
)

DECISIONS = Dashboard(
    "prelay-decisions",
    "prelay: decisions",
    "Admission, placement and predictions of the router.",
    (),
    (_DECISIONS, _PREDICTIONS, _ATTEMPTS),
)
