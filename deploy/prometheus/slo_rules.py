"""Writes rules/slo.yml: attainment over several windows, and alerts on how fast it eats the error budget.

    python deploy/prometheus/slo_rules.py --target 0.9      # write
    python deploy/prometheus/slo_rules.py --check           # is the file what its own target comes to?

With a target of T, 1 - T of the requests may be bad: the budget. Burn is the share that is bad over the share
that may be: a burn of 1 all the time uses up the budget, and the largest there can be is M = 1 / (1 - T),
when nothing is good. The multiwindow thresholds of the Site Reliability Workbook (chapter 5) were made for
T = 0.999, where M is 1000; with T = 0.9, M is 10, and their 14.4 could never be exceeded. So each threshold
here is theirs, or a point part of the way from 1 to M if that is less: 3.25, 1.9 and 1 for T = 0.9, theirs
from T = 0.99 on.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

OUT = Path(__file__).parent / "rules" / "slo.yml"
WINDOWS = {"5m": 300, "30m": 1800, "1h": 3600, "6h": 21600, "3d": 259200}
LEAST_REQUESTS = 30
"""Of a class in the long window: a share of fewer says little."""


@dataclass(frozen=True, slots=True)
class BurnAlert:
    """Fires while the burn is above the threshold over both windows: the long one says that it matters, the
    short one that it still goes on. workbook: the workbook's threshold; way: how far from 1 to M ours may be.
    """

    name: str
    severity: str
    long: str
    short: str
    workbook: float
    way: float

    def threshold(self, target: float) -> float:
        largest = 1 / (1 - target)
        return round(min(self.workbook, 1 + self.way * (largest - 1)), 4)


ALERTS = (
    BurnAlert("PrelayBudgetBurnsFast", "critical", "1h", "5m", 14.4, 0.25),
    BurnAlert("PrelayBudgetBurns", "critical", "6h", "30m", 6, 0.1),
    BurnAlert("PrelayBudgetBurnsSlowly", "warning", "3d", "6h", 1, 0),
)


def rules(target: float) -> str:
    """The file. Raises ValueError unless 0 < target < 1."""
    if not 0 < target < 1:
        raise ValueError(f"the target is {target}, but must be between 0 and 1: 0.9 means that 90 % are good")
    parts = [
        f"# Written by slo_rules.py --target {target:g}; run that again rather than edit this.",
        "groups:",
        "  - name: prelay-attainment",
        "    rules:",
        "      - record: prelay:attainment_target:ratio",
        f"        expr: vector({target:g})",
    ]
    for window in WINDOWS:
        parts += _window(window, target)
    parts += ["  - name: prelay-burn", "    rules:"]
    for alert in ALERTS:
        parts += _alert(alert, target)
    parts += _nothing_good()
    return "\n".join(parts) + "\n"


def _window(window: str, target: float) -> list[str]:
    """Judged and good requests, attainment by class and of all, and burn."""
    good = f'rate(prelay_requests_total{{outcome="good"}}[{window}])'
    judged = f'rate(prelay_requests_total{{outcome!="cancelled"}}[{window}])'
    return [
        f"      - record: slo_class:prelay_requests_judged:rate{window}",
        f"        expr: sum by (slo_class) ({judged})",
        f"      - record: slo_class:prelay_requests_good:rate{window}",
        f"        expr: sum by (slo_class) ({good})",
        f"      - record: slo_class:prelay_attainment:ratio_rate{window}",
        f"        expr: slo_class:prelay_requests_good:rate{window}"
        f" / slo_class:prelay_requests_judged:rate{window}",
        f"      - record: prelay:attainment:ratio_rate{window}",
        f"        expr: sum(slo_class:prelay_requests_good:rate{window})"
        f" / sum(slo_class:prelay_requests_judged:rate{window})",
        f"      - record: slo_class:prelay_budget_burn:ratio_rate{window}",
        f"        expr: (1 - slo_class:prelay_attainment:ratio_rate{window}) / {1 - target:.6g}",
    ]


def _alert(alert: BurnAlert, target: float) -> list[str]:
    limit = alert.threshold(target)
    bad = f"{limit * (1 - target):.0%}"
    return [
        f"      - alert: {alert.name}",
        "        expr: >-",
        f"          slo_class:prelay_budget_burn:ratio_rate{alert.long} > {limit:g}",
        f"          and slo_class:prelay_budget_burn:ratio_rate{alert.short} > {limit:g}",
        f"          and slo_class:prelay_requests_judged:rate{alert.long} * {WINDOWS[alert.long]}"
        f" >= {LEAST_REQUESTS}",
        f"        labels: {{severity: {alert.severity}}}",
        "        annotations:",
        "          summary: Class {{ $labels.slo_class }} uses its error budget"
        " {{ $value | humanize }} times as fast as it may",
        f"          description: More than {bad} of its requests are bad, over {alert.long} and still over"
        f" {alert.short}; {1 - target:.3g} of them may be.",
    ]


def _nothing_good() -> list[str]:
    """A burn over an hour takes a while to show that nothing works at all."""
    return [
        "      - alert: PrelayNothingGood",
        "        expr: >-",
        "          slo_class:prelay_attainment:ratio_rate5m == 0",
        f"          and slo_class:prelay_requests_judged:rate5m * {WINDOWS['5m']} >= {LEAST_REQUESTS}",
        "        for: 1m",
        "        labels: {severity: critical}",
        "        annotations:",
        "          summary: Not one request of class {{ $labels.slo_class }} was good in five minutes",
        "          description: Outcomes tell which limit they missed, stages where their time went.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the rules on attainment.")
    parser.add_argument("--target", type=float, default=0.9, help="share of requests that shall be good")
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    options = parser.parse_args()
    try:
        if not options.check:
            OUT.write_text(rules(options.target), encoding="utf-8")
            return
        found = OUT.read_text(encoding="utf-8")
        named = re.search(r"--target (\S+);", found)
        if named is None or found != rules(float(named[1])):
            sys.exit(f"{OUT.name} is not what slo_rules.py writes: run it")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
