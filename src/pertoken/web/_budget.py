"""Budgets over HTTP: how they stand, and whether the next request fits."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from pydantic import BaseModel

from pertoken.report._written import plain, utc_text
from pertoken.report.budgets import Standing
from pertoken.web._doors import Reader, ServiceHere, answers, caller_with, service_of
from pertoken.web.tokens import Caller
from pertoken.web.watch import Fit, Watch

router = APIRouter()
_NOT_YET = HTTPException(503, "the budgets are being read: ask again in a moment", {"Retry-After": "1"})
_SHARED = "a budget of more than this tenant is used up"


class FitOfBudget(BaseModel):
    """One budget the request falls under. A budget of more than the tenant shows its figures to no tenant's token."""

    budget: str
    fits: bool
    hard: bool
    shared: bool
    unit: str | None
    remaining: str | None
    period_end: str | None


class FitAnswer(BaseModel):
    """Whether the next request fits; of the budget nearest its end, what is left."""

    tenant: str
    allowed: bool
    reason: str
    budget: str | None
    unit: str | None
    remaining: str | None
    hard: bool | None
    period_end: str | None
    as_of: str | None
    """When the hour so far was last asked."""
    budgets: list[FitOfBudget]


class Forecast(BaseModel):
    """What the period will end at."""

    expected: str
    low: str
    high: str
    interval: str
    method: str
    basis: str


class BudgetStanding(BaseModel):
    """A budget and how it stands; amounts are plain decimal text in its unit."""

    name: str
    unit: str
    amount: str
    hard: bool
    tenant: str
    models: list[str]
    pools: list[str]
    idle_included: bool
    period: str
    timezone: str
    period_start: str
    period_end: str
    as_of: str
    closed_until: str
    spent: str
    spent_closed: str
    spent_running: str
    spent_fraction: float
    remaining: str
    burn_per_hour: dict[str, str | None]
    burn_ratio: dict[str, float | None]
    forecast: Forecast | None
    forecast_missing: str
    runs_out: str | None
    unpriced_hours: int
    basis: str
    note: str


async def quick_reader(request: Request) -> Caller:
    """`Reader`, without a thread for it: looking a token up takes microseconds."""
    return caller_with("read")(request)


def watch_of(request: Request) -> Watch:
    """The budgets of the running service."""
    return service_of(request).budgets


def seen_by(caller: Caller, standings: tuple[Standing, ...] | None) -> list[Standing]:
    """The standings a caller may see: a tenant's token those of that tenant alone. 503 until there are some."""
    if standings is None:
        raise _NOT_YET
    return [s for s in standings if not caller.tenant or s.budget.tenant == caller.tenant]


@router.get("/v1/budgets", responses=answers(401, 403, 429, 503))
async def budgets(service: ServiceHere, caller: Reader) -> list[BudgetStanding]:
    """Budgets that have begun: spent, burn rate, forecast with its interval, when they run out."""
    found = seen_by(caller, service.budgets.standings)
    return [BudgetStanding(**standing.to_dict()) for standing in found]


@router.get(
    "/v1/budget/{tenant:whole}",
    responses={**answers(401, 403, 422, 429, 503), 200: {"model": FitAnswer}},
    name="budget",
)
async def budget(
    request: Request,
    tenant: str,
    caller: Annotated[Caller, Depends(quick_reader)],
    tokens: Annotated[int, Query(ge=0, le=10**18)] = 0,
    usd: Annotated[Decimal, Query(ge=0, le=10**12)] = Decimal(0),
    model: Annotated[str, Query(max_length=200)] = "",
    pool: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Whether a tenant's next request fits, from memory: it counts what was metered up to `as_of`, nothing under way.

    `usd` is held against budgets in USD, `tokens` against those in tokens; with neither, whether anything is left.
    Budgets of models or pools count where `model` or `pool` names one of theirs. Of a budget of more than the tenant,
    a tenant's token hears whether anything is left, whatever the amount.
    """
    if caller.tenant and caller.tenant != tenant:
        raise HTTPException(403, "a tenant's token may ask for its own budget alone")
    found = watch_of(request).fits(tenant, model, pool, usd, tokens, own=bool(caller.tenant))
    if found is None:
        raise _NOT_YET
    return Response(
        msgspec.json.encode(_answer(tenant, *found, own=bool(caller.tenant))), media_type="application/json"
    )


def _answer(tenant: str, fits: list[Fit], allowed: bool, own: bool) -> dict[str, Any]:
    shown = [_one(fit, own and not fit.standing.budget.tenant) for fit in fits]
    told = [fit for fit in fits if fit.standing.budget.tenant or not own]
    refusing = [fit for fit in fits if fit.standing.budget.hard and not fit.fits]
    nearest = min([f for f in told if f in refusing] or told, key=lambda f: f.left_fraction, default=None)
    if not fits:
        reason = "no budget applies"
    elif not allowed:
        names = [fit.standing.budget.name for fit in refusing if fit in told]
        reason = f"the hard budget {names[0]} has too little left" if names else _SHARED
    elif all(fit.fits for fit in fits):
        reason = "it fits"
    else:
        reason = "a budget has too little left, and is not hard"
    one = _one(nearest, False) if nearest else {}
    return {
        "tenant": tenant,
        "allowed": allowed,
        "reason": reason,
        **{key: one.get(key) for key in ("budget", "unit", "remaining", "hard", "period_end")},
        "as_of": utc_text(fits[0].standing.as_of) if fits else None,
        "budgets": shown,
    }


def _one(fit: Fit, hidden: bool) -> dict[str, Any]:
    standing = fit.standing
    return {
        "budget": "(shared)" if hidden else standing.budget.name,
        "fits": fit.fits,
        "hard": standing.budget.hard,
        "shared": not standing.budget.tenant,
        "unit": None if hidden else standing.budget.unit,
        "remaining": None if hidden else plain(standing.remaining),
        "period_end": None if hidden else utc_text(standing.ground.period.end),
    }
