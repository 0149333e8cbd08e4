"""Electricity tariffs as rows of data: bands, tiers, demand charges, ratchets, hourly series; with source
and date.

A tariff's windows are local; nothing here knows UTC (`pertoken.rates.energy` converts, in one place).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pertoken.errors import InputError, UnknownNameError
from pertoken.units import HOURS_PER_DAY, MONTHS_PER_YEAR

Floats = npt.NDArray[np.float64]
Schedule = tuple[tuple[int, ...], ...]
"""12 months × 24 local hours (the hour that begins then) of indexes; `GAP` where nothing covers the hour."""
TierUnit = Literal["kWh", "kWh daily", "kWh/kW"]

GAP = -1
ALL_MONTHS = tuple(range(1, MONTHS_PER_YEAR + 1))
ALWAYS: Schedule = ((1,) * HOURS_PER_DAY,) * MONTHS_PER_YEAR
ZERO: Schedule = ((0,) * HOURS_PER_DAY,) * MONTHS_PER_YEAR
MONTH_NAMES = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


@dataclass(frozen=True)
class Tier:
    """One step of a price: `usd_per_unit` [USD/kWh or USD/kW] up to `upper` (of energy: in the tariff's
    `tier_unit`; of demand: kW)."""

    usd_per_unit: float
    upper: float = math.inf


@dataclass(frozen=True)
class EnergyBand:
    """A named price of energy, one tier or several; the tariff's schedules say when it holds."""

    name: str
    tiers: tuple[Tier, ...]


@dataclass(frozen=True)
class Ratchet:
    """Billed kW is at least `fraction` of the highest peak of the `months` billing months before.

    `of_months`: calendar months whose peaks are remembered; `in_months`: calendar months whose bill it can
    raise; `peaks`: whether the peak remembered is the ``metered`` or the ``billed`` one.
    """

    fraction: float
    months: int = 11
    of_months: tuple[int, ...] = ALL_MONTHS
    in_months: tuple[int, ...] = ALL_MONTHS
    peaks: Literal["metered", "billed"] = "metered"


@dataclass(frozen=True)
class Demand:
    """USD per kW of the billing month's highest demand within the band's hours.

    A flat demand charge is a band of every hour; one whose price changes by season is two bands.
    `weekday`, `weekend`: 12 × 24 of 1 (the hour counts) and 0.
    """

    name: str
    tiers: tuple[Tier, ...]
    weekday: Schedule = ALWAYS
    weekend: Schedule = ALWAYS
    ratchet: Ratchet | None = None
    minimum_kw: float = 0.0


@dataclass(frozen=True, eq=False)
class Hourly:
    """A price series: `usd_per_kwh` [USD/kWh, shape (T,)] of the UTC hours from `start_utc` on, no hour
    missing.

    `repeat`: an hour outside the series takes the price of the hour a whole number of 52 weeks away (same
    weekday, same hour); without it such an hour is an error.
    """

    start_utc: np.datetime64
    usd_per_kwh: Floats
    repeat: bool = False


@dataclass(frozen=True)
class Tariff:
    """One electricity tariff.

    Price of an hour's energy = band of the schedule (its tier) + `adjustment_usd_per_kwh` of the month +
    hourly series, whichever are given. `tier_unit`: what a tier's `upper` counts: ``kWh`` per billing month,
    ``kWh daily`` (× days of the month) or ``kWh/kW`` (× the month's highest demand: hours of use);
    `tiers_by`: ``month`` (all kWh of the month count) or ``band`` (those of the band alone).
    A billing month is a local calendar month. `holidays` count as weekend days (names of
    `pertoken.catalog.holidays`); `holidays_observed`: ``monday`` moves one that falls on a Sunday to the
    Monday after. `eligible_kw`: demand a customer must have, at least and at most, to be on the tariff.
    `demand_window_min`: what the utility averages demand over; ours is the hour, so a peak inside an hour
    is not seen.
    """

    name: str
    utility: str
    timezone: str
    energy: tuple[EnergyBand, ...]
    weekday: Schedule
    weekend: Schedule
    demand: tuple[Demand, ...] = ()
    fixed_usd_per_month: float = 0.0
    fixed_usd_per_day: float = 0.0
    tier_unit: TierUnit = "kWh"
    tiers_by: Literal["month", "band"] = "month"
    adjustment_usd_per_kwh: tuple[float, ...] = (0.0,) * MONTHS_PER_YEAR
    hourly: Hourly | None = None
    holidays: tuple[str, ...] = ()
    holidays_observed: Literal["none", "monday"] = "none"
    eligible_kw: tuple[float, float] = (0.0, math.inf)
    demand_window_min: float = 15.0
    currency: str = "USD"
    basis: str = "quoted"
    about: str = ""
    sources: tuple[str, ...] = ()
    effective: str = ""
    checked: str = ""
    note: str = ""

    @property
    def tiers(self) -> int:
        """How many energy tiers the tariff has."""
        return max((len(band.tiers) for band in self.energy), default=1)

    def misfit(self, peak_kw: float) -> str:
        """Why a site of that yearly peak [kW] would not be put on this tariff; empty where it would.

        >>> tariff("SMUD CI-TOD4").misfit(45.0)
        'tariff SMUD CI-TOD4 is for 1000 kW and more; the site peaks at 45.0 kW'
        """
        low, high = self.eligible_kw
        if low <= peak_kw <= high:
            return ""
        span = f"{low:g} kW and more" if math.isinf(high) else f"{low:g} to {high:g} kW"
        return f"tariff {self.name} is for {span}; the site peaks at {peak_kw:,.1f} kW"


def tariffs() -> Mapping[str, Tariff]:
    """All tariffs of the catalogue by name, in catalogue order."""
    return _catalogue()


def tariff(name: str) -> Tariff:
    """The tariff of that name; case and punctuation do not count.

    Raises UnknownNameError with the nearest names.

    >>> tariff("smud ci-tod4").utility
    'Sacramento Municipal Utility District'
    """
    known = _catalogue()
    plain = {_plain(key): key for key in known}
    if _plain(name) not in plain:
        raise UnknownNameError("tariff", name, known, "tariffs")
    return known[plain[_plain(name)]]


def flat_tariff(
    usd_per_kwh: float, *, usd_per_kw_month: float = 0.0, timezone: str = "UTC", source: str = "scenario"
) -> Tariff:
    """A tariff of one energy price [USD/kWh] and, where given, one demand charge [USD/kW and month of
    the time zone]; assumed.

    Raises InputError on a price that is not a finite number.

    >>> flat_tariff(0.08).energy[0].tiers[0].usd_per_unit
    0.08
    """
    if not math.isfinite(usd_per_kwh) or not math.isfinite(usd_per_kw_month) or usd_per_kw_month < 0:
        raise InputError(
            f"power price must be a number: found {usd_per_kwh} USD/kWh, {usd_per_kw_month} USD/kW"
        )
    demand = (Demand("flat", (Tier(usd_per_kw_month),)),) if usd_per_kw_month else ()
    return Tariff(
        name=f"flat {usd_per_kwh:g} USD/kWh",
        utility="",
        timezone=timezone,
        energy=(EnergyBand("flat", (Tier(usd_per_kwh),)),),
        weekday=ZERO,
        weekend=ZERO,
        demand=demand,
        basis="assumed",
        sources=(source,),
    )


def tariff_from_urdb(path: Path, *, label: str = "", timezone: str = "", coincident: str = "error") -> Tariff:
    """The tariff a URDB v8 JSON file describes, as OpenEI's API returns it (an ``items`` list or one item).

    Parameters: label: which item, where the file has several; timezone: IANA name (URDB has none; empty:
    looked up for the utilities of the catalogue, else an error); coincident: what to do with a charge on
    demand at the utility's own peak hour: ``error``, or ``band`` (bill the highest demand of its window:
    an upper bound). Tiers count the kWh of their own period, as NREL's SAM counts them.
    Raises InputError naming tariff and field on anything it cannot bill rightly: units other than kWh, kWh
    daily, kWh/kW and kW, a schedule with a gap, a minimum charge above the fixed one.
    Source: https://openei.org/services/doc/rest/util_rates/?version=8
    """
    from pertoken.catalog._urdb import read

    return read(path, label=label, timezone=timezone, coincident=coincident)


def tariff_from_csv(
    path: Path, *, name: str = "", timezone: str = "UTC", adder_usd_per_kwh: float = 0.0, repeat: bool = False
) -> Tariff:
    """A tariff of hourly prices from a CSV file, one row per UTC hour.

    Columns: ``hour_utc,usd_per_kwh``, or ``Datetime (UTC)`` with ``Price (USD/MWh)``; others are ignored.
    `adder_usd_per_kwh`: delivery, taxes and supplier's margin on top of every hour; `repeat`: see `Hourly`.
    Raises InputError with the line number on a gap, a duplicate, an unsorted hour or a price that is no
    number.
    """
    from pertoken.catalog._tariff_rows import hourly_from_csv

    series = hourly_from_csv(path, repeat)
    return Tariff(
        name=name or path.stem,
        utility="",
        timezone=timezone,
        energy=(EnergyBand("adder", (Tier(adder_usd_per_kwh),)),),
        weekday=ZERO,
        weekend=ZERO,
        hourly=series,
        sources=(path.name,),
        note="hourly series from a file",
    )


def check_schedule(schedule: Schedule, bands: int, *, where: str, day_type: str) -> None:
    """Raise InputError unless every month and hour of a schedule names one of `bands` bands."""
    if len(schedule) != MONTHS_PER_YEAR:
        raise InputError(f"{where}: {day_type} schedule has {len(schedule)} months, needs {MONTHS_PER_YEAR}")
    for month, row in zip(MONTH_NAMES, schedule, strict=True):
        if len(row) != HOURS_PER_DAY:
            raise InputError(
                f"{where}: {day_type} schedule of {month} has {len(row)} hours, needs {HOURS_PER_DAY}"
            )
        for hour, index in enumerate(row):
            if not 0 <= index < bands:
                raise InputError(
                    f"{where}: no band covers {month}, {day_type}, {hour:02d}:00-{hour + 1:02d}:00"
                    + ("" if index == GAP else f" (the schedule names band {index} of {bands})")
                )


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


@cache
def _catalogue() -> Mapping[str, Tariff]:
    from importlib.resources import files
    from types import MappingProxyType

    from pertoken.catalog._tariff_rows import tariffs_from_text

    text = (files("pertoken.catalog") / "data" / "tariffs.yaml").read_text(encoding="utf-8")
    return MappingProxyType(dict(tariffs_from_text(text, "tariffs.yaml")))
