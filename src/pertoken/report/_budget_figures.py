"""Figures of budgets (Vega-Lite): all of them as bars, and one through its period."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pertoken.report._page import PALETTE, UTC_AXES
from pertoken.report._written import utc_text
from pertoken.report.budgets import Standing, cumulative

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_SPENT, _FORECAST, _AMOUNT = "spent", "forecast, 80 % interval", "budget"
_COLOURS = {"domain": [_SPENT, _FORECAST, _AMOUNT], "range": [PALETTE[0], PALETTE[1], PALETTE[3]]}
_MOST_POINTS = 400
_PERCENT = 100
_BAR_HEIGHT = 34


def bars(standings: Sequence[Standing]) -> dict[str, Any]:
    """Budgets in percent of their amounts: spent as a bar, the forecast as a tick on its interval, 100 % as a line."""
    values = []
    for standing in standings:
        row: dict[str, Any] = {"budget": standing.budget.name, "spent": standing.spent_fraction * _PERCENT}
        if standing.forecast is not None:
            for bound in ("expected", "low", "high"):
                row[bound] = float(getattr(standing.forecast, bound) / standing.budget.amount * _PERCENT)
        values.append(row)
    y = {"field": "budget", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 240}}

    def x(field: str) -> dict[str, Any]:
        return {"field": field, "type": "quantitative", "title": "% of the budget"}

    known = {"filter": "isValid(datum.expected)"}
    colour = _coloured(_FORECAST)
    forecasts = [
        {
            "transform": [known],
            "mark": {"type": "rule", "strokeWidth": 3},
            "encoding": {"x": x("low"), "x2": {"field": "high"}, "color": colour},
        },
        {
            "transform": [known],
            "mark": {"type": "tick", "thickness": 4, "size": 18},
            "encoding": {"x": x("expected"), "color": colour},
        },
    ]
    return {
        "$schema": _SCHEMA,
        "data": {"values": values},
        "width": "container",
        "height": _BAR_HEIGHT * len(values),
        "encoding": {"y": y},
        "layer": [
            {"mark": {"type": "bar", "size": 16}, "encoding": {"x": x("spent"), "color": _coloured(_SPENT)}},
            # Without any forecast Vega complains of layers without an extent.
            *(forecasts if any("expected" in row for row in values) else ()),
            {
                "mark": {"type": "rule", "strokeDash": [5, 3], "strokeWidth": 2, "aria": False},
                "encoding": {"x": {"datum": _PERCENT}, "y": None, "color": _coloured(_AMOUNT)},
            },
        ],
    }


def burn(standing: Standing) -> dict[str, Any]:
    """A budget through its period: what was spent up to each hour, the forecast's fan, and the amount as a line."""
    columns = ("actual", "expected", "low", "high")
    values = [
        {"at": utc_text(row["at"])} | {k: None if row[k] is None else float(row[k]) for k in columns}
        for row in thinned(cumulative(standing))
    ]
    unit, period = standing.budget.unit, standing.ground.period
    span = [utc_text(period.start), utc_text(period.end)]
    x = {"field": "at", **UTC_AXES["hour"], "title": "UTC", "scale": {"type": "utc", "domain": span}}

    def y(field: str) -> dict[str, Any]:
        return {"field": field, "type": "quantitative", "title": f"{unit} since the period began"}

    forecast = _coloured(_FORECAST)
    return {
        "$schema": _SCHEMA,
        "data": {"values": values},
        "width": "container",
        "height": 320,
        "layer": [
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "area", "opacity": 0.25},
                "encoding": {"x": x, "y": y("low"), "y2": {"field": "high"}, "color": forecast},
            },
            {
                "transform": [{"filter": "isValid(datum.expected)"}],
                "mark": {"type": "line", "strokeDash": [6, 3]},
                "encoding": {"x": x, "y": y("expected"), "color": forecast},
            },
            {
                "transform": [{"filter": "isValid(datum.actual)"}],
                "mark": {"type": "line", "strokeWidth": 3},
                "encoding": {"x": x, "y": y("actual"), "color": _coloured(_SPENT)},
            },
            {
                "mark": {"type": "rule", "strokeDash": [5, 3], "strokeWidth": 2, "aria": False},
                "encoding": {"x": None, "y": {"datum": float(standing.budget.amount)}, "color": _coloured(_AMOUNT)},
            },
        ],
    }  # fmt: skip


def thinned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows evenly left out where there are many; the first, the last and the one where the forecast begins stay."""
    step = -(-len(rows) // _MOST_POINTS)
    joint = next((n for n, row in enumerate(rows) if row["expected"] is not None), 0)
    return [row for n, row in enumerate(rows) if n % step == 0 or n in (joint, len(rows) - 1)]


def _coloured(name: str) -> dict[str, Any]:
    return {
        "datum": name,
        "type": "nominal",
        "scale": _COLOURS,
        "legend": {"title": None, "orient": "top", "symbolOpacity": 1},
    }
