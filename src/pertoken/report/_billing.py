"""What belongs to a site's billing month and not to an hour: the peak demand, and the tiers of its energy.

Both are restated each time an hour of the month is closed, from the energy that the ledger holds of the month.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pertoken.fleet import RunningFleet
from pertoken.ledger import Ledger
from pertoken.plan._pricing import pays_for_energy
from pertoken.rates.energy import TariffHours, tier_shares
from pertoken.rates.site import peak_usage_rows, tier_meter
from pertoken.report._terms import Month, hours_between, month_tariff, months_of
from pertoken.tables import QUANTITY, USAGE, concat
from pertoken.units import PHASES, site_pool

_MICRO = 10**6  # steps per unit of DECIMAL(19, 6)
Span = tuple[datetime, datetime]


def restate(
    ledger: Ledger, fleet: RunningFleet, book: str, start: datetime, end: datetime, latest: datetime
) -> list[Span]:
    """Write peaks and tiers anew for all billing months that hours from `start` up to `end` touch.

    With a ratchet, also for the months after, up to the one of `latest`, the newest hour the book has.
    Returns the spans of hours whose usage changed and which must be closed.
    """
    changed: list[Span] = []
    for name, site in fleet.sites.items():
        pools = [p for p, pool in fleet.pools.items() if pool.site == name and pays_for_energy(pool)]
        if not pools:
            continue
        for month in months_of(site, start, end):
            tariff = _monthly_tariff(fleet, name, month, start)
            if tariff is None:
                continue
            if tariff.tariff.tiers > 1:
                _tiers(ledger, book, pools, tariff, month)
                changed.append(month)
            if tariff.demand:
                changed += _peaks(ledger, fleet, book, name, pools, month, latest)
    return changed


def _monthly_tariff(fleet: RunningFleet, site: str, month: Month, hour: datetime) -> TariffHours | None:
    """The tariff over the month, None where nothing in it belongs to a month.

    An hourly price series need not reach to the end of the month: it is asked for one hour first.
    """
    probe = month_tariff(fleet, site, (hour, hour + timedelta(hours=1)))
    if probe is None or (not probe.tariff.demand and probe.tariff.tiers == 1):
        return None
    return month_tariff(fleet, site, month)


def _peaks(
    ledger: Ledger,
    fleet: RunningFleet,
    book: str,
    name: str,
    pools: list[str],
    month: Month,
    latest: datetime,
) -> list[Span]:
    site = fleet.sites[name]
    tariff = month_tariff(fleet, name, month)
    assert tariff is not None
    ratchets = any(d.demand.ratchet is not None for d in tariff.demand)
    months = [month]
    metered = _metered(ledger, book, pools)
    began, newest = metered or (month[1], month[0])
    if ratchets:
        last = max(latest, newest + timedelta(hours=1), month[1])
        months = months_of(site, min(began, month[0]), last)
        span = (months[0][0], months[-1][1])
        tariff = month_tariff(fleet, name, span)
        assert tariff is not None
    load = _load(ledger, book, pools, tariff.hours_utc, months[0][0], months[-1][1])
    # What was set before metering began counts in the month in which it began, and in no other.
    known = {charge.name for charge in tariff.tariff.demand}
    so_far = {n: kw for n, kw in site.peak_so_far_kw.items() if n in known}
    began_here = months[0][0] <= began < months[0][1]
    rows = peak_usage_rows(
        book, name, tariff, load, previous_peaks_kw=site.previous_peaks_kw or None,
        so_far_kw=so_far if began_here else None, basis="measured",
    )  # fmt: skip
    written = [m[0] for m in months if m[0] >= month[0]]
    keep = np.isin(
        rows["hour"].to_numpy(zero_copy_only=False).astype("datetime64[us]"),
        np.array([m.replace(tzinfo=None) for m in written], "datetime64[us]"),
    )
    pool = site_pool(name)
    ledger.replace_usage(book, written, rows.filter(pa.array(keep)), pools=[pool], meters=["peak_kw"])
    return [(m, m + timedelta(hours=1)) for m in written]


def _metered(ledger: Ledger, book: str, pools: list[str]) -> tuple[datetime, datetime] | None:
    """The first and last hour of the pools' energy, else of anything they used: metering began with the first."""
    for meters in ({"meter": "energy_kwh"}, {}):
        rows = ledger.usage("hour", where={"book": book, "pool": pools, **meters})
        hours: list[datetime] = [hour for hour in rows["hour"].to_pylist() if hour is not None]
        if hours:
            return min(hours), max(hours)
    return None


def _load(
    ledger: Ledger, book: str, pools: list[str], hours: Any, start: datetime, end: datetime
) -> dict[str, npt.NDArray[np.float64]]:
    """Mean kW of each hour by phase, from the energy in the book."""
    where = {"book": book, "pool": pools, "meter": "energy_kwh"}
    rows = ledger.usage("hour", "phase", where=where, start=start, end=end)
    load = {phase: np.zeros(len(hours)) for phase in PHASES}
    at = np.searchsorted(hours, rows["hour"].to_numpy(zero_copy_only=False).astype("datetime64[h]"))
    quantity = rows["quantity"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    for place, phase, kwh in zip(at.tolist(), rows["phase"].to_pylist(), quantity.tolist(), strict=True):
        load[str(phase)][place] += kwh
    return load


def _tiers(ledger: Ledger, book: str, pools: list[str], tariff: TariffHours, month: Month) -> None:
    """Split the month's energy rows of the pools into tiers; each row's parts add up to it to the digit."""
    where = {"book": book, "pool": pools, "meter": "energy_kwh"}
    rows = ledger.usage_rows(where, start=month[0], end=month[1])
    if not rows.num_rows:
        return
    keys = ["hour", "pool", "model", "tenant", "phase", "basis"]
    whole = rows.group_by(keys).aggregate([("quantity", "sum")])
    hours = hours_between(*month)
    micro = _micro(whole["quantity_sum"])
    at = np.searchsorted(hours, whole["hour"].to_numpy(zero_copy_only=False).astype("datetime64[h]"))
    kwh = np.bincount(at, weights=micro / _MICRO, minlength=len(hours)).astype(np.float64)
    shares = tier_shares(tariff, kwh)[:, at]
    parts = np.floor(shares * micro).astype(np.int64)
    largest = shares.argmax(axis=0)
    parts[largest, np.arange(len(micro))] += micro - parts.sum(axis=0)
    tables = []
    for tier, part in enumerate(parts):
        some = np.flatnonzero(part)
        taken = whole.take(some)
        columns: dict[str, Any] = {name: taken[name] for name in keys}
        columns |= {"book": pa.repeat(book, len(some)), "meter": pa.repeat(tier_meter(tier), len(some))}
        columns["quantity"] = _decimal(part[some])
        tables.append(pa.table([columns[name] for name in USAGE.names], schema=USAGE))
    wanted = sorted({h for h in whole["hour"].to_pylist() if h is not None})
    ledger.replace_usage(book, wanted, concat(tables, USAGE), pools=pools, meters=["energy_kwh"])


def _micro(quantity: Any) -> npt.NDArray[np.int64]:
    """Decimals in millionths, exact."""
    scaled = quantity.cast(pa.decimal128(38, 6)).combine_chunks()
    raw = np.frombuffer(scaled.buffers()[1], np.int64)[2 * scaled.offset :: 2]
    return np.array(raw[: len(scaled)], np.int64)


def _decimal(micro: npt.NDArray[np.int64]) -> Any:
    """Millionths as the usage table's decimals, exact."""
    wide = np.zeros(2 * len(micro), np.int64)
    wide[::2] = micro
    wide[1::2] = np.where(micro < 0, -1, 0)
    return pa.Array.from_buffers(QUANTITY, len(micro), [None, pa.py_buffer(wide.tobytes())])
