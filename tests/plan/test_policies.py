"""What a plan keeps to: fewest replicas, on premises first, ratchets and falling tiers of demand charges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pertoken.errors import InfeasibleError, ScenarioError
from pertoken.ledger import open_ledger
from pertoken.plan._instance import Instance, Peak
from pertoken.plan.options import Market
from pertoken.plan.schedule import Plan, plan, savings
from pertoken.rates.energy import billed_peaks_kw
from pertoken.scenario import Scenario, load

Make = Callable[..., Instance]


def serving(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "serving",
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "requests_per_day": 2_500_000,
        "input_tokens": 500,
        "output_tokens": 200,
        "profile": "office",
    } | changes


def scenario(**changes: Any) -> Scenario:
    """Two days of an assistant: L40S on premises, rented ones, an API."""
    document: dict[str, Any] = {
        "name": "policy",
        "horizon": {"start": "2027-03-01", "days": 2, "timezone": "America/Los_Angeles"},
        "sites": {
            "home": {"timezone": "America/Los_Angeles", "pue": 1.3, "tariff": {"usd_per_kwh": 0.15}},
            "cloud": {"timezone": "America/Los_Angeles", "pue": 1.2},
        },
        "pools": {
            "own": {
                "gpu": "L40S", "count": 4, "gpus_per_machine": 1, "have": True, "site": "home",
                "price": {"term": "owned", "usd_per_gpu": 11500},
            },
            "rented": {
                "gpu": "L40S", "count": 12, "gpus_per_machine": 1, "site": "cloud",
                "price": {"term": "on_demand", "usd_per_gpu_hour": 0.9},
            },
            "api": {"price": {"term": "api", "input_usd_per_mtok": 0.001, "output_usd_per_mtok": 0.002}},
        },
        "workloads": {"chat": serving()},
    }  # fmt: skip
    return Scenario.model_validate(document | changes)


def books(found: Plan) -> float:
    ledger = open_ledger()
    ledger.add_rates(found.rate_rows())
    ledger.add_usage(found.usage_rows())
    ledger.close()
    total = float(ledger.cost()["cost_usd"][0].as_py())
    ledger.shut()
    return total


@pytest.mark.parametrize("least", [2, 3])
def test_replicas_that_answer_are_as_many_as_asked(least: int) -> None:
    """An API is cheaper than a machine for few requests and dearer for many: it answers alone by night."""
    pools = scenario().model_dump(mode="json")["pools"]
    del pools["own"]
    pools["api"]["price"] = {"term": "api", "input_usd_per_mtok": 0.01, "output_usd_per_mtok": 0.2}
    few = serving(requests_per_day=800_000)
    one = plan(scenario(pools=pools, workloads={"chat": few}), gap=0.0, time_limit_s=60)
    more = plan(
        scenario(pools=pools, workloads={"chat": few | {"minimum_replicas": least}}), gap=0.0, time_limit_s=60
    )
    assert set(np.unique(one.schedule.units.sum(axis=0))) >= {1.0}
    replicas = more.schedule.units.sum(axis=0)
    assert set(np.unique(replicas)) <= {0.0, float(least), float(least) + 1}
    assert (replicas == 0).any()
    assert (replicas >= least).any()
    by_replicas = more.schedule.load[more.instance.flow_unit >= 0].sum(axis=0)
    assert (by_replicas[replicas == 0] <= 1e-9).all()
    assert more.objective > one.objective
    assert books(more) == pytest.approx(more.objective, rel=1e-6)
    assert not [n for n in more.notes if "minimum_replicas" in n]


def test_without_an_api_they_run_whenever_there_is_work() -> None:
    pools = scenario().model_dump(mode="json")["pools"]
    del pools["api"], pools["own"]
    asked = {"chat": serving(requests_per_day=50_000, minimum_replicas=2)}
    found = plan(scenario(pools=pools, workloads=asked), gap=0.0, time_limit_s=60)
    assert (found.schedule.units.sum(axis=0) == 2).all()
    pools["rented"]["count"] = 1
    with pytest.raises(InfeasibleError, match="add 1 machine to pool 'rented'"):
        plan(scenario(pools=pools, workloads=asked), gap=0.0, time_limit_s=60)


def test_elsewhere_only_where_nothing_fits_on_premises() -> None:
    free = plan(scenario(), gap=0.001, time_limit_s=60)
    first = plan(scenario(policy={"on_prem_first": True}), gap=0.001, time_limit_s=60)
    i, s = first.instance, first.schedule
    on_prem = i.flow_pool == 0
    elsewhere = s.load[~on_prem].sum(axis=0) > 1e-9
    assert elsewhere.any()
    assert not elsewhere.all()
    used = s.units[i.unit_pool == 0] * i.unit_gpus[i.unit_pool == 0][:, None]
    assert (used.sum(axis=0)[elsewhere] == 4).all()
    spare = s.units[i.unit_pool == 0].sum(axis=0) - (s.load * i.flow_reserve[:, None])[on_prem].sum(axis=0)
    lost = (s.loads * i.unit_start_hours[:, None])[i.unit_pool == 0].sum(axis=0)
    assert (spare - lost)[elsewhere] == pytest.approx(np.zeros(int(elsewhere.sum())), abs=1e-6)
    # The API is nearly free: without the policy it takes all.
    assert free.schedule.load[on_prem].sum() < s.load[on_prem].sum()
    assert first.objective >= free.objective * (1 - 0.001)
    assert first.gap is not None
    assert first.gap <= 0.005  # the program's 0.001, and power at part load beyond its line
    assert books(first) == pytest.approx(first.objective, rel=1e-6)
    rivals = {a.name: a.cost_usd for a in savings(first)}
    assert rivals["on premises not first"] == pytest.approx(free.objective, rel=0.03)


def test_a_policy_in_the_way_is_named(make: Make) -> None:
    """One owned machine answers in hours 0 and 1 and rests in hour 2: a job too long for that hour needs a rented
    machine in all three, and may not have it in hour 2."""
    base = make()
    chat_elsewhere = (base.flow_class >= 0) & (base.flow_pool != 0)
    names = ("unit", "pool", "class", "job", "per_hour", "kw", "gpu_kw", "reserve", "loss", "prefill")
    i = make(
        on_prem=np.array([True, False, False]),
        held_least=np.array([1, 0, 0]),
        held_most=np.array([1, 0, 0]),
        unit_whole=np.ones(2, dtype=np.bool_),
        start_hours=np.zeros(3),
        requests=np.array([[900.0, 900.0, 0.0, 0.0], [0.0] * 4]),
        job_tokens=np.array([2.9e6]),
        job_deadline=np.array([3]),
        rented_most=np.array([[0.0], [1.0], [0.0]]) * np.ones(4),
        **{f"flow_{n}": getattr(base, f"flow_{n}")[~chat_elsewhere] for n in names},
    )
    free = plan(replace(i, on_prem=None), gap=0.0)
    assert free.schedule.load[i.flow_pool == 1].sum() == pytest.approx(2.9 / 1.2)
    with pytest.raises(InfeasibleError, match="on_prem_first") as caught:
        plan(i, gap=0.0)
    causes = {c.constraint: c for c in caught.value.causes}  # type: ignore[attr-defined]
    # Two hours of 1.2 M tokens are allowed elsewhere: half a million is missing.
    assert causes["on_prem_first"].missing == pytest.approx(0.5e6, rel=1e-6)
    assert "policy.on_prem_first: false" in str(caught.value)


def test_endless_pools_are_never_full(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    text = (Path(__file__).parents[2] / "examples" / "shop.yaml").read_text()
    path.write_text(
        text.replace("    gpus_per_machine: 2\n", "    gpus_per_machine: 2\n    on_prem: true\n", 1)
    )
    with pytest.raises(ScenarioError, match="on_prem: what is on premises has a count"):
        load(path)


def months(make: Make, **band: Any) -> Instance:
    """Two "months" of four hours: the load of the first is four times that of the second."""
    t = np.arange(8)
    first = Peak(0, ("peak_kw:day",), t < 4, 0)
    second = replace(Peak(0, ("peak_kw:day",), t >= 4, 4), **band)
    return make(
        8,
        requests=np.concatenate([np.full((2, 4), 900.0), np.full((2, 4), 225.0)], axis=1),
        job_tokens=np.zeros(1),
        peaks=(first, second),
    )


def test_a_later_month_pays_for_an_earlier_peak(make: Make) -> None:
    free = plan(months(make), gap=0.0)
    bound = plan(months(make, ratchets=((0, 0.8),)), gap=0.0)
    first, second = bound.schedule.peak_kw
    assert second == pytest.approx(max(0.8 * first, float(bound.schedule.site_kw[0, 4:].max())))
    assert free.schedule.peak_kw[1] < second
    assert bound.objective > free.objective
    assert bound.cost_usd == pytest.approx(bound.objective, rel=1e-6)
    # Knowing of it, the plan draws no more in the first month than one that does not.
    assert first <= free.schedule.peak_kw[0] + 1e-9
    blind = free.cost_usd + 2.0 * (
        max(0.8 * free.schedule.peak_kw[0], free.schedule.peak_kw[1]) - free.schedule.peak_kw[1]
    )
    assert bound.objective <= blind + 1e-9


def test_ratchets_of_a_tariff_are_billed_as_the_utility_bills_them() -> None:
    """Sacramento bills the highest peak of twelve months: training in March is paid for again in April."""
    job = {
        "kind": "training", "model": "Qwen/Qwen3-4B", "tokens": 4e8, "sequence_tokens": 2048, "deadline_days": 5,
        "pools": ["own"],
    }  # fmt: skip
    site = {
        "timezone": "America/Los_Angeles",
        "pue": 1.3,
        "tariff": "SMUD CI-TOD4",
        "fixed_charge_fraction": 0,
    }
    pool = scenario().model_dump(mode="json")["pools"]["own"]
    made = scenario(
        sites={"home": site | {"previous_peaks_kw": {"site": [0.5, 0.4]}}},
        pools={"own": pool},
        workloads={"chat": serving(requests_per_day=200_000), "job": job},
        horizon={"start": "2027-03-26", "days": 12, "timezone": "America/Los_Angeles"},
    )
    found = plan(made, gap=0.02, time_limit_s=60)
    resolved = Market(made).tariff("home")
    assert resolved is not None
    billed = billed_peaks_kw(resolved, found.schedule.site_kw[0], previous_peaks_kw={"site": [0.5, 0.4]})
    assert found.schedule.peak_kw == pytest.approx(billed["site"])
    march, april = found.schedule.peak_kw
    second = found.instance.peaks[1]
    assert march == april > float(found.schedule.site_kw[0][second.hours].max()) * 1.2
    assert books(found) == pytest.approx(found.objective, rel=1e-6)


@pytest.mark.parametrize("billed", [False, True])
def test_falling_tiers_are_filled_in_order(make: Make, billed: bool) -> None:
    """A demand charge of 6 USD up to 0.5 kW and 1 USD beyond: the plan pays the first tier before the second."""
    t = np.arange(4)
    base = make(job_tokens=np.array([1.8e6]))
    charge = (
        replace(base.rates[-1], usd_per_unit=np.full(4, 6.0)),
        replace(base.rates[-1], meter="peak_kw:day:tier2", usd_per_unit=np.full(4, 1.0)),
    )
    peak = Peak(
        0, ("peak_kw:day", "peak_kw:day:tier2"), t >= 0, 0, upper_kw=(0.5, np.inf), ratchet_billed=billed
    )
    i = replace(base, rates=(*base.rates[:-1], *charge), peaks=(peak,))
    found = plan(i, gap=0.0)
    kw = float(found.schedule.peak_kw[0])
    paid = found.by_component()["demand_charge"]
    assert paid == pytest.approx(6.0 * min(kw, 0.5) + 1.0 * max(kw - 0.5, 0.0))
    assert found.cost_usd == pytest.approx(found.objective, rel=1e-6)
    # By hand: the least over plans that stay within the first tier, and plans that pay for all of it.
    within = plan(
        replace(
            i,
            site_cap_kw=np.full((1, 4), 0.5),
            peaks=(replace(peak, meters=peak.meters[:1], upper_kw=(np.inf,)),),
        ),
        gap=0.0,
    )
    beyond = plan(
        replace(i, peaks=(replace(peak, meters=peak.meters[1:], upper_kw=(np.inf,), already_kw=0.5),)),
        gap=0.0,
    )
    assert found.objective == pytest.approx(min(within.objective, beyond.objective + 2.5), rel=1e-6)
