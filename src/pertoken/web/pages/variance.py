"""Plan against actual: two books over the hours they share, their difference split by what drove it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response

from pertoken.client import quoted
from pertoken.errors import InputError
from pertoken.ledger import Ledger
from pertoken.meter.attribute import BOOK
from pertoken.report._page import png
from pertoken.report._waterfall import BooksHere, Span, in_common, pair, to_vega, waterfall
from pertoken.report.actual import DIMENSIONS, DRIVERS, Line, Variance, compare_books
from pertoken.web._doors import Moment, ServiceHere, WholeReader
from pertoken.web._drill import WINDOWS, hours_of
from pertoken.web._frame import page
from pertoken.web._question import Names, split_names
from pertoken.web.figures import csv_of, sql_of

router = APIRouter(include_in_schema=False)
TWINS = ("json", "csv", "vl.json", "png", "sql")
_FIRST_WINDOW = "7d"
_FIGURES = ("forecast_usd", "actual_usd", "variance_usd", *(f"{driver}_usd" for driver in DRIVERS))
ABOUT = {
    "price": "Σ (p1 − p0) × Q1: a unit of the resource cost more or less",
    "volume": "C0 × (T1/T0 − 1): all tokens together became more or fewer",
    "efficiency": "Σ p0 × (Q1 − Q0 × T1ᵍ/T0ᵍ): a token took more or less of the resource; idle is in here",
    "mix": "C0 × (T1ᵍ/T0ᵍ − T1/T0): tokens moved between the groups",
}


@dataclass(frozen=True)
class Choice:
    """What is put side by side: books in any order, dimensions, and the hours or the name of a window of them."""

    books: tuple[str, ...]
    by: tuple[str, ...]
    start: datetime | None
    end: datetime | None
    window: str

    def query(self, **changes: Any) -> str:
        """The query string that shows the same, but for the `changes`."""
        parts = {
            "book": self.books, "by": self.by, "from": self.start, "to": self.end, "window": self.window,
            **changes,
        }  # fmt: skip
        pairs: list[tuple[str, str]] = []
        for key, value in parts.items():
            values = value if isinstance(value, tuple) else (value,)
            pairs += [(key, v.isoformat() if isinstance(v, datetime) else v) for v in values if v]
        return urlencode(pairs)


def _choice(
    caller: WholeReader,
    book: Names = [],  # noqa: B006
    by: Names = [],  # noqa: B006
    first: Annotated[Moment | None, Query(alias="from")] = None,
    last: Annotated[Moment | None, Query(alias="to")] = None,
    window: str = "",
) -> Choice:
    return Choice(tuple(split_names(book)), tuple(split_names(by)), first, last, window)


Choosing = Annotated[Choice, Depends(_choice)]


@router.get("/variance")
async def variance(request: Request, service: ServiceHere, choice: Choosing) -> Response:
    """The page."""
    return await asyncio.to_thread(_page, request, service.books.ledger, choice)


@router.get("/variance.{twin}")
async def variance_twin(service: ServiceHere, choice: Choosing, twin: str) -> Response:
    """The waterfall and its table as data."""
    if twin not in TWINS:
        raise HTTPException(404, f"this page ends in one of .{', .'.join(TWINS)}, or in nothing")
    return await asyncio.to_thread(_twin, service.books.ledger, choice, twin)


def _page(request: Request, ledger: Ledger, choice: Choice) -> Response:
    here = BooksHere(ledger)
    spans = here.spans()
    pairs = _pair(spans, choice)
    if pairs is None:
        return page(
            request, "variance.html", title="Plan against actual", found=None, books=list(spans), actual=BOOK
        )
    try:
        found, choice = _compared(here, choice, pairs)
        problem = ""
    except InputError as error:
        if choice.books:
            raise
        found, problem = None, str(error)  # the page's own choice had nothing: say so and let another be made
    windows = [
        (told, choice.query(**{"from": None, "to": None, "window": name}), name == choice.window)
        for name, told in WINDOWS.items()
    ]
    shown: dict[str, Any] = {}
    if found:
        permalink = choice.query(**{"from": found.start, "to": found.end, "window": None})
        shown = {
            "steps": waterfall(found.total),
            "spec": to_vega(waterfall(found.total)),
            "rows": [(line, _links(found, line)) for line in found.lines],
            "permalink": permalink,
        }
    return page(
        request,
        "variance.html",
        title="Plan against actual",
        found=found,
        problem=problem,
        books=list(spans),
        pair=pairs,
        choice=choice,
        dimensions=DIMENSIONS,
        windows=windows,
        drivers=DRIVERS,
        about=ABOUT,
        twins=TWINS,
        **shown,
    )


def _pair(spans: dict[str, Span], choice: Choice) -> tuple[str, ...] | None:
    """Books to compare, the forecast first; None where the ledger has not two."""
    if choice.books:
        return tuple(sorted(choice.books, key=lambda name: name == BOOK))
    return pair(spans, BOOK)


def _compared(here: BooksHere, choice: Choice, books: tuple[str, ...]) -> tuple[Variance, Choice]:
    """The variance, and the choice with what it left out filled in; named windows end where the shared hours do."""
    spans = here.spans()
    window, start, end = choice.window, choice.start, choice.end
    if not (start or end):
        window = window or _FIRST_WINDOW
        known = [spans[name] for name in books if name in spans]
        shared = in_common(known[0], known[1]) if len(known) == 2 else None
        start, end = hours_of(window, shared[1] if shared else datetime.now(UTC))
        filled = Choice(books, choice.by or DIMENSIONS[:1], None, None, window)
    else:
        filled = Choice(books, choice.by or DIMENSIONS[:1], start, end, "")
    found = compare_books(lambda _: here, books=books, by=filled.by, start=start, end=end)
    return found, filled


def _links(found: Variance, line: Line) -> list[tuple[str, str]]:
    """Where the cost of a line is, book by book."""
    names = {key: quoted(name) for key, name in zip(found.by, line.group, strict=True)}
    hours = {"from": found.start.isoformat(), "to": found.end.isoformat()}
    return [
        (book, f"/where?{urlencode({'book': book, **names, **hours})}")
        for book in (found.forecast, found.actual)
    ]


def _twin(ledger: Ledger, choice: Choice, twin: str) -> Response:
    here = BooksHere(ledger)
    pairs = _pair(here.spans(), choice)
    if pairs is None:
        raise InputError("the ledger has not two books to compare: put a plan beside the actual one")
    found, _ = _compared(here, choice, pairs)
    if twin == "json":
        return Response(json.dumps(found.to_dict()), media_type="application/json")
    if twin == "csv":
        told = found.to_dict()
        total = {**dict.fromkeys(found.by, ""), found.by[0]: "total", **told["total"]}
        return Response(csv_of([*found.by, *_FIGURES], [*told["lines"], total]), media_type="text/csv")
    if twin == "sql":
        span = {"start": found.start, "end": found.end}
        return sql_of(
            ledger,
            {
                f"{measure} of {book}": (
                    measure,
                    [*found.by, "phase", kind],
                    {"where": {"book": [book]}, **span},
                )
                for book in (found.forecast, found.actual)
                for measure, kind in (("cost_usd", "component"), ("quantity", "meter"))
            },
        )
    spec = to_vega(waterfall(found.total))
    if twin == "vl.json":
        return Response(json.dumps(spec), media_type="application/json")
    return Response(png(spec), media_type="image/png")
