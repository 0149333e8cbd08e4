"""Electricity: boundary arithmetic, tariffs resolved to UTC hours, and the bill of a load.

kW and kWh here are at the utility meter. An hour's mean kW is its kWh, so a series of one is a series of
the other.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pertoken.catalog.tariffs import Demand, Schedule, Tariff
from pertoken.errors import InputError
from pertoken.rates._local import LocalHours, local_hours, month_bounds
from pertoken.units import HOURS_PER_DAY, MONTHS_PER_YEAR, WATTS_PER_KILOWATT

Floats = npt.NDArray[np.float64]
Hours = npt.NDArray[np.datetime64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_REPEAT_HOURS = 52 * 7 * HOURS_PER_DAY  # whole weeks: the repeated hour has the same weekday


def utc_hours(start_utc: dt.datetime | str, hours: int) -> Hours:
    """`hours` UTC hours from a start on, shape (hours,).

    `start_utc`: an aware datetime or ISO text with its offset (or ``Z``). Raises InputError on a start
    without a time zone or off the full hour.

    >>> utc_hours("2026-07-01T00:00-07:00", 2).tolist()[0].isoformat()
    '2026-07-01T07:00:00'
    """
    try:
        start = dt.datetime.fromisoformat(start_utc) if isinstance(start_utc, str) else start_utc
    except ValueError as error:
        raise InputError(f"start {start_utc!r} is no ISO date and time such as 2026-07-01T00:00Z") from error
    if start.tzinfo is None:
        raise InputError(f"start {start_utc} has no time zone; write 2026-07-01T00:00Z or ...-07:00")
    start = start.astimezone(dt.UTC)
    if start.minute or start.second or start.microsecond:
        raise InputError(f"start {start_utc} is not a full UTC hour")
    if hours < 1:
        raise InputError(f"a horizon of {hours} hours is empty")
    first = np.datetime64(start.replace(tzinfo=None), "h")
    return first + np.arange(hours, dtype="timedelta64[h]")


def utility_kwh(
    gpu_kwh: float | Floats,
    *,
    host_kwh: float | Floats = 0.0,
    idle_kwh: float | Floats = 0.0,
    pue: float = 1.0,
) -> float | Floats:
    """Energy at the utility meter: GPU + host + idle, × PUE.

    Parameters: gpu_kwh [kWh at the boards of the accelerators at work]; host_kwh [kWh of their servers'
    CPUs, memory, fans, conversion]; idle_kwh [kWh of machines held ready]; pue [≥ 1]. Arrays broadcast.
    Raises InputError on a PUE below 1. Source: the comprehensive boundary of Google, arXiv 2508.15734.

    >>> round(utility_kwh(0.14, host_kwh=0.06, idle_kwh=0.02, pue=1.09), 2)  # Wh, Gemini prompt
    0.24
    """
    _check_pue(pue)
    return (gpu_kwh + host_kwh + idle_kwh) * pue


def overhead_kwh(it_kwh: float | Floats, pue: float) -> float | Floats:
    """Energy of cooling and power distribution: IT energy [kWh] × (PUE − 1).

    >>> overhead_kwh(100.0, 1.25)
    25.0
    """
    _check_pue(pue)
    return it_kwh * (pue - 1.0)


def site_kw(
    gpus: float | Floats, gpu_power_w: float | Floats, host_power_w: float | Floats, pue: float
) -> float | Floats:
    """Power at the utility meter [kW] of GPUs that each draw board and host power [W].

    Formula: GPUs × (GPU W + host W) / 1000 × PUE.

    >>> site_kw(8, 700, 550, 1.2)
    12.0
    """
    _check_pue(pue)
    return gpus * (gpu_power_w + host_power_w) / WATTS_PER_KILOWATT * pue


def gco2e(kwh: float | Floats, intensity_g_per_kwh: float | Floats) -> float | Floats:
    """Greenhouse gas [g CO2e] of energy at the utility meter [kWh] at the grid's intensity [g/kWh], by
    hour or flat.

    >>> gco2e(2.0, 400.0)
    800.0
    """
    if (np.asarray(intensity_g_per_kwh) < 0).any() or not np.isfinite(intensity_g_per_kwh).all():
        raise InputError("grid intensity must be a number of 0 or more g/kWh")
    return kwh * intensity_g_per_kwh


def heat_credit_usd_per_kwh(*, reuse_fraction: float, usd_per_kwh_heat: float) -> float:
    """What selling waste heat earns per kWh bought: share of the energy sold as heat × price of heat
    [USD/kWh].

    Raises InputError where the share is outside 0 to 1 or the price is negative.

    >>> heat_credit_usd_per_kwh(reuse_fraction=0.5, usd_per_kwh_heat=0.04)
    0.02
    """
    if not 0 <= reuse_fraction <= 1 or not usd_per_kwh_heat >= 0:
        raise InputError(f"heat: share {reuse_fraction} must be 0 to 1, price {usd_per_kwh_heat} 0 or more")
    return reuse_fraction * usd_per_kwh_heat


@dataclass(frozen=True, eq=False)
class DemandHours:
    """A demand charge resolved to hours.

    name: qualifier of its meter (``peak_kw:<name>``); mask [shape (T,)]: hours that count; usd_per_kw
    [shape (K, P)]: price of each tier in each billing period, prorated, 0 where the band has no hour;
    upper_kw [shape (K,)]: upper ends of the tiers; demand: the row it came from.
    """

    name: str
    mask: Bools
    usd_per_kw: Floats
    upper_kw: Floats
    demand: Demand


@dataclass(frozen=True, eq=False)
class TariffHours:
    """A tariff resolved to the UTC hours of a horizon.

    hours_utc (T,); energy_usd_per_kwh (K, T): price of tier k in the hour (tiers a band lacks repeat its
    last); tier_upper (K, T): upper end of tier k in the tariff's tier unit, per billing month (infinity:
    none); band (T,): index of the energy band; period (T,): index of the billing month; period_names (P,):
    ``2026-07``; period_hours (P,): hours of the whole month; proration (P,): share of the month within the
    horizon (1 where not prorated); fixed_usd_per_hour (T,); demand: demand charges that count in the
    horizon; basis: ``quoted``, or ``assumed`` where something was prorated or repeated.
    """

    tariff: Tariff
    hours_utc: Hours
    energy_usd_per_kwh: Floats
    tier_upper: Floats
    band: Ints
    period: Ints
    period_names: tuple[str, ...]
    period_hours: Ints
    proration: Floats
    fixed_usd_per_hour: Floats
    demand: tuple[DemandHours, ...]
    energy_basis: str
    demand_basis: tuple[str, ...]
    """Per billing period."""

    @property
    def periods(self) -> int:
        """How many billing months the horizon touches."""
        return len(self.period_names)

    def first_hours(self) -> Ints:
        """Index of the first hour of each billing period within the horizon, shape (P,)."""
        return np.searchsorted(self.period, np.arange(self.periods)).astype(np.int64)


def resolve(tariff: Tariff, hours_utc: Hours, *, prorate: bool = True) -> TariffHours:
    """A tariff as prices and masks of consecutive UTC hours: the one conversion from local windows.

    Parameters: hours_utc [UTC, shape (T,), consecutive]; prorate: where the horizon holds only part of a
    billing month, scale its demand price and its tier limits by hours in the horizon / hours of the month
    (then `assumed`). Raises InputError where an hourly series does not reach, or hours are not consecutive.

    A winter weekday at 14:00 in Sacramento is in SMUD's cheap hours (0.0765 + 0.0003 state surcharge):

    >>> from pertoken.catalog.tariffs import tariff
    >>> hour = resolve(tariff("SMUD CI-TOD4"), utc_hours("2026-02-03T14:00-08:00", 1))
    >>> round(float(hour.energy_usd_per_kwh[0, 0]), 4)
    0.0768
    """
    _check_hours(hours_utc)
    local = local_hours(hours_utc, tariff.timezone, tariff.holidays, tariff.holidays_observed)
    month_number = local.year * MONTHS_PER_YEAR + local.month
    _, first, period = np.unique(month_number, return_index=True, return_inverse=True)
    months = [(int(local.year[i]), int(local.month[i])) for i in first]
    bounds = [month_bounds(y, m, tariff.timezone) for y, m in months]
    period_hours = np.array([end - start for start, end in bounds], dtype=np.int64)
    share = np.bincount(period) / period_hours
    whole = share >= 1.0
    proration = share if prorate else np.ones(len(months))
    band = _lookup(tariff.weekday, tariff.weekend, local)
    prices, upper = _energy_prices(tariff, hours_utc, band, local.month)
    days = period_hours / HOURS_PER_DAY
    fixed = tariff.fixed_usd_per_month / period_hours + tariff.fixed_usd_per_day / HOURS_PER_DAY
    if tariff.tier_unit == "kWh daily":
        upper = upper * np.round(days)[period]
    repeated = tariff.hourly is not None and not _within(tariff, hours_utc).all()
    tier_assumed = tariff.tiers > 1 and prorate and not whole.all()
    return TariffHours(
        tariff=tariff,
        hours_utc=hours_utc,
        energy_usd_per_kwh=prices,
        tier_upper=upper * proration[period],
        band=band,
        period=period.astype(np.int64),
        period_names=tuple(f"{y}-{m:02d}" for y, m in months),
        period_hours=period_hours,
        proration=proration,
        fixed_usd_per_hour=fixed[period],
        demand=_resolve_demand(tariff, local, period, proration),
        energy_basis="assumed" if repeated or tier_assumed else tariff.basis,
        demand_basis=tuple(tariff.basis if w or not prorate else "assumed" for w in whole),
    )


def tier_shares(resolved: TariffHours, kwh: Floats, *, peak_kw: Floats | None = None) -> Floats:
    """Share of each hour's energy in each tier, shape (K, T); each hour's shares sum to 1.

    Parameters: kwh [kWh per hour at the meter, shape (T,)]; peak_kw [highest kW of each billing period,
    shape (P,)], needed for tiers per kW; default: that of `kwh`. Energy counts up from 0 in each billing
    period (and band, where the tariff counts tiers by band). An hour without energy is put where its next
    kWh would fall. Raises InputError on a negative or non-finite load.

    >>> from pertoken.catalog.tariffs import EnergyBand, Tariff, Tier, ZERO
    >>> t = Tariff("t", "", "UTC", (EnergyBand("all", (Tier(0.20, 15.0), Tier(0.10))),), ZERO, ZERO)
    >>> r = resolve(t, utc_hours("2026-01-01T00:00Z", 2), prorate=False)
    >>> tier_shares(r, np.array([10.0, 10.0])).tolist()
    [[1.0, 0.5], [0.0, 0.5]]
    """
    load = _check_load(resolved, kwh)
    tiers = resolved.tariff.tiers
    if tiers == 1:
        return np.ones((1, len(load)))
    upper = resolved.tier_upper
    if resolved.tariff.tier_unit == "kWh/kW":
        peaks = _peaks(resolved, load, np.ones(len(load), dtype=bool)) if peak_kw is None else peak_kw
        per_hour = np.asarray(peaks, dtype=np.float64)[resolved.period]
        endless = np.isinf(upper)
        upper = np.where(endless, np.inf, np.where(endless, 0.0, upper) * per_hour)
    group = resolved.period
    if resolved.tariff.tiers_by == "band":
        group = group * len(resolved.tariff.energy) + resolved.band
    end = np.empty(len(load))
    for g in np.unique(group):
        at = group == g
        end[at] = np.cumsum(load[at])
    start = end - load
    lower = np.vstack([np.zeros(len(load)), upper[:-1]])
    inside = np.clip(np.minimum(end, upper) - np.maximum(start, lower), 0.0, None)
    amount = inside.sum(axis=0)
    next_tier = (start >= lower) & (start < upper)
    # An hour without energy (or with too little for a float to tell) goes where its next kWh would fall.
    shares = np.where(amount > 0, inside / np.where(amount > 0, amount, 1.0), next_tier)
    return np.asarray(shares, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Bill:
    """What a load costs over a horizon [USD]: energy, demand by charge, fixed, total.

    metered_kw and billed_kw: by demand charge, shape (P,): the peak of each billing period, and what is
    billed after ratchet and minimum. energy_usd_by_period, shape (P,). assumed: whether a part month was
    prorated.
    """

    energy_usd: float
    demand_usd: Mapping[str, float]
    fixed_usd: float
    total_usd: float
    metered_kw: Mapping[str, Floats]
    billed_kw: Mapping[str, Floats]
    period_names: tuple[str, ...]
    assumed: bool


def bill(
    tariff: Tariff,
    hours_utc: Hours,
    kw: Floats,
    *,
    previous_peaks_kw: Mapping[str, Sequence[float]] | None = None,
    prorate: bool = True,
) -> Bill:
    """The utility's bill of a load series.

    Parameters: hours_utc [UTC, shape (T,)]; kw [mean kW of each hour at the meter, shape (T,)];
    previous_peaks_kw: by demand charge, the metered peaks of the months before the horizon, oldest first
    (for ratchets); prorate as `resolve`. Formula: Σ kWh × price of its tier + Σ charges Σ months billed kW
    × USD/kW + fixed. Raises InputError on a load that is negative, not finite or of another length.

    10 kW for an hour at 0.08 USD/kWh:

    >>> from pertoken.catalog.tariffs import flat_tariff
    >>> bill(flat_tariff(0.08), utc_hours("2026-01-01T00:00Z", 1), np.array([10.0])).total_usd
    0.8
    """
    return bill_resolved(resolve(tariff, hours_utc, prorate=prorate), kw, previous_peaks_kw=previous_peaks_kw)


def bill_resolved(
    resolved: TariffHours, kw: Floats, *, previous_peaks_kw: Mapping[str, Sequence[float]] | None = None
) -> Bill:
    """`bill` of a tariff already resolved."""
    load = _check_load(resolved, kw)
    energy_usd = float((resolved.energy_usd_per_kwh * tier_shares(resolved, load) * load).sum())
    metered = metered_peaks_kw(resolved, load)
    billed = billed_peaks_kw(resolved, load, previous_peaks_kw=previous_peaks_kw)
    demand_usd = {}
    for charge in resolved.demand:
        demand_usd[charge.name] = float((split_tiers(billed[charge.name], charge) * charge.usd_per_kw).sum())
    fixed_usd = float(resolved.fixed_usd_per_hour.sum())
    return Bill(
        energy_usd=energy_usd,
        demand_usd=demand_usd,
        fixed_usd=fixed_usd,
        total_usd=energy_usd + sum(demand_usd.values()) + fixed_usd,
        metered_kw=metered,
        billed_kw=billed,
        period_names=resolved.period_names,
        assumed="assumed" in (resolved.energy_basis, *resolved.demand_basis),
    )


def metered_peaks_kw(resolved: TariffHours, kw: Floats) -> dict[str, Floats]:
    """Highest kW of each billing period within each demand charge's hours, by charge, shape (P,)."""
    load = _check_load(resolved, kw)
    return {charge.name: _peaks(resolved, load, charge.mask) for charge in resolved.demand}


def billed_peaks_kw(
    resolved: TariffHours,
    kw: Floats,
    *,
    previous_peaks_kw: Mapping[str, Sequence[float]] | None = None,
    so_far_kw: Mapping[str, float] | None = None,
) -> dict[str, Floats]:
    """kW billed per charge and billing month, shape (P,): the highest of metered peak, minimum and ratchet.

    Formula: max(metered, minimum, fraction × highest peak of the months before), the peaks of
    `previous_peaks_kw` (oldest first, ending the month before the horizon) counted in, and in the first month the
    peak that was set before the horizon began, `so_far_kw`. 0 in a month in which the charge has no hours. Raises
    InputError on peaks of a charge the tariff lacks.
    """
    previous, so_far = dict(previous_peaks_kw or {}), dict(so_far_kw or {})
    unknown = {*previous, *so_far} - {d.name for d in resolved.tariff.demand}
    if unknown:
        raise InputError(f"tariff {resolved.tariff.name!r} has no demand charge {min(unknown)!r}")
    metered = metered_peaks_kw(resolved, kw)
    result = {}
    for charge in resolved.demand:
        before = [float(p) for p in previous.get(charge.name, ())]
        if not all(0 <= p < np.inf for p in before):
            raise InputError(f"previous peaks of {charge.name!r} must be numbers of 0 or more kW")
        peaks = metered[charge.name].copy()
        peaks[0] = max(peaks[0], so_far.get(charge.name, 0.0))
        result[charge.name] = _billed(resolved, charge, peaks, before)
    return result


def _billed(resolved: TariffHours, charge: DemandHours, metered: Floats, before: list[float]) -> Floats:
    months = [int(name[-2:]) for name in resolved.period_names]
    ratchet = charge.demand.ratchet
    active = _peaks(resolved, np.ones(len(resolved.hours_utc)), charge.mask) > 0
    history = list(before)
    billed = np.zeros(resolved.periods)
    for p, month in enumerate(months):
        kw = max(metered[p], charge.demand.minimum_kw) if active[p] else 0.0
        if ratchet is not None and active[p] and month in ratchet.in_months:
            past = [
                peak
                for back, peak in enumerate(reversed(history[-ratchet.months :]), 1)
                if (month - 1 - back) % MONTHS_PER_YEAR + 1 in ratchet.of_months
            ]
            kw = max(kw, ratchet.fraction * max(past, default=0.0))
        billed[p] = kw
        history.append(kw if ratchet is not None and ratchet.peaks == "billed" else metered[p])
    return billed


def split_tiers(billed_kw: Floats, charge: DemandHours) -> Floats:
    """kW of each tier of a demand charge, shape (K, P); they sum to the billed kW."""
    lower = np.concatenate([[0.0], charge.upper_kw[:-1]])[:, None]
    inside: Floats = np.clip(np.minimum(billed_kw, charge.upper_kw[:, None]) - lower, 0.0, None)
    return inside


def _resolve_demand(
    tariff: Tariff, local: LocalHours, period: Ints, proration: Floats
) -> tuple[DemandHours, ...]:
    result = []
    for demand in tariff.demand:
        mask = _lookup(demand.weekday, demand.weekend, local) > 0
        if not mask.any():
            continue
        counts = np.bincount(period, weights=mask, minlength=len(proration)) > 0
        prices = np.array([t.usd_per_unit for t in demand.tiers])
        result.append(
            DemandHours(
                name=demand.name,
                mask=mask,
                usd_per_kw=prices[:, None] * (proration * counts)[None, :],
                upper_kw=np.array([t.upper for t in demand.tiers]),
                demand=demand,
            )
        )
    return tuple(result)


def _lookup(weekday: Schedule, weekend: Schedule, local: LocalHours) -> Ints:
    table = np.array([weekday, weekend], dtype=np.int64)
    return np.asarray(table[local.weekend.astype(int), local.month - 1, local.hour])


def _energy_prices(tariff: Tariff, hours_utc: Hours, band: Ints, month: Ints) -> tuple[Floats, Floats]:
    tiers = tariff.tiers
    price = np.zeros((len(tariff.energy), tiers))
    upper = np.full((len(tariff.energy), tiers), np.inf)
    for b, row in enumerate(tariff.energy):
        for k in range(tiers):
            tier = row.tiers[min(k, len(row.tiers) - 1)]
            price[b, k], upper[b, k] = tier.usd_per_unit, tier.upper
    prices = price[band].T + np.array(tariff.adjustment_usd_per_kwh)[month - 1]
    if tariff.hourly is not None:
        prices = prices + _hourly_prices(tariff, hours_utc)
    return np.ascontiguousarray(prices), np.ascontiguousarray(upper[band].T)


def _within(tariff: Tariff, hours_utc: Hours) -> Bools:
    assert tariff.hourly is not None
    index = (hours_utc - tariff.hourly.start_utc).astype("timedelta64[h]").astype(np.int64)
    return np.asarray((index >= 0) & (index < len(tariff.hourly.usd_per_kwh)))


def _hourly_prices(tariff: Tariff, hours_utc: Hours) -> Floats:
    series = tariff.hourly
    assert series is not None
    index = (hours_utc - series.start_utc).astype("timedelta64[h]").astype(np.int64)
    length = len(series.usd_per_kwh)
    inside = (index >= 0) & (index < length)
    if not inside.all():
        last = series.start_utc + np.timedelta64(length - 1, "h")
        if not series.repeat:
            raise InputError(
                f"tariff {tariff.name!r} has prices from {series.start_utc} to {last} UTC; asked for "
                f"{hours_utc[~inside][0]}; repeat the series or move the horizon"
            )
        if length < _REPEAT_HOURS:
            raise InputError(
                f"tariff {tariff.name!r}: a series of {length} hours is too short to repeat by 52 weeks"
            )
        index = np.where(inside, index, index % _REPEAT_HOURS)
    return np.asarray(series.usd_per_kwh[index], dtype=np.float64)


def _peaks(resolved: TariffHours, load: Floats, mask: Bools) -> Floats:
    peaks = np.zeros(resolved.periods)
    np.maximum.at(peaks, resolved.period[mask], load[mask])
    return peaks


def _check_load(resolved: TariffHours, kw: Floats) -> Floats:
    load = np.asarray(kw, dtype=np.float64)
    if load.shape != resolved.hours_utc.shape:
        raise InputError(f"a load of {load.shape} for {len(resolved.hours_utc)} hours")
    if not np.isfinite(load).all() or (load < 0).any():
        raise InputError("a load must be a number of 0 or more kW in every hour")
    return load


def _check_hours(hours_utc: Hours) -> None:
    if not len(hours_utc):
        raise InputError("no hours to resolve a tariff over")
    if (np.diff(hours_utc) != np.timedelta64(1, "h")).any():
        at = int(np.flatnonzero(np.diff(hours_utc) != np.timedelta64(1, "h"))[0])
        raise InputError(f"hours are not consecutive after {hours_utc[at]} UTC")


def _check_pue(pue: float) -> None:
    if not 1 <= pue < np.inf:
        raise InputError(f"PUE {pue} is not a number of 1 or more")
