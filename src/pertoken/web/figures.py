"""Every figure is a URL: a page that says how it is computed, and its twins as JSON, CSV, Vega-Lite, PNG and SQL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
from fastapi import APIRouter, HTTPException, Request, Response

from pertoken.errors import InputError, nearest
from pertoken.ledger import Ledger
from pertoken.report._page import PALETTE, UTC_AXES, png
from pertoken.report._written import counted, csv_text, ratio
from pertoken.report.spend import OneSided, label, names_axis, one_sided
from pertoken.units import METRICS
from pertoken.web._doors import ServiceHere
from pertoken.web._frame import page
from pertoken.web._question import COST_FILTERS, FILTERS, Looking, Question, plain_rows

router = APIRouter(include_in_schema=False)
TWINS = (".json", ".csv", ".vl.json", ".png", ".sql")
COST = "cost_usd"
_DRAWN_ROWS = 5_000
_SHOWN_ROWS = 500
_NAMES = (COST, *METRICS)
_METRIC_KEYS = ("hour", "pool", "model", "tenant", "book")
_COST_KEYS = ("component", "category", "phase", *_METRIC_KEYS)


@dataclass(frozen=True)
class Asked:
    """A figure: a name and what is asked of the ledger, whole enough to ask it again."""

    name: str
    question: Question

    @property
    def by(self) -> list[str]:
        """Its dimensions."""
        return self.question.by

    @property
    def unit(self) -> str:
        """The figure's unit."""
        return "USD" if self.name == COST else METRICS[self.name].unit

    @property
    def about(self) -> str:
        """One sentence on what it is."""
        return "what it cost, idle and waste included" if self.name == COST else METRICS[self.name].about

    @property
    def formula(self) -> str:
        """The sums it is made of."""
        if self.name == COST:
            return "Σ cost"
        metric = METRICS[self.name]
        share = f" × Σ cost / Σ ({metric.share_of})" if metric.share_of else ""
        return f"{metric.scale:,.15g} × Σ ({metric.numerator}) / Σ ({metric.denominator}){share}"

    def url(self, twin: str) -> str:
        """The permalink, or that of a twin."""
        return f"/figure/{self.name}{twin}?{self.question.query()}"

    def behind(self, kind: str) -> str:
        """Where the rows it sums are: `kind` is cost or usage."""
        keys = [*FILTERS, "hour", "phase", *(("category", "component") if kind == "cost" else ("meter",))]
        asked = self.question if kind == "cost" else self.question.without("category", "component")
        return f"/v1/{kind}?{asked.query('start', 'end', by=keys)}"

    def other(self, name: str) -> str:
        """Another figure of the same rows; a metric is of all phases and components."""
        asked = self.question if name == COST else self.question.without(*COST_FILTERS)
        return f"/figure/{name}?{asked.query(by=[])}"

    def of_pools(self, pools: Sequence[str]) -> str:
        """The figure of these pools alone."""
        return f"/figure/{self.name}?{self.question.query(pool=pools)}"

    def within(self, row: Mapping[str, Any]) -> str:
        """The figure of one row alone; empty where no filter can name it."""
        found = self.question.within(row)
        return Asked(self.name, found).url("") if found else ""


@router.get("/figure/{address}")
async def figure(request: Request, service: ServiceHere, address: str, question: Looking) -> Response:
    """A figure as a page, or as the twin its address ends in; a tenant's token sees that tenant's rows alone."""
    name, dot, rest = address.partition(".")
    twin = dot + rest
    if name not in _NAMES:
        near = nearest(name, _NAMES) or _NAMES
        raise HTTPException(404, f"there is no figure {name[:50]!r}; there is {', '.join(near)}")
    if twin and twin not in TWINS:
        raise HTTPException(404, f"a figure ends in one of {', '.join(TWINS)}, or in nothing")
    if len(question.by) > 2:
        keys = ", ".join(question.by)
        raise InputError(f"a figure has at most two dimensions, found {len(question.by)}: {keys}"[:200])
    return await asyncio.to_thread(_answer, request, service.books.ledger, Asked(name, question), twin)


def _answer(request: Request, ledger: Ledger, asked: Asked, twin: str) -> Response:
    if twin == ".sql":
        return sql_of(ledger, {asked.about: (asked.name, asked.by, asked.question.asked)})
    rows = plain_rows(_table(ledger, asked))
    if twin == ".json":
        answer = {
            "figure": asked.name, "unit": asked.unit, "about": asked.about, "formula": asked.formula,
            "by": asked.by, "where": asked.question.where, "url": asked.url(""),
            "rows_behind": [asked.behind("cost"), asked.behind("usage")],
            "unmeasured_pools": list(lacking.pools) if (lacking := _lacking(ledger, asked)) else [], "rows": rows,
        }  # fmt: skip
        return Response(json.dumps(answer), media_type="application/json")
    if twin == ".csv":
        return Response(csv_of([*asked.by, asked.name], rows), media_type="text/csv")
    if len(rows) > _DRAWN_ROWS:
        raise InputError(
            f"{len(rows)} rows cannot be drawn, at most {_DRAWN_ROWS}: ask for fewer, or for .csv"
        )
    if twin == ".vl.json":
        return Response(json.dumps(_spec(asked, rows)), media_type="application/json")
    if twin == ".png":
        return Response(png(_spec(asked, rows)), media_type="image/png")
    return _page(request, ledger, asked, rows)


def _page(request: Request, ledger: Ledger, asked: Asked, rows: list[dict[str, Any]]) -> Response:
    lacking = _lacking(ledger, asked)
    return page(
        request,
        "figure.html",
        title=asked.name,
        lacking=lacking,
        whole=asked.of_pools(lacking.others) if lacking else "",
        caption=counted(len(rows), "row")
        if len(rows) <= _SHOWN_ROWS
        else f"The first {_SHOWN_ROWS} of {len(rows):,} rows; .csv has them all",
        f=asked,
        spec=_spec(asked, rows) if any(row[asked.name] is not None for row in rows) else None,
        rows=[
            ({**row, **_shown(asked, row), asked.name: _told(row[asked.name])}, asked.within(row))
            for row in rows[:_SHOWN_ROWS]
        ],
        names=_NAMES,
        twins=TWINS,
        dimensions=_COST_KEYS if asked.name == COST else _METRIC_KEYS,
    )


def _lacking(ledger: Ledger, asked: Asked) -> OneSided | None:
    """What makes it too small; by pool nothing does: each row is of one that has both sides, or has no figure."""
    return None if "pool" in asked.by else one_sided(ledger, asked.name, asked.question.asked)


def _shown(asked: Asked, row: Mapping[str, Any]) -> dict[str, str]:
    return {key: label(key, row[key]) for key in asked.by if key != "hour"}


def _told(value: str | float | None) -> str:
    """A value as the page shows it: money to its last digit, a ratio with six that matter; the twins hold all."""
    return f"{Decimal(value):,f}" if isinstance(value, str) else ratio(value)


def _table(ledger: Ledger, asked: Asked) -> pa.Table:
    if asked.name == COST:
        return ledger.cost(*asked.by, **asked.question.asked)
    return ledger.metric(asked.name, by=asked.by, **asked.question.asked)


def _spec(asked: Asked, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Bars, or lines over hours; a cost is stacked and a ratio, which does not add up, is not."""
    keys = sorted(asked.by, key=lambda k: k != "hour")
    names = [key for key in keys if key != "hour"]
    told = {tuple(row[key] for key in names) for row in rows if row[asked.name] is not None}
    values = [
        {**row, **_shown(asked, row)}
        | {asked.name: None if row[asked.name] is None else float(row[asked.name])}
        for row in rows
        if tuple(row[key] for key in names) in told  # else the legend names what has no figure at all
    ]
    over_time, adds = keys[:1] == ["hour"], asked.name == COST
    encoding: dict[str, Any] = {
        "y": {
            "field": asked.name,
            "type": "quantitative",
            "title": asked.unit,
            "stack": "zero" if adds else None,
        }
    }
    if keys:
        kind = dict(UTC_AXES["hour"]) if over_time else {
            "title": keys[0], "type": "nominal", "axis": names_axis({str(row[keys[0]]) for row in values}),
        }  # fmt: skip
        encoding["x"] = {"field": keys[0], **kind}
    if len(keys) > 1:
        encoding["color"] = {"field": keys[1], "type": "nominal", "scale": {"range": list(PALETTE)}}
        if not over_time and not adds:
            encoding["xOffset"] = {"field": keys[1], "type": "nominal"}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": values},
        "mark": {"type": "line", "point": True}
        if over_time and not adds
        else {"type": "bar", "color": PALETTE[0]},
        "encoding": encoding,
        "width": "container",
        "height": 300,
    }


def csv_of(head: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """These columns of rows as CSV."""
    return csv_text(head, ([row[key] for key in head] for row in rows))


def sql_of(ledger: Ledger, asked: Mapping[str, tuple[str, Sequence[str], Mapping[str, Any]]]) -> Response:
    """Statements that give a page's sums, to read and to run elsewhere: by what each gives, the measure, its dimensions
    and what is asked."""
    made = []
    for about, (name, by, what) in asked.items():
        sql, parameters = ledger.sql(name, by=by, **what)
        made.append(f"-- {' '.join(about.split())}\n{_written_out(sql, parameters)};\n")
    return Response("\n".join(made), media_type="text/plain")


def _written_out(sql: str, parameters: Sequence[object]) -> str:
    """The statement with its parameters as literals: to read and to run elsewhere, never run here."""
    first, *others = sql.split("?")
    return first + "".join(_literal(p) + text for p, text in zip(parameters, others, strict=True))


def _literal(value: object) -> str:
    if isinstance(value, datetime):
        return f"TIMESTAMPTZ '{value.isoformat()}'"
    return "'" + str(value).replace("'", "''") + "'"
