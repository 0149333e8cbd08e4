"""Infeasible is an answer: what is in the way, how much is missing, what would free it; and stopping keeps
the best."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pertoken.errors import InfeasibleError, InputError, PerTokenError
from pertoken.plan._duals import shadow_prices
from pertoken.plan._infeasible import Cause
from pertoken.plan._instance import Instance
from pertoken.plan._program import build
from pertoken.plan._solve import Progress, Session, Watch
from pertoken.plan.schedule import frontier, plan

Make = Callable[..., Instance]


def alone(make: Make, **changes: object) -> Instance:
    """The tiny instance without the API, so that capacity can run out."""
    base = make(**changes)
    keep = base.flow_pool != 2
    names = ("unit", "pool", "class", "job", "per_hour", "kw", "gpu_kw", "reserve", "loss", "prefill")
    return replace(base, **{f"flow_{n}": getattr(base, f"flow_{n}")[keep] for n in names})


def causes(i: Instance, **options: float) -> dict[str, Cause]:
    with pytest.raises(InfeasibleError) as caught:
        plan(i, **options)  # type: ignore[arg-type]
    assert "To fix:" in str(caught.value)
    found: tuple[Cause, ...] = caught.value.causes  # type: ignore[attr-defined]
    return {c.constraint: c for c in found}


def test_too_few_machines(make: Make) -> None:
    requests = np.array([[6000.0, 1000.0, 1000.0, 1000.0], [0.0] * 4])
    i = alone(make, requests=requests, job_tokens=np.zeros(1))
    found = causes(i)
    # Two owned at 1000 and two rented at 1200 requests an hour serve 4400 of 6000: 1600 too many.
    assert found["serve"].missing == pytest.approx(1600.0, rel=1e-6)
    assert "1,600 fewer requests of 'chat'" in found["serve"].remedy
    assert found["capacity"].missing == pytest.approx(2.0)
    assert "add 2 machines to pool 'rent'" in found["capacity"].remedy


def test_deadline_too_early(make: Make) -> None:
    i = alone(make, job_tokens=np.array([2.5e6]), job_deadline=np.array([1]), requests=np.zeros((2, 4)))
    found = causes(i)
    # One hour of two rented machines at 1.2 M tokens: 0.1 M tokens short.
    assert found["deadline"].missing == pytest.approx(0.1e6, rel=1e-6)
    assert "1 h later" in found["deadline"].remedy


def test_power_cap_too_low(make: Make) -> None:
    i = alone(make, site_cap_kw=np.full((1, 4), 0.01), job_tokens=np.zeros(1))
    # Two machines that are off draw 0.05 kW each, times the PUE of 1.4.
    assert causes(i)["power_cap"].missing == pytest.approx(0.13, rel=1e-6)


def test_budget_too_small(make: Make) -> None:
    i = make()
    least = plan(i, gap=0.0).objective
    found = causes(i, budget_usd=least / 2)
    assert found["budget"].unit == "USD"
    # The relaxation's own least cost is what the budget lacks, within the rounding of machines.
    assert least / 2 * 0.8 <= found["budget"].missing <= least / 2 + 1e-9


def test_what_was_set_is_named_before_what_is_asked_for(make: Make) -> None:
    """A machine more is no way out of a budget: it is paid for; fewer requests always are, and come last."""
    with pytest.raises(InfeasibleError, match="'budget' of 'USD'") as caught:
        plan(alone(make), budget_usd=1.0)
    assert "add " not in str(caught.value)
    capped = alone(make, site_cap_kw=np.full((1, 4), 0.01), job_tokens=np.zeros(1))
    with pytest.raises(InfeasibleError, match="'power_cap' of 'home'"):
        plan(capped)


def test_whole_machines_in_the_way(make: Make) -> None:
    """1.4 replicas' work on the machines of 1.5: the answer is one machine more, not a part of one."""
    i = alone(
        make,
        unit_whole=np.ones(2, dtype=np.bool_),
        start_hours=np.zeros(3),
        unit_gpus=np.array([2.0, 2.0]),
        machine_gpus=np.array([1, 1, 0]),
        held_most=np.array([3, 0, 0]),
        held_least=np.array([3, 0, 0]),
        machines_most=np.array([[3.0], [0.0], [0.0]]) * np.ones(4),
        rented_most=np.zeros((3, 4)),
        requests=np.array([[1400.0] * 4, [0.0] * 4]),
        job_tokens=np.zeros(1),
    )
    assert causes(i)["capacity"].missing == pytest.approx(1.0)


def test_ctrl_c_returns_the_best_so_far(make: Make) -> None:
    seen: list[Progress] = []
    pressed: list[bool] = []

    def press(progress: Progress) -> None:
        seen.append(progress)
        if progress.best is not None and not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)

    i = _hard(make)
    found = plan(i, gap=0.0, time_limit_s=60.0, progress=press)
    assert found.status in ("stopped", "optimal")
    assert found.gap is not None
    assert found.cost_usd == pytest.approx(found.objective, rel=1e-6)
    assert [p.bound for p in seen if p.bound is not None]


def _hard(make: Make) -> Instance:
    random = np.random.default_rng(3)
    T = 96
    return make(
        T,
        requests=random.uniform(300, 1900, (2, T)),
        job_tokens=np.array([30e6]),
        min_run=np.array([3, 3, 1]),
        held_least=np.zeros(3, dtype=np.int64),
        held_most=np.array([4, 0, 0]),
        machines_most=np.array([[4.0], [6.0], [0.0]]) * np.ones(T),
        rented_most=np.array([[0.0], [6.0], [0.0]]) * np.ones(T),
    )


def test_out_of_time_says_so(make: Make) -> None:
    with pytest.raises(PerTokenError, match="raise the time limit"):
        plan(_hard(make), gap=0.0, time_limit_s=1e-6)


def test_shadow_prices_are_differences(make: Make) -> None:
    """Tokens against the change of the relaxation's optimum for a small step, all else for a whole one."""
    i = make(site_cap_kw=np.full((1, 4), 1.7), job_tokens=np.array([2.2e6]), job_deadline=np.array([3]))
    prices = shadow_prices(i)

    def least(changed: Instance, cuts: bool = True) -> float:
        session = Session(build(changed, cuts=cuts), Watch(10))
        assert session.relax()
        return session.objective

    base, uncut, step = least(i), least(i, cuts=False), 1e-4
    more = i.requests.copy()
    more[0, 1] += step * 1e3
    tokens = i.tokens_per_request()[0] * step * 1e3 / 1e6
    assert (least(replace(i, requests=more), cuts=False) - uncut) / tokens == pytest.approx(
        prices.usd_per_mtok["chat"][1], rel=1e-3
    )
    cap = replace(i, site_cap_kw=i.site_cap_kw + 1)
    assert base - least(cap) == pytest.approx(prices.usd_per_kw["home"], rel=1e-6, abs=1e-9)
    assert prices.usd_per_kw["home"] > 0
    free = replace(i.rates[2], pool="rent held", usd_per_unit=np.zeros(4))
    energy = replace(i.rates[3], pool="rent held")
    one = replace(
        i,
        held_names=("own", "rent held", "api"),
        held_least=np.array([2, 1, 0]),
        held_most=np.array([2, 1, 0]),
        machines_most=i.machines_most + np.array([[0.0], [1.0], [0.0]]),
        rates=(*i.rates, free, energy),
    )
    assert base - least(one) == pytest.approx(prices.usd_per_gpu["rent"], rel=1e-6)
    assert 0 < prices.usd_per_gpu["rent"] < 3.0 * 4
    trained = replace(i, job_tokens=i.job_tokens + step * 1e6)
    assert (least(trained, cuts=False) - uncut) / step == pytest.approx(
        prices.usd_per_mtok_trained["train"], rel=1e-3
    )
    later = replace(i, job_deadline=i.job_deadline + 1)
    assert base - least(later) == pytest.approx(prices.usd_per_deadline_hour["train"], abs=1e-6)


def test_token_prices_leave_out_cuts_that_hold_the_demand(make: Make) -> None:
    """With cuts active: duals times demand are what a little more of all demand costs, hour by hour."""
    i = make(4, requests=np.array([[700.0, 1300.0, 400.0, 900.0], [0.0, 0.0, 0.0, 0.0]]))
    i = replace(i, unit_whole=np.ones(len(i.unit_pool), dtype=np.bool_))

    def least(changed: Instance, cuts: bool = False) -> float:
        session = Session(build(changed, cuts=cuts), Watch(10))
        assert session.relax()
        return session.objective

    assert least(i, cuts=True) > least(i) * (1 + 1e-6)  # the cuts are active
    mtok = i.requests[0] * i.tokens_per_request()[0] / 1e6
    more = (least(replace(i, requests=i.requests * (1 + 1e-5))) - least(i)) / 1e-5
    assert float((shadow_prices(i).usd_per_mtok["chat"] * mtok).sum()) == pytest.approx(more, rel=1e-3)


def test_frontiers_fall_and_rise(make: Make) -> None:
    i = make(6, job_tokens=np.array([3e6]))
    later = [p.objective for _, p in frontier(i, "deadline", [2, 4, 6], gap=0.0) if p is not None]
    assert later == sorted(later, reverse=True)
    more = [p.objective for _, p in frontier(i, "tokens", [1.0, 1.25, 1.5], gap=0.0) if p is not None]
    assert more == sorted(more)
    assert frontier(i, "carbon", [0.0])[0][1] is None
    for against, wrong in (
        ("tokens", 0.0),
        ("tokens", float("nan")),
        ("deadline", -3.0),
        ("deadline", 1.5),
        ("carbon", -1.0),
        ("luck", 1.0),
    ):
        with pytest.raises(InputError, match="frontier"):
            frontier(i, against, [wrong])  # type: ignore[arg-type]
