"""`plan` as a page: the schedule as a heat map by hour and pool, cost by component, what it saves, how it was
found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pertoken.catalog.holidays import DAYS_PER_WEEK
from pertoken.rates._local import LocalHours, local_hours
from pertoken.report._compare_notes import tokens
from pertoken.report._compare_table import usd
from pertoken.report._page import (
    CATEGORY_COLOURS,
    PALETTE,
    Block,
    Figure,
    Table,
    Text,
    html_page,
    write_whole,
)
from pertoken.report._plan_calendar import runs
from pertoken.report._plan_table import answers, busiest, price_lines, proof, regret_rows, within_gap
from pertoken.units import COMPONENTS

if TYPE_CHECKING:
    from pertoken.plan._duals import ShadowPrices
    from pertoken.report.plan import Planned

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
Spec = dict[str, Any]
_STRIP_DAYS = 15
"""Longer schedules are drawn as days × hours."""
_TICK_HOURS = 6
_TICKS = 16
"""Times named under a figure, at most: of months, as many as there are."""
_EVENTS = 200
"""Spans listed in the page; the calendar files hold all."""


def write_page(planned: Planned, path: Path) -> None:
    """One self-contained page at `path`."""
    horizon = planned.scenario.horizon
    title = f"The cheapest schedule: {planned.scenario.name}"
    if planned.found.objective_name != "cost":
        title = f"Plan ({planned.found.objective_name}): {planned.scenario.name}"
    days = f"{horizon.days} day{'s' if horizon.days > 1 else ''}"
    subtitle = f"{days} from {horizon.start}, {horizon.timezone}. All money is USD."
    write_whole(path, html_page(title, subtitle, blocks(planned)))


def blocks(planned: Planned) -> list[Block]:
    """What the page shows, from top to bottom."""
    f = planned.found
    lead = [
        f"Cost {usd(planned.cost_usd)} USD over the horizon, {usd(planned.usd_per_month)} USD a month.",
        f"The plan is {proof(f)}.",
        *(f"{line[0].upper()}{line[1:]}." for line in answers(planned)),
        *f.notes,
    ]
    made: list[Block] = [
        Text("The plan", lead),
        Figure(
            "What runs when: each row one kind of replica, job or API, each cell one local hour.",
            _heat(planned),
        ),
        Figure("Cost by component over the horizon.", _components(planned)),
        _workloads(planned),
    ]
    power = _power(planned)
    if power:
        made.append(Figure("Power at each site's meter, and the price of energy there.", power))
    if planned.alternatives:
        made.append(_alternatives(planned))
    if planned.robust is not None:
        names = list(planned.robust.plans)
        title = (
            f"Regret in USD: a row's plan, met by a column's future. Least worst: {planned.robust.choice}."
        )
        made.append(
            Table(title, ("plan", *names), regret_rows(planned.robust), tuple(range(1, len(names) + 1)))
        )
    if len(planned.progress) > 1:
        made.append(Figure("Best plan and bound while the solver ran.", _gap(planned)))
    if planned.prices is not None:
        made += _prices(planned.prices)
    if planned.frontier:
        if sum(cost is not None for _, cost in planned.frontier) > 1:
            made.append(Figure(f"Least cost against {planned.against}.", _frontier(planned)))
        rows = [[f"{value:g}", "–" if cost is None else f"{cost:,.2f}"] for value, cost in planned.frontier]
        made.append(Table(f"Least cost against {planned.against}", [planned.against, "USD"], rows, (0, 1)))
    made.append(_events(planned))
    return made


def _prices(prices: ShadowPrices) -> list[Block]:
    rows = [[name, what, f"{usd:,.4g}"] for name, what, usd in price_lines(prices)]
    return [Table("What one unit more would cost or save, at the margin", ["of", "unit", "USD"], rows, (2,))]


def _frontier(planned: Planned) -> Spec:
    values = [{"at": value, "usd": cost} for value, cost in planned.frontier if cost is not None]
    return {
        "$schema": SCHEMA,
        "data": {"values": values},
        "mark": {"type": "line", "point": True},
        "width": 640,
        "height": 220,
        "encoding": {
            "x": {"field": "at", "type": "quantitative", "title": planned.against, "scale": {"zero": False}},
            "y": {"field": "usd", "type": "quantitative", "title": "USD", "axis": {"format": "~s"}},
            "tooltip": [{"field": "at"}, {"field": "usd", "format": ",.2f"}],
        },
    }


def _heat(planned: Planned) -> Spec:
    """Hour by hour, a row per thing that runs; past a fortnight a panel each of days × hours. Colour is the count as a
    share of its own most."""
    local = local_hours(planned.found.instance.hours, planned.scenario.horizon.timezone)
    days = [f"{y:04d}-{m:02d}-{d:02d}" for y, m, d in zip(local.year, local.month, local.day, strict=True)]
    rows = [
        {
            "runs": name,
            "at": at,
            "day": day,
            "hour": int(hour),
            "count": round(float(count), 3),
            "share": round(float(count) / float(series.max()), 3),
        }
        for name, series in busiest(planned.found)
        for at, (day, hour, count) in enumerate(zip(days, local.hour, series, strict=True))
    ]
    colour = {
        "field": "share",
        "type": "quantitative",
        "title": "of its most",
        "scale": {"range": ["#f2f2f2", PALETTE[0]], "domain": [0, 1]},
        "legend": {"orient": "top", "direction": "horizontal", "format": "%"},
    }
    tooltip = [{"field": name} for name in ("runs", "day", "hour", "count")]
    if len(set(days)) > _STRIP_DAYS:
        return _panels(rows, colour, tooltip, len(set(days)))
    return {
        "$schema": SCHEMA,
        "data": {"values": rows},
        "transform": [{"calculate": "datum.at + 1", "as": "until"}],
        "mark": {"type": "rect", "stroke": None},
        "width": 860,
        "height": {"step": 26},
        "encoding": {
            "x": {
                "field": "at",
                **_time_axis(local, planned.scenario.horizon.timezone, zindex=1),
            },
            "x2": {"field": "until"},
            "y": {
                "field": "runs",
                "type": "nominal",
                "title": None,
                "sort": None,
                "axis": {"labelLimit": 300},
            },
            "color": colour,
            "tooltip": tooltip,
        },
    }


def _time_axis(local: LocalHours, timezone: str, **more: Any) -> Spec:
    """Positions of hours under a figure, a few of them named by the local clock: hours of 24, dates where days begin.

    Hours are told apart by their place: the one a clock shows twice is drawn twice.
    """
    day, hour, month = local.day, local.hour, local.month
    begins = np.concatenate([[True], day[1:] != day[:-1]])
    first = begins & ((day == 1) | (np.arange(len(day)) == 0))
    week = begins & (np.cumsum(begins) % DAYS_PER_WEEK == 1)
    finest = begins | ((hour % _TICK_HOURS == 0) & np.concatenate([[True], hour[1:] != hour[:-1]]))
    marked = next((which for which in (finest, begins, week) if which.sum() <= _TICKS), first)
    at = [int(place) for place in np.flatnonzero(marked)]
    names = [f"{month[t]:02d}-{day[t]:02d}" if begins[t] else f"{hour[t]:02d}:00" for t in at]
    told = ", ".join(f"'{name}'" for name in names)
    return {
        "type": "quantitative",
        "title": f"local time ({timezone})",
        "scale": {"domain": [0, len(day)], "nice": False},
        "axis": {
            "values": at,
            "labelExpr": f"[{told}][indexof({at}, datum.value)]",
            "labelAlign": "left",
            "labelOverlap": True,
            "grid": True,
            **more,
        },
    }


def _panels(rows: list[dict[str, Any]], colour: Spec, tooltip: list[dict[str, str]], days: int) -> Spec:
    return {
        "$schema": SCHEMA,
        "data": {"values": rows},
        "facet": {"row": {"field": "runs", "title": None, "header": {"labelAngle": 0, "labelAlign": "left"}}},
        "spec": {
            "mark": "rect",
            "width": min(860, 14 * days),
            "height": 120,
            "encoding": {
                "x": {"field": "day", "type": "ordinal", "title": None, "axis": {"labelOverlap": True}},
                "y": {
                    "field": "hour",
                    "type": "ordinal",
                    "title": "hour",
                    "axis": {"values": [0, 6, 12, 18]},
                },
                "color": colour,
                "tooltip": tooltip,
            },
        },
    }


def _components(planned: Planned) -> Spec:
    values = [
        {"component": name, "category": COMPONENTS[name], "usd": round(value, 4)}
        for name, value in planned.by_component.items()
    ]
    return {
        "$schema": SCHEMA,
        "data": {"values": values},
        "mark": "bar",
        "width": 640,
        "height": {"step": 26},
        "encoding": {
            "y": {"field": "component", "type": "nominal", "sort": "-x", "title": None},
            "x": {"field": "usd", "type": "quantitative", "title": "USD"},
            "color": {
                "field": "category",
                "type": "nominal",
                "scale": {"domain": list(CATEGORY_COLOURS), "range": list(CATEGORY_COLOURS.values())},
            },
            "tooltip": [{"field": "component"}, {"field": "usd"}],
        },
    }


def _power(planned: Planned) -> Spec | None:
    """kW by hour of each metered site above its price; None where no site with a meter draws any."""
    f = planned.found
    metered = sorted({k.site for k in f.instance.peaks if f.schedule.site_kw[k.site].any()})
    if not metered:
        return None
    local = local_hours(f.instance.hours, planned.scenario.horizon.timezone)
    values = []
    for s in metered:
        pools = np.flatnonzero(f.instance.pool_site == s)
        price = f.instance.energy_prices(f.instance.pool_names)[pools[0]] if len(pools) else None
        site, count = f.instance.site_names[s], len(f.instance.hours)
        values += [
            {
                "at": at,
                "site": site,
                "kw": round(float(f.schedule.site_kw[s, t]), 3),
                "price": None if price is None else round(float(price[t]), 5),
            }
            for at, t in enumerate([*range(count), count - 1])  # the last hour again: where it ends
        ]
    x = {"field": "at", **_time_axis(local, planned.scenario.horizon.timezone)}
    unnamed = {**x, "title": None, "axis": {**x["axis"], "labels": False, "ticks": False}}
    kw = {"mark": {"type": "area", "interpolate": "step-after", "color": PALETTE[1]}, "width": 860, "height": 120,
          "encoding": {"x": unnamed, "y": {"field": "kw", "type": "quantitative", "title": "kW"}}}  # fmt: skip
    usd_kwh = {"mark": {"type": "line", "interpolate": "step-after", "color": PALETTE[7]}, "width": 860, "height": 70,
               "encoding": {"x": x, "y": {"field": "price", "type": "quantitative", "title": "USD/kWh"}}}  # fmt: skip
    return {
        "$schema": SCHEMA,
        "data": {"values": values},
        "facet": {"row": {"field": "site", "title": None}},
        "spec": {"vconcat": [kw, usd_kwh]},
    }


def _gap(planned: Planned) -> Spec:
    values = []
    for step in planned.progress:
        for name, value in (("best plan", step.best), ("bound", step.bound)):
            if value is not None:
                values.append({"seconds": round(step.elapsed_s, 2), "what": name, "value": value})
    return {
        "$schema": SCHEMA,
        "data": {"values": values},
        "mark": {"type": "line", "interpolate": "step-after", "point": True},
        "width": 640,
        "height": 180,
        "encoding": {
            "x": {"field": "seconds", "type": "quantitative", "title": "seconds"},
            "y": {"field": "value", "type": "quantitative", "title": "objective", "scale": {"zero": False}},
            "color": {"field": "what", "type": "nominal", "title": None},
        },
    }


def _workloads(planned: Planned) -> Table:
    rows = [
        (w.name, w.model, tokens(w.tokens), usd(w.own_usd), usd(w.with_idle_usd), usd(w.usd_per_mtok))
        for w in planned.workloads
    ]
    return Table(
        "By workload; idle, waste and overheads of a pool or site go to who uses it, in proportion to own cost.",
        ("workload", "model", "tokens", "own USD", "USD", "USD per M tokens"),
        rows,
        (2, 3, 4, 5),
    )


def _alternatives(planned: Planned) -> Table:
    rows = []
    for a in planned.alternatives:
        if a.cost_usd is None:
            rows.append((a.name, "–", f"{a.why}: {a.note}"))
        else:
            saved = within_gap(planned, a.cost_usd) or usd(a.cost_usd - planned.cost_usd)
            rows.append((a.name, usd(a.cost_usd), saved))
    return Table(
        "Against other ways to do the same.", ("instead", "USD", "the plan saves, USD"), rows, (1, 2)
    )


def _events(planned: Planned) -> Table:
    found = runs(planned.found)
    rows = [
        (r.what, f"{r.count}", r.start.strftime("%Y-%m-%d %H:%M"), r.end.strftime("%Y-%m-%d %H:%M"))
        for r in found[:_EVENTS]
    ]
    more = (
        f" The first {_EVENTS} of {len(found)}; the calendar files hold all." if len(found) > _EVENTS else ""
    )
    return Table(f"What runs, from when to when (UTC).{more}", ("what", "count", "from", "to"), rows, (1,))
