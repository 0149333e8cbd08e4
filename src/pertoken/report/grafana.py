"""`pertoken grafana`: dashboards and alert rules over `GET /metrics`, each from one description.

A dashboard is a list of panels, a panel a list of queries; what Grafana wants besides is the same for all and stands
in `_dashboard` and `_panel`. Every query is run against a real Prometheus in the tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pertoken.units import JOULES_PER_KWH, MILLISECONDS_PER_SECOND, SECONDS_PER_HOUR, TOKENS_PER_MTOK

Kind = Literal["stat", "timeseries", "bargauge", "table"]
_WIDTH = 24
_HEIGHTS: dict[Kind, int] = {"stat": 4, "timeseries": 8, "bargauge": 8, "table": 8}
_SCHEMA_VERSION = 39
_USD, _KWH, _SHARE, _COUNT, _JOULE = "currencyUSD", "kwatth", "percentunit", "short", "joule"
RULES_FILE = "pertoken-alerts.yaml"


@dataclass(frozen=True)
class Query:
    """PromQL, with Grafana's variables in it, and what its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One figure of a dashboard."""

    title: str
    queries: tuple[Query, ...]
    unit: str
    kind: Kind = "timeseries"
    width: int = 12
    about: str = ""
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """Panels under a title; `variable` is the label its viewer chooses values of, and the family that has it."""

    name: str
    title: str
    about: str
    panels: tuple[Panel, ...]
    variable: tuple[str, str] | None = None
    many: bool = True
    """Whether several values may be chosen at once."""


@dataclass(frozen=True)
class Alert:
    """A rule: fires once `expr` has held for `hold`."""

    name: str
    expr: str
    hold: str
    severity: Literal["critical", "warning", "info"]
    summary: str
    advice: str


def _of(family: str, *labels: str) -> str:
    """A family of the service and the window that the viewer chose."""
    return _at(family, 'window="$window"', *labels)


def _at(family: str, *labels: str) -> str:
    chosen = ",".join(['instance=~"$instance"', *labels])
    return f"pertoken_{family}{{{chosen}}}"


def _priced(expr: str) -> str:
    """Nothing while hours of the window lack a price: the service then tells no USD per token, and nor do we."""
    return f"{expr} and on () {_of('cost_per_mtok_usd')}"


def _kwh(expr: str) -> str:
    return f"{expr} / {JOULES_PER_KWH}"


def _gpu_hours(expr: str) -> str:
    return f"{expr} / {SECONDS_PER_HOUR}"


def _one(expr: str, legend: str = "") -> tuple[Query, ...]:
    return (Query(expr, legend),)


_TOTAL, _OUTPUT, _INPUT = (f'metric="usd_per_mtok_{end}"' for end in ("total", "output", "input"))
_WITH_IDLE = 'metric="usd_per_mtok_output_with_idle"'
_HOUR, _ENERGY_SPEND, _SERVED = 'window="1h"', 'category="energy"', 'meter!="training_tokens"'
_J_TOTAL = 'metric="joule_per_token_total"'

_OVERVIEW = Dashboard(
    "overview",
    "PerToken: overview",
    "What a token costs, where the money goes, and whether the figures can be trusted.",
    (
        Panel("USD per M tokens, all in", _one(_of("cost_per_mtok_usd", _TOTAL)), _USD, "stat", 4),
        Panel(
            "USD per M output tokens, with idle", _one(_of("cost_per_mtok_usd", _WITH_IDLE)), _USD, "stat", 4,
            "Compare this one with an API's price.",
        ),
        Panel("Spend", _one(f"sum({_of('spend_usd')})"), _USD, "stat", 4),
        Panel("Tokens", _one(f"sum({_of('tokens')})"), _COUNT, "stat", 4),
        Panel("Energy per token", _one(_of("energy_per_token_joules", _J_TOTAL)), _JOULE, "stat", 4),
        Panel("GPU hours used", _one(_of("utilisation_ratio")), _SHARE, "stat", 4),
        Panel(
            "USD per M tokens",
            tuple(
                Query(_of("cost_per_mtok_usd", metric), legend)
                for metric, legend in ((_TOTAL, "all in"), (_OUTPUT, "output"), (_INPUT, "input"))
            ),
            _USD,
        ),
        Panel("Spend by category", _one(_of("spend_usd"), "{{category}}"), _USD, stacked=True),
        Panel("Spend by pool", _one(f"sum by (pool) ({_of('pool_spend_usd')})", "{{pool}}"), _USD, stacked=True),
        Panel("Tokens by kind", _one(_of("tokens"), "{{meter}}"), _COUNT, stacked=True),
        Panel(
            "GPU hours by phase", _one(_gpu_hours(_of("gpu_held_seconds")), "{{phase}}"), _COUNT, stacked=True,
            about="Idle is what was held, paid for and used by nobody.",
        ),
        Panel(
            "USD per M tokens by model", _one(f"sort_desc({_of('model_cost_per_mtok_usd', _TOTAL)})", "{{model}}"),
            _USD, "bargauge",
        ),
        Panel("Tokens per second in the newest closed hour", _one(
            f"sum({_at('tokens', _HOUR)}) / {SECONDS_PER_HOUR}"), _COUNT, "stat", 6),
        Panel("Sources", _one(_at("sources"), "{{state}}"), _COUNT, "stat", 6),
        Panel("Journal takes records", _one(_at("journal_writable")), "bool_yes_no", "stat", 4),
        Panel("Closing is late by", _one(_at("closing_late_seconds")), "s", "stat", 4),
        Panel(
            "Closed until", _one(f"{_at('closed_until_timestamp_seconds')} * {MILLISECONDS_PER_SECOND}"),
            "dateTimeFromNow", "stat", 4,
        ),
        Panel("Age of sources", _one(_at("source_age_seconds"), "{{kind}} {{source}}"), "s", "bargauge"),
        Panel(
            "Hours without a price", _one(f"sum({_at('unpriced_seconds')}) / {SECONDS_PER_HOUR} or vector(0)"),
            _COUNT, "stat",
        ),
    ),
)  # fmt: skip


def _by(label: str, *, more: tuple[Panel, ...] = ()) -> Dashboard:
    """A dashboard of one dimension, whose values its viewer chooses."""
    chosen, legend = f'{label}=~"${label}"', f"{{{{{label}}}}}"

    def of(family: str, *labels: str) -> str:
        return _of(f"{label}_{family}", chosen, *labels)

    return Dashboard(
        label,
        f"PerToken: by {label}",
        f"What each {label} costs; those past the twenty costliest are (other).",
        (
            Panel("Spend", _one(f"sum({of('spend_usd')})"), _USD, "stat", 6),
            Panel("Tokens", _one(f"sum({of('tokens')})"), _COUNT, "stat", 6),
            Panel(
                "USD per M tokens",
                _one(_priced(f"sum({of('spend_usd')}) / sum({of('tokens', _SERVED)}) * {TOKENS_PER_MTOK}")),
                _USD,
                "stat",
                6,
                "All cost of those chosen over all their tokens served.",
            ),
            Panel("Energy", _one(_kwh(f"sum({of('energy_joules')})")), _KWH, "stat", 6),
            Panel(f"Spend by {label}", _one(f"sum by ({label}) ({of('spend_usd')})", legend), _USD, stacked=True),
            Panel(
                "Spend by category", _one(f"sum by (category) ({of('spend_usd')})", "{{category}}"), _USD, stacked=True
            ),
            Panel("USD per M tokens, all in", _one(of("cost_per_mtok_usd", _TOTAL), legend), _USD),
            Panel("USD per M output tokens, idle not included", _one(of("cost_per_mtok_usd", _OUTPUT), legend), _USD),
            Panel("USD per M input tokens, idle not included", _one(of("cost_per_mtok_usd", _INPUT), legend), _USD),
            Panel(f"Tokens by {label}", _one(f"sum by ({label}) ({of('tokens')})", legend), _COUNT, stacked=True),
            Panel("Tokens by kind", _one(f"sum by (meter) ({of('tokens')})", "{{meter}}"), _COUNT, stacked=True),
            Panel("Energy per token", _one(of("energy_per_token_joules", _J_TOTAL), legend), _JOULE),
            Panel(
                "GPU hours by phase",
                _one(_gpu_hours(f"sum by (phase) ({of('gpu_held_seconds')})"), "{{phase}}"), _COUNT, stacked=True,
            ),
            Panel(
                "Ranking by spend", _one(f"sort_desc(sum by ({label}) ({of('spend_usd')}))", legend), _USD, "bargauge"
            ),
        ),
        (label, f"pertoken_{label}_spend_usd"),
    )  # fmt: skip


_ENERGY = Dashboard(
    "energy",
    "PerToken: energy",
    "Energy at the meter, the plug and the board, per token and in USD.",
    (
        Panel("Energy at the utility meter", _one(_kwh(_of("energy_joules"))), _KWH, "stat", 4),
        Panel(
            "Mean power in the newest closed hour",
            _one(f"{_at('energy_joules', _HOUR)} / {SECONDS_PER_HOUR}"), "watt", "stat", 4,
        ),
        Panel("Energy per token", _one(_of("energy_per_token_joules", _J_TOTAL)), _JOULE, "stat", 4),
        Panel(
            "PUE, of what is measured at the plug",
            _one(f"{_of('energy_joules')} / {_of('server_energy_joules')}"), _COUNT, "stat", 4,
            "Energy at the utility meter over energy at the servers' plugs.",
        ),
        Panel("Cost of energy", _one(f"sum({_of('spend_usd', _ENERGY_SPEND)})"), _USD, "stat", 4),
        Panel(
            "USD per kWh",
            _one(_priced(f"sum({_of('spend_usd', _ENERGY_SPEND)}) / sum({_kwh(_of('energy_joules'))})")),
            _USD, "stat", 4, "Energy and demand charges over all energy; where power is in the rent it costs 0.",
        ),
        Panel(
            "Energy by where it is measured",
            (
                Query(_kwh(_of("energy_joules")), "utility meter"),
                Query(_kwh(_of("server_energy_joules")), "servers' plugs"),
                Query(_kwh(_of("gpu_energy_joules")), "GPU boards"),
            ),
            _KWH,
        ),
        Panel("Energy by pool", _one(_kwh(_of("pool_energy_joules")), "{{pool}}"), _KWH, stacked=True),
        Panel("J per token", _one(_of("energy_per_token_joules"), "{{metric}}"), _JOULE),
        Panel(
            "J per token by model", _one(_of("model_energy_per_token_joules", _J_TOTAL), "{{model}}"), _JOULE
        ),
        Panel("Energy by tenant", _one(_kwh(_of("tenant_energy_joules")), "{{tenant}}"), _KWH, stacked=True),
        Panel(
            "Energy's share of spend",
            _one(_priced(f"sum({_of('spend_usd', _ENERGY_SPEND)}) / sum({_of('spend_usd')})")), _SHARE,
        ),
    ),
)  # fmt: skip


def _plan(family: str, *labels: str) -> str:
    return _of(f"plan_{family}", 'book=~"$book"', *labels)


_PLAN = Dashboard(
    "plan",
    "PerToken: plan against actual",
    "A plan beside what happened, over the hours of the window that both have.",
    (
        Panel("Planned", _one(f"sum({_plan('spend_usd')})"), _USD, "stat", 6),
        Panel("Actual", _one(f"sum({_plan('actual_spend_usd')})"), _USD, "stat", 6),
        Panel("Actual less plan", _one(f"sum({_plan('variance_usd')})"), _USD, "stat", 6),
        Panel(
            "Actual less plan, share of plan", _one(f"sum({_plan('variance_usd')}) / sum({_plan('spend_usd')})"),
            _SHARE, "stat", 6,
        ),
        Panel(
            "Spend",
            (Query(_plan("spend_usd"), "planned"), Query(_plan("actual_spend_usd"), "actual")), _USD,
        ),
        Panel(
            "Why: price, volume, efficiency, mix", _one(_plan("variance_usd"), "{{driver}}"), _USD, stacked=True,
            about="The four add up to actual less plan, to the cent.",
        ),
        Panel("Why, now", _one(_plan("variance_usd"), "{{driver}}"), _USD, "bargauge"),
        Panel("Tokens", (Query(_plan("tokens"), "planned"), Query(_plan("actual_tokens"), "actual")), _COUNT),
        Panel(
            "USD per M tokens, all in",
            tuple(
                Query(f"{_plan(f'{which}spend_usd')} / {_plan(f'{which}tokens')} * {TOKENS_PER_MTOK}", legend)
                for which, legend in (("", "planned"), ("actual_", "actual"))
            ),
            _USD,
            about="Tokens here are served and trained ones together.",
        ),
    ),
    ("book", "pertoken_plan_spend_usd"),
    many=False,
)  # fmt: skip


def _budget(family: str, *labels: str) -> str:
    return _at(f"budget_{family}", 'budget=~"$budget"', *labels)


_EXPECTED = 'bound="expected"'
_BUDGETS = Dashboard(
    "budgets",
    "PerToken: budgets",
    "What is spent of each budget, how fast, and where its period will end.",
    (
        Panel("Spent, of the budget", _one(_budget("spent_ratio"), "{{budget}}"), _SHARE, "bargauge"),
        Panel("Forecast, of the budget", _one(_budget("forecast_ratio", _EXPECTED), "{{budget}}"), _SHARE, "bargauge"),
        Panel(
            "Spent through the period", (Query(_budget("spent_ratio"), "{{budget}}"),), _SHARE,
            about="At 1 a budget is used up.",
        ),
        Panel(
            "Where the period will end", _one(_budget("forecast_ratio"), "{{budget}} {{bound}}"), _SHARE,
            about="Expected, and the ends of an 80 % interval.",
        ),
        Panel(
            "Burn, last 24 h", _one(_budget("burn_ratio", 'window="24h"'), "{{budget}}"), "short",
            about="Pace of the newest 24 h over the one that lasts to the period's end: at 1 it lasts exactly.",
        ),
        Panel("Spent in USD", _one(_budget("spent_usd"), "{{budget}}"), _USD),
    ),
    ("budget", "pertoken_budget_spent_ratio"),
)  # fmt: skip

DASHBOARDS: tuple[Dashboard, ...] = (_OVERVIEW, _by("model"), _by("tenant"), _ENERGY, _PLAN, _BUDGETS)

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
