"""`pertoken grafana`: dashboards and alert rules over `GET /metrics`, each from one description.

What a dashboard shows stands in `_panels`; what Grafana wants besides is the same for all and stands in `_dashboard`
and `_panel`. Every query is run against a real Prometheus in the tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pertoken.report._panels import DASHBOARDS, Dashboard, Kind, Panel
from pertoken.units import SECONDS_PER_HOUR

_WIDTH = 24
_HEIGHTS: dict[Kind, int] = {"stat": 4, "timeseries": 8, "bargauge": 8, "table": 8}
_SCHEMA_VERSION = 39
__all__ = ["ALERTS", "DASHBOARDS", "RULES_FILE", "Alert", "documents", "prometheus_rule", "rules", "write"]
RULES_FILE = "pertoken-alerts.yaml"


@dataclass(frozen=True)
class Alert:
    """A rule: fires once `expr` has held for `hold`."""

    name: str
    expr: str
    hold: str
    severity: Literal["critical", "warning", "info"]
    summary: str
    advice: str


ALERTS: tuple[Alert, ...] = (
    Alert(
        "PerTokenGone", "absent(pertoken_build_info)", "10m", "critical",
        "No PerToken is scraped", "See that it runs, and that Prometheus' token has the scope read.",
    ),
    Alert(
        "PerTokenSourceSilent", "pertoken_source_silent == 1", "10m", "warning",
        "{{ $labels.kind }} {{ $labels.source }} tells nothing",
        "Its tokens or energy are missing from the books until it is back; `pertoken doctor` says why.",
    ),
    Alert(
        "PerTokenJournalRefuses", "pertoken_journal_writable == 0", "1m", "critical",
        "The journal takes nothing", "Senders are told to come back. Free the disk, or mend it.",
    ),
    Alert(
        "PerTokenJournalDamaged", "pertoken_journal_damaged_bytes > 0", "0m", "critical",
        "The disk lost {{ $value }} bytes of the journal", "Bring them back from a copy; `pertoken doctor` names them.",
    ),
    Alert(
        "PerTokenClosingFails", "pertoken_closing_failed == 1", "15m", "critical",
        "Hours do not close", "`pertoken doctor` has the reason.",
    ),
    Alert(
        "PerTokenClosingLate", f"pertoken_closing_late_seconds > {2 * SECONDS_PER_HOUR}", "15m", "warning",
        "{{ $value | humanizeDuration }} are not closed", "`pertoken doctor` names the oldest hour.",
    ),
    Alert(
        "PerTokenUsageUnpriced", "sum without (meter) (pertoken_unpriced_seconds) > 0", "15m", "warning",
        "Usage of pool {{ $labels.pool }} has no price", "Give the fleet file its price, 0 if it is free.",
    ),
    Alert(
        "PerTokenAbovePlan",
        'sum without (driver) (pertoken_plan_variance_usd{window="24h"}) > 0.2 * pertoken_plan_spend_usd{window="24h"}',
        "1h", "warning", "A day cost {{ $value | humanize }} USD more than {{ $labels.book }} said",
        "`pertoken report` splits it into price, volume, efficiency and mix.",
    ),
    Alert(
        "PerTokenBudgetUsedUp", "pertoken_budget_spent_ratio >= 1", "0m", "critical",
        "The budget {{ $labels.budget }} is used up: {{ $value | humanizePercentage }}",
        "`pertoken budget` says when, and what is left of the others; a hard one now refuses requests.",
    ),
    Alert(
        "PerTokenBudgetWillBeUsedUp",
        'pertoken_budget_forecast_ratio{bound="expected"} >= 1 '
        "unless on (budget, instance) pertoken_budget_spent_ratio >= 1",
        "1h", "warning", "The budget {{ $labels.budget }} is expected to end at {{ $value | humanizePercentage }}",
        "`pertoken budget` shows its forecast with the interval, and when it runs out.",
    ),
    Alert(
        "PerTokenAlertsUndelivered", "pertoken_alerts_failing == 1", "15m", "warning",
        "Budget alerts do not reach {{ $labels.channel }}",
        "`pertoken doctor` has the reason; what waits is sent for a day.",
    ),
    Alert(
        "PerTokenMostlyIdle", 'pertoken_utilisation_ratio{window="24h"} < 0.1', "6h", "info",
        "GPUs were used {{ $value | humanizePercentage }} of a day", "`pertoken plan` looks for a cheaper mix.",
    ),
)  # fmt: skip


def documents() -> dict[str, str]:
    """File name to text: a JSON file per dashboard, and the alert rules as Prometheus reads them (YAML)."""
    found = {
        f"pertoken-{board.name}.json": json.dumps(_dashboard(board), indent=1, ensure_ascii=False) + "\n"
        for board in DASHBOARDS
    }
    return {**found, RULES_FILE: yaml.safe_dump(rules(), sort_keys=False, width=110)}


def rules() -> dict[str, Any]:
    """The alert rules: what a rules file of Prometheus holds, and the `spec` of a PrometheusRule."""
    return {
        "groups": [
            {
                "name": "pertoken",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expr,
                        "for": alert.hold,
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary, "description": alert.advice},
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }


def prometheus_rule() -> str:
    """The alert rules as a PrometheusRule of the Prometheus operator (YAML)."""
    named = {"name": "pertoken", "labels": {"app.kubernetes.io/name": "pertoken"}}
    found = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": named,
        "spec": rules(),
    }
    return "# Written by `make docs` from report/grafana.py; edit there.\n" + yaml.safe_dump(
        found, sort_keys=False, width=110
    )


def write(folder: Path) -> list[Path]:
    """Write every document into a folder, made where it is missing; the paths written. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in documents().items():
        paths.append(folder / name)
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def _dashboard(board: Dashboard) -> dict[str, Any]:
    """The JSON that Grafana imports."""
    panels: list[dict[str, Any]] = []
    x = y = row = 0
    for panel in board.panels:
        if x + panel.width > _WIDTH:
            x, y, row = 0, y + row, 0
        place = {"x": x, "y": y, "w": panel.width, "h": _HEIGHTS[panel.kind]}
        panels.append(_panel(panel, len(panels) + 1, place))
        x, row = x + panel.width, max(row, _HEIGHTS[panel.kind])
    return {
        "uid": f"pertoken-{board.name}",
        "title": board.title,
        "description": board.about,
        "tags": ["pertoken"],
        "schemaVersion": _SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "1m",
        "time": {"from": "now-7d", "to": "now"},
        "timezone": "utc",
        "links": [
            {"type": "dashboards", "title": "PerToken", "tags": ["pertoken"], "asDropdown": True,
             "keepTime": True, "includeVars": True}
        ],
        "templating": {"list": _variables(board)},
        "annotations": {"list": []},
        "panels": panels,
    }  # fmt: skip


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _variables(board: Dashboard) -> list[dict[str, Any]]:
    windows = [{"text": w, "value": w, "selected": w == "24h"} for w in ("1h", "24h", "30d")]
    found: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0},
        _values("instance", "pertoken_build_info", many=True),
    ]
    if any("$window" in query.expr for panel in board.panels for query in panel.queries):
        found.append({
            "name": "window", "label": "Window", "type": "custom", "query": "1h,24h,30d", "hide": 0,
            "options": windows, "current": {"text": "24h", "value": "24h"},
        })  # fmt: skip
    return [*found, _values(*board.variable, many=board.many)] if board.variable else found


def _values(label: str, family: str, *, many: bool) -> dict[str, Any]:
    query = f"label_values({family}, {label})"
    return {
        "name": label, "label": label.capitalize(), "type": "query", "datasource": _SOURCE, "hide": 0,
        "query": {"query": query, "refId": label}, "definition": query, "refresh": 2, "sort": 1,
        "multi": many, "includeAll": many, "allValue": ".+" if many else None,
        "current": {"text": "All", "value": "$__all"} if many else {},
    }  # fmt: skip


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    instant = panel.kind in ("bargauge", "table", "stat")
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "fillOpacity": 20 if panel.stacked else 0,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "lineInterpolation": "stepAfter",
        }
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}}
    if panel.kind != "timeseries":
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "values": False}, "orientation": "auto"}
    return {
        "id": number,
        "title": panel.title,
        "description": panel.about,
        "type": panel.kind,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                "instant": instant,
                "range": not instant,
            }
            for i, query in enumerate(panel.queries)
        ],
    }
