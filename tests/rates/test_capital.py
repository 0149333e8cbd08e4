from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import InputError
from pertoken.rates.capital import (
    annuity_usd_per_hour,
    capital_usd_per_hour,
    colocation_usd_per_gpu_hour,
    commitment_usd_per_hour,
    cooling_usd_per_hour,
    payback_years,
    spot_lost_fraction,
    spot_usd_per_useful_hour,
    straight_line_usd_per_hour,
)
from pertoken.units import HOURS_PER_YEAR

prices = st.floats(1.0, 1e7)
lives = st.floats(0.5, 20.0)
waccs = st.floats(1e-6, 0.5)
residuals = st.floats(0.0, 1.0)


@settings(deadline=None)
@given(prices, lives, residuals)
def test_annuity_at_no_interest_is_the_straight_line(price: float, life: float, residual: float) -> None:
    line = straight_line_usd_per_hour(price, life_years=life, residual_fraction=residual)
    zero = annuity_usd_per_hour(price, life_years=life, wacc_fraction=0.0, residual_fraction=residual)
    tiny = annuity_usd_per_hour(price, life_years=life, wacc_fraction=1e-8, residual_fraction=residual)
    assert zero == line
    assert tiny == pytest.approx(line, rel=1e-6, abs=price * 1e-11)


@settings(deadline=None)
@given(prices, lives, waccs)
def test_annuity_falls_with_life_and_rises_with_interest(price: float, life: float, wacc: float) -> None:
    one = annuity_usd_per_hour(price, life_years=life, wacc_fraction=wacc)
    assert annuity_usd_per_hour(price, life_years=life * 1.1, wacc_fraction=wacc) < one
    assert annuity_usd_per_hour(price, life_years=life, wacc_fraction=wacc + 0.01) > one
    assert annuity_usd_per_hour(price * 2, life_years=life, wacc_fraction=wacc) == pytest.approx(2 * one)
    assert one > straight_line_usd_per_hour(price, life_years=life) * (1 - 1e-9)


@settings(deadline=None)
@given(prices, st.integers(1, 15), waccs, residuals)
def test_payments_and_residual_are_worth_the_price(
    price: float, life: int, wacc: float, residual: float
) -> None:
    year = (
        annuity_usd_per_hour(price, life_years=life, wacc_fraction=wacc, residual_fraction=residual)
        * HOURS_PER_YEAR
    )
    value = sum(year / (1 + wacc) ** n for n in range(1, life + 1)) + residual * price / (1 + wacc) ** life
    assert value == pytest.approx(price, rel=1e-9)


def test_a_full_residual_leaves_the_interest() -> None:
    year = annuity_usd_per_hour(1000, life_years=3, wacc_fraction=0.1, residual_fraction=1.0) * HOURS_PER_YEAR
    assert year == pytest.approx(100.0)


def test_the_method_is_named_and_never_mixed() -> None:
    line = capital_usd_per_hour(8760, life_years=1, wacc_fraction=0.2, method="straight-line")
    assert line == 1.0
    with pytest.raises(InputError, match="'sum of digits' is neither annuity nor straight-line"):
        capital_usd_per_hour(8760, life_years=1, wacc_fraction=0.2, method="sum of digits")


@pytest.mark.parametrize(
    ("price", "life", "wacc", "residual", "message"),
    [
        (-1.0, 5, 0.08, 0.0, "price -1.0"),
        (math.nan, 5, 0.08, 0.0, "price nan"),
        (1.0, 0, 0.08, 0.0, "life of 0"),
        (1.0, math.inf, 0.08, 0.0, "life of inf"),
        (1.0, 5, -0.01, 0.0, "WACC -0.01"),
        (1.0, 5, 0.08, 1.2, "residual 1.2"),
    ],
)
def test_numbers_out_of_range(price: float, life: float, wacc: float, residual: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        annuity_usd_per_hour(price, life_years=life, wacc_fraction=wacc, residual_fraction=residual)


@settings(deadline=None)
@given(prices, st.floats(0.1, 100.0), st.one_of(st.just(0.0), st.floats(1e-4, 0.3)))
def test_payback_discounts_to_the_price(price: float, saving: float, wacc: float) -> None:
    years = payback_years(price, saving, wacc_fraction=wacc)
    year = saving * HOURS_PER_YEAR
    if math.isinf(years):
        assert wacc * price >= year
    elif wacc == 0:
        assert years * year == pytest.approx(price)
    else:
        assert years >= payback_years(price, saving) * (1 - 1e-9)
        worth = year * (1 - (1 + wacc) ** -years) / wacc
        assert worth == pytest.approx(price, rel=1e-6)


def test_payback_of_nothing_and_never() -> None:
    assert payback_years(0.0, 1.0) == 0.0
    assert payback_years(1.0, 0.0) == math.inf
    assert payback_years(1.0, -2.0) == math.inf


def test_commitment() -> None:
    assert commitment_usd_per_hour(upfront_usd=730, term_months=1) == 1.0
    with pytest.raises(InputError, match="reservation of -1"):
        commitment_usd_per_hour(usd_per_hour=-1)
    with pytest.raises(InputError, match="0 months"):
        commitment_usd_per_hour(usd_per_hour=1, term_months=0)


def test_spot() -> None:
    lost = spot_lost_fraction(0.1, lost_work_hours=1.0, reload_hours=0.25)
    assert lost == pytest.approx(0.125)
    assert spot_usd_per_useful_hour(1.75, lost) == pytest.approx(2.0)
    assert spot_lost_fraction(0.0, lost_work_hours=1.0, reload_hours=0.25) == 0.0
    with pytest.raises(InputError, match="no useful hour"):
        spot_lost_fraction(2.0, lost_work_hours=0.5, reload_hours=0.5)
    with pytest.raises(InputError, match="must not be negative"):
        spot_lost_fraction(-1.0, lost_work_hours=0.5, reload_hours=0.5)
    with pytest.raises(InputError, match="not within 0 and 1"):
        spot_usd_per_useful_hour(1.0, 1.0)


def test_colocation_and_cooling() -> None:
    # 8 GPUs in a rack at 1,460 USD, 10 kW contracted at 146 USD/kW-month: (1,460 + 1,460) / 8 / 730 h.
    rack = colocation_usd_per_gpu_hour(
        usd_per_kw_month=146, kw_per_gpu=1.25, usd_per_rack_month=1460, gpus_per_rack=8
    )
    assert rack == pytest.approx(0.5)
    with pytest.raises(InputError, match="must hold a GPU"):
        colocation_usd_per_gpu_hour(usd_per_rack_month=1, gpus_per_rack=0)
    line = cooling_usd_per_hour(8760, 10, life_years=10, wacc_fraction=0.08, method="straight-line")
    assert line == pytest.approx(1.0)
