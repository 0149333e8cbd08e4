"""A month of statements: its hours, how far they are closed, and what is missing in its sums."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any
from zoneinfo import ZoneInfo

from pertoken.errors import InputError
from pertoken.fleet import RunningFleet
from pertoken.ledger import Ledger
from pertoken.meter.attribute import BOOK
from pertoken.report._written import counted, utc_text, utc_told
from pertoken.report.books import HOUR
from pertoken.scenario import Colocated, Owned
from pertoken.units import MONTHS_PER_YEAR, base_meter


@dataclass(frozen=True)
class Month:
    """A month: its name, its hours (UTC), and how far they are closed."""

    name: str
    start: datetime
    end: datetime
    timezone: str
    closed_until: datetime
    unpriced_hours: int

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Month:
        """The month that `to_dict` gave."""
        return cls(
            told["month"], datetime.fromisoformat(told["start"]), datetime.fromisoformat(told["end"]),
            told["timezone"], datetime.fromisoformat(told["closed_until"]), told["unpriced_hours"],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "month": self.name, "timezone": self.timezone, "start": utc_text(self.start), "end": utc_text(self.end),
            "closed_until": utc_text(self.closed_until), "unpriced_hours": self.unpriced_hours,
        }  # fmt: skip

    @property
    def span(self) -> str:
        """Its hours, for people."""
        return f"{utc_told(self.start)} to {utc_told(self.end)} ({self.timezone})"

    @property
    def notes(self) -> tuple[str, ...]:
        """Why its sums may still change."""
        found = []
        if self.closed_until < self.end:
            found.append(f"Provisional: the month is closed up to {utc_told(self.closed_until)}.")
        if self.unpriced_hours:
            found.append(
                f"{counted(self.unpriced_hours, 'hour')} with usage that no rate prices yet: its cost is missing."
            )
        return tuple(found)


def month_named(text: str, fleet: RunningFleet, ledger: Ledger, closed_until: datetime | None) -> Month:
    """A month by its name, such as 2026-11, in the time zone of the fleet's chargeback. Raises InputError."""
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", text, re.ASCII) or not 1970 <= int(text[:4]) <= 2200:
        raise InputError(f"{text[:20]!r} is no month: write 2026-11")
    zone = ZoneInfo(fleet.chargeback.timezone)
    number = int(text[:4]) * MONTHS_PER_YEAR + int(text[5:]) - 1
    start, end = (_border(number + n, zone) for n in (0, 1))
    open_hours = max((int(str(r["hours"])) for r in ledger.unpriced(BOOK, start, end)), default=0)
    return Month(
        text, start, end, fleet.chargeback.timezone, max(start, min(closed_until or end, end)), open_hours
    )


def energy_missing(
    ledger: Ledger, fleet: RunningFleet, month: Month, pools: Iterable[str] | None = None
) -> tuple[str, ...]:
    """What a statement says of pools that pay for their electricity and held GPUs in hours without any energy.

    Parameters: pools, those it is about (None: all). A rent and an API's price hold their energy, and miss none.
    """
    terms = fleet.at(month.end - HOUR).pools
    paying = [
        name
        for name in (terms if pools is None else sorted(set(pools) & set(terms)))
        if isinstance(price := terms[name].price, Owned | Colocated)
        and not (isinstance(price, Colocated) and price.energy_included)
    ]
    if not paying:
        return ()
    where = {"book": [BOOK], "pool": paying, "meter": ["gpu_hours", "energy_kwh"]}
    hours: dict[tuple[str, str], set[datetime]] = defaultdict(set)
    for row in ledger.usage(
        "hour", "pool", "meter", where=where, start=month.start, end=month.end
    ).to_pylist():
        if row["quantity"]:
            hours[row["pool"], base_meter(row["meter"])].add(row["hour"])
    found = []
    for pool in paying:
        held, metered = hours[pool, "gpu_hours"], hours[pool, "energy_kwh"]
        if held and not metered:
            found.append(f"No energy of {pool} was metered: it is missing here.")
        elif without := len(held - metered):
            found.append(
                f"In {counted(without, 'hour')} no energy of {pool} was metered: it is missing here."
            )
    return tuple(found)


def _border(number: int, zone: ZoneInfo) -> datetime:
    year, index = divmod(number, MONTHS_PER_YEAR)
    moment = datetime.combine(date(year, index + 1, 1), time(), zone).astimezone(UTC)
    full = moment.replace(minute=0, second=0, microsecond=0)
    return full if full == moment else full + HOUR
