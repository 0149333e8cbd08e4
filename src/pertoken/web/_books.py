"""Plans in the service's own ledger: put whole, or forgotten. An answer of 200 means: it is on the disk, closed."""

from __future__ import annotations

import asyncio
import logging
from decimal import Decimal
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Path, Request
from pydantic import BaseModel

from pertoken.errors import InputError
from pertoken.ledger import LedgerBrokenError
from pertoken.report import plan_book
from pertoken.web._doors import ServiceHere, answers, caller_with
from pertoken.web._ingest import body_schema, held, kind_of
from pertoken.web.tokens import Caller

router = APIRouter()
log = logging.getLogger("pertoken.serve")
WholeAdmin = Annotated[Caller, Depends(caller_with("admin", whole=True))]
BookName = Annotated[str, Path(min_length=1, max_length=100, description="plan:NAME")]


class BookKept(BaseModel):
    """A book that is now in the ledger, closed: rows of either table, and what it costs in all [USD, exact text]."""

    book: str
    usage_rows: int
    rate_rows: int
    cost_usd: str


class BookGone(BaseModel):
    """A book that is no longer in the ledger."""

    book: str


@router.put(
    "/v1/books/{name}",
    responses=answers(400, 401, 403, 408, 409, 413, 415, 422, 429, 503),
    openapi_extra=body_schema(*plan_book.CONTENT_TYPES),
)
async def put_book(request: Request, service: ServiceHere, caller: WholeAdmin, name: BookName) -> BookKept:
    """A plan's usage and rates, in place of what its book held; closed at these rates alone, or refused whole.

    As Arrow: a stream of usage rows, then one of rate rows. As NDJSON: rows with `"table": "usage"` or `"rates"`.
    """
    book = plan_book.book_named(name)
    kind = kind_of(request, *plan_book.CONTENT_TYPES)

    def keep(body: bytes) -> BookKept:
        usage, rates = plan_book.from_body(body, kind, book)
        ledger = service.books.ledger
        try:
            ledger.put_book(book, usage, rates)
        except LedgerBrokenError as error:
            log.warning("a book was not kept: %r", str(error))
            headers = {"Retry-After": "30"}
            raise HTTPException(
                503, "the disk failed here and nothing was kept: send it again later", headers
            ) from error
        cost: Decimal = ledger.cost(where={"book": book})["cost_usd"][0].as_py() or Decimal(0)
        return BookKept(book=book, usage_rows=len(usage), rate_rows=len(rates), cost_usd=format(cost, "f"))

    async with held(request, plan_book.MAX_BODY_BYTES) as body:
        return await asyncio.to_thread(keep, body)


@router.delete("/v1/books/{name}", responses=answers(400, 401, 403, 422, 429))
async def delete_book(service: ServiceHere, caller: WholeAdmin, name: BookName) -> BookGone:
    """Forget a plan: its usage, its rates and its costs."""
    book = plan_book.book_named(name)

    def forget() -> BookGone:
        known = [found for found, *_ in service.books.ledger.books()]
        if book not in known:
            raise InputError(f"there is no book {book!r}: the ledger has {', '.join(known) or 'none'}")
        service.books.ledger.drop_book(book)
        return BookGone(book=book)

    return await asyncio.to_thread(forget)
