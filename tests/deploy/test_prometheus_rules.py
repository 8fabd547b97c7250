"""Each alert fires when it should and at no other time; the rules on attainment are right for any target."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules"
STEP_S = 15

Series = dict[str, str]

needs_promtool = [
    pytest.mark.prometheus,
    pytest.mark.skipif(
        shutil.which("promtool") is None, reason="promtool is missing: install Debian's package prometheus"
    ),
]

ONE_ROUTER, P, D = (
    'job="prelay-router"',
    'role="prefill", worker="prefill-0"',
    'role="decode", worker="decode-0"',
)

HEALTHY: Series = {
    f"up{{{ONE_ROUTER}}}": "1x200",
    f'up{{job="prelay-worker", {P}}}': "1x200",
    f'up{{job="prelay-worker", {D}}}': "1x200",
    f"prelay_worker_up{{{P}}}": "1x200",
    f"prelay_worker_up{{{D}}}": "1x200",
    f"prelay_worker_epoch{{{P}}}": "7x200",
    f"prelay_worker_epoch{{{D}}}": "7x100 8x100",
    f"prelay_worker_suspected{{{P}}}": "0x200",
    f"prelay_worker_suspected{{{D}}}": "0x50 1 0x150",
    "prelay_gated_requests": "3x200",
    'prelay_placement_total{kind="disaggregated"}': "0+100x200",
    f'prelay_kv_blocks{{{D}, state="free"}}': "0x200",
    f'prelay_kv_blocks{{{D}, state="cached"}}': "10x200",
    f'prelay_kv_blocks{{{D}, state="owned"}}': "80x200",
    f'prelay_kv_blocks{{{D}, state="leased"}}': "10x200",
    f"prelay_lease_expirations_total{{{D}}}": "4x200",
    f'prelay_transfer_failures_total{{{D}, reason="transfer_failed"}}': "3+0.5x200",
    f'prelay_transfer_digests_total{{{D}, outcome="bad"}}': "0x200",
    'prelay_requests_total{slo_class="standard", outcome="good"}': "0+95x200",
    'prelay_requests_total{slo_class="standard", outcome="rejected"}': "0+4.5x200",
    'prelay_requests_total{slo_class="standard", outcome="error"}': "0+0.5x200",
    'prelay_requests_total{slo_class="standard", outcome="cancelled"}': "0+50x200",
    'prelay_admission_total{decision="rejected", reason="late"}': "0+4.5x200",
    "prelay_could_have_served_total": "0+0.05x200",
    'prelay_prediction_error_ratio_bucket{what="ttft", le="0.8"}': "0+10x200",
    'prelay_prediction_error_ratio_bucket{what="ttft", le="1.25"}': "0+90x200",
    'prelay_prediction_error_ratio_bucket{what="ttft", le="+Inf"}': "0+100x200",
    'prelay_prediction_error_ratio_count{what="ttft"}': "0+100x200",
}
"""50 minutes of a deployment in which little goes wrong: one restart, a moment of silence, some failures."""

TROUBLE: dict[str, tuple[Series, set[str]]] = {
    "PrelayRouterGone": ({f"up{{{ONE_ROUTER}}}": "0x200"}, set()),
    "PrelayNobodyReads": ({f"prelay_worker_up{{{P}}}": "0x200"}, {"PrelayWorkerDown"}),
    "PrelayNobodyWrites": ({f"prelay_worker_up{{{D}}}": "0x200"}, {"PrelayWorkerDown"}),
    "PrelayWorkerDown": ({'prelay_worker_up{role="prefill", worker="prefill-1"}': "0x200"}, set()),
    "PrelayWorkerRestarts": ({f"prelay_worker_epoch{{{D}}}": "1x150 2x15 3x15 4x15 5x15"}, set()),
    "PrelayWorkerFallsSilent": (
        {f"prelay_worker_suspected{{{D}}}": "0x160 1 1 0x5 1 1 0x5 1 1 1 0x40"},
        set(),
    ),
    "PrelayWorkerNotScraped": ({f'up{{job="prelay-worker", {P}}}': "0x200"}, set()),
    "PrelayGateStuck": (
        {'prelay_placement_total{kind="disaggregated"}': "0+100x150 15000x50"},
        {"PrelayHandoffsFail"},  # what failed was begun before
    ),
    "PrelayKvExhausted": ({f'prelay_kv_blocks{{{D}, state="cached"}}': "1x200"}, set()),
    "PrelayLeasesExpire": ({f"prelay_lease_expirations_total{{{D}}}": "4x180 5x20"}, set()),
    "PrelayHandoffsFail": (
        {f'prelay_transfer_failures_total{{{D}, reason="transfer_failed"}}': "0+1.5x200"},
        set(),
    ),
    "PrelayKvDamaged": ({f'prelay_transfer_digests_total{{{D}, outcome="bad"}}': "0x50 1x150"}, set()),
    "PrelayRequestsFail": (
        {'prelay_requests_total{slo_class="standard", outcome="error"}': "0+1.5x200"},
        set(),
    ),
    "PrelayRefuses": (
        {'prelay_requests_total{slo_class="standard", outcome="rejected"}': "0+12x200"},
        {"PrelayBudgetBurnsSlowly"},
    ),
    "PrelayRefusesInVain": ({"prelay_could_have_served_total": "0+0.2x200"}, set()),
    "PrelayPredictionsOff": (
        {
            'prelay_prediction_error_ratio_bucket{what="ttft", le="1.25"}': "0+20x200",
            'prelay_prediction_error_ratio_bucket{what="ttft", le="4.0"}': "0+100x200",
        },
        set(),
    ),
}
"""What differs from HEALTHY when an alert must fire, and which others may then fire, too."""


@pytest.fixture(scope="module")
def slo_rules() -> ModuleType:
    path = DEPLOY / "prometheus" / "slo_rules.py"
    spec = importlib.util.spec_from_file_location("slo_rules", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def scenario(
    name: str, series: Series, firing: set[str], at: str, step: str = f"{STEP_S}s"
) -> dict[str, Any]:
    """A test in promtool's format: at this time exactly these alerts fire."""
    expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(firing)]
    return {
        "name": name,
        "interval": step,
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": at,
                "exp_samples": expected,
            }
        ],
    }


def run_scenarios(folder: Path, rule_files: list[Path], scenarios: list[dict[str, Any]], step: str) -> None:
    path = folder / "scenarios.yml"
    tests = {"rule_files": list(map(str, rule_files)), "evaluation_interval": step, "tests": scenarios}
    path.write_text(yaml.safe_dump(tests))
    promtool("test", "rules", path)


def alerts_in(path: Path) -> set[str]:
    groups = yaml.safe_load(path.read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


def test_the_rules_on_attainment_are_what_their_script_writes() -> None:
    script = DEPLOY / "prometheus" / "slo_rules.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 0.99, 0.999])
def test_thresholds_can_be_reached_and_are_above_what_is_allowed(
    slo_rules: ModuleType, target: float
) -> None:
    fast, middle, slow = (alert.threshold(target) for alert in slo_rules.ALERTS)
    largest = 1 / (1 - target)
    assert largest > fast > middle > slow == 1
    assert fast <= 14.4


@pytest.mark.parametrize("target", [0.0, 1.0, 90.0])
def test_a_target_that_is_no_share_is_refused(slo_rules: ModuleType, target: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        slo_rules.rules(target)


def test_every_alert_has_its_trouble() -> None:
    assert alerts_in(RULES / "alerts.yml") == set(TROUBLE)


class TestWithPromtool:
    pytestmark = needs_promtool

    def test_configuration_and_rules_are_valid(self) -> None:
        output = promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")
        assert output.count("rules found") == len(list(RULES.glob("*.yml")))

    @pytest.mark.slow
    def test_each_alert_fires_when_it_should_and_at_no_other_time(self, tmp_path: Path) -> None:
        scenarios = [scenario("all is well", HEALTHY, set(), "48m")]
        for alert, (changed, besides) in TROUBLE.items():
            scenarios.append(scenario(alert, {**HEALTHY, **changed}, {alert} | besides, "48m"))
        run_scenarios(tmp_path, sorted(RULES.glob("*.yml")), scenarios, f"{STEP_S}s")

    def test_a_router_of_which_nothing_was_ever_seen(self, tmp_path: Path) -> None:
        absent = scenario(
            "no router", {f'up{{job="prelay-worker", {P}}}': "1x20"}, {"PrelayRouterGone"}, "4m"
        )
        run_scenarios(tmp_path, [RULES / "alerts.yml"], [absent], f"{STEP_S}s")

    @pytest.mark.slow
    @pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
    def test_burn_alerts_fire_just_above_their_thresholds(
        self, tmp_path: Path, slo_rules: ModuleType, target: float
    ) -> None:
        rules = tmp_path / "slo.yml"
        rules.write_text(slo_rules.rules(target))
        scenarios = []
        for alert in slo_rules.ALERTS:
            limit = alert.threshold(target)
            for factor in (0.97, 1.03):
                burn = factor * limit
                firing = {each.name for each in slo_rules.ALERTS if each.threshold(target) < burn}
                assert (alert.name in firing) is (factor > 1)
                bad = 60 * burn * (1 - target)
                series = requests(f"0+{60 - bad}x90", f"0+{bad}x90")
                scenarios.append(scenario(f"burn {burn}", series, firing, "80m", "1m"))
        every = {alert.name for alert in slo_rules.ALERTS}
        scenarios += [
            scenario("nothing good", requests("0x90", "0+60x90"), every | {"PrelayNothingGood"}, "80m", "1m"),
            scenario("a handful", requests("0x90", "0+0.1x90"), set(), "80m", "1m"),
            # All was bad for an hour, and is good again: only the longest windows still say so.
            scenario("over", requests("0x60 60+60x300", "0+60x60 3600x300"),
                     {"PrelayBudgetBurnsSlowly"} if target > 0.5 else set(), "3h", "1m"),
        ]  # fmt: skip
        run_scenarios(tmp_path, [rules], scenarios, "1m")


def requests(good: str, missed: str) -> Series:
    return {
        'prelay_requests_total{slo_class="standard", outcome="good"}': good,
        'prelay_requests_total{slo_class="standard", outcome="ttft_miss"}': missed,
        'prelay_requests_total{slo_class="standard", outcome="cancelled"}': "0+600x360",
    }


def test_rules_and_dashboards_use_only_rules_that_are_recorded() -> None:
    recorded = set()
    for path in RULES.glob("*.yml"):
        groups = yaml.safe_load(path.read_text())["groups"]
        recorded |= {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    files = [*RULES.glob("*.yml"), *(DEPLOY / "grafana" / "dashboards").glob("*.json")]
    used = {
        name
        for path in files
        for name in re.findall(r"\b\w*:prelay_\w+:\w+|\bprelay:\w+:\w+", path.read_text())
    }
    assert used == recorded
