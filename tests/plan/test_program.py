"""The program finds what trying every schedule finds, and its objective is usage × rates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from pertoken.errors import InputError
from pertoken.plan._instance import Instance, Limit, Peak
from pertoken.plan._outcome import entries
from pertoken.plan._program import Goal, build
from pertoken.plan.schedule import plan

Make = Callable[..., Instance]


def tried(i: Instance, loss: float = 0.0) -> float:
    """Least cost by trying every count of machines and pool of the job; the loads by a program of its own.

    Written from the tables alone, sharing nothing with the planner: pools own (0), rent (1) and an API (2).
    """
    T = len(i.hours)
    energy = i.price("own", "energy_kwh")
    best = np.inf
    for on in itertools.product(range(3), repeat=T):
        for rented in itertools.product(range(3), repeat=T):
            n = np.array([on, rented], dtype=float)
            before = np.concatenate([n[:, :1], n[:, :-1]], axis=1)
            starts = np.maximum(n - before, 0)
            if i.initial_on is not None:
                starts[:, 0] = np.maximum(n[:, 0] - i.initial_on[:2], 0)
            fixed = 2 * T * 1.0 + 3.0 * n[1].sum()
            idle = 1.4 * (0.3 * n[0] + 0.05 * (2 - n[0]) + 0.2 * starts[0])
            fixed += float((idle * energy).sum())
            if not _runs_long_enough(i, starts, n):
                continue
            for job_pool in (0, 1):
                cost = _loads(i, n, starts, idle, energy, job_pool, loss)
                if cost is not None:
                    best = min(best, cost + fixed)
    return best


def _runs_long_enough(i: Instance, starts: Any, n: Any) -> bool:
    for p in (0, 1):
        for t in range(n.shape[1]):
            first = max(0, t - int(i.min_run[p]) + 1)
            if i.min_run[p] > 1 and starts[p, first : t + 1].sum() > n[p, t]:
                return False
    return True


def _loads(
    i: Instance, n: Any, starts: Any, idle: Any, energy: Any, job_pool: int, loss: float
) -> float | None:
    """Variables: load of the 8 flows by hour (hour fastest), requests of class 1 served late by (arrival,
    hour), peak."""
    T = len(i.hours)
    flows = 8
    columns = flows * T + 1
    y = np.arange(flows * T).reshape(flows, T)
    cost = np.zeros(columns)
    cost[y[[0, 1, 6]]] = 1.4 * i.flow_kw[[0, 1, 6]][:, None] * energy
    per = i.flow_per_hour * (1 - i.flow_loss)
    for flow, c in ((4, 0), (5, 1)):
        usd = i.input_tokens[c] * 2e-6 + i.output_tokens[c] * 8e-6
        cost[y[flow]] = per[flow] * usd
    cost[-1] = 2.0
    upper, upper_right, equal, equal_right = [], [], [], []
    for t in range(T):
        row = np.zeros(columns)
        row[y[[0, 2, 4], t]] = per[[0, 2, 4]]
        equal.append(row)
        equal_right.append(i.requests[0, t])
        for p, mine in ((0, [0, 1, 6]), (1, [2, 3, 7])):
            row = np.zeros(columns)
            row[y[mine, t]] = 1
            upper.append(row)
            upper_right.append(n[p, t] - 0.1 * starts[p, t])
        row = np.zeros(columns)
        row[y[[0, 1, 6], t]] = 1.4 * i.flow_kw[[0, 1, 6]]
        row[-1] = -1
        upper.append(row)
        upper_right.append(-idle[t])
        # Class 1: by hour t all that arrived up to t − 2 is served, and nothing before it arrives.
        row = np.zeros(columns)
        row[y[[1, 3, 5], : t + 1].ravel()] = np.repeat(per[[1, 3, 5]], t + 1)
        upper.append(row)
        upper_right.append(i.requests[1, : t + 1].sum())
        if t == T - 1:
            equal.append(row)
            equal_right.append(i.requests[1].sum())
        else:
            upper.append(-row)
            upper_right.append(-i.requests[1, : max(t - 1, 0)].sum())
    row = np.zeros(columns)
    row[y[6 + job_pool, : int(i.job_deadline[0])]] = -per[6 + job_pool]
    upper.append(row)
    upper_right.append(-i.job_tokens[0])
    bounds: list[tuple[float, float | None]] = [(0.0, None)] * columns
    for t in range(T):
        bounds[y[7 - job_pool, t]] = (0.0, 0.0)
    bounds[-1] = (i.peaks[0].already_kw, None)
    found = linprog(
        cost, A_ub=np.array(upper), b_ub=upper_right, A_eq=np.array(equal), b_eq=equal_right, bounds=bounds
    )
    return float(found.fun) if found.status == 0 else None


@pytest.mark.parametrize("seed", range(4))
def test_equals_trying_everything(make: Make, seed: int) -> None:
    random = np.random.default_rng(seed)
    changes: dict[str, Any] = {
        "requests": random.uniform(200, 1500, (2, 3)),
        "job_tokens": np.array([random.uniform(0.3e6, 1.5e6)]),
        "job_deadline": np.array([random.integers(2, 4)]),
    }
    if seed % 2:
        changes["min_run"] = np.array([2, 2, 1])
    if seed % 3 == 0:
        changes["initial_on"] = np.array([1.0, 0.0, 0.0])
    i = make(3, **changes)
    i = replace(i, peaks=(replace(i.peaks[0], already_kw=float(random.uniform(0, 1.5))),))
    found = plan(i, gap=0.0)
    assert found.objective == pytest.approx(tried(i), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_objective_is_usage_times_rates(seed: int) -> None:
    random = np.random.default_rng(seed)
    from_file = _tiny()
    T = 6
    i = from_file(
        T,
        requests=random.uniform(0, 1500, (2, T)),
        job_tokens=np.array([random.uniform(0, 2e6)]),
        held_names=("own", "rent committed", "api"),
        held_most=np.array([2, 2, 0]),
        flow_loss=np.where(np.arange(8) % 2 == 0, 0.0, random.uniform(0, 0.3)),
        unit_whole=np.array([bool(seed % 2), False]),
        unit_start_hours=np.array([0.2, 0.0]) * (seed % 2),
        start_hours=np.array([0.0, 0.1, 0.0]),
        unit_most=np.array([4.0, np.inf]),
    )
    rent = replace(i.rates[2], pool="rent committed", component="commitment", usd_per_unit=np.full(T, 1.5))
    free = replace(i.rates[3], pool="rent committed")
    i = replace(i, rates=(*i.rates, rent, free))
    found = plan(i, gap=0.05)
    assert found.cost_usd == pytest.approx(found.objective, rel=1e-6)
    assert found.solver_cost_usd == pytest.approx(found.objective, rel=1e-6)
    _conserved(i, found.schedule)


def _tiny() -> Make:
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("tiny_instance", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Make = module.instance
    return made


def _conserved(i: Instance, s: Any) -> None:
    """GPU hours and kWh of all rows add up to what was held and drawn, hour by hour; all demand is served."""
    gpus, kwh = np.zeros(len(i.hours)), np.zeros(len(i.hours))
    served: dict[str, float] = {}
    for e in entries(i, s):
        assert (e.quantity >= -1e-9).all()
        if e.meter == "gpu_hours":
            gpus += e.quantity
        elif e.meter == "energy_kwh":
            kwh += e.quantity
        elif e.phase != "waste":
            served[e.meter] = served.get(e.meter, 0.0) + float(e.quantity.sum())
    assert gpus == pytest.approx(
        ((s.held[:, None] + s.rented) * i.machine_gpus[:, None]).sum(axis=0), abs=1e-6
    )
    assert kwh == pytest.approx(s.kwh.sum(axis=0), abs=1e-6)
    assert served["output_tokens"] == pytest.approx(float((i.output_tokens @ i.requests).sum()), rel=1e-6)
    assert served["training_tokens"] >= i.job_tokens[0] * (1 - 1e-6)


def test_peak_already_set_is_free_to_use(make: Make) -> None:
    i = make()
    cheap = replace(i, peaks=(replace(i.peaks[0], already_kw=5.0),))
    found = plan(cheap, gap=0.0)
    assert found.schedule.peak_kw[0] == 5.0
    assert found.by_component()["demand_charge"] == pytest.approx(10.0)
    free = replace(i, peaks=())
    assert found.objective - 10.0 == pytest.approx(plan(free, gap=0.0).objective, rel=1e-6)


def test_power_cap_and_spot_share_hold(make: Make) -> None:
    base = make()
    flows = base.flow_pool == 1
    of = base.flow_class == 0
    i = replace(
        base,
        site_cap_kw=np.full((1, 4), 1.6),
        limits=(Limit("spot", "chat", flows & of, of, fraction=0.25),),
    )
    found = plan(i, gap=0.0)
    assert (found.schedule.site_kw <= 1.6 + 1e-6).all()
    served = found.schedule.load * i.flow_per_hour[:, None]
    assert (served[flows & of].sum(axis=0) <= 0.25 * served[of].sum(axis=0) + 1e-6).all()
    assert found.objective >= plan(base, gap=0.0).objective


def test_a_job_stays_on_one_pool(make: Make) -> None:
    i = make(job_tokens=np.array([5e6]))
    tokens = plan(i, gap=0.0).schedule.load[6:].sum(axis=1)
    assert (tokens > 1e-9).sum() == 1
    mixed = plan(replace(i, job_one_pool=np.array([False])), gap=0.0)
    assert mixed.objective <= plan(i, gap=0.0).objective + 1e-9


def test_whole_replicas_and_machines(make: Make) -> None:
    """Replicas of two GPUs on machines of four: two fit, and a third needs the next machine."""
    i = make(
        machine_gpus=np.array([4, 4, 0]),
        unit_gpus=np.array([2.0, 2.0]),
        unit_whole=np.ones(2, dtype=np.bool_),
        start_hours=np.zeros(3),
        requests=np.array([[2500.0, 900.0, 2500.0, 900.0], [0.0, 0.0, 0.0, 0.0]]),
        job_tokens=np.zeros(1),
        rates=tuple(r for r in make().rates if r.pool != "api")
        + tuple(replace(r, usd_per_unit=r.usd_per_unit * 1e3) for r in make().rates if r.pool == "api"),
    )
    found = plan(i, gap=0.0).schedule
    assert (found.units[0] * 2 <= found.machines[0] * 4).all()
    assert found.units[:, 0].sum() >= 3
    assert (found.load[:2].sum(axis=0) <= found.units[0] + 1e-6).all()
    assert found.machines[0, 0] == 2


def test_minimum_run(make: Make) -> None:
    quick, long = make(6, requests=np.array([[900, 1900, 900, 1900, 900, 900.0]] * 1 + [[0.0] * 6])), 4
    slow = replace(quick, min_run=np.array([long, long, 1]))
    n = plan(slow, gap=0.0).schedule.machines
    for p in (0, 1):
        for t in range(1, 6):
            begun = max(0.0, n[p, t] - n[p, t - 1])
            if begun:
                assert (n[p, t : t + long] >= begun).all()


def test_budgets(make: Make) -> None:
    i = make()
    cheapest = plan(i, gap=0.0)
    carbon = plan(i, "carbon", gap=0.0)
    assert carbon.carbon_kg <= cheapest.carbon_kg + 1e-9
    assert carbon.objective == pytest.approx(carbon.carbon_kg, rel=1e-6)
    between = plan(i, gap=0.0, budget_kgco2e=(carbon.carbon_kg + cheapest.carbon_kg) / 2)
    assert cheapest.objective - 1e-9 <= between.objective <= carbon.cost_usd + 1e-6
    most = plan(i, "tokens", gap=0.0, budget_usd=cheapest.objective * 1.3)
    assert most.scale > 1
    assert most.cost_usd <= cheapest.objective * 1.3 * (1 + 1e-6)
    again = plan(i, gap=0.0, scale=most.scale)
    assert again.objective == pytest.approx(cheapest.objective * 1.3, rel=1e-4)


def test_training_time_within_cost(make: Make) -> None:
    i = make(6, job_tokens=np.array([4e6]))
    late = plan(i, gap=0.0)
    soon = plan(i, "time", gap=0.0, budget_usd=late.objective * 1.5)
    assert soon.objective <= 6
    assert soon.bound <= soon.objective
    assert soon.cost_usd <= late.objective * 1.5 * (1 + 1e-6)
    tight = plan(i, "time", gap=0.0, budget_usd=late.objective * 1.0001)
    assert tight.objective >= soon.objective


def test_fewest_switches_costs_no_more(make: Make) -> None:
    i = make(8, start_hours=np.zeros(3), start_kwh=np.zeros(3))
    one, two = plan(i, gap=0.0), plan(i, gap=0.0, fewest_switches=True)
    assert two.objective == pytest.approx(one.objective, rel=1e-6)
    assert two.switches <= one.switches


def test_unknown_grid_has_no_least_carbon(make: Make) -> None:
    i = make(carbon_g_per_kwh=np.full((3, 4), np.nan))
    with pytest.raises(InputError, match="grid intensity"):
        plan(i, "carbon")
    assert np.isnan(plan(i).carbon_kg)


def test_build_is_bulk(make: Make) -> None:
    i = make(24)
    program = build(i, Goal())
    rows, columns, entries_ = program.shape
    assert len(program.start) == rows + 1
    assert program.start[-1] == entries_
    assert program.index.max() < columns
    assert (
        len(set(zip(np.repeat(np.arange(rows), np.diff(program.start)), program.index, strict=True)))
        == entries_
    )


def test_bad_instances_are_refused(make: Make) -> None:
    with pytest.raises(InputError, match="flow_kw has shape"):
        make(flow_kw=np.zeros(3))
    with pytest.raises(InputError, match="requests is not finite"):
        make(requests=np.full((2, 4), np.nan))
    with pytest.raises(InputError, match="held_least exceeds"):
        make(held_least=np.array([3, 0, 0]))
    with pytest.raises(InputError, match="unknown objective"):
        plan(make(), "speed")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a budget"):
        plan(make(), "tokens")
    assert isinstance(make().peaks[0], Peak)
