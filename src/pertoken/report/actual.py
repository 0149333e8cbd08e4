"""Forecast against actual: the difference of two books in USD, split into price, volume, efficiency and mix.

Per group g (of the dimensions asked for), T = tokens, Q = the resource that drives a cost line (GPU hours of a rent,
kWh of an energy charge, tokens of an API price), p = USD per unit of it; 0 is the forecast, 1 the actual::

    volume      C0_g × (T1/T0 − 1)                  all tokens together became more or fewer
    mix         C0_g × (T1_g/T0_g − T1/T0)          they moved between groups
    efficiency  Σ p0 × (Q1 − Q0 × T1_g/T0_g)        a token took more or less of the resource, idle included
    price       Σ (p1 − p0) × Q1                    a unit of the resource cost more or less

The four sum to C1_g − C0_g identically, and are rounded so that they still do, to the last digit of the ledger.
A group without tokens in either book (a site, idle hours) has efficiency and price alone; one with tokens in only one
of them is mix (volume, where the forecast has no tokens at all).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, Protocol

from pertoken.errors import InputError, UnknownNameError
from pertoken.ledger import Ledger
from pertoken.meter._models import renamed
from pertoken.units import SERVED_TOKEN_METERS, TOKEN_METERS, base_meter

DIMENSIONS = ("pool", "model", "tenant")
DRIVERS = ("price", "volume", "efficiency", "mix")
_DIGITS = 9  # of the ledger's USD

_DRIVING: dict[str, tuple[str, ...]] = {
    "capital": ("gpu_hours",),
    "rent": ("gpu_hours",),
    "commitment": ("gpu_hours",),
    "software": ("gpu_hours", "site_hours"),
    "energy_charge": ("energy_kwh", "site_hours"),
    "demand_charge": ("peak_kw",),
    "egress": ("egress_gb",),
}
"""Component to the meters that drive it, the first one told in a book counts; staff and the like: hours paid."""
_BY_THE_HOUR = ("site_hours", "gpu_hours")
_API_TOKENS = {"input": ("input_tokens", "cached_input_tokens"), "output": ("output_tokens",)}

Group = tuple[str, ...]
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Facts:
    """Sums of one book: cost by group, phase and component; quantities by group, phase and meter."""

    costs: dict[tuple[Group, str, str], Decimal]
    quantities: dict[tuple[Group, str, str], Fraction]

    @classmethod
    def of(cls, by: Sequence[str], costs: Rows, usage: Rows) -> Facts:
        """From rows as `Ledger.cost` and `Ledger.usage` give them (by, phase, component | meter)."""
        found: dict[tuple[Group, str, str], Decimal] = defaultdict(Decimal)
        for row in costs:
            found[_group(row, by), row["phase"], row["component"]] += Decimal(row["cost_usd"])
        amounts: dict[tuple[Group, str, str], Fraction] = defaultdict(Fraction)
        for row in usage:
            amounts[_group(row, by), row["phase"], base_meter(row["meter"])] += Fraction(
                Decimal(row["quantity"])
            )
        return cls(dict(found), dict(amounts))

    def tokens(self) -> dict[Group, Fraction]:
        """Tokens served and trained, by group."""
        found: dict[Group, Fraction] = defaultdict(Fraction)
        for (group, _, meter), amount in self.quantities.items():
            if meter in TOKEN_METERS:
                found[group] += amount
        return found

    def driver(self, group: Group, phase: str, component: str) -> str:
        """The meter that drives a cost line in this book; empty where none of them is told."""
        if component == "api":
            return "tokens"
        meters = _DRIVING.get(component, _BY_THE_HOUR)
        return next((m for m in meters if self.quantities.get((group, phase, m))), "")

    def quantity(self, group: Group, phase: str, meter: str) -> Fraction:
        """How much of a driver the group took in a phase."""
        names = _API_TOKENS.get(phase, SERVED_TOKEN_METERS) if meter == "tokens" else (meter,)
        return sum((self.quantities.get((group, phase, n), Fraction(0)) for n in names), Fraction(0))


@dataclass(frozen=True)
class Line:
    """The difference of one group [USD]; the four drivers sum to actual − forecast."""

    group: Group
    forecast_usd: Decimal
    actual_usd: Decimal
    price_usd: Decimal
    volume_usd: Decimal
    efficiency_usd: Decimal
    mix_usd: Decimal
    forecast_tokens: int
    actual_tokens: int

    @property
    def variance_usd(self) -> Decimal:
        """Actual less forecast."""
        return self.actual_usd - self.forecast_usd


@dataclass(frozen=True)
class Variance:
    """Two books over the same hours: a line per group, and their sum."""

    forecast: str
    actual: str
    by: tuple[str, ...]
    start: datetime
    end: datetime
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> Line:
        """All groups together; each driver is the sum of its lines."""

        def usd(name: str) -> Decimal:
            return sum((getattr(line, name) for line in self.lines), Decimal(0))

        return Line(
            group=("total",),
            forecast_usd=usd("forecast_usd"),
            actual_usd=usd("actual_usd"),
            price_usd=usd("price_usd"),
            volume_usd=usd("volume_usd"),
            efficiency_usd=usd("efficiency_usd"),
            mix_usd=usd("mix_usd"),
            forecast_tokens=sum(line.forecast_tokens for line in self.lines),
            actual_tokens=sum(line.actual_tokens for line in self.lines),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; USD as text, exact."""
        lines = [{**dict(zip(self.by, line.group, strict=True)), **_figures(line)} for line in self.lines]
        return {
            "forecast": self.forecast, "actual": self.actual, "by": list(self.by),
            "start": self.start.isoformat(), "end": self.end.isoformat(),
            "lines": lines, "total": _figures(self.total), "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        heads = [*self.by, "forecast", "actual", "variance", *DRIVERS]
        body = [[*line.group, *_cells(line)] for line in self.lines]
        body.append(["total", *[""] * (len(self.by) - 1), *_cells(self.total)])
        wide = [max(len(row[i]) for row in [heads, *body]) for i in range(len(heads))]
        keys = len(self.by)

        def shown(row: list[str]) -> str:
            return "  ".join(
                cell.ljust(w) if i < keys else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, wide, strict=True))
            ).rstrip()

        span = f"{self.start:%Y-%m-%d %H:%M} to {self.end:%Y-%m-%d %H:%M} UTC"
        top = f"{self.actual} against {self.forecast}, {span}; USD"
        return "\n".join(
            [top, "", shown(heads), *map(shown, body), *([""] if self.notes else []), *self.notes]
        )


def variance(
    forecast: Facts,
    actual: Facts,
    *,
    by: Sequence[str],
    start: datetime,
    end: datetime,
    books: tuple[str, str] = ("plan", "actual"),
) -> Variance:
    """The difference of two books' sums over the same hours, by group; formulas in this module's docstring."""
    groups = sorted({g for facts in (forecast, actual) for g, *_ in [*facts.costs, *facts.quantities]})
    tokens = forecast.tokens(), actual.tokens()
    whole = sum(tokens[0].values(), Fraction(0)), sum(tokens[1].values(), Fraction(0))
    growth = whole[1] / whole[0] if whole[0] else None
    lines = [
        _line(
            group,
            forecast,
            actual,
            tokens[0].get(group, Fraction(0)),
            tokens[1].get(group, Fraction(0)),
            growth,
        )
        for group in groups
    ]
    kept = tuple(line for line in lines if line.forecast_usd or line.actual_usd)
    return Variance(books[0], books[1], tuple(by), start, end, kept, tuple(_notes(forecast, actual)))


def _line(
    group: Group, forecast: Facts, actual: Facts, t0: Fraction, t1: Fraction, growth: Fraction | None
) -> Line:
    cells = {key[1:] for facts in (forecast, actual) for key in facts.costs if key[0] == group}
    c0 = sum((forecast.costs.get((group, *cell), Decimal(0)) for cell in cells), Decimal(0))
    c1 = sum((actual.costs.get((group, *cell), Decimal(0)) for cell in cells), Decimal(0))
    volume = mix = efficiency = Fraction(0)
    gap = Fraction(c1) - Fraction(c0)
    if bool(t0) != bool(t1):  # planned and not there, or there and not planned
        volume = Fraction(c0) * (growth - 1) if growth is not None and t0 else Fraction(0)
        volume = gap if growth is None else volume
        mix = gap - volume
    else:
        flex = t1 / t0 if t0 else Fraction(1)
        if t0 and growth is not None:
            volume, mix = Fraction(c0) * (growth - 1), Fraction(c0) * (flex - growth)
        efficiency = sum((_efficiency(group, cell, forecast, actual, flex) for cell in cells), Fraction(0))
    parts = [_rounded(x) for x in (volume, efficiency, mix)]
    return Line(
        group=group,
        forecast_usd=c0,
        actual_usd=c1,
        price_usd=c1 - c0 - sum(parts, Decimal(0)),
        volume_usd=parts[0],
        efficiency_usd=parts[1],
        mix_usd=parts[2],
        forecast_tokens=int(t0),
        actual_tokens=int(t1),
    )


def _efficiency(
    group: Group, cell: tuple[str, str], forecast: Facts, actual: Facts, flex: Fraction
) -> Fraction:
    """p0 × (Q1 − Q0 × flex) of one cost line; the price is what is left of its difference."""
    c0 = Fraction(forecast.costs.get((group, *cell), Decimal(0)))
    c1 = Fraction(actual.costs.get((group, *cell), Decimal(0)))
    meter = forecast.driver(group, *cell) or actual.driver(group, *cell)
    q0, q1 = (facts.quantity(group, cell[0], meter) for facts in (forecast, actual))
    if q0 and q1:
        return c0 / q0 * (q1 - q0 * flex)
    if q1:  # none was planned: its price is the actual one
        return c1 - c0 * flex
    # None was taken, or nothing drives the line: what was planned is saved; a cost without a quantity is price.
    return -c0 * flex if q0 else c0 - c0 * flex


def compare_books(
    ask: Callable[[str], Source],
    *,
    books: Sequence[str],
    by: Sequence[str],
    start: datetime | None = None,
    end: datetime | None = None,
) -> Variance:
    """The variance of two books: `books` holds ``actual`` and a plan in either order, or two plans.

    Parameters: ask gives where a book is read; start and end [UTC], by default the hours that both books have.
    Raises UnknownNameError on a book that is not there, InputError on dimensions that are none or no common hours.
    """
    if len(books) != 2 or books[0] == books[1]:
        raise InputError("give two books: --book actual --book plan:NAME")
    for name in by:
        if name not in DIMENSIONS:
            raise InputError(f"cannot group by {name!r}: one of {', '.join(DIMENSIONS)}")
    keys = list(dict.fromkeys(by)) or ["pool"]
    actual, forecast = sorted(books, key=lambda book: book != "actual")
    spans = {}
    for book in (forecast, actual):
        known = ask(book).spans()
        if book not in known:
            raise UnknownNameError("book", book, known)
        spans[book] = known[book]
    first = max(start or min(s[0] for s in spans.values()), max(s[0] for s in spans.values()))
    last = min(end or max(s[1] for s in spans.values()), min(s[1] for s in spans.values()))
    if first >= last:
        told = "; ".join(f"{b} {s[0]:%Y-%m-%d %H:%M} to {s[1]:%Y-%m-%d %H:%M} UTC" for b, s in spans.items())
        raise InputError(f"the books have no hours in common in that window: {told}")
    facts = {book: ask(book).facts(book, keys, first, last) for book in (forecast, actual)}
    found = variance(facts[forecast], facts[actual], by=keys, start=first, end=last, books=(forecast, actual))
    if "model" not in keys:
        return found
    at = keys.index("model")
    named = {book: {group[at] for group in facts[book].tokens()} for book in (actual, forecast)}
    return replace(found, notes=(*found.notes, *_alike(named)))


class Source(Protocol):
    """Where books are read: a ledger of this process, or a service."""

    def spans(self) -> dict[str, tuple[datetime, datetime]]:
        """By book, its first hour and the one after its last."""

    def facts(self, book: str, by: Sequence[str], start: datetime, end: datetime) -> Facts:
        """Sums of a book over hours."""


class LedgerSource:
    """Books of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def spans(self) -> dict[str, tuple[datetime, datetime]]:
        """By book, its first hour and the one after its last."""
        return {book: (first, last + timedelta(hours=1)) for book, first, last in self._ledger.books()}

    def facts(self, book: str, by: Sequence[str], start: datetime, end: datetime) -> Facts:
        """Sums of a book over hours."""
        where = {"book": book}
        costs = self._ledger.cost(*by, "phase", "component", where=where, start=start, end=end)
        usage = self._ledger.usage(*by, "phase", "meter", where=where, start=start, end=end)
        return Facts.of(by, costs.to_pylist(), usage.to_pylist())


def _notes(forecast: Facts, actual: Facts) -> Iterable[str]:
    charged = [any(c == "demand_charge" for _, _, c in facts.costs) for facts in (forecast, actual)]
    if charged[0] != charged[1]:
        which = "the forecast" if charged[0] else "the actual"
        yield (
            f"only {which} has a demand charge in these hours: it stands at the first hour of its billing month; "
            "choose whole months to compare it"
        )


def _alike(named: Mapping[str, set[str]]) -> Iterable[str]:
    """One model under two names stands in two lines: said, with what makes it one."""
    (book, mine), (beside, theirs) = named.items()
    for name, other in renamed(mine - theirs, theirs - mine).items():
        yield (
            f"{name!r} of {book} and {other!r} of {beside} are one model: give its sources "
            f"names: {{{name}: {other}}} and close the hours again"
        )


def _group(row: Mapping[str, Any], by: Sequence[str]) -> Group:
    return tuple(str(row[name]) for name in by)


def _rounded(value: Fraction) -> Decimal:
    return Decimal(round(value * 10**_DIGITS)).scaleb(-_DIGITS)


def _figures(line: Line) -> dict[str, Any]:
    names = ("forecast_usd", "actual_usd", "variance_usd", *(f"{d}_usd" for d in DRIVERS))
    found: dict[str, Any] = {name: format(getattr(line, name), "f") for name in names}
    return {**found, "forecast_tokens": line.forecast_tokens, "actual_tokens": line.actual_tokens}


def _cells(line: Line) -> list[str]:
    values = [line.forecast_usd, line.actual_usd, line.variance_usd]
    values += [getattr(line, f"{driver}_usd") for driver in DRIVERS]
    return [f"{value:,.2f}" if i < 2 else f"{value:+,.2f}" for i, value in enumerate(values)]
