"""Rate rows of a pool by price term: owned, rented, reserved, spot, API; and what else a GPU hour or byte
costs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.rates.capital import ANNUITY, capital_usd_per_hour
from pertoken.tables import RATES, concat, rate_rows
from pertoken.units import HOURS_PER_MONTH, HOURS_PER_YEAR, TOKEN_METERS, TOKENS_PER_MTOK, base_meter

Floats = npt.NDArray[np.float64]
Hours = npt.NDArray[np.datetime64]

INCLUDED = "included in rent"


def owned_rate_rows(
    pool: str,
    hours: Hours,
    *,
    usd_per_gpu: float,
    life_years: float,
    wacc_fraction: float,
    residual_fraction: float = 0.0,
    method: str = ANNUITY,
    basis: str = "quoted",
    source: str,
) -> pa.Table:
    """Capital per ``gpu_hours`` of GPUs that were bought, their share of the server included in
    `usd_per_gpu`.

    The rate is per hour held, used or not. See `capital_usd_per_hour` for parameters, formula and errors.
    """
    rate = capital_usd_per_hour(
        usd_per_gpu,
        life_years=life_years,
        wacc_fraction=wacc_fraction,
        residual_fraction=residual_fraction,
        method=method,
    )
    terms = f"{method}, {life_years:g} years, WACC {wacc_fraction:.1%}, residual {residual_fraction:.0%}"
    if method != ANNUITY:
        terms = f"{method}, {life_years:g} years, residual {residual_fraction:.0%}"
    return gpu_hour_rate_rows(
        pool, hours, rate, component="capital", basis=basis, source=f"{source}; {terms}"
    )


def rented_rate_rows(
    pool: str,
    hours: Hours,
    usd_per_gpu_hour: float | Floats,
    *,
    energy_included: bool = True,
    basis: str = "quoted",
    source: str,
) -> pa.Table:
    """Rent per ``gpu_hours`` [USD/GPU·h, scalar or shape (T,)]; with it a zero rate of ``energy_kwh``
    where the rent holds the power, so that energy is never charged twice and never passes unpriced."""
    rows = [gpu_hour_rate_rows(pool, hours, usd_per_gpu_hour, component="rent", basis=basis, source=source)]
    if energy_included:
        rows.append(energy_included_rate_rows(pool, hours, source=source))
    return concat(rows, RATES)


def spot_rate_rows(
    pool: str, hours: Hours, usd_per_gpu_hour: float | Floats, *, basis: str = "quoted", source: str
) -> pa.Table:
    """Spot price per ``gpu_hours``: rent, power included. Lost work is no price: it is usage in phase
    ``waste`` (`spot_lost_fraction` of the hours)."""
    return rented_rate_rows(pool, hours, usd_per_gpu_hour, basis=basis, source=f"{source}; spot")


def reserved_rate_rows(
    pool: str,
    hours: Hours,
    usd_per_gpu_hour: float | Floats,
    *,
    energy_included: bool = True,
    basis: str = "quoted",
    source: str,
) -> pa.Table:
    """Commitment per ``gpu_hours`` (see `commitment_usd_per_hour`): due for every committed hour, so the
    usage side must hold all of them, the unused ones as idle."""
    rows = [
        gpu_hour_rate_rows(pool, hours, usd_per_gpu_hour, component="commitment", basis=basis, source=source)
    ]
    if energy_included:
        rows.append(energy_included_rate_rows(pool, hours, source=source))
    return concat(rows, RATES)


def energy_included_rate_rows(pool: str, hours: Hours, *, source: str) -> pa.Table:
    """An explicit zero rate of ``energy_kwh``: the power is in the rent."""
    return rate_rows(
        hours,
        0.0,
        pool=pool,
        meter="energy_kwh",
        component="energy_charge",
        basis="quoted",
        source=f"{INCLUDED}: {source}",
    )


def api_rate_rows(
    pool: str, hours: Hours, usd_per_mtok: Mapping[str, float], *, basis: str = "quoted", source: str
) -> pa.Table:
    """API prices per token meter [USD per million tokens]: ``input_tokens``, ``cached_input_tokens``,
    ``output_tokens``.

    Raises InputError on a meter that counts no tokens or a negative price.
    """
    parts = []
    for meter, price in usd_per_mtok.items():
        if base_meter(meter) not in TOKEN_METERS:
            raise InputError(f"API price of {meter!r}: not a token meter ({', '.join(TOKEN_METERS)})")
        if not 0 <= price < np.inf:
            raise InputError(f"API price of {meter} must be a number of 0 or more, found {price}")
        parts.append(
            rate_rows(
                hours,
                price / TOKENS_PER_MTOK,
                pool=pool,
                meter=meter,
                component="api",
                basis=basis,
                source=source,
            )
        )
    return concat(parts, RATES)


def gpu_hour_rate_rows(
    pool: str,
    hours: Hours,
    usd_per_gpu_hour: float | Floats,
    *,
    component: str,
    basis: str = "assumed",
    source: str = "scenario",
) -> pa.Table:
    """Any cost per ``gpu_hours``: ``capital``, ``rent``, ``hosting``, ``network``, ``software``,
    ``storage``; zero if free.

    Raises InputError on a negative price.
    """
    if not (np.asarray(usd_per_gpu_hour) >= 0).all():
        raise InputError(f"{component} of pool {pool!r} must be a number of 0 or more USD per GPU hour")
    return rate_rows(
        hours, usd_per_gpu_hour, pool=pool, meter="gpu_hours", component=component, basis=basis, source=source
    )


def start_rate_rows(
    pool: str,
    hours: Hours,
    *,
    usd_per_start: float,
    component: str,
    basis: str = "assumed",
    source: str = "scenario",
) -> pa.Table:
    """What a machine's start costs per ``starts`` [USD], in the component its hours are paid in (``rent``,
    ``commitment``, ``capital``).

    Raises InputError on a price that is no number of 0 or more.

    >>> rows = start_rate_rows(
    ...     "p", np.array(["2026-01-01T00"], "datetime64[h]"), usd_per_start=1.5, component="rent")
    >>> float(rows["usd_per_unit"][0].as_py()), rows["meter"][0].as_py()
    (1.5, 'starts')
    """
    if not 0 <= usd_per_start < np.inf:
        raise InputError(
            f"a start in pool {pool!r} must cost a number of 0 or more USD, found {usd_per_start}"
        )
    return rate_rows(
        hours, usd_per_start, pool=pool, meter="starts", component=component, basis=basis, source=source
    )


def software_rate_rows(
    pool: str, hours: Hours, *, usd_per_gpu_year: float, basis: str = "assumed", source: str = "scenario"
) -> pa.Table:
    """Software licence per GPU: USD per GPU and year / 8760, per ``gpu_hours``.

    >>> rows = software_rate_rows("p", np.array(["2026-01-01T00"], "datetime64[h]"), usd_per_gpu_year=4380)
    >>> float(rows["usd_per_unit"][0].as_py())
    0.5
    """
    return gpu_hour_rate_rows(
        pool, hours, usd_per_gpu_year / HOURS_PER_YEAR, component="software", basis=basis, source=source
    )


def egress_rate_rows(
    pool: str, hours: Hours, *, usd_per_gb: float, basis: str = "assumed", source: str = "scenario"
) -> pa.Table:
    """Egress per ``egress_gb`` [USD/GB]."""
    return rate_rows(
        hours, usd_per_gb, pool=pool, meter="egress_gb", component="egress", basis=basis, source=source
    )


def storage_rate_rows(
    pool: str, hours: Hours, *, usd_per_gb_month: float, basis: str = "assumed", source: str = "scenario"
) -> pa.Table:
    """Storage per ``storage_gb_hours``: USD per GB and month / 730.

    >>> rows = storage_rate_rows("p", np.array(["2026-01-01T00"], "datetime64[h]"), usd_per_gb_month=0.073)
    >>> float(rows["usd_per_unit"][0].as_py())
    0.0001
    """
    return rate_rows(
        hours,
        usd_per_gb_month / HOURS_PER_MONTH,
        pool=pool,
        meter="storage_gb_hours",
        component="storage",
        basis=basis,
        source=source,
    )
