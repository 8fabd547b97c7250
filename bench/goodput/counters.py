"""What a router counts of itself: who was refused, and where requests went."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from bench.errors import MeasurementError

_TIMEOUT_S = 10.0
# Name of the counter, and what of its labels belongs to the name that it gets here.
_COUNTERS = {
    "prelay_admission_total": ("admission", ("decision", "reason")),
    "prelay_placement_total": ("placement", ("kind",)),
    "prelay_could_have_served_total": ("could_have_served", ()),
    "prelay_recoveries_total": ("recovery", ("cause",)),
}


async def read_counters(address: str) -> dict[str, float]:
    """address: HOST:PORT of the metrics. Names as in admission.rejected.late. Raises MeasurementError."""
    try:
        text = await asyncio.to_thread(_fetch, f"http://{address}/metrics")
    except OSError as error:
        raise MeasurementError(f"the metrics of the router at {address} cannot be read: {error}") from error
    return parse_counters(text)


def parse_counters(text: str) -> dict[str, float]:
    """text: in Prometheus's format."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in _COUNTERS:
                name, labels = _COUNTERS[sample.name]
                found[".".join((name, *(sample.labels[label] for label in labels)))] = sample.value
    return found


def counted_between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, int]:
    """What has been counted in the meantime; what has not is left out."""
    grown = {name: round(value - before.get(name, 0.0)) for name, value in after.items()}
    return {name: value for name, value in grown.items() if value}


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        text: str = response.read().decode()
        return text
