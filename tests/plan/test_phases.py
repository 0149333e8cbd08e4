"""A plan tells what its hours were spent on as `compare` and the meter do: by the time with requests in flight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pertoken.plan._power_rows import tangent
from pertoken.plan.options import Market, evaluate, usage
from pertoken.plan.schedule import plan
from pertoken.scenario import Scenario
from pertoken.units import IDLE


def one_pool(profile: str, term: str) -> Scenario:
    usd = {"usd_per_gpu": 11500} if term == "owned" else {"usd_per_gpu_hour": 0.9}
    price: dict[str, Any] = {"term": term, **usd}
    pool: dict[str, Any] = {"gpu": "L40S", "gpus_per_machine": 1, "site": "home", "price": price}
    if term == "owned":
        pool |= {"count": 6, "have": True}
    return Scenario.model_validate(
        {
            "name": "one",
            "horizon": {"start": "2027-03-01", "days": 2, "timezone": "America/Los_Angeles"},
            "sites": {
                "home": {
                    "timezone": "America/Los_Angeles", "pue": 1.3, "carbon_g_per_kwh": 200,
                    "tariff": {"usd_per_kwh": 0.15, "demand_usd_per_kw": 10},
                    "overheads": {"staff_fte": 0.1},
                }
            },
            "pools": {"pool": pool},
            "workloads": {
                "chat": {
                    "kind": "serving", "model": "meta-llama/Llama-3.1-8B-Instruct", "requests_per_day": 2_000_000,
                    "input_tokens": 500, "output_tokens": 200, "cached_fraction": 0.3, "profile": profile,
                }
            },
        }
    )  # fmt: skip


def by_phase(table: pa.Table, meter: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in table.to_pylist():
        if row["meter"] == meter:
            total[row["phase"]] = total.get(row["phase"], 0.0) + float(row["quantity"])
    return total


@pytest.mark.parametrize("term", ["owned", "on_demand"])
def test_one_workload_on_one_pool_is_split_as_compare_splits_it(term: str) -> None:
    scenario = one_pool("flat", term)
    market = Market(scenario)
    option = evaluate(market, "chat", "pool")
    found = plan(scenario, gap=0.0, time_limit_s=60)
    assert option.machines is not None
    assert (found.schedule.units == option.machines.replicas).all()
    told, planned = usage(market, option), found.usage_rows()
    for meter in (
        "gpu_hours",
        "site_hours",
        "input_tokens",
        "cached_input_tokens",
        "output_tokens",
        "requests",
    ):
        assert by_phase(planned, meter) == pytest.approx(by_phase(told, meter), rel=1e-5), meter
    # Power follows the load of the replicas, as compare has it, and is split alike.
    for meter in ("energy_kwh", "it_energy_kwh", "gpu_energy_kwh", "gco2e"):
        kwh, curve = by_phase(planned, meter), by_phase(told, meter)
        for phases in (kwh, curve):  # compare keeps a pool's other GPUs on, a plan turns them off
            phases.pop("idle", None)
        assert kwh == pytest.approx(curve, rel=1e-5), meter
    assert found.cost_usd == pytest.approx(found.objective, rel=1e-6)


def test_the_split_moves_no_dollar_and_conserves_what_was_held() -> None:
    scenario = one_pool("office", "on_demand")
    found = plan(scenario, gap=0.0, time_limit_s=60)
    i, s = found.instance, found.schedule
    assert found.cost_usd == pytest.approx(found.objective, rel=1e-6)
    gpus, kwh = np.zeros(len(i.hours)), np.zeros(len(i.hours))
    busy = np.zeros(len(i.hours))
    for e in found.usage():
        assert (e.quantity >= -1e-9).all()
        if e.meter == "gpu_hours":
            gpus += e.quantity
            busy += e.quantity if e.tenant != IDLE else 0.0
        if e.meter == "energy_kwh":
            kwh += e.quantity
    assert gpus == pytest.approx(s.machines[0])
    assert kwh == pytest.approx(s.kwh.sum(axis=0))
    # More of the time has a request in flight than of the capacity is in use.
    assert (busy >= s.load.sum(axis=0) - 1e-9).all()


def test_a_power_cap_holds_by_the_curve() -> None:
    """The program's line lies below what replicas at part load draw: a cap between the two is kept all the same."""
    scenario = one_pool("office", "owned")
    api = {"price": {"term": "api", "input_usd_per_mtok": 0.5, "output_usd_per_mtok": 2}}
    document = scenario.model_dump(mode="json")
    document["pools"]["api"] = api
    free = plan(Scenario.model_validate(document), gap=0.01, time_limit_s=60)
    cap_kw = 0.93 * float(free.schedule.site_kw.max())
    document["sites"]["home"]["power_cap_kw"] = cap_kw
    found = plan(Scenario.model_validate(document), gap=0.01, time_limit_s=60)
    assert (found.schedule.site_kw <= cap_kw * (1 + 1e-6)).all()
    assert found.cost_usd >= free.cost_usd * (1 - 0.01)


def test_a_line_over_a_curve_lies_over_it() -> None:
    load = np.array([0.0, 0.2, 0.5, 1.0])
    kw = np.array([0.0, 0.3, 0.5, 0.6])
    at = np.linspace(0.01, 1.0, 25)
    rest, slope = tangent(load, kw, at)
    each = np.linspace(0.0, 1.0, 51)
    assert (rest[:, None] + slope[:, None] * each >= np.interp(each, load, kw) - 1e-12).all()
    assert rest + slope * at == pytest.approx(np.interp(at, load, kw))
