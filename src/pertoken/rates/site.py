"""Rate rows of a site: energy, demand, fixed charges, hosting, network, storage, staff, software, egress.

Rates are per (hour, pool, meter, component): two components may price one meter. What no pool owns sits in
the pool ``(site:<name>)``. The usage side of site things (peaks, site hours, tier split) is here too, so
that both sides name the same meter in the same hour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.rates.energy import TariffHours, billed_peaks_kw, split_tiers
from pertoken.tables import RATES, USAGE, concat, rate_rows, usage_rows
from pertoken.units import HOURS_PER_MONTH, HOURS_PER_YEAR, IDLE, PHASES, site_pool

Floats = npt.NDArray[np.float64]
Hours = npt.NDArray[np.datetime64]

UTILITY_HOURS = "site_hours:utility"
"""Meter of the hours a site is connected to the utility: what its fixed charge prices."""


def tier_meter(tier: int) -> str:
    """Meter of an energy tier, counted from 0: the first is plain ``energy_kwh``.

    >>> tier_meter(0), tier_meter(1)
    ('energy_kwh', 'energy_kwh:tier2')
    """
    return "energy_kwh" if tier == 0 else f"energy_kwh:tier{tier + 1}"


def peak_meter(charge: str, tier: int = 0) -> str:
    """Meter of a demand charge's tier, counted from 0.

    >>> peak_meter("summer-peak"), peak_meter("flat", 1)
    ('peak_kw:summer-peak', 'peak_kw:flat:tier2')
    """
    return f"peak_kw:{charge}" if tier == 0 else f"peak_kw:{charge}:tier{tier + 1}"


def split_kwh(shares: Floats, kwh: float | Floats) -> dict[str, Floats]:
    """Energy of one pool or phase [kWh, scalar or shape (T,)] by tier meter, in the site's tier shares
    [shape (K, T)].

    The parts sum to the whole. `shares` is `tier_shares` of all the site's energy: tiers belong to the
    utility meter.

    >>> parts = split_kwh(np.array([[1.0, 0.5], [0.0, 0.5]]), np.array([4.0, 4.0]))
    >>> {meter: kwh.tolist() for meter, kwh in parts.items()}
    {'energy_kwh': [4.0, 2.0], 'energy_kwh:tier2': [0.0, 2.0]}
    """
    return {tier_meter(k): np.asarray(row * kwh, dtype=np.float64) for k, row in enumerate(shares)}


def energy_rate_rows(pool: str, resolved: TariffHours) -> pa.Table:
    """Rates of ``energy_kwh`` (and ``energy_kwh:tier2``, ...) of a pool by hour, component ``energy_charge``.

    A negative wholesale price is a negative rate.
    """
    return concat(
        [
            rate_rows(
                resolved.hours_utc,
                prices,
                pool=pool,
                meter=tier_meter(k),
                component="energy_charge",
                basis=resolved.energy_basis,
                source=_source(resolved),
            )
            for k, prices in enumerate(resolved.energy_usd_per_kwh)
        ],
        RATES,
    )


def heat_credit_rate_rows(
    pool: str,
    resolved: TariffHours,
    credit_usd_per_kwh: float,
    *,
    basis: str = "assumed",
    source: str = "scenario",
) -> pa.Table:
    """What sold waste heat takes off each kWh [USD/kWh, see `heat_credit_usd_per_kwh`]: a negative rate, a
    row of its own beside the tariff's, so that the tariff's price stays what the utility published."""
    return concat(
        [
            rate_rows(
                resolved.hours_utc,
                -credit_usd_per_kwh,
                pool=pool,
                meter=tier_meter(k),
                component="energy_charge",
                basis=basis,
                source=f"heat reuse credit, {source}",
            )
            for k in range(len(resolved.energy_usd_per_kwh))
        ],
        RATES,
    )


def demand_rate_rows(site: str, resolved: TariffHours) -> pa.Table:
    """Rates of ``peak_kw:<charge>`` in pool ``(site:...)``, at the first UTC hour of each billing month in
    the horizon.

    Component ``demand_charge``; a part month's rate is prorated and its basis `assumed` (see `resolve`). A
    month in which a charge has no hours has no row.
    """
    parts = []
    first = resolved.first_hours()
    for charge in resolved.demand:
        active = _active(resolved, charge.mask)
        for k, prices in enumerate(charge.usd_per_kw):
            for p in np.flatnonzero(active):
                share = resolved.proration[p]
                note = f", {share:.4f} of {resolved.period_names[p]}" if share < 1 else ""
                parts.append(
                    rate_rows(
                        resolved.hours_utc[first[p : p + 1]],
                        float(prices[p]),
                        pool=site_pool(site),
                        meter=peak_meter(charge.name, k),
                        component="demand_charge",
                        basis=resolved.demand_basis[p],
                        source=_source(resolved) + note,
                    )
                )
    return concat(parts, RATES)


def peak_usage_rows(
    book: str,
    site: str,
    resolved: TariffHours,
    kw: Floats | Mapping[str, Floats],
    *,
    previous_peaks_kw: Mapping[str, Sequence[float]] | None = None,
    so_far_kw: Mapping[str, float] | None = None,
    basis: str = "assumed",
) -> pa.Table:
    """Usage of ``peak_kw:<charge>``: billed kW of each billing month, at the same hour as its rate.

    Parameters: kw: load at the utility meter [kW, shape (T,)], or one such series per phase. With series
    per phase the metered peak is attributed by what each phase drew in the hour of the peak; a plain
    series, and what a ratchet, a minimum or the peak so far (see `billed_peaks_kw`) adds, is phase ``idle``. Tenant is
    ``(idle)``: no tenant owns a site's peak. Raises InputError on an unknown phase or a load that is no load.
    """
    phases = dict(kw) if isinstance(kw, Mapping) else {"idle": np.asarray(kw, dtype=np.float64)}
    for phase in phases:
        if phase not in PHASES:
            raise InputError(f"unknown phase {phase!r}: one of {', '.join(PHASES)}")
    total = np.sum([np.asarray(v, dtype=np.float64) for v in phases.values()], axis=0)
    billed = billed_peaks_kw(resolved, total, previous_peaks_kw=previous_peaks_kw, so_far_kw=so_far_kw)
    first = resolved.first_hours()
    parts = []
    for charge in resolved.demand:
        tiers = split_tiers(billed[charge.name], charge)
        for p in np.flatnonzero(billed[charge.name] > 0):
            counted = np.flatnonzero(charge.mask & (resolved.period == p))
            at = counted[np.argmax(total[counted])]
            whole = billed[charge.name][p]
            by_phase = {phase: float(np.asarray(v)[at]) / whole for phase, v in phases.items()}
            by_phase["idle"] = by_phase.get("idle", 0.0) + 1.0 - sum(by_phase.values())
            parts.append(
                usage_rows(
                    resolved.hours_utc[first[p : p + 1]],
                    {
                        (phase, peak_meter(charge.name, k)): max(float(row[p]) * share, 0.0)
                        for phase, share in by_phase.items()
                        for k, row in enumerate(tiers)
                    },
                    book=book,
                    pool=site_pool(site),
                    model="",
                    tenant=IDLE,
                    basis=basis,
                )
            )
    return concat(parts, USAGE)


def fixed_rate_rows(site: str, resolved: TariffHours) -> pa.Table:
    """The tariff's fixed charge per ``site_hours:utility`` in pool ``(site:...)``: USD per month spread over its
    hours. A meter of its own, since only what draws from the site's meter pays it."""
    return rate_rows(
        resolved.hours_utc,
        resolved.fixed_usd_per_hour,
        pool=site_pool(site),
        meter=UTILITY_HOURS,
        component="energy_charge",
        basis=resolved.tariff.basis,
        source=_source(resolved),
    )


def staff_rate_rows(
    site: str,
    hours: Hours,
    *,
    fte: float,
    usd_per_fte_year: float,
    basis: str = "assumed",
    source: str = "scenario",
) -> pa.Table:
    """Staff per ``site_hours`` in pool ``(site:...)``: full-time equivalents × loaded cost per year / 8760.

    >>> hour = np.array(["2026-01-01T00"], "datetime64[h]")
    >>> rows = staff_rate_rows("s", hour, fte=0.5, usd_per_fte_year=175_200)
    >>> float(rows["usd_per_unit"][0].as_py())
    10.0
    """
    _not_negative(fte=fte, usd_per_fte_year=usd_per_fte_year)
    return site_rate_rows(
        site, hours, fte * usd_per_fte_year / HOURS_PER_YEAR, component="staff", basis=basis, source=source
    )


def site_rate_rows(
    site: str,
    hours: Hours,
    usd_per_hour: float | Floats,
    *,
    component: str,
    basis: str = "assumed",
    source: str = "scenario",
) -> pa.Table:
    """Any cost of a site per hour [USD/h]: ``hosting``, ``network``, ``software``, ``capital`` of cooling,
    zero if free."""
    return rate_rows(
        hours,
        usd_per_hour,
        pool=site_pool(site),
        meter="site_hours",
        component=component,
        basis=basis,
        source=source,
    )


def per_month_usd_per_hour(usd_per_month: float) -> float:
    """USD per month as USD per hour, a month being 730 h.

    >>> per_month_usd_per_hour(730.0)
    1.0
    """
    return usd_per_month / HOURS_PER_MONTH


def _active(resolved: TariffHours, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.bincount(resolved.period, weights=mask, minlength=resolved.periods) > 0)


def _source(resolved: TariffHours) -> str:
    tariff = resolved.tariff
    dated = f", effective {tariff.effective}" if tariff.effective else ""
    return f"tariff {tariff.name}{dated}"


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < np.inf:
            raise InputError(f"{name} must be a number of 0 or more, found {value}")
