"""Now: what tokens cost in the last minute, in the hour so far, and in the 24 closed hours before."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from fastapi import APIRouter, FastAPI, Request, Response

from pertoken.report._written import counted, shown
from pertoken.report.now import HOUR, HOURS_BACK, Day, Tile, closed_day
from pertoken.report.so_far import window_s
from pertoken.report.spend import one_sided
from pertoken.web._doors import ServiceHere
from pertoken.web._frame import page, prepare
from pertoken.web._question import Looking, Question
from pertoken.web.live import scope_of, tiles_of
from pertoken.web.service import Service

log = logging.getLogger("pertoken.serve")


@asynccontextmanager
async def _prepared(app: FastAPI) -> AsyncIterator[None]:
    """Beside the start of the service, what the first page waits for when it is asked for the first time."""
    ready = threading.Thread(target=_prepare, args=(app.state.service,), name="prepare")
    ready.start()
    try:
        yield
    finally:
        await asyncio.to_thread(ready.join)


def _prepare(service: Service) -> None:
    try:
        prepare()
        closed_day(service.books.ledger, {}, _hour(service))
    except Exception as error:
        # The page asks again, and shows what is wrong to who can mend it.
        log.warning("the first page could not be prepared: %s: %r", type(error).__name__, str(error))


router = APIRouter(include_in_schema=False, lifespan=_prepared)
_JOULES = "joule_per_token_total"
_HEIGHT = 28
_STEP = 4


@dataclass(frozen=True)
class _Bar:
    """One hour of a small figure: a bar from `y` down, and what it stands for."""

    x: int
    y: float
    height: float
    told: str


@dataclass(frozen=True)
class _Shown:
    """A tile with its closed hours."""

    tile: Tile
    value: str
    bars: list[_Bar]
    label: str
    url: str


@router.get("/")
async def now(request: Request, service: ServiceHere, question: Looking) -> Response:
    """The first page. The live part comes over `/live`; what is closed is here at once."""
    where = scope_of(question)
    end = _hour(service)
    unpriced, closed_until = list(service.books.unpriced), service.books.closed_until
    ledger = service.books.ledger
    tiles = tiles_of(where)
    window = replace(question, start=end - HOURS_BACK * HOUR, end=end, where={"book": ["actual"], **where})
    day, lacking = await asyncio.gather(
        asyncio.to_thread(closed_day, ledger, where, end, unpriced, until=closed_until),
        asyncio.to_thread(one_sided, ledger, _JOULES, window.asked),
    )
    return page(
        request,
        "now.html",
        title="Now",
        tiles=[_shown(tile, day, window) for tile in tiles],
        heads=[f"{tile.title} [{tile.unit}]" for tile in tiles],
        rows=_rows(tiles, day, window),
        day=day,
        lacking=lacking,
        whole=f"/?{Question(where={**where, 'pool': lacking.others}).query()}" if lacking else "",
        question=question,
        query=Question(where=where).query(),
        own=bool(request.state.caller.tenant),
        narrowed=[(key, ", ".join(names)) for key, names in where.items()],
        back=HOURS_BACK,
        window_s=window_s(service.fleet),
        closed_until=closed_until,
        unpriced=[hour for hour in day.unpriced if hour in day.hours],
    )


def _hour(service: Service) -> datetime:
    return service.now().replace(minute=0, second=0, microsecond=0)


def _shown(tile: Tile, day: Day, window: Question) -> _Shown:
    series = day.series(tile)
    values = [value for _, value in series if value is not None]
    highest = max(values, default=0.0)
    bars = []
    for at, (hour, value) in enumerate(series):
        if value is None:
            continue
        height = max(1.0, round(_HEIGHT * max(0.0, value) / highest, 2)) if highest > 0 else 1.0
        bars.append(
            _Bar(
                at * _STEP,
                round(_HEIGHT - height, 2),
                height,
                f"{hour:%H:%M} UTC: {shown(value)} {tile.unit}",
            )
        )
    label = f"{tile.title} by hour, [{tile.unit}]: "
    label += (
        f"{shown(min(values))} to {shown(highest)} over {counted(len(values), 'hour')}"
        if values
        else "nothing metered"
    )
    return _Shown(tile, shown(day.total.value(tile)), bars, label, _behind(tile, window))


def _behind(tile: Tile, window: Question) -> str:
    """Where the figure is shown hour by hour, with how it is computed: its permalink, or the rows it sums."""
    if tile.metric:
        return f"/figure/{tile.metric}?{window.query(by=['hour'])}"
    if not tile.meters:
        return f"/figure/cost_usd?{window.query(by=['hour', 'component'])}"
    query = window.query("start", "end", by=["hour", "phase", "meter"], book="actual")
    return f"/v1/usage?{query}"


def _rows(tiles: list[Tile], day: Day, window: Question) -> list[list[str | tuple[str, str]]]:
    """The hours as rows, newest first; those without anything left out."""
    found: list[list[str | tuple[str, str]]] = []
    for hour in sorted(day.hours, reverse=True):
        inside = replace(window, start=hour, end=hour + timedelta(hours=1))
        link = f"/figure/cost_usd?{inside.query(by=['component', 'category'])}"
        cells = [shown(day.hours[hour].value(tile)) for tile in tiles]
        found.append([(f"{hour:%Y-%m-%d %H:%M}", link), *cells])
    return found
