"""Which thresholds budgets have crossed since one last looked, and which they are below again.

A threshold fires once in a period, however often it is looked at. It resolves when its figure is below it again (a
forecast: by `_SLACK` of the amount, so that one that hovers does not chatter), when the period is over, or when the
fleet file no longer has it. A figure that is not known (no forecast yet) changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal

import msgspec

from pertoken.report._written import plain
from pertoken.report.budgets import Standing

Kind = Literal["actual", "forecast"]
_SLACK = Decimal("0.02")


class Event(msgspec.Struct, frozen=True):
    """A threshold crossed (`firing`), or no longer (`resolved`). Amounts are plain decimal text [`unit`]."""

    id: str
    budget: str
    kind: Kind
    percent: float
    state: Literal["firing", "resolved"]
    at: datetime
    since: datetime
    period_start: datetime
    period_end: datetime
    amount: str
    figure: str
    """What was spent, or what the forecast said."""
    unit: str
    tenant: str = ""
    hard: bool = False
    why: str = ""

    @property
    def key(self) -> str:
        """What it is of, firing or resolved."""
        return _key(self.budget, self.kind, self.percent)

    @property
    def severity(self) -> Literal["critical", "warning"]:
        """`critical` where a hard budget is used up."""
        return "critical" if self.hard and self.kind == "actual" and self.percent >= 100 else "warning"

    @property
    def text(self) -> str:
        """One sentence for people."""
        figure = f"{self._shown(self.figure)} {self.unit}"
        whole = f"{self.percent:g} % of the budget {self.budget} ({self._shown(self.amount)} {self.unit})"
        until = f"the period from {self.period_start:%Y-%m-%d %H:%M} to {self.period_end:%Y-%m-%d %H:%M} UTC"
        if self.state == "resolved":
            return f"Recovered: {whole}: {self.why}. At {figure}, in {until}."
        if self.kind == "forecast":
            return f"Expected to pass {whole}: forecast {figure} for {until}."
        return f"Passed {whole}: spent {figure} in {until}."

    def _shown(self, amount: str) -> str:
        return f"{Decimal(amount or 0):,.{2 if self.unit == 'USD' else 0}f}"


Firing = dict[str, Event]
"""By `Event.key`, the event that began it."""


def crossings(firing: Firing, standings: Sequence[Standing], now: datetime) -> tuple[Firing, list[Event]]:
    """What fires now, and the events that lead there from what fired before; recoveries first."""
    found = {key: seen for s in standings for key, seen in _seen(s, now).items()}
    after: Firing = {}
    events: list[Event] = []
    for key, begun in firing.items():
        seen = found.get(key)
        why = _over(begun, seen, now)
        if not why:
            after[key] = begun
            continue
        figure = seen.figure if seen is not None and seen.period_start == begun.period_start else begun.figure
        events.append(_resolved(begun, figure, why, now))
    for key, seen in found.items():
        if key not in after and _reached(seen):
            after[key] = seen
            events.append(seen)
    return after, events


def _seen(standing: Standing, now: datetime) -> Mapping[str, Event]:
    """Every threshold of a budget with its figure, as the event it would be."""
    budget, period = standing.budget, standing.ground.period
    forecast = standing.forecast
    figures: list[tuple[Kind, Decimal | None, list[float]]] = [
        ("actual", standing.spent, budget.alert_at.actual_percent),
        ("forecast", forecast.expected if forecast else None, budget.alert_at.forecast_percent),
    ]
    found = {}
    for kind, figure, percents in figures:
        for percent in percents:
            key = _key(budget.name, kind, percent)
            found[key] = Event(
                id=_id(key, now), budget=budget.name, kind=kind, percent=percent, state="firing", at=now, since=now,
                period_start=period.start, period_end=period.end, amount=plain(budget.amount),
                figure="" if figure is None else plain(figure), unit=budget.unit, tenant=budget.tenant,
                hard=budget.hard,
            )  # fmt: skip
    return found


def _reached(seen: Event) -> bool:
    return bool(seen.figure) and Decimal(seen.figure) >= _threshold(seen)


def _over(begun: Event, seen: Event | None, now: datetime) -> str:
    """Why a threshold fires no more; empty: it does."""
    if seen is None:
        return (
            "the period is over" if now >= begun.period_end else "the fleet file no longer has this threshold"
        )
    if seen.period_start != begun.period_start:
        return "the period is over"
    if not seen.figure or seen.tenant != begun.tenant:
        return "" if seen.tenant == begun.tenant else "the budget is another tenant's now"
    slack = _SLACK * Decimal(seen.amount) if seen.kind == "forecast" else Decimal(0)
    if Decimal(seen.figure) >= _threshold(seen) - slack:
        return ""
    return "the forecast is below it again" if seen.kind == "forecast" else "less is booked, or more allowed"


def _threshold(event: Event) -> Decimal:
    return Decimal(event.amount) * Decimal(str(event.percent)) / 100


def _resolved(begun: Event, figure: str, why: str, now: datetime) -> Event:
    return msgspec.structs.replace(
        begun, id=_id(f"{begun.key} resolved", now), state="resolved", at=now, figure=figure, why=why
    )


def _key(budget: str, kind: str, percent: float) -> str:
    return f"{budget}/{kind}/{percent:g}"


def _id(key: str, now: datetime) -> str:
    """The same event has the same id, however often it is sent."""
    return hashlib.sha256(f"{key} {now.astimezone(UTC).isoformat()}".encode()).hexdigest()[:32]
