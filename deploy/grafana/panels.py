"""Dashboards as values, and what Grafana reads: its dashboard JSON (schema version 39, Grafana 10 and later).

A dashboard is rows of panels, each panel a title, a sentence, a unit and queries. Where panels stand follows
from their order: Grafana's grid is 24 columns wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

GRID_WIDTH = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """legend: what a series is called, with {{label}} for its labels."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """unit: Grafana's name of it (s, percentunit, reqps, Bps, short, ...). kind: of panel.

    stacked: the series add up to something. limits: (value, colour) from which on a value has that colour;
    below the first it is green. at_most: end of the axis, where there is one.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "state-timeline"] = "timeseries"
    width: int = 8
    stacked: bool = False
    limits: tuple[tuple[float, str], ...] = ()
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading. height: in units of Grafana's grid, about 30 pixels each."""

    title: str
    panels: tuple[Panel, ...]
    height: int = 8


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of a dashboard among the values that `label` has in `metric`; at first all."""

    label: str
    metric: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    """uid: name of its file, and part of its address."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    def to_json(self) -> Json:
        """What Grafana imports and provisions."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["prelay"],
            "schemaVersion": 39,
            "editable": False,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "links": [
                {
                    "title": "prelay",
                    "type": "dashboards",
                    "tags": ["prelay"],
                    "asDropdown": True,
                    "keepTime": True,
                }
            ],
            "templating": {"list": [_datasource(), *(_variable(each) for each in self.variables)]},
            "panels": list(self._panels()),
        }

    def _panels(self) -> Iterator[Json]:
        number, top = 1, 0
        for row in self.rows:
            yield {
                "id": number,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": top, "w": GRID_WIDTH, "h": 1},
            }
            number, top, left = number + 1, top + 1, 0
            for panel in row.panels:
                if left + panel.width > GRID_WIDTH:
                    top, left = top + row.height, 0
                place = {"x": left, "y": top, "w": panel.width, "h": row.height}
                yield {"id": number, "gridPos": place, **_panel(panel)}
                number, left = number + 1, left + panel.width
            top += row.height


def _panel(panel: Panel) -> Json:
    colours: list[Json] = [{"value": None, "color": "green"}]
    colours += [{"value": value, "color": colour} for value, colour in panel.limits]
    defaults: Json = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": colours},
        "custom": _drawing(panel),
    }
    if panel.at_most is not None:
        defaults["max"] = panel.at_most
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                "range": True,
            }
            for place, query in enumerate(panel.queries)
        ],
    }


def _drawing(panel: Panel) -> Json:
    if panel.kind == "state-timeline":
        return {"fillOpacity": 70, "lineWidth": 0}
    if panel.kind == "stat":
        return {}
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 40 if panel.stacked else 0,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if panel.limits else "off"},
    }


def _options(panel: Panel) -> Json:
    if panel.kind == "state-timeline":
        return {"mergeValues": True, "showValue": "auto", "legend": {"showLegend": False}}
    if panel.kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
            "colorMode": "value" if panel.limits else "none",
            "graphMode": "area",
        }
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _datasource() -> Json:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(variable: Variable) -> Json:
    query = f"label_values({variable.metric}, {variable.label})"
    return {
        "name": variable.label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": variable.label},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }
