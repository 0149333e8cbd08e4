"""What may be asked of the service, and told: figures, its health, and to close hours."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Response
from pydantic import BaseModel

from pertoken.errors import InputError, UnknownNameError
from pertoken.report.actual import LedgerSource, compare_books
from pertoken.report.books import hours_in
from pertoken.report.doctor import examine
from pertoken.units import METRICS
from pertoken.web._doors import Admin, Moment, ServiceHere, WholeReader, answers
from pertoken.web._paging import Pages
from pertoken.web._question import Asking, Names, split_names

router = APIRouter()
_ASKING = answers(400, 401, 403, 429)
_MOST_HOURS = 24 * 366 * 3


class Figures(BaseModel):
    """Rows of a question: by dimensions, the figures asked for, with the unit of each, in order of the dimensions.

    `next`: send it as `cursor` with the same question for the rows after these; null where they are the last. Rows that
    are booked meanwhile move no other across the edge of a page.
    """

    units: dict[str, str]
    rows: list[dict[str, str | float | int | None]]
    next: str | None = None


class Window(BaseModel):
    """Full UTC hours from `start` up to, not with, `end`."""

    start: Moment
    end: Moment


class CloseAnswer(BaseModel):
    """What a close did: hours priced, those left out, and those left open with the reason."""

    hours: int
    unmetered: int
    """Hours of the window before anything was metered: left out."""
    unpriced: dict[str, str]


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses=answers(503))
async def readyz(service: ServiceHere, response: Response) -> dict[str, str]:
    """The service takes what is sent: its journal can be written."""
    if service.health.journal:
        raise HTTPException(503, "the journal takes nothing: see /v1/doctor")
    return {"status": "ready"}


@router.get("/v1/metric", responses=_ASKING)
async def metric(
    service: ServiceHere,
    question: Asking,
    pages: Pages,
    name: Names,
) -> Figures:
    """Metrics by dimensions, read from the ledger: `?name=usd_per_mtok_output&by=model&book=actual`."""
    names = split_names(name)
    for one in names:
        if one not in METRICS:
            raise UnknownNameError("metric", one, METRICS)
    found = await asyncio.to_thread(pages.answer, service.books.ledger, names, question)
    return Figures(units={n: METRICS[n].unit for n in names}, **found)


@router.get("/v1/cost", responses=_ASKING)
async def cost(service: ServiceHere, question: Asking, pages: Pages) -> Figures:
    """Cost [USD] by dimensions, phase, category and component; decimals as text, exact."""
    found = await asyncio.to_thread(pages.answer, service.books.ledger, ["cost_usd"], question)
    return Figures(units={"cost_usd": "USD"}, **found)


@router.get("/v1/usage", responses=_ASKING)
async def usage(service: ServiceHere, question: Asking, pages: Pages) -> Figures:
    """Quantities by dimensions and phase, always by meter; decimals as text, exact."""
    by = [*(k for k in question.by if k != "meter"), "meter"]
    metered = replace(question, by=by)
    found = await asyncio.to_thread(pages.answer, service.books.ledger, ["quantity"], metered)
    return Figures(units={"quantity": "the meter's unit"}, **found)


class BookSpan(BaseModel):
    """A book with its first hour and the one after its last."""

    book: str
    start: datetime
    end: datetime


@router.get("/v1/books", responses=answers(401, 403, 429))
async def books(service: ServiceHere, caller: WholeReader) -> list[BookSpan]:
    """The books of the ledger: `actual`, and plans that were written to it."""
    spans = await asyncio.to_thread(LedgerSource(service.books.ledger).spans)
    return [BookSpan(book=book, start=start, end=end) for book, (start, end) in spans.items()]


@router.get("/v1/report", responses=answers(400, 401, 403, 422, 429))
async def report(
    service: ServiceHere,
    caller: WholeReader,
    book: Names,
    by: Names = [],  # noqa: B006
    start: Moment | None = None,
    end: Moment | None = None,
) -> dict[str, Any]:
    """Two books over the hours they share: the difference in USD split into price, volume, efficiency and mix."""
    source = LedgerSource(service.books.ledger)
    found = await asyncio.to_thread(
        lambda: compare_books(
            lambda _: source, books=split_names(book), by=split_names(by), start=start, end=end
        )
    )
    return found.to_dict()


@router.get("/v1/doctor", responses=answers(400, 401, 403, 422, 429))
async def doctor(
    service: ServiceHere, caller: WholeReader, hours: Annotated[int, Query(ge=1, le=24 * 366)] = 24
) -> dict[str, Any]:
    """What is wrong with the books: silent sources, unpriced usage, sums that disagree, the journal's state."""
    found = await asyncio.to_thread(
        lambda: examine(service.books, service.now(), hours=hours, process=service.process())
    )
    return found.to_dict()


@router.post("/v1/close", responses=answers(400, 401, 403, 409, 422, 429))
async def close(service: ServiceHere, caller: Admin, window: Window) -> CloseAnswer:
    """Close hours again from the journal, at the rates in force at each."""
    hours = hours_in(window.start, window.end)
    if len(hours) > _MOST_HOURS:
        raise InputError(f"{len(hours)} hours at once: close at most {_MOST_HOURS}")
    if hours[-1] > service.now():
        raise InputError(f"the window ends in the future: it is {service.now().isoformat()} here")

    def run() -> CloseAnswer:
        metered = service.books.metered(hours)
        done = service.close(metered)
        unpriced = {hour.isoformat(): why for hour, why in done.unpriced.items()}
        return CloseAnswer(hours=len(done.hours), unmetered=len(hours) - len(metered), unpriced=unpriced)

    return await asyncio.to_thread(run)
