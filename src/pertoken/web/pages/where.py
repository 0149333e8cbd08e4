"""Where it goes: cost by component, category and phase over time, down to the single row and what it is made of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from pertoken.errors import InputError
from pertoken.ledger import Ledger
from pertoken.report._page import png
from pertoken.report.spend import BANDS, COST, ROW_KEYS, UNUSED, breakdown, explain, label, over_time
from pertoken.web._doors import ServiceHere
from pertoken.web._drill import Drill, Drilling
from pertoken.web._frame import page
from pertoken.web._paging import Paging
from pertoken.web.figures import csv_of, sql_of

router = APIRouter(include_in_schema=False)
TWINS = ("json", "csv", "vl.json", "png", "sql")
_ROW_TWINS = ("json", "csv")
_PAGE_ROWS = 200
_LINE = (
    "meter", "quantity", "unit", "quantity_basis", "component", "usd_per_unit", "rate_basis", "source", COST,
)  # fmt: skip


@router.get("/where")
async def where(request: Request, service: ServiceHere, drill: Drilling) -> Response:
    """The page."""
    return await asyncio.to_thread(_overview, request, service.books.ledger, drill)


@router.get("/where.{twin}")
async def where_twin(service: ServiceHere, drill: Drilling, twin: str) -> Response:
    """Its figure and its table as data."""
    _known(twin, TWINS)
    return await asyncio.to_thread(_twin, service.books.ledger, drill, twin)


@router.get("/where/rows")
async def rows(request: Request, service: ServiceHere, drill: Drilling, cursor: str = "") -> Response:
    """The rows a sum is of, by the dimensions that are still open; each opens what is inside it."""
    return await asyncio.to_thread(_rows, request, service.books.ledger, drill, cursor)


@router.get("/where/row")
async def row(request: Request, service: ServiceHere, drill: Drilling) -> Response:
    """One row of the ledger, and the products it is the sum of."""
    return await asyncio.to_thread(_row, request, service.books.ledger, drill, "")


@router.get("/where/row.{twin}")
async def row_twin(request: Request, service: ServiceHere, drill: Drilling, twin: str) -> Response:
    """The products as data."""
    _known(twin, _ROW_TWINS)
    return await asyncio.to_thread(_row, request, service.books.ledger, drill, twin)


def _known(twin: str, twins: Sequence[str]) -> None:
    if twin not in twins:
        raise HTTPException(404, f"this page ends in one of .{', .'.join(twins)}, or in nothing")


def _overview(request: Request, ledger: Ledger, drill: Drill) -> Response:
    found, bands = breakdown(ledger, drill.asked), over_time(ledger, drill.asked)
    unused = {phase: found.total.by_phase.get(phase, Decimal(0)) for phase in UNUSED}
    return page(
        request,
        "where.html",
        title="Where it goes",
        drill=drill,
        trail=_trail(request, drill, "/where"),
        found=found,
        step=bands.step,
        spec=bands.to_vega() if bands.rows else None,
        bands=", ".join(BANDS),
        used=found.total.total - sum(unused.values(), Decimal(0)),
        unused=unused,
        twins=TWINS,
    )


def _twin(ledger: Ledger, drill: Drill, twin: str) -> Response:
    if twin == "csv":
        rows = breakdown(ledger, drill.asked).to_dict()["rows"]
        return Response(csv_of(["category", "component", "phase", COST], rows), media_type="text/csv")
    if twin == "sql":
        what = {
            "USD by component and phase": ["category", "component", "phase"],
            "bands by hour": ["hour", "category", "phase"],
        }
        return sql_of(ledger, {about: (COST, by, drill.asked) for about, by in what.items()})
    bands = over_time(ledger, drill.asked)
    if twin == "json":
        answer = {
            "unit": "USD", "about": "cost by category, component and phase, and in bands over time",
            "formula": "Σ cost", "where": drill.question.where, "url": f"/where?{drill.query(by=[])}",
            **breakdown(ledger, drill.asked).to_dict(), "over_time": bands.to_dicts(),
        }  # fmt: skip
        return Response(json.dumps(answer), media_type="application/json")
    if twin == "vl.json":
        return Response(json.dumps(bands.to_vega()), media_type="application/json")
    return Response(png(bands.to_vega()), media_type="image/png")


@dataclass(frozen=True)
class Crumb:
    """One narrowing: what by, to which name, and the way out of it."""

    key: str
    name: str
    out: str


def _trail(request: Request, drill: Drill, path: str) -> list[Crumb]:
    tenant = request.state.caller.tenant
    return [
        Crumb(key, name, f"{path}?{drill.widened(key).query(by=[])}")
        for key, name in drill.crumbs("tenant" if tenant else "")
    ]


def _rows(request: Request, ledger: Ledger, drill: Drill, cursor: str) -> Response:
    by = _grouping(drill)
    found = Paging(_PAGE_ROWS, cursor).answer(ledger, [COST], replace(drill.effective, by=by))
    shown: list[tuple[list[str], Decimal, str]] = []
    for row in found["rows"]:
        names = {key: datetime.fromisoformat(row[key]) if key == "hour" else row[key] for key in by}
        inside = drill.narrowed(names)
        path = "/where/rows" if inside.open else "/where/row"
        link = f"{path}?{inside.query(by=[])}"
        shown.append(([label(key, names[key]) for key in by], Decimal(row[COST]), link))
    (whole,) = ledger.cost(**drill.asked).to_pylist()
    return page(
        request,
        "where_rows.html",
        title="Where it goes: rows",
        drill=drill,
        trail=_trail(request, drill, "/where/rows"),
        by=by,
        rows=shown,
        subtotal=sum((usd for _, usd, _ in shown), Decimal(0)),
        total=whole[COST],
        cursor=cursor,
        following=f"/where/rows?{drill.query(by=by, cursor=found['next'])}" if found["next"] else "",
        groupings=[(key, f"/where/rows?{drill.query(by=[key])}", by == [key]) for key in drill.open],
        up=f"/where?{_up(request, drill).query(by=[])}",
    )


def _up(request: Request, drill: Drill) -> Drill:
    """The whole page: nothing narrowed."""
    keys = [key for key in ROW_KEYS if not (key == "tenant" and request.state.caller.tenant)]
    return drill.widened(*keys)


def _grouping(drill: Drill) -> list[str]:
    asked = drill.question.by
    for key in asked:
        if key not in ROW_KEYS:
            raise InputError(f"rows are not known by {key[:50]!r}: choose of {', '.join(ROW_KEYS)}")
    still = drill.open
    return asked or [key for key in still if key != "hour"] or still


def _row(request: Request, ledger: Ledger, drill: Drill, twin: str) -> Response:
    if drill.open or drill.hour is None:
        raise InputError(f"a row of the ledger has one of each: say its {', '.join(drill.open)}")
    key = {name: str(drill.single(name)) for name in ROW_KEYS if name != "hour"}
    found = explain(ledger, drill.book, drill.hour, key)
    if found.cost_usd is None:
        raise HTTPException(
            404, "the ledger has no such row: nothing was booked there, or it was closed anew"
        )
    if twin == "json":
        return Response(json.dumps(found.to_dict()), media_type="application/json")
    if twin == "csv":
        lines = [{**line, "component": key["component"]} for line in found.to_dict()["lines"]]
        return Response(csv_of(_LINE, lines), media_type="text/csv")
    return page(
        request,
        "where_row.html",
        title="One row of the ledger",
        drill=drill,
        found=found,
        key=[(name, label(name, value)) for name, value in found.key.items()],
        trail=_trail(request, drill, "/where/rows"),
        up=f"/where?{_up(request, drill).query(by=[])}",
        usage=_usage(drill, key),
        twins=_ROW_TWINS,
    )


def _usage(drill: Drill, key: dict[str, Any]) -> str:
    """Where the quantities behind it are as data."""
    asked = drill.effective.without("category", "component")
    return f"/v1/usage?{asked.query('start', 'end', by=['pool', 'model', 'tenant', 'phase', 'hour'])}"
