"""By model, tenant, pool, hour: any measure by any two dimensions, with totals, each cell opening what is inside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from pertoken.client import quoted
from pertoken.errors import InputError
from pertoken.ledger import Ledger
from pertoken.report._written import ratio
from pertoken.report.spend import (
    COST,
    COST_KEYS,
    MEASURES,
    METRIC_KEYS,
    ROWS_SHOWN,
    Crossed,
    Name,
    Others,
    Value,
    crossed,
    label,
    one_sided,
)
from pertoken.units import METRICS
from pertoken.web._doors import ServiceHere
from pertoken.web._drill import Drill, Drilling
from pertoken.web._frame import page
from pertoken.web._question import COST_FILTERS
from pertoken.web.figures import TWINS, Asked

router = APIRouter(include_in_schema=False)
DRAWN = {"bars": "bars", "heat": "heat map"}
_FIRST = ["model", "tenant"]
_MOST_ROWS = 1_000_000


@router.get("/by")
async def by(
    request: Request,
    service: ServiceHere,
    drill: Drilling,
    measure: str = COST,
    draw: str = "",
    row: Annotated[int, Query(ge=0, le=_MOST_ROWS)] = 0,
) -> Response:
    """The page; its figure's twins are those of the measure's own address."""
    if draw and draw not in DRAWN:
        raise InputError(f"a figure is drawn as one of {', '.join(DRAWN)}, found {draw[:50]!r}")
    kept = {"measure": measure} | ({"draw": draw} if draw else {})
    return await asyncio.to_thread(_answer, request, service.books.ledger, replace(drill, more=kept), row)


@dataclass(frozen=True)
class Cell:
    """A value and what it opens."""

    value: Value
    link: str


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    cells: list[Cell]
    total: Cell


def _answer(request: Request, ledger: Ledger, drill: Drill, first_row: int) -> Response:
    measure, draw = drill.more["measure"], drill.more.get("draw", "")
    keys = _keys(drill, measure)
    drill = replace(drill, question=replace(drill.question, by=keys))
    _check(drill, measure)
    found = crossed(ledger, measure, keys, drill.asked, first_row=first_row)
    tenant = request.state.caller.tenant
    inside = _inside(drill, found.by)
    heat = draw == "heat" if draw else not found.adds and len(found.by) > 1
    lacking = one_sided(ledger, measure, drill.asked)
    figure = Asked(measure, replace(drill.effective, by=keys))
    return page(
        request,
        "by.html",
        title="By",
        drill=drill,
        found=found,
        figure=figure,
        spec=found.to_vega(heat) if found.rows else None,
        lacking=lacking,
        ratio=ratio,
        whole=f"/by?{drill.query(pool=lacking.others)}" if lacking else "",
        heat=heat,
        rows=[_row(found, name, inside) for name in found.rows],
        total=_row(found, None, inside),
        heads=[label(found.by[-1], name) for name in found.columns],
        trail=[
            (key, name, f"/by?{_out(drill, key)}") for key, name in drill.crumbs("tenant" if tenant else "")
        ],
        up=f"/by?{_out(drill, *(key for key, _ in drill.crumbs('tenant' if tenant else '')))}",
        measures=MEASURES,
        dimensions=_allowed(measure),
        drawn=DRAWN,
        twins=TWINS,
        pages=_pages(drill, found),
    )


def _allowed(measure: str) -> tuple[str, ...]:
    return COST_KEYS if measure == COST else METRIC_KEYS


def _keys(drill: Drill, measure: str) -> list[str]:
    """The dimensions asked for; where the measure was changed and has them not, or none were, those still open."""
    allowed = _allowed(measure)
    given = [key for key in drill.question.by if key not in COST_FILTERS or key in allowed]
    return given or _next(drill, measure)


def _next(drill: Drill, measure: str) -> list[str]:
    """The dimensions a page shows by itself: the first two that are not narrowed to one name."""
    still = [key for key in _allowed(measure) if key in drill.open and key not in COST_FILTERS]
    return still[:2] or ["hour"]


def _check(drill: Drill, measure: str) -> None:
    narrowed = [key for key in COST_FILTERS if key in drill.question.where]
    if measure in METRICS and narrowed:
        raise InputError(
            f"{measure} is of all phases and components: it cannot be narrowed by {', '.join(narrowed)}"
        )


def _inside(drill: Drill, by: tuple[str, ...]) -> Callable[[Mapping[str, Any]], str]:
    """Gives the address of what is inside of names: by the next dimensions, at the end the rows of the ledger."""
    measure = drill.more["measure"]
    begun: dict[tuple[str, ...], str] = {}

    def link(names: Mapping[str, Any]) -> str:
        if Others.ALL in names.values():
            return ""
        keys = tuple(names)
        if keys not in begun:  # all that the cells of a table have in common: there may be thousands
            begun[keys] = _begin(drill, by, keys)
        if not begun[keys]:
            return Asked(measure, replace(drill.narrowed(names).effective, by=[])).url("")
        named = {k: v.isoformat() if k == "hour" else quoted(v) for k, v in names.items()}
        return f"{begun[keys]}&{urlencode(named)}"

    return link


def _begin(drill: Drill, by: tuple[str, ...], keys: tuple[str, ...]) -> str:
    """The address inside of names of these dimensions without the names; empty where a figure of its own is next."""
    measure = drill.more["measure"]
    still = [key for key in drill.open if key not in keys]
    rest = [key for key in by if key in still]
    more = [key for key in _allowed(measure) if key in still and key not in (*rest, *COST_FILTERS)]
    outside = drill.widened(*keys)
    if following := [*rest, *more][:2]:
        return f"/by?{outside.query(by=following)}"
    return f"/where/rows?{outside.query(by=[], measure=None, draw=None)}" if measure == COST else ""


def _row(found: Crossed, name: Name | None, inside: Callable[[Mapping[str, Any]], str]) -> Row:
    """A row of the table; of no name, that of the totals."""
    first = found.by[0]
    at: dict[str, Any] = {} if name is None else {first: name}
    cells = [
        Cell(
            found.columns[column] if name is None else found.cells.get((name, column)),
            inside({**at, found.by[1]: column}),
        )
        for column in found.columns
    ]
    if name is None:
        return Row("total", cells, Cell(found.total, ""))
    return Row(label(first, name), cells, Cell(found.rows[name], inside(at)))


def _out(drill: Drill, *keys: str) -> str:
    """The query string without these narrowings, by their dimensions again: the way back is the way in."""
    measure = drill.more["measure"]
    wide = drill.widened(*keys)
    back = [key for key in keys if key in _allowed(measure)]
    shown = [*back, *(key for key in drill.question.by if key not in back)][:2]
    return wide.query(by=shown)


def _pages(drill: Drill, found: Crossed) -> list[tuple[str, str, bool]]:
    """Where there are more rows than are shown: the first number of each page with its address."""
    if found.rows_in_all <= ROWS_SHOWN:
        return []
    return [
        (
            f"{at + 1} to {min(at + ROWS_SHOWN, found.rows_in_all)}",
            f"/by?{drill.query(row=str(at))}",
            at == found.first_row,
        )
        for at in range(0, found.rows_in_all, ROWS_SHOWN)
    ][:60]
