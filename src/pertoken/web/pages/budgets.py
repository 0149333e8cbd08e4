"""Budgets: how they stand, one through its period, what was told, and the statements of a month."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

from fastapi import APIRouter, HTTPException, Query, Request, Response

from pertoken.client import quoted
from pertoken.errors import InputError, nearest
from pertoken.fleet import COUNTED, Budget
from pertoken.meter.attribute import BOOK
from pertoken.report._budget_figures import bars, burn
from pertoken.report._crossings import Event
from pertoken.report._month import Month, month_named
from pertoken.report._page import png
from pertoken.report._written import counted, csv_text, percent, plain, utc_text, utc_told
from pertoken.report.budgets import Standing, cumulative, grounds, stand
from pertoken.report.statement import (
    CAPTION,
    HEAD,
    SHARES_CAPTION,
    SHARES_HEAD,
    TOKENS_HEAD,
    chargeback,
    statement,
)
from pertoken.units import IDLE, MONTHS_PER_YEAR, TOKENS_PER_MTOK
from pertoken.web._budget import seen_by
from pertoken.web._doors import Moment, Reader, ServiceHere, WholeReader
from pertoken.web._frame import page
from pertoken.web.figures import sql_of
from pertoken.web.service import Service
from pertoken.web.tokens import Caller

router = APIRouter(include_in_schema=False)
TWINS = (".json", ".csv", ".vl.json", ".png", ".sql")
STATEMENT_TWINS = (".json", ".csv")
_EVENTS = 50
_FIRST_YEAR = 1970
_HEAD = (
    "Budget", "Of", "Unit", "Amount", "Spent", "Of it", "Forecast", "80 % interval", "Runs out [UTC]", "Ends [UTC]",
)  # fmt: skip
_MonthAsked = Annotated[str, Query(alias="month", max_length=20)]


@router.get("/budgets")
async def budgets(request: Request, service: ServiceHere, caller: Reader) -> Response:
    """All budgets the caller may see, what was told of them, and the way to the statements."""
    found = seen_by(caller, service.budgets.standings)
    history = [e for e in service.budgets.alarm.history() if not caller.tenant or e.tenant == caller.tenant]
    firing = {e.key for e in service.budgets.alarm.firing()}
    return page(
        request,
        "budgets.html",
        title="Budgets",
        spec=bars(found) if found else None,
        head=_HEAD,
        rows=[_row(standing) for standing in found],
        later=_later(service, caller, found),
        events=[_event(event, event.key in firing) for event in history[:_EVENTS]],
        channels=[] if caller.tenant else [c.name for c in service.fleet.alerts.channels],
        problems={} if caller.tenant else service.budgets.alarm.problems(),
        months=_months(service),
        tenant=caller.tenant,
        own=f"/statement/{quote(caller.tenant, safe='')}" if caller.tenant else "",
    )


@router.get("/budgets/{address}")
async def budget(
    request: Request, service: ServiceHere, caller: Reader, address: str, at: Moment | None = None
) -> Response:
    """One budget through its period, as a page or as a twin; `at`: as the closed hours told it at that time."""
    name, dot, rest = address.partition(".")
    twin = dot + rest
    if twin and twin not in TWINS:
        raise HTTPException(404, f"a budget's figure ends in one of {', '.join(TWINS)}, or in nothing")
    mine = [b for b in service.fleet.budgets if not caller.tenant or b.tenant == caller.tenant]
    wanted = [b for b in mine if b.name == name]
    if not wanted:
        known = ", ".join(nearest(name, [b.name for b in mine])) or "see /budgets"
        raise HTTPException(404, f"there is no budget {name[:50]!r}, or it is not yours: {known}")
    return await asyncio.to_thread(_one, request, service, caller, wanted[0], at, twin)


@router.get("/statement")
@router.get("/statement.{ending}")
async def statements(
    request: Request,
    service: ServiceHere,
    caller: WholeReader,
    ending: str = "",
    month: _MonthAsked = "",
    spread: bool | None = None,
) -> Response:
    """All tenants of a month and what is nobody's: together the ledger; `spread`: with idle spread, or without."""
    twin = f".{ending}" if ending else ""
    if twin and twin not in STATEMENT_TWINS:
        raise HTTPException(404, f"statements end in one of {', '.join(STATEMENT_TWINS)}, or in nothing")
    return await asyncio.to_thread(_all, request, service, twin, month, spread)


@router.get("/statement/{address:whole}")
async def statement_of(
    request: Request,
    service: ServiceHere,
    caller: Reader,
    address: str,
    month: _MonthAsked = "",
    spread: bool | None = None,
    form: Annotated[Literal["page", "json", "csv"] | None, Query(alias="as")] = None,
) -> Response:
    """A tenant's statement, as a page that prints or a twin; `spread`: with its part of idle, or without.

    With `as` the address is the tenant's name to the letter, and its last letters ask for no twin: a tenant may be
    called ``blue.json``. To such a tenant's own token its name means itself.
    """
    exact = form is not None or address == caller.tenant
    twin = "" if exact else next((ending for ending in STATEMENT_TWINS if address.endswith(ending)), "")
    tenant = address.removesuffix(twin)
    if form in ("json", "csv"):
        twin = f".{form}"
    if caller.tenant and tenant != caller.tenant:
        raise HTTPException(403, "a tenant's token may ask for its own statement alone")
    return await asyncio.to_thread(_tenants, request, service, tenant, twin, month, spread)


def _one(
    request: Request, service: Service, caller: Caller, wanted: Budget, at: datetime | None, twin: str
) -> Response:
    standing = _standing(service, wanted, at)
    if twin == ".json":
        answer = standing.to_dict() | {"url": _url(standing), "path": _path(standing)}
        return Response(json.dumps(answer), media_type="application/json")
    if twin == ".csv":
        head = ("at", "actual", "expected", "low", "high")
        rows = ([row[key] for key in head] for row in _path(standing))
        return Response(csv_text(head, rows), media_type="text/csv")
    if twin == ".sql":
        return sql_of(service.books.ledger, _asked(standing))
    spec = burn(standing)
    if twin == ".vl.json":
        return Response(json.dumps(spec), media_type="application/json")
    if twin == ".png":
        return Response(png(spec), media_type="image/png")
    history = [
        e for e in service.budgets.alarm.history() if e.budget == wanted.name and e.tenant == wanted.tenant
    ]
    firing = {e.key for e in service.budgets.alarm.firing()}
    budget, ground = standing.budget, standing.ground
    return page(
        request,
        "budget.html",
        title=f"Budget {budget.name}",
        s=standing,
        spec=spec,
        unpriced=counted(ground.unpriced_hours, "hour") if ground.unpriced_hours else "",
        tiles=_tiles(standing),
        scope=_scope(budget),
        idle=_idle(service, budget),
        start=utc_told(ground.period.start),
        end=utc_told(ground.period.end),
        closed_until=utc_told(ground.until),
        behind=_behind(standing),
        charged=_statement_url(budget.tenant, None, name=_month_of(service, standing.as_of))
        if budget.tenant and budget.with_idle
        else "",
        url=_url(standing),
        twins=[(twin[1:], _url(standing, twin)) for twin in TWINS],
        events=[_event(event, event.key in firing) for event in history[:_EVENTS]],
        thresholds=budget.alert_at,
    )


def _standing(service: Service, wanted: Budget, at: datetime | None) -> Standing:
    """As it stands now, or as the closed hours told it at a time."""
    if at is None:
        for standing in service.budgets.standings or ():
            if standing.budget.name == wanted.name:
                return standing
        at = service.now()
    if at.year < _FIRST_YEAR:
        raise InputError(f"at {at.isoformat()[:40]} lies before any hour that was metered")
    if at > service.now():
        raise InputError(f"at {at.isoformat()[:40]} lies ahead: it is {utc_told(service.now())} here")
    moment = at.astimezone(UTC).replace(microsecond=0)
    found = grounds(service.books, service.fleet, moment, [wanted])
    if not found:
        raise InputError(f"the budget {wanted.name} begins on {wanted.start}: there is no period yet")
    return stand(found[0], moment, None)


def _all(request: Request, service: Service, twin: str, asked: str, spread: bool | None) -> Response:
    month = _month(service, asked)
    found = chargeback(service.books.ledger, service.fleet, month, spread)
    if twin == ".json":
        return Response(json.dumps(found.to_dict()), media_type="application/json")
    if twin == ".csv":
        return Response(found.csv(), media_type="text/csv")
    links = [_statement_url(s.tenant, month) for s in found.tenants] + [""] * len(found.nobodys)
    rows = [((row[0], link), *row[1:]) for row, link in zip(found.rows, links, strict=True)]
    return page(
        request,
        "statements.html",
        title=f"Statements of {month.name}",
        found=found,
        month=month,
        months=_months(service, month),
        rows=rows,
        caption=SHARES_CAPTION,
        head=SHARES_HEAD,
        total=found.sum_row,
        twins=[(t[1:], f"/statement{t}?month={month.name}") for t in STATEMENT_TWINS],
    )


def _tenants(
    request: Request, service: Service, tenant: str, twin: str, asked: str, spread: bool | None
) -> Response:
    month = _month(service, asked)
    months = [(m, _statement_url(tenant, None, name=m), m == month.name) for m in _around(month)]
    try:
        found = statement(service.books.ledger, service.fleet, month, tenant, spread)
    except InputError as error:
        if twin:
            raise
        return page(
            request, "statement.html", title=f"Statement of {tenant or '(no name)'}, {month.name}", found=None,
            why=str(error), month=month, months=months, twins=[], rows=[], total=(), tokens=[],
            notes=(), exact="", caption=CAPTION, head=HEAD, tokens_head=TOKENS_HEAD,
        )  # fmt: skip
    if twin == ".json":
        return Response(json.dumps(found.to_dict()), media_type="application/json")
    if twin == ".csv":
        return Response(found.csv(), media_type="text/csv")
    return page(
        request,
        "statement.html",
        title=f"Statement of {tenant}, {month.name}",
        found=found,
        exact=f"{found.usd:,f}",
        caption=CAPTION,
        head=HEAD,
        tokens_head=TOKENS_HEAD,
        why="",
        month=month,
        months=months,
        rows=found.rows,
        total=found.sum_row,
        tokens=found.token_rows,
        twins=[(t[1:], _statement_url(tenant, month, t)) for t in STATEMENT_TWINS],
        notes=found.notes,
    )


def _month(service: Service, asked: str) -> Month:
    zone = ZoneInfo(service.fleet.chargeback.timezone)
    name = asked or f"{service.now().astimezone(zone):%Y-%m}"
    return month_named(name, service.fleet, service.books.ledger, service.books.reached)


def _months(service: Service, shown: Month | None = None) -> list[tuple[str, str, bool]]:
    """Months one may open: name, address, whether it is shown."""
    if shown is None:
        zone = ZoneInfo(service.fleet.chargeback.timezone)
        now = service.now().astimezone(zone)
        number = now.year * MONTHS_PER_YEAR + now.month - 1
        return [(m, f"/statement?month={m}", False) for m in (_named(number), _named(number - 1))]
    return [(m, f"/statement?month={m}", m == shown.name) for m in _around(shown)]


def _around(month: Month) -> list[str]:
    number = int(month.name[:4]) * MONTHS_PER_YEAR + int(month.name[5:]) - 1
    return [_named(number + n) for n in (-1, 0, 1)]


def _month_of(service: Service, moment: datetime) -> str:
    """The month of the statements that a moment lies in."""
    return f"{moment.astimezone(ZoneInfo(service.fleet.chargeback.timezone)):%Y-%m}"


def _named(number: int) -> str:
    year, index = divmod(number, MONTHS_PER_YEAR)
    return f"{year:04}-{index + 1:02}"


def _statement_url(tenant: str, month: Month | None, twin: str = "", name: str = "") -> str:
    asked = {"month": month.name if month else name}
    if tenant.endswith(STATEMENT_TWINS):
        # The name's own ending must not be taken for a twin's.
        asked["as"] = twin.removeprefix(".") or "page"
        twin = ""
    return f"/statement/{quote(tenant, safe='')}{twin}?{urlencode(asked)}"


def _row(standing: Standing) -> Sequence[Any]:
    budget, forecast = standing.budget, standing.forecast
    unit = "USD" if budget.usd is not None else f"M {budget.counts} tokens"

    def short(value: Decimal) -> str:
        return f"{value if budget.usd is not None else value / TOKENS_PER_MTOK:,.2f}"

    return (
        (budget.name, f"/budgets/{quote(budget.name)}"),
        _scope(budget) + (", hard" if budget.hard else ""),
        unit,
        short(budget.amount),
        short(standing.spent),
        percent(standing.spent_fraction),
        "–" if forecast is None else short(forecast.expected),
        "–" if forecast is None else f"{short(forecast.low)} to {short(forecast.high)}",
        "it lasts" if standing.runs_out is None else _short_utc(standing.runs_out),
        _short_utc(standing.ground.period.end),
    )


def _tiles(standing: Standing) -> list[tuple[str, str, str, str]]:
    """Name, value, unit, note."""
    budget, ground, forecast = standing.budget, standing.ground, standing.forecast
    day = ground.burn["24h"]
    ratio = standing.burn_ratio("24h")
    expected = "–" if forecast is None else _number(budget, forecast.expected)
    between = (
        "needs two days of closed hours"
        if forecast is None
        else f"80 %: {_number(budget, forecast.low)} to {_number(budget, forecast.high)}"
    )
    amount = _amount(budget, budget.amount)
    refused = "hard: requests are refused at 0" if budget.hard else "soft: requests go on at 0"
    pace = "" if ratio is None else f"{ratio:.2f} × the pace that lasts to the end"
    out = "it lasts" if standing.runs_out is None else utc_told(standing.runs_out)
    return [
        (
            "Spent",
            _number(budget, standing.spent),
            budget.unit,
            f"{percent(standing.spent_fraction)} of {amount}",
        ),
        ("Remaining", _number(budget, standing.remaining), budget.unit, refused),
        ("Forecast", expected, budget.unit, between),
        ("Burn, last 24 h", "–" if day is None else _number(budget, day), f"{budget.unit} per h", pace),
        ("Runs out", out, "", f"period ends {utc_told(ground.period.end)}"),
    ]


def _scope(budget: Budget) -> str:
    parts = [f"tenant {budget.tenant}"] if budget.tenant else []
    parts += [f"models {', '.join(budget.models)}"] if budget.models else []
    parts += [f"pools {', '.join(budget.pools)}"] if budget.pools else []
    return "; ".join(parts) or "everything"


def _idle(service: Service, budget: Budget) -> str:
    if budget.usd is None:
        return "idle hours have no tokens"
    if not budget.with_idle:
        return "idle is not in it"
    if budget.tenant:
        policy = service.fleet.chargeback.spread_idle.replace("_", " ")
        return f"the tenant's part of idle is in it, spread {policy}"
    return "idle is in it"


def _behind(standing: Standing) -> str:
    """The ledger's rows of the period's closed hours."""
    budget, ground = standing.budget, standing.ground
    kind = "cost" if budget.usd is not None else "usage"
    asked: list[tuple[str, str]] = [("by", "hour"), ("by", "pool"), ("by", "model"), ("by", "tenant")]
    asked += [("tenant", quoted(budget.tenant))] if budget.tenant else []
    asked += [("model", quoted(m)) for m in budget.models] + [("pool", quoted(p)) for p in budget.pools]
    asked += [
        ("start", ground.period.start.isoformat()),
        ("end", min(ground.until, ground.period.end).isoformat()),
    ]
    return f"/v1/{kind}?{urlencode(asked)}"


def _asked(standing: Standing) -> dict[str, tuple[str, list[str], dict[str, Any]]]:
    """What the ledger is asked for the period's closed hours; the forecast is no sum and has no statement."""
    budget, ground = standing.budget, standing.ground
    span = {"start": ground.period.start, "end": min(ground.until, ground.period.end)}
    where: dict[str, Any] = {"book": [BOOK]}
    where |= {key: names for key, names in (("model", budget.models), ("pool", budget.pools)) if names}
    own = where | ({"tenant": [budget.tenant]} if budget.tenant else {})
    if budget.usd is None:
        tokens_ = {**own, "meter": list(COUNTED[budget.counts])}
        return {f"spent by hour [{budget.unit}]": ("quantity", ["hour"], {"where": tokens_, **span})}
    found = {"spent by hour [USD]": ("cost_usd", ["hour"], {"where": own, **span})}
    idle = {"where": {**where, "tenant": [IDLE]}, **span}
    if budget.tenant and budget.with_idle:
        about = "idle by hour and pool [USD], of which the tenant bears its part as statements spread it"
        found[about] = ("cost_usd", ["hour", "pool"], idle)
    elif not budget.tenant and not budget.with_idle:
        found["idle by hour [USD], to be taken off"] = ("cost_usd", ["hour"], idle)
    return found


def _url(standing: Standing, twin: str = "") -> str:
    """The permalink: as the closed hours tell it at this time."""
    return f"/budgets/{quote(standing.budget.name)}{twin}?{urlencode({'at': utc_text(standing.as_of)})}"


def _later(service: Service, caller: Caller, found: Sequence[Standing]) -> list[str]:
    """Budgets that have not begun."""
    begun = {standing.budget.name for standing in found}
    mine = [b for b in service.fleet.budgets if not caller.tenant or b.tenant == caller.tenant]
    return [f"{b.name} begins on {b.start}" for b in mine if b.name not in begun]


def _event(event: Event, fires: bool) -> Sequence[Any]:
    state = "resolved" if event.state == "resolved" else "fires" if fires else "fired"
    return (utc_told(event.at), (event.budget, f"/budgets/{quote(event.budget)}"), state, event.text)


def _money(value: Decimal) -> str:
    return f"{value:,.2f}"


def _number(budget: Budget, value: Decimal) -> str:
    return f"{value:,.2f}" if budget.usd is not None else f"{value:,.0f}"


def _amount(budget: Budget, value: Decimal) -> str:
    return f"{_number(budget, value)} {budget.unit}"


def _short_utc(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%m-%d %H:%M}"


def _path(standing: Standing) -> list[dict[str, str | None]]:
    """The way through the period, as text."""
    return [
        {
            key: utc_text(v) if isinstance(v, datetime) else None if v is None else plain(v)
            for key, v in row.items()
        }
        for row in cumulative(standing)
    ]
