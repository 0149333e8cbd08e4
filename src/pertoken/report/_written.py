"""How figures, amounts, times and tables of them are written, on a page and in an answer."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")
_DIGITS = 6
COUNTED_UNITS = ("token", "request")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def shown(value: float | None) -> str:
    """A figure with four digits that count, thousands apart; a dash where there is none.

    >>> shown(0.12268518), shown(1234567.8), shown(12.0), shown(None), shown(0.00000012), shown(0.0)
    ('0.1227', '1,234,568', '12.00', '–', '1.2e-07', '0')
    """
    if value is None:
        return "–"
    size = abs(value)
    if not size:
        return "0"
    if size < 1e-4:
        return f"{value:.2g}"
    digits = 0 if size >= 1e3 else 1 if size >= 1e2 else 2 if size >= 1e1 else 3 if size >= 1 else 4
    return f"{value:,.{digits}f}"


def ratio(value: float | None) -> str:
    """A ratio with the six digits that matter, without an exponent; a dash where there is none.

    >>> ratio(62862.27696666667), ratio(1234567.8), ratio(0.000012345678), ratio(None)
    ('62,862.3', '1,234,570', '0.0000123457', '–')
    """
    return "–" if value is None else f"{Decimal(f'{value:.{_DIGITS}g}'):,f}"


def percent(fraction: float) -> str:
    """A share as it is read.

    >>> percent(0.78712)
    '78.7 %'
    """
    return f"{fraction * 100:.1f} %"


def counted(count: int, one: str) -> str:
    """A number of things, one of them without the plural's ``s``.

    >>> counted(1, "hour"), counted(1200, "row")
    ('1 hour', '1,200 rows')
    """
    return f"{count:,} {one}" + ("" if count == 1 else "s")


def unit_told(amount: Decimal, unit: str) -> str:
    """A unit beside its amount: what is counted has a plural, what is measured has none.

    >>> unit_told(Decimal(2), "token"), unit_told(Decimal(2), "kWh")
    ('tokens', 'kWh')
    """
    return unit if amount == 1 or unit not in COUNTED_UNITS else f"{unit}s"


def plain(value: Decimal) -> str:
    """Plain digits without an exponent and without trailing zeros.

    >>> plain(Decimal("1200.50")), plain(Decimal("1E+3"))
    ('1200.5', '1000')
    """
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def utc_text(moment: datetime) -> str:
    """A time for programs (UTC).

    >>> utc_text(datetime(2026, 11, 24, 9, tzinfo=UTC))
    '2026-11-24T09:00:00Z'
    """
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def utc_told(moment: datetime) -> str:
    """A time for people, to the minute.

    >>> utc_told(datetime(2026, 11, 24, 9, tzinfo=UTC))
    '2026-11-24 09:00 UTC'
    """
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV. A name that begins like a formula, which it would be to a spreadsheet, gets a ``'`` before it.

    >>> csv_text(["name", "usd"], [["=A1", "-0.5"]])
    "name,usd\\r\\n'=A1,-0.5\\r\\n"
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(head)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    formula = str(value)[:1] in _FORMULA and not _NUMBER.fullmatch(str(value))
    return f"'{value}" if formula else value
