"""What hardware costs per hour: owned, colocated, reserved, spot; and when buying it pays back."""

from __future__ import annotations

import math

from pertoken.errors import InputError
from pertoken.units import HOURS_PER_MONTH, HOURS_PER_YEAR

STRAIGHT_LINE = "straight-line"
ANNUITY = "annuity"


def capital_usd_per_hour(
    price_usd: float,
    *,
    life_years: float,
    wacc_fraction: float,
    residual_fraction: float = 0.0,
    method: str = ANNUITY,
) -> float:
    """Cost per hour of something bought, by annuity or straight line; never a mix.

    Parameters: price_usd [USD]; life_years [years]; wacc_fraction [per year, 0.08 is 8 %]; residual_fraction
    [share of the price got back at the end of life]; method: ``annuity`` or ``straight-line``.
    Raises InputError on an unknown method or a number out of range.

    >>> round(capital_usd_per_hour(87_600, life_years=5, wacc_fraction=0.08, method="straight-line"), 6)
    2.0
    """
    if method == ANNUITY:
        return annuity_usd_per_hour(
            price_usd, life_years=life_years, wacc_fraction=wacc_fraction, residual_fraction=residual_fraction
        )
    if method == STRAIGHT_LINE:
        return straight_line_usd_per_hour(
            price_usd, life_years=life_years, residual_fraction=residual_fraction
        )
    raise InputError(f"depreciation {method!r} is neither {ANNUITY} nor {STRAIGHT_LINE}")


def annuity_usd_per_hour(
    price_usd: float, *, life_years: float, wacc_fraction: float, residual_fraction: float = 0.0
) -> float:
    """Equal payment per hour over the life whose present value is price less the residual's present value.

    Parameters: price_usd [USD]; life_years [years]; wacc_fraction i [per year, compounded yearly];
    residual_fraction r [0 to 1]. Formula, n years, payments at each year's end, 8760 hours a year:
    (P − r·P·(1+i)^−n) × i / (1 − (1+i)^−n) / 8760; for i = 0: (P − r·P) / n / 8760.
    Raises InputError on a negative price, a life not above 0, a WACC below 0 or a residual outside 0 to 1.
    Source: Brealey, Myers, Allen, Principles of Corporate Finance, "equivalent annual cost".

    10,000 USD, 1 year, 10 %: one payment of 11,000 USD.

    >>> round(annuity_usd_per_hour(10_000, life_years=1, wacc_fraction=0.10) * 8760, 6)
    11000.0
    """
    _check(price_usd, life_years, residual_fraction, wacc_fraction)
    if wacc_fraction * life_years < 1e-9:  # below it the formula is 0/0 in floats, and the limit is exact
        return straight_line_usd_per_hour(
            price_usd, life_years=life_years, residual_fraction=residual_fraction
        )
    discount = math.exp(-life_years * math.log1p(wacc_fraction))
    factor = wacc_fraction / -math.expm1(-life_years * math.log1p(wacc_fraction))
    return price_usd * (1.0 - residual_fraction * discount) * factor / HOURS_PER_YEAR


def straight_line_usd_per_hour(
    price_usd: float, *, life_years: float, residual_fraction: float = 0.0
) -> float:
    """Price less residual, spread evenly over the hours of the life; money costs nothing.

    Parameters: price_usd [USD]; life_years [years]; residual_fraction [0 to 1].
    Formula: P × (1 − r) / (n × 8760). Raises InputError as `annuity_usd_per_hour`.

    >>> straight_line_usd_per_hour(43_800, life_years=5)
    1.0
    """
    _check(price_usd, life_years, residual_fraction, 0.0)
    return price_usd * (1.0 - residual_fraction) / (life_years * HOURS_PER_YEAR)


def payback_years(price_usd: float, saving_usd_per_hour: float, *, wacc_fraction: float = 0.0) -> float:
    """Years until savings repay a purchase; infinity where they never do.

    Parameters: price_usd [USD]; saving_usd_per_hour [USD/h, running costs already taken off];
    wacc_fraction i [per year; 0: simple payback]. Formula: P/S for i = 0, else −ln(1 − i·P/S) / ln(1+i),
    S the saving per year. Raises InputError on a negative price or WACC.

    >>> payback_years(17_520, 1.0)
    2.0
    """
    _check(price_usd, 1.0, 0.0, wacc_fraction)
    saving_usd_per_year = saving_usd_per_hour * HOURS_PER_YEAR
    if price_usd == 0:
        return 0.0
    if saving_usd_per_year <= 0 or wacc_fraction * price_usd >= saving_usd_per_year:
        return math.inf
    if wacc_fraction == 0:
        return price_usd / saving_usd_per_year
    return -math.log1p(-wacc_fraction * price_usd / saving_usd_per_year) / math.log1p(wacc_fraction)


def commitment_usd_per_hour(
    *, usd_per_hour: float = 0.0, upfront_usd: float = 0.0, term_months: float = 12.0
) -> float:
    """Cost per committed hour of a reservation: its hourly price and its share of what was paid upfront.

    Parameters: usd_per_hour [USD/h, due used or unused]; upfront_usd [USD]; term_months [months of 730 h].
    Formula: usd_per_hour + upfront / (term × 730). Raises InputError on a negative number or a term not
    above 0.

    >>> commitment_usd_per_hour(usd_per_hour=1.0, upfront_usd=8760, term_months=12)
    2.0
    """
    if min(usd_per_hour, upfront_usd) < 0 or not term_months > 0:
        raise InputError(
            f"reservation of {usd_per_hour} USD/h, {upfront_usd} USD upfront, {term_months} months"
        )
    return usd_per_hour + upfront_usd / (term_months * HOURS_PER_MONTH)


def spot_lost_fraction(
    interruptions_per_hour: float, *, lost_work_hours: float, reload_hours: float
) -> float:
    """Share of paid spot hours that produces nothing: work lost and model loaded again.

    Parameters: interruptions_per_hour [per paid hour and machine]; lost_work_hours [h per interruption,
    work since the last checkpoint or in flight]; reload_hours [h to load weights and warm up].
    Formula: interruptions × (lost work + reload). Raises InputError where that is 1 or more (nothing gets
    done) or a number is negative.

    One interruption in 20 hours that costs 0.5 h of work and 0.1 h of reload:

    >>> round(spot_lost_fraction(0.05, lost_work_hours=0.5, reload_hours=0.1), 6)
    0.03
    """
    if not min(interruptions_per_hour, lost_work_hours, reload_hours) >= 0:
        raise InputError("spot: interruptions, lost work and reload must not be negative")
    lost = interruptions_per_hour * (lost_work_hours + reload_hours)
    if not lost < 1:
        raise InputError(
            f"spot: {interruptions_per_hour:g} interruptions/h × {lost_work_hours + reload_hours:g} h each "
            "leave "
            "no useful hour; checkpoint more often or use another price term"
        )
    return lost


def spot_usd_per_useful_hour(spot_usd_per_hour: float, lost_fraction: float) -> float:
    """Spot price per hour that produces something: price / (1 − lost fraction); for display, the ledger
    keeps waste.

    >>> round(spot_usd_per_useful_hour(0.97, 0.03), 6)
    1.0
    """
    if not 0 <= lost_fraction < 1:
        raise InputError(f"lost fraction {lost_fraction:g} is not within 0 and 1")
    return spot_usd_per_hour / (1.0 - lost_fraction)


def colocation_usd_per_gpu_hour(
    *,
    usd_per_kw_month: float = 0.0,
    kw_per_gpu: float = 0.0,
    usd_per_rack_month: float = 0.0,
    gpus_per_rack: float = 1.0,
) -> float:
    """Colocation fee per GPU and hour: contracted power (paid used or unused) and rack space.

    Parameters: usd_per_kw_month [USD per contracted kW and month]; kw_per_gpu [contracted kW per GPU, host
    included]; usd_per_rack_month [USD]; gpus_per_rack. A month is 730 h.
    Formula: (USD/kW-month × kW/GPU + USD/rack-month / GPUs per rack) / 730.
    Raises InputError on a negative number or no GPUs in a rack.

    >>> colocation_usd_per_gpu_hour(usd_per_kw_month=146, kw_per_gpu=1.25)
    0.25
    """
    if min(usd_per_kw_month, kw_per_gpu, usd_per_rack_month) < 0 or not gpus_per_rack > 0:
        raise InputError("colocation: prices and kW must not be negative, a rack must hold a GPU")
    return (usd_per_kw_month * kw_per_gpu + usd_per_rack_month / gpus_per_rack) / HOURS_PER_MONTH


def cooling_usd_per_hour(
    usd_per_kw: float,
    kw: float,
    *,
    life_years: float,
    wacc_fraction: float,
    residual_fraction: float = 0.0,
    method: str = ANNUITY,
) -> float:
    """Capital cost per hour of owned cooling (and power distribution), sized for the site's design load.

    Parameters: usd_per_kw [USD per kW of IT load]; kw [design IT load]; the rest as `capital_usd_per_hour`.

    >>> round(cooling_usd_per_hour(876, 100, life_years=10, wacc_fraction=0.0), 6)
    1.0
    """
    return capital_usd_per_hour(
        usd_per_kw * kw,
        life_years=life_years,
        wacc_fraction=wacc_fraction,
        residual_fraction=residual_fraction,
        method=method,
    )


def _check(price_usd: float, life_years: float, residual_fraction: float, wacc_fraction: float) -> None:
    if not 0 <= price_usd < math.inf:
        raise InputError(f"price {price_usd} USD is not a number of 0 or more")
    if not 0 < life_years < math.inf:
        raise InputError(f"life of {life_years} years is not above 0")
    if not 0 <= residual_fraction <= 1:
        raise InputError(f"residual {residual_fraction} of the price is not between 0 and 1")
    if not 0 <= wacc_fraction < math.inf:
        raise InputError(f"WACC {wacc_fraction} is not a number of 0 or more (0.08 is 8 %)")
