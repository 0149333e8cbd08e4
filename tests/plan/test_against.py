"""What a plan is held against: rivals keep its limits as billed, and it is never dearer than any of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pertoken.plan._against import Alternative
from pertoken.plan._duals import prices_of
from pertoken.plan._instance import Floats
from pertoken.plan._outcome import derived
from pertoken.plan.schedule import Plan, held_against, plan
from pertoken.scenario import Scenario, load

EXAMPLES = Path(__file__).parents[2] / "examples"


def capped(cap_kw: float | None = None, **changes: object) -> Scenario:
    """Owned L40S under a power cap, which replicas at part load pass and a straight line does not; H100 to rent."""
    overheads = dict.fromkeys(
        ("staff_fte", "hosting_usd_per_month", "network_usd_per_month", "storage_usd_per_month",
         "egress_usd_per_gb"), 0,
    )  # fmt: skip
    here = {"timezone": "America/Los_Angeles", "overheads": overheads}
    bought = {
        "term": "owned",
        "usd_per_gpu": 11500,
        "life_years": 4,
        "wacc_fraction": 0.09,
        "residual_fraction": 0.1,
    }
    pool = {"gpus_per_machine": 1, "overheads": {"software_usd_per_gpu_year": 0}}
    rented = {"term": "on_demand", "usd_per_gpu_hour": 2.95}
    return Scenario.model_validate(
        {
            "name": "cap",
            "horizon": {"start": "2027-02-01", "days": 2, "timezone": "America/Los_Angeles"},
            "sites": {
                "w": here | {"power_cap_kw": cap_kw, "tariff": {"usd_per_kwh": 0.3}, "pue": 1.3}
                | {"carbon_g_per_kwh": 210},
                "c": here | {"tariff": {"usd_per_kwh": 0.1}, "pue": 1.1, "carbon_g_per_kwh": 100},
            },
            "pools": {
                "own": pool | {"gpu": "L40S", "count": 8, "have": True, "site": "w", "price": bought},
                "rent": pool | {"gpu": "H100-SXM", "site": "c", "price": rented},
            },
            "workloads": {
                "a": {
                    "kind": "serving",
                    "model": "meta-llama/Llama-3.1-8B-Instruct",
                    "requests_per_day": 1_000_000,
                    "input_tokens": 1000,
                    "output_tokens": 200,
                    "profile": "office",
                    "slo": {"ttft_s": 2.0, "tpot_s": 0.1},
                    "headroom_fraction": 0.1,
                }
            },
        }
        | changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def free() -> Plan:
    return plan(capped(), gap=0.01, time_limit_s=60)


def tight_kw(free: Plan) -> float:
    """A cap on what the free plan draws that its program's straight line keeps and its power curve does not."""
    i, s = free.instance, free.schedule
    line: Floats = s.kwh[0] - s.kwh[0]
    for f in np.flatnonzero(i.flow_pool == 0):
        line = line + i.line_kw()[f] * s.load[f] * i.pue[0]
    line = (
        line + (i.machine_kw[0] - i.off_kw[0]) * i.pue[0] * s.machines[0] + i.off_kw[0] * i.pue[0] * s.held[0]
    )
    peak = int(np.argmax(s.site_kw[0]))
    assert line[peak] < s.site_kw[0, peak]
    return float((line.max() + s.site_kw[0].max()) / 2)


def _never_dearer(found: Plan, rivals: list[Alternative]) -> None:
    assert rivals
    for rival in rivals:
        if rival.cost_usd is not None:
            assert rival.cost_usd >= found.cost_usd * (1 - 1e-9), rival.name


def test_rivals_keep_the_power_cap_at_the_power_of_part_load(free: Plan) -> None:
    cap = tight_kw(free)
    found = plan(capped(cap), gap=0.01, time_limit_s=60)
    assert found.cost_usd > free.cost_usd
    assert (found.schedule.site_kw[0] <= cap * (1 + 1e-6)).all()
    held, rivals = held_against(found, time_limit_s=60)
    _never_dearer(held, rivals)
    single = rivals[0]
    # Owned machines alone pass the cap: that is no single option, and the note says why.
    assert single.name == "best single option (rent)"
    assert "own: " in single.note
    assert (held.schedule.site_kw[0] <= cap * (1 + 1e-6)).all()
    assert prices_of(found).usd_per_kw["w"] > 0


def test_a_rival_that_cannot_keep_a_limit_says_which(free: Plan) -> None:
    alone = capped().workloads["a"].model_dump(mode="json") | {"pools": ["own"]}
    found = plan(capped(workloads={"a": alone}), gap=0.01, time_limit_s=60)
    cap = np.where(np.arange(2)[:, None] == 0, tight_kw(free), np.inf) * np.ones(len(found.instance.hours))
    short = replace(found, instance=replace(found.instance, site_cap_kw=cap))
    _, rivals = held_against(short, time_limit_s=30)
    assert rivals[0].cost_usd is None
    assert "power cap" in rivals[0].note
    assert "rent: a cannot run there" in rivals[0].note


def test_rivals_keep_the_carbon_budget(free: Plan) -> None:
    kg = free.carbon_kg * 0.95
    found = plan(capped(), budget_kgco2e=kg, gap=0.01, time_limit_s=60)
    assert found.carbon_kg <= kg * (1 + 1e-6)
    held, rivals = held_against(found, time_limit_s=60)
    assert held.carbon_kg <= kg * (1 + 1e-6)
    _never_dearer(held, rivals)
    assert rivals[0].name == "best single option (rent)"


@pytest.mark.parametrize("name", ["amd", "mixed"])
def test_a_plan_is_never_dearer_than_its_rivals(name: str) -> None:
    found = plan(load(EXAMPLES / f"{name}.yaml"), gap=0.01, time_limit_s=15)
    held, rivals = held_against(found, time_limit_s=15)
    _never_dearer(held, rivals)
    assert held.cost_usd <= found.cost_usd
    assert held.bound == found.bound
    assert held.objective == pytest.approx(held.cost_usd, rel=1e-12)


def test_a_cheaper_rival_is_taken_for_the_plan(free: Plan) -> None:
    """The rented machines alone, given as the plan: owned ones are there and paid for, so they are cheaper."""
    alone = capped().workloads["a"].model_dump(mode="json") | {"pools": ["rent"]}
    dear = plan(capped(workloads={"a": alone}), gap=0.01, time_limit_s=60).schedule
    i = free.instance
    load_, units = np.zeros_like(free.schedule.load), np.zeros_like(free.schedule.units)
    load_[i.flow_pool == 1], units[i.unit_pool == 1] = dear.load, dear.units
    worse = replace(free, schedule=derived(i, dear.machines, dear.held, units, load_, free.schedule.backlog))
    worse = replace(worse, objective=worse.cost_usd)
    assert worse.cost_usd > free.cost_usd
    held, rivals = held_against(worse, time_limit_s=60)
    assert held.cost_usd == pytest.approx(free.cost_usd, rel=0.02)
    assert held.cost_usd == min(r.cost_usd for r in rivals if r.cost_usd is not None)
    assert held.bound == worse.bound
    assert any("the schedule is that of 'best single option (own)'" in note for note in held.notes)
    carbon = replace(worse, objective_name="carbon")
    assert held_against(carbon, time_limit_s=60)[0] is carbon


def test_why_there_is_no_cost() -> None:
    assert Alternative("a", None, limit="power cap").why == "cannot keep the power cap"
    assert Alternative("a", None, cut=True).why == "not found in time"
    assert Alternative("a", None).why == "cannot be done"
    assert not Alternative("a", 1.0).why
