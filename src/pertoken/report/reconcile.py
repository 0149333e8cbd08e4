"""`reconcile`: does the book add up to the bill?

A bill is a CSV with the columns ``pool`` (a pool, or ``(site:name)`` for what a utility bills a site), ``usd`` and,
where it says so much, ``component``. Each line is set against what the book holds of it over the billed hours.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from pertoken.errors import InputError, UnknownNameError
from pertoken.report.actual import Source
from pertoken.units import COMPONENTS

_MAX_BYTES = 1 << 24
_COLUMNS = ("pool", "component", "usd")


@dataclass(frozen=True)
class Line:
    """One line of a bill beside the book [USD]; `component` is empty where the line is of all of them."""

    pool: str
    component: str
    billed_usd: Decimal
    booked_usd: Decimal

    @property
    def difference_usd(self) -> Decimal:
        """Booked less billed."""
        return self.booked_usd - self.billed_usd


@dataclass(frozen=True)
class Reconciliation:
    """A bill's lines beside the book, and what the book holds that no line bills."""

    book: str
    start: datetime
    end: datetime
    lines: tuple[Line, ...]
    tolerance_fraction: Decimal

    @property
    def agrees(self) -> bool:
        """Whether every line is within the tolerance of what was billed."""
        return not [line for line in self.lines if self.off(line)]

    def off(self, line: Line) -> bool:
        """Whether a line differs by more than the tolerance."""
        return abs(line.difference_usd) > self.tolerance_fraction * abs(line.billed_usd)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; USD as text, exact."""
        lines = [
            {
                "pool": line.pool,
                "component": line.component,
                "billed_usd": format(line.billed_usd, "f"),
                "booked_usd": format(line.booked_usd, "f"),
                "difference_usd": format(line.difference_usd, "f"),
                "agrees": not self.off(line),
            }
            for line in self.lines
        ]
        window = {"start": self.start.isoformat(), "end": self.end.isoformat()}
        return {"book": self.book, **window, "agrees": self.agrees, "lines": lines}

    def __str__(self) -> str:
        heads = ["pool", "component", "billed", "booked", "difference", ""]
        body = [
            [line.pool, line.component or "(all)", *_money(line), "OFF" if self.off(line) else ""]
            for line in self.lines
        ]
        wide = [max(len(row[i]) for row in [heads, *body]) for i in range(len(heads))]
        shown = [
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True))
            )
            for row in [heads, *body]
        ]
        span = f"{self.start:%Y-%m-%d %H:%M} to {self.end:%Y-%m-%d %H:%M} UTC"
        return "\n".join(
            [f"{self.book} against the bill, {span}; USD", "", *(line.rstrip() for line in shown)]
        )


def read_bill(path: Path) -> dict[tuple[str, str], Decimal]:
    """USD by pool and component of a bill's CSV; lines of the same pool and component are added up.

    Raises InputError naming file, line and field.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: more than {_MAX_BYTES} bytes is no bill")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: a CSV file is needed") from error
    rows = csv.DictReader(text.splitlines())
    names = rows.fieldnames or []
    if not {"pool", "usd"} <= set(names) <= set(_COLUMNS):
        raise InputError(
            f"{path}: a bill has the columns pool, usd and may have component; found {', '.join(names)}"
        )
    found: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for row in rows:
        component = (row.get("component") or "").strip()
        if component and component not in COMPONENTS:
            raise InputError(
                f"{path}:{rows.line_num}: {UnknownNameError('component', component, COMPONENTS)}"
            )
        try:
            usd = Decimal((row["usd"] or "").replace(",", "").strip())
        except InvalidOperation as error:
            raise InputError(f"{path}:{rows.line_num}: usd {row['usd']!r} is no number") from error
        if not usd.is_finite():
            raise InputError(f"{path}:{rows.line_num}: usd {row['usd']!r} is no number")
        found[(row["pool"] or "").strip(), component] += usd
    return dict(found)


def reconcile(
    source: Source,
    bill: dict[tuple[str, str], Decimal],
    start: datetime,
    end: datetime,
    *,
    book: str = "actual",
    tolerance_fraction: float = 0.01,
) -> Reconciliation:
    """A bill beside a book over the hours from `start` up to, not with, `end`.

    Parameters: bill, USD by (pool, component), see `read_bill`; tolerance_fraction, the share of a billed amount by
    which the book may differ. What the book holds of billed pools and no line bills is a line with 0 billed.
    Raises InputError on a pool billed whole and by component, UnknownNameError on one the book does not have.
    """
    costs = source.facts(book, ["pool"], start, end).costs
    booked: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for ((pool,), _, component), usd in costs.items():
        booked[pool, component] += usd
    pools = {pool for pool, _ in booked}
    lines = []
    for (pool, component), usd in sorted(bill.items()):
        if pool not in pools:
            raise UnknownNameError("pool of the bill", pool, pools)
        if component and (pool, "") in bill:
            raise InputError(f"the bill has pool {pool!r} whole and by component: give one of them")
        mine = [v for (p, c), v in booked.items() if p == pool and component in ("", c)]
        lines.append(Line(pool, component, usd, sum(mine, Decimal(0))))
    lines += _unbilled(booked, bill)
    return Reconciliation(book, start, end, tuple(lines), Decimal(str(tolerance_fraction)))


def _unbilled(booked: dict[tuple[str, str], Decimal], bill: dict[tuple[str, str], Decimal]) -> Sequence[Line]:
    billed = {pool for pool, _ in bill}
    return [
        Line(pool, component, Decimal(0), usd)
        for (pool, component), usd in sorted(booked.items())
        if pool in billed and usd and (pool, "") not in bill and (pool, component) not in bill
    ]


def _money(line: Line) -> list[str]:
    return [f"{line.billed_usd:,.2f}", f"{line.booked_usd:,.2f}", f"{line.difference_usd:+,.2f}"]
