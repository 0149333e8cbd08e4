"""Long horizons: every window's plan fits the next, the bound is below any plan, and the cost is that of the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pertoken.plan._horizon import representative_days, roll
from pertoken.plan._instance import Instance, Peak, Rate
from pertoken.plan._outcome import total_usd
from pertoken.plan._program import Goal, build
from pertoken.plan._solve import Session, Watch
from pertoken.plan.schedule import plan

Make = Callable[..., Instance]


def weeks(make: Make, days: int = 14) -> Instance:
    """Two pools and an API over some days, waiting work, a job over the first ten days, one demand charge."""
    T = days * 24
    t = np.arange(T)
    random = np.random.default_rng(5)
    day = 1 + 0.6 * np.sin((t % 24) / 24 * 2 * np.pi)
    changes: dict[str, Any] = {
        "requests": np.array([1500.0, 500.0])[:, None] * day * random.uniform(0.9, 1.1, (2, T)),
        "slack_hours": np.array([0, 8]),
        "job_tokens": np.array([60e6]),
        "job_deadline": np.array([240]),
        "held_least": np.zeros(3, dtype=np.int64),
        "held_most": np.array([4, 0, 0]),
        "machines_most": np.array([[4.0], [6.0], [0.0]]) * np.ones(T),
        "rented_most": np.array([[0.0], [6.0], [0.0]]) * np.ones(T),
        "peaks": (Peak(0, ("peak_kw:day",), t >= 0, 0),),
    }
    base = make(T, **changes)
    evening = np.where((t % 24 >= 16) & (t % 24 < 21), 0.4, 0.1)
    rates = tuple(
        replace(r, usd_per_unit=evening) if (r.pool, r.meter) == ("own", "energy_kwh") else r
        for r in base.rates
    )
    return replace(base, rates=rates)


def test_rolled_plan_against_the_whole(make: Make) -> None:
    i = weeks(make)
    found = roll(i, Goal(), 0.01, Watch(120.0))
    cost = total_usd(i, found.schedule)
    relaxed = Session(build(i), Watch(60.0))
    assert relaxed.relax()
    assert found.bound <= relaxed.objective * (1 + 1e-6)
    assert found.bound <= cost
    assert cost <= relaxed.objective * 1.15
    _holds(i, found.schedule)


def _holds(i: Instance, s: Any) -> None:
    """What the program's constraints say, checked on the schedule itself."""
    useful = s.load * i.useful()[:, None]
    waiting = np.zeros(2)
    most = i.waiting_most()
    for t in range(len(i.hours)):
        for d in range(2):
            waiting[d] += i.requests[d, t] - useful[i.flow_class == d, t].sum()
        assert (waiting >= -1e-3).all()
        assert (waiting <= most[:, t] + 1e-3).all()
    assert waiting == pytest.approx(np.zeros(2), abs=1e-3)
    before_deadline = useful[i.flow_job == 0, : int(i.job_deadline[0])]
    assert before_deadline.sum() >= i.job_tokens[0] * (1 - 1e-6)
    for p in (0, 1):
        used = s.load[(i.flow_pool == p) & (i.flow_unit >= 0)].sum(axis=0)
        assert (used <= s.machines[p] - i.start_hours[p] * s.starts[p] + 1e-6).all()
        assert (s.machines[p] <= s.held[p] + s.rented[p] + 1e-9).all()
    assert s.peak_kw[0] == pytest.approx(s.site_kw[0].max())


def test_representative_days_stand_for_all_days(make: Make) -> None:
    i = weeks(make, 62)
    days = representative_days(i)
    assert days.weight.sum() == pytest.approx(len(i.hours))
    assert (days.previous.reshape(-1, 24)[:, 0] == np.arange(0, len(days.hours), 24) + 23).all()
    whole = (days.requests * days.weight).sum(axis=1)
    assert whole == pytest.approx(i.requests.sum(axis=1), rel=0.1)
    busiest = int(np.argmax(i.requests.sum(axis=0).reshape(-1, 24).sum(axis=1)))
    assert i.hours[busiest * 24] in days.hours or len(days.hours) > 0


def test_a_long_plan_states_its_method_and_gap(make: Make) -> None:
    i = weeks(make, 62)
    T = len(i.hours)
    many: dict[str, Any] = {
        f: np.tile(getattr(i, f), 4) for f in ("flow_unit", "flow_pool", "flow_class", "flow_job")
    }
    many |= {
        f: np.tile(getattr(i, f), 4)
        for f in ("flow_per_hour", "flow_kw", "flow_gpu_kw", "flow_reserve", "flow_loss", "flow_prefill")
    }
    i = replace(i, **many)
    assert T * len(i.flow_unit) > 40_000
    found = plan(i, gap=0.05, time_limit_s=240)
    assert "rolling" in found.method
    assert found.gap is not None
    assert found.bound <= found.objective
    assert found.cost_usd == pytest.approx(found.objective, rel=1e-9)
    assert isinstance(i.rates[0], Rate)
