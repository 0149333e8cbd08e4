"""Rates in force: the price rows of a running fleet for any hours, changes from their date on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from pertoken.fleet import RunningFleet
from pertoken.plan._pricing import pool_rates, resolved_tariff, site_rates
from pertoken.rates.energy import TariffHours
from pertoken.rates.site import demand_rate_rows
from pertoken.scenario import Api, Fleet, Pool, Site
from pertoken.tables import RATES, Hours, concat
from pertoken.units import MONTHS_PER_YEAR

Month = tuple[datetime, datetime]
"""First UTC hour of a billing month, and of the one after."""


def rates_of(fleet: RunningFleet, start: datetime, end: datetime) -> pa.Table:
    """Rate rows (`tables.RATES`) of all pools and sites for the hours from `start` up to, not with, `end`.

    A demand charge's rate stands at the first hour of its billing month, whole and not prorated, under the tariff
    in force at that hour. Raises InputError where the catalogue has no price.
    """
    parts: list[pa.Table] = []
    for first, last in _spans(fleet, start, end):
        terms = fleet.at(first)
        for name, pool in terms.pools.items():
            for on, begins, ends in _days(terms, pool, first, last):
                hours = hours_between(begins, ends)
                tariff = _tariff(terms, pool.site, hours)
                parts.append(pool_rates(terms, name, hours, tariff, on=on))
        hours = hours_between(first, last)
        for site in terms.sites:
            tariff = _tariff(terms, site, hours)
            plain = None if tariff is None else replace(tariff, demand=())
            parts.append(site_rates(terms, site, hours, plain))
    parts += [_demand(fleet, site, start, end) for site in fleet.sites]
    return concat(parts, RATES)


def hours_between(start: datetime, end: datetime) -> Hours:
    """UTC hours from `start` up to, not with, `end`, shape (T,)."""
    return np.arange(
        np.datetime64(start.astimezone(UTC).replace(tzinfo=None), "h"),
        np.datetime64(end.astimezone(UTC).replace(tzinfo=None), "h"),
    )


def months_of(site: Site, start: datetime, end: datetime) -> list[Month]:
    """Billing months, in the site's own time, that hours from `start` up to `end` lie in, oldest first."""
    zone = ZoneInfo(site.timezone)
    local, last = start.astimezone(zone), (end - timedelta(hours=1)).astimezone(zone)
    found = []
    number = local.year * MONTHS_PER_YEAR + local.month - 1
    while number <= last.year * MONTHS_PER_YEAR + last.month - 1:
        found.append((_first(number, zone), _first(number + 1, zone)))
        number += 1
    return found


def month_tariff(fleet: RunningFleet, site: str, month: Month) -> TariffHours | None:
    """A site's tariff over a whole billing month, under the terms of its first hour."""
    return _tariff(fleet.at(month[0]), site, hours_between(*month))


def _first(month: int, zone: ZoneInfo) -> datetime:
    year, index = divmod(month, MONTHS_PER_YEAR)
    moment = datetime(year, index + 1, 1, tzinfo=zone).astimezone(UTC)
    # A month that begins off the hour (half-hour zones) begins, for us, with the first full UTC hour in it.
    full = moment.replace(minute=0, second=0)
    return full if full == moment else full + timedelta(hours=1)


def _spans(fleet: RunningFleet, start: datetime, end: datetime) -> Iterator[tuple[datetime, datetime]]:
    """The hours cut where terms change."""
    borders = [start, *(b for b in fleet.borders() if start < b < end), end]
    yield from pairwise(borders)


def _days(
    fleet: Fleet, pool: Pool, first: datetime, last: datetime
) -> Iterator[tuple[date, datetime, datetime]]:
    """The hours cut by local day where the catalogue's price of the day counts, else whole."""
    price = pool.price
    written = price.input_usd_per_mtok if isinstance(price, Api) else getattr(price, "usd_per_gpu_hour", 0.0)
    zone = ZoneInfo(fleet.sites[pool.site].timezone) if pool.site else ZoneInfo("UTC")
    if written is not None:
        yield first.astimezone(zone).date(), first, last
        return
    at = first
    while at < last:
        day = at.astimezone(zone).date()
        midnight = datetime(day.year, day.month, day.day, tzinfo=zone) + timedelta(days=1)
        ends = min(last, midnight.astimezone(UTC))
        yield day, at, max(ends, at + timedelta(hours=1))
        at = max(ends, at + timedelta(hours=1))


def _tariff(fleet: Fleet, site: str, hours: Hours) -> TariffHours | None:
    return resolved_tariff(fleet.sites[site], hours, prorate=False) if site else None


def _demand(fleet: RunningFleet, site: str, start: datetime, end: datetime) -> pa.Table:
    parts = []
    for month in months_of(fleet.sites[site], start, end):
        probe = _tariff(fleet.at(month[0]), site, hours_between(start, start + timedelta(hours=1)))
        if probe is not None and probe.tariff.demand:
            tariff = month_tariff(fleet, site, month)
            assert tariff is not None
            parts.append(demand_rate_rows(site, tariff))
    return concat(parts, RATES)
