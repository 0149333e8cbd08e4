"""Budgets: what is spent of them, how fast, where the period will end, and whether the next request fits.

Per budget, A = its amount, and all hours of its scope (tenant, models, pools; idle as it says)::

    spent      Σ closed hours of the period + the hour so far
    burn       Σ newest n closed hours / n, without demand charges               [USD or tokens per hour]
    burn ratio burn × hours of the period / A                                    1: it lasts to the end, no longer
    forecast   Σ closed hours + expected hours ahead + what the hour so far is above its own expectation + demand ahead
    runs out   the hour in which spent, or spent and expected, reaches A

The hours ahead are those of `_forecast`. A demand charge stands at the first hour of its billing month, whole: it
counts in the period that holds that hour, in no burn rate, and ahead of time as the mean of the months that are over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from pertoken.fleet import Budget, RunningFleet
from pertoken.meter.attribute import BOOK
from pertoken.report._forecast import HOURS_PER_WEEK, MOST_WEEKS, Floats, Outlook, Places, outlook
from pertoken.report._scope import ByHour, Running, Scope, exact, running_of
from pertoken.report._spread import weights_of
from pertoken.report._terms import months_of
from pertoken.report._written import plain, utc_text
from pertoken.report.books import HOUR, Books
from pertoken.units import DAYS_PER_WEEK, HOURS_PER_DAY, MONTHS_PER_YEAR, SECONDS_PER_HOUR, site_pool

BURN_HOURS = {"1h": 1, "24h": HOURS_PER_DAY, "7d": HOURS_PER_WEEK}
"""Windows of the burn rate, in hours back from the first hour that is not closed."""
_DEMAND_MONTHS = timedelta(days=400)
_MONTHS = {"month": 1, "quarter": 3}
_MONDAY = date(1970, 1, 5)
Paths = tuple[Floats, Floats, Floats]
_NOT_YET = "a forecast needs two days of closed hours"


@dataclass(frozen=True)
class Period:
    """The full UTC hours from `start` up to, not with, `end`."""

    start: datetime
    end: datetime

    @property
    def hours(self) -> int:
        """How many."""
        return round((self.end - self.start) / HOUR)


@dataclass(frozen=True)
class Forecast:
    """What the period will end at [the budget's unit], with the interval that four of five outcomes are to lie in."""

    expected: Decimal
    low: Decimal
    high: Decimal
    method: str
    basis: str = "fitted"


@dataclass(frozen=True)
class Ground:
    """What the closed hours say of a budget; it changes only when hours close."""

    budget: Budget
    period: Period
    until: datetime
    """The first hour that is not closed."""
    hours: ByHour
    """The period's closed hours that came to something, demand charges among them."""
    burn: dict[str, Decimal | None]
    """By window, per hour; None where the books are younger."""
    outlook: Outlook | None
    ahead: Demand
    unpriced_hours: int
    """Hours of the period with usage that no rate prices: what is spent in them is not known."""
    weights: Mapping[str, dict[str, Fraction]]

    @cached_property
    def closed(self) -> Decimal:
        """What the closed hours of the period come to."""
        return sum(self.hours.values(), Decimal(0))


@dataclass(frozen=True)
class Demand:
    """Demand charges still to come in a period [USD]: the rise of the running months, and whole months ahead."""

    expected_usd: float = 0.0
    low_usd: float = 0.0
    high_usd: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Standing:
    """How a budget stands at a moment."""

    ground: Ground
    as_of: datetime
    """When the hour so far was asked."""
    running: Decimal
    """What the hour so far comes to."""
    forecast: Forecast | None
    runs_out: datetime | None
    """When it is, or was, used up; None where it is expected to last."""
    rise: Decimal = Decimal(0)
    """What of the hour so far is the rise of a month's demand charge."""

    @property
    def budget(self) -> Budget:
        """The budget."""
        return self.ground.budget

    @cached_property
    def spent(self) -> Decimal:
        """Closed hours and the hour so far."""
        return self.ground.closed + self.running

    @cached_property
    def remaining(self) -> Decimal:
        """What is left; below 0 where more was spent."""
        return self.budget.amount - self.spent

    @property
    def spent_fraction(self) -> float:
        """Spent over the amount."""
        return float(self.spent / self.budget.amount)

    @property
    def forecast_fraction(self) -> float | None:
        """Forecast over the amount."""
        return float(self.forecast.expected / self.budget.amount) if self.forecast else None

    def burn_ratio(self, window: str) -> float | None:
        """How many times as fast as the budget allows: at 1 it lasts exactly to the period's end."""
        rate = self.ground.burn[window]
        return None if rate is None else float(rate * self.ground.period.hours / self.budget.amount)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: amounts as text, exact."""
        budget, ground = self.budget, self.ground
        forecast = self.forecast
        return {
            "name": budget.name, "unit": budget.unit, "amount": plain(budget.amount), "hard": budget.hard,
            "tenant": budget.tenant, "models": list(budget.models), "pools": list(budget.pools),
            "idle_included": budget.with_idle, "period": budget.period, "timezone": budget.timezone,
            "period_start": utc_text(ground.period.start), "period_end": utc_text(ground.period.end),
            "as_of": utc_text(self.as_of), "closed_until": utc_text(ground.until),
            "spent": plain(self.spent), "spent_closed": plain(ground.closed), "spent_running": plain(self.running),
            "spent_fraction": self.spent_fraction, "remaining": plain(self.remaining),
            "burn_per_hour": {k: None if v is None else plain(v) for k, v in ground.burn.items()},
            "burn_ratio": {k: self.burn_ratio(k) for k in ground.burn},
            "forecast": None if forecast is None else {
                "expected": plain(forecast.expected), "low": plain(forecast.low), "high": plain(forecast.high),
                "interval": "80 %", "method": forecast.method, "basis": forecast.basis,
            },
            "forecast_missing": _NOT_YET if forecast is None else "",
            "runs_out": None if self.runs_out is None else utc_text(self.runs_out),
            "unpriced_hours": ground.unpriced_hours, "basis": "measured", "note": ground.ahead.note,
        }  # fmt: skip


def period_at(budget: Budget, moment: datetime) -> Period | None:
    """The period that holds a moment; None before the budget's first.

    Days begin at local midnight; where that is off the hour, with the first full UTC hour after it.
    """
    zone = ZoneInfo(budget.timezone)
    number = _number(budget, moment.astimezone(zone).date())
    if moment < _border(budget, number, zone):
        number -= 1  # local midnight was off the hour
    if budget.start is not None and number < 0:
        return None
    return Period(_border(budget, number, zone), _border(budget, number + 1, zone))


def grounds(
    books: Books, fleet: RunningFleet, now: datetime, budgets: list[Budget] | None = None
) -> list[Ground]:
    """What the closed hours say of the budgets that have begun, in the fleet's order (None: of all of the fleet)."""
    current = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    until = min(books.closed_until or current, current)
    first = books.first_hour()
    unpriced: dict[Period, list[dict[str, object]]] = {}
    weights: dict[Period, dict[str, dict[str, Fraction]]] = {}
    found = []
    for budget in fleet.budgets if budgets is None else budgets:
        period = period_at(budget, now)
        if period is None:
            continue
        if period not in unpriced:
            unpriced[period] = books.ledger.unpriced(BOOK, period.start, min(until, period.end))
        spreads = bool(budget.tenant) and budget.with_idle
        if spreads and period not in weights:
            weights[period] = weights_of(books.ledger, fleet, period.start, min(current + HOUR, period.end))
        scope = Scope(books.ledger, budget, weights[period] if spreads else {})
        begun = max(until, period.start)
        known = max(first or begun, begun - MOST_WEEKS * HOURS_PER_WEEK * HOUR)
        before = scope
        if spreads:  # what hours before this period bore of idle goes by what was used then
            earlier = Period(known, begun)
            if earlier not in weights:
                weights[earlier] = weights_of(books.ledger, fleet, known, begun)
            before = replace(scope, weights=weights[earlier])
        found.append(_ground(fleet, scope, period, _History(before, known, begun), unpriced[period]))
    return found


def stand(ground: Ground, now: datetime, running: Running | None) -> Standing:
    """How a budget stands, from its closed hours and the hour so far (None: closed hours alone)."""
    more = rise = Decimal(0)
    moment = now if running is None else running.until
    if running is not None and ground.until <= running.hour < ground.period.end:
        asked = ground.budget, ground.weights, ground.period.start
        more, rise = running.sum_of(*asked), running.demand_of(*asked)
    paths = _paths(ground, moment, more, rise)
    out = _runs_out(ground, moment, more, paths)
    return Standing(ground, moment, more, _forecast(ground, paths), out, rise)


def standings(books: Books, now: datetime) -> list[Standing]:
    """How all budgets of the fleet that have begun stand now."""
    found = grounds(books, books.fleet, now)
    running = running_of(books.so_far(now)) if found else None
    return [stand(ground, now, running) for ground in found]


def cumulative(standing: Standing) -> list[dict[str, Any]]:
    """The period at each hour's end: `actual` so far, else `expected`, `low` and `high` [the budget's unit]."""
    ground = standing.ground
    total, rows = Decimal(0), []
    at = ground.period.start
    rows.append({"at": at, "actual": total, "expected": None, "low": None, "high": None})
    while at < ground.until:
        total += ground.hours.get(at, Decimal(0))
        at += HOUR
        rows.append({"at": at, "actual": total, "expected": None, "low": None, "high": None})
    paths = _paths(ground, standing.as_of, standing.running, standing.rise)
    if paths is not None and len(paths[0]):
        rows[-1] |= {"expected": total, "low": total, "high": total}
        for n, values in enumerate(zip(*paths, strict=True)):
            ahead = dict(
                zip(("expected", "low", "high"), (_amount(ground.budget, v) for v in values), strict=True)
            )
            rows.append({"at": ground.until + (n + 1) * HOUR, "actual": None, **ahead})
    return rows


@dataclass(frozen=True)
class _History:
    """The closed hours that tell what comes: from `start` up to, not with, `until`."""

    scope: Scope
    start: datetime
    until: datetime


def _ground(
    fleet: RunningFleet, scope: Scope, period: Period, history: _History, unpriced: list[dict[str, object]]
) -> Ground:
    budget, until = scope.budget, history.until
    demand = history.scope.demand(until - _DEMAND_MONTHS, until)
    steady = history.scope.by_hour(history.start, until)
    for (_, hour), amount in demand.items():
        if hour in steady:
            steady[hour] -= amount
    zone = ZoneInfo(budget.timezone)
    past = _filled(steady, history.start, until)
    places = _places(history.start, len(past), zone)
    counted = [int(str(r["hours"])) for r in unpriced if not budget.pools or r["pool"] in budget.pools]
    return Ground(
        budget=budget,
        period=period,
        until=until,
        hours=scope.by_hour(period.start, min(until, period.end)),
        burn={window: _burn(steady, history, hours) for window, hours in BURN_HOURS.items()},
        outlook=outlook(past, places, _places(until, _gap(until, period.end), zone)),
        ahead=_demand_ahead(fleet, period, until, demand),
        unpriced_hours=max(counted, default=0) if budget.usd is not None else 0,
        weights=scope.weights,
    )


def _burn(steady: ByHour, history: _History, hours: int) -> Decimal | None:
    if _gap(history.start, history.until) < hours:
        return None
    newest = (steady.get(history.until - n * HOUR, Decimal(0)) for n in range(1, hours + 1))
    return exact(Fraction(sum(newest, Decimal(0))) / hours)


def _demand_ahead(
    fleet: RunningFleet, period: Period, until: datetime, known: Mapping[tuple[str, datetime], Decimal]
) -> Demand:
    """Demand charges that the period has still to meet: months over tell what the running ones and the next come to."""
    expected = low = high = 0.0
    notes = []
    for name, site in fleet.sites.items():
        pool = site_pool(name)
        months = {hour: float(usd) for (p, hour), usd in known.items() if p == pool}
        if not months:
            continue
        ends = {hour: months_of(site, hour, hour + HOUR)[0][1] for hour in months}
        over = [usd for hour, usd in months.items() if ends[hour] <= until]
        usual = sum(over) / len(over) if over else 0.0
        for start, end in months_of(site, period.start, period.end):
            if not period.start <= start < period.end or end <= until:
                continue
            so_far = months.get(start, 0.0)
            if not over:  # nothing says how a whole month ends: as the running one stands
                usual = max(months.values())
            expected += max(usual - so_far, 0.0)
            low += 0.0 if start < until else max(min(over, default=usual) - so_far, 0.0)
            high += max(max(over, default=usual) - so_far, 0.0)
            notes.append(
                f"{name}'s demand charge of the month from {start:%Y-%m-%d}: {so_far:.2f} USD so far"
            )
    return Demand(expected, low, high, "; ".join(notes))


def _paths(ground: Ground, now: datetime, running: Decimal, rise: Decimal) -> Paths | None:
    """Running totals at the end of each hour from `until` on: expected, low, high; None where there is no outlook."""
    seen = ground.outlook
    if seen is None:
        return None
    size = len(seen.expected)
    gone = min(max((now - ground.until).total_seconds() / SECONDS_PER_HOUR, 0.0), float(size))
    whole = int(gone)
    steps = np.diff(seen.expected, prepend=0.0)
    due = float(steps[:whole].sum() + (steps[whole] * (gone - whole) if whole < size else 0.0))
    more = float(ground.closed) + max(float(running - rise) - due, 0.0)
    ahead, spent = ground.ahead, float(ground.closed + running)
    # The rise of this hour is a part of what a month's demand charge has still to rise, not more of it.
    expected, low, high = (
        max(usd, float(rise)) for usd in (ahead.expected_usd, ahead.low_usd, ahead.high_usd)
    )
    return (
        np.maximum(seen.expected + more + expected, spent),
        np.maximum(seen.low + more + low, spent),
        np.maximum(seen.high + more + high, spent),
    )


def _forecast(ground: Ground, paths: Paths | None) -> Forecast | None:
    if paths is None or ground.outlook is None:
        return None
    if not len(paths[0]):
        whole = _amount(ground.budget, float(ground.closed))
        return Forecast(whole, whole, whole, "the period is over")
    ends = [_amount(ground.budget, float(path[-1])) for path in paths]
    return Forecast(ends[0], min(ends[1], ends[0]), max(ends[2], ends[0]), ground.outlook.method)


def _runs_out(ground: Ground, now: datetime, running: Decimal, paths: Paths | None) -> datetime | None:
    amount, total = ground.budget.amount, Decimal(0)
    for hour in sorted(ground.hours):
        total += ground.hours[hour]
        if total >= amount:
            return hour + HOUR
    if total + running >= amount:
        return now
    if paths is None:
        return None
    reached = np.flatnonzero(paths[0] >= float(amount))
    return ground.until + (int(reached[0]) + 1) * HOUR if len(reached) else None


def _number(budget: Budget, day: date) -> int:
    """Which period a local day lies in, counted from the budget's first."""
    if budget.period in _MONTHS:
        size, first = _MONTHS[budget.period], budget.start or date(1970, 1, 1)
        months = (day.year - first.year) * MONTHS_PER_YEAR + day.month - first.month
        return months // size - (months % size == 0 and day < _month_day(first, months))
    first = budget.start or _MONDAY
    return (day - first).days // (DAYS_PER_WEEK if budget.period == "week" else 1)


def _border(budget: Budget, number: int, zone: ZoneInfo) -> datetime:
    """The first full UTC hour of a period."""
    if budget.period in _MONTHS:
        day = _month_day(budget.start or date(1970, 1, 1), number * _MONTHS[budget.period])
    else:
        days = number * (DAYS_PER_WEEK if budget.period == "week" else 1)
        day = (budget.start or _MONDAY) + timedelta(days=days)
    moment = datetime.combine(day, time(), zone).astimezone(UTC)
    full = moment.replace(minute=0, second=0, microsecond=0)
    return full if full == moment else full + HOUR


def _month_day(first: date, months: int) -> date:
    """The same day some months later; the month's last where it has no such day."""
    year, month = divmod(first.year * MONTHS_PER_YEAR + first.month - 1 + months, MONTHS_PER_YEAR)
    after = date(year + month // 11, (month + 1) % MONTHS_PER_YEAR + 1, 1)
    return date(year, month + 1, min(first.day, (after - timedelta(days=1)).day))


def _filled(found: ByHour, start: datetime, end: datetime) -> Floats:
    """What each hour from `start` up to `end` came to, shape (T,); an hour without rows to nothing."""
    return np.array(
        [float(found.get(start + n * HOUR, 0)) for n in range(_gap(start, end))], dtype=np.float64
    )


def _places(start: datetime, count: int, zone: ZoneInfo) -> Places:
    """The hour of the local week of each hour, shape (T,)."""
    local = [(start + n * HOUR).astimezone(zone) for n in range(count)]
    return np.array([t.weekday() * HOURS_PER_DAY + t.hour for t in local], dtype=np.int64)


def _gap(start: datetime, end: datetime) -> int:
    return max(round((end - start) / HOUR), 0)


def _amount(budget: Budget, value: float) -> Decimal:
    """A forecast as an amount: USD to the cent, tokens whole."""
    return Decimal(value).quantize(Decimal("0.01") if budget.usd is not None else Decimal(1))
