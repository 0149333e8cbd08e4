"""Plans billed on the power curve and in energy tiers: within their limits, with bounds that hold."""

from __future__ import annotations

from typing import Any

import pytest

from pertoken.errors import InfeasibleError, NoPlanError
from pertoken.plan.schedule import Plan, plan
from pertoken.scenario import Scenario

_NONE = ("hosting_usd_per_month", "network_usd_per_month", "storage_usd_per_month", "egress_usd_per_gb")


def _scenario(
    requests_per_day: float, *, gpus_per_machine: int = 1, cloud_g: float = 100, pools: list[str] | None = None,
    zone: str = "America/Los_Angeles", **warehouse: Any,
) -> Scenario:  # fmt: skip
    """Two days of one workload on eight L40S of one's own, whose site has dear energy, or on rented H100."""
    none: dict[str, Any] = {"staff_fte": 0, **dict.fromkeys(_NONE, 0)}
    site = {"timezone": zone, "overheads": none}
    workload: dict[str, Any] = {
        "kind": "serving", "model": "meta-llama/Llama-3.1-8B-Instruct", "requests_per_day": requests_per_day,
        "input_tokens": 1000, "output_tokens": 200, "profile": "office", "slo": {"ttft_s": 2.0, "tpot_s": 0.1},
        "headroom_fraction": 0.1,
    }  # fmt: skip
    owned = {
        "term": "owned",
        "usd_per_gpu": 11500,
        "life_years": 4,
        "wacc_fraction": 0.09,
        "residual_fraction": 0.1,
    }
    return Scenario.model_validate(
        {
            "name": "rounds",
            "horizon": {"start": "2027-02-01", "days": 2, "timezone": zone},
            "sites": {
                "warehouse": {
                    **site, "tariff": {"usd_per_kwh": 0.3}, "pue": 1.3, "carbon_g_per_kwh": 210, **warehouse,
                },
                "cloud": {**site, "tariff": {"usd_per_kwh": 0.1}, "pue": 1.1, "carbon_g_per_kwh": cloud_g},
            },
            "pools": {
                "own": {
                    "gpu": "L40S", "count": 8, "have": True, "gpus_per_machine": gpus_per_machine, "site": "warehouse",
                    "price": owned, "overheads": {"software_usd_per_gpu_year": 0},
                },
                "rent": {
                    "gpu": "H100-SXM", "gpus_per_machine": 1, "site": "cloud",
                    "price": {"term": "on_demand", "usd_per_gpu_hour": 2.95},
                    "overheads": {"software_usd_per_gpu_year": 0},
                },
            },
            "workloads": {"chat": workload if pools is None else {**workload, "pools": pools}},
        }
    )  # fmt: skip


def _holds(found: Plan) -> None:
    """The bound is none that the plan beats, and the stated gap is their distance."""
    assert found.gap is not None
    sign = -1 if found.objective_name == "tokens" else 1
    assert sign * (found.objective - found.bound) >= -1e-6 * abs(found.objective)
    assert found.gap == pytest.approx(max(sign * (found.objective - found.bound), 0) / found.objective)
    assert (found.status == "optimal") == (found.gap <= 0.01 * (1 + 1e-6) + 1e-6)


def test_energy_tiers_prove_nothing_that_a_plan_beats() -> None:
    """The money of a plan buys at least its tokens, and the bound is above both."""
    scenario = _scenario(4e5, tariff="Hartselle GSA-2", zone="America/Chicago")
    cheapest = plan(scenario)
    _holds(cheapest)
    most = plan(scenario, "tokens", budget_usd=cheapest.cost_usd * (1 + 1e-6))
    assert most.scale >= 1 - 1e-6
    assert most.cost_usd <= cheapest.cost_usd * (1 + 1e-5)
    _holds(most)


def test_the_budget_of_a_plan_has_a_plan() -> None:
    """Least gas for what the cheapest plan costs is no more than that plan's."""
    scenario = _scenario(4e6, gpus_per_machine=2)
    cheapest = plan(scenario)
    least = plan(scenario, "carbon", budget_usd=cheapest.cost_usd * (1 + 1e-5))
    assert least.cost_usd <= cheapest.cost_usd * (1 + 2e-5)
    assert least.carbon_kg <= cheapest.carbon_kg * (1 + 1e-6)
    _holds(least)


def test_least_carbon_is_no_more_than_that_of_least_cost() -> None:
    scenario = _scenario(2e6, cloud_g=600)
    least = plan(scenario, "carbon")
    assert least.carbon_kg <= plan(scenario).carbon_kg * (1 + 1e-6)
    _holds(least)


def test_a_plan_within_a_power_cap_is_sought_beyond_the_first() -> None:
    """Of a cap that binds, the first plan within it cost 258 USD, where 254 can be had."""
    found = plan(_scenario(2e6, power_cap_kw=4.0))
    assert (found.schedule.site_kw <= found.instance.site_cap_kw + 1e-6).all()
    assert found.cost_usd <= 254.5
    _holds(found)


@pytest.mark.parametrize(
    ("limits", "missing", "unit"),
    [({"power_cap_kw": 3.273}, 0.031, "kW"), ({}, 3.78, "USD")],
    ids=["cap", "budget"],
)
def test_what_is_missing_is_said_to_be_at_least_that(
    limits: dict[str, Any], missing: float, unit: str
) -> None:
    """Too little is proven on the line below the power curve; a little more than that is only not found."""

    def found(more: float) -> Plan:
        now = {name: kw + more for name, kw in limits.items()}
        scenario = _scenario(1e6, pools=["own"], **now)
        return plan(scenario) if limits else plan(scenario, budget_usd=164.86 + more)

    with pytest.raises(InfeasibleError, match=rf"at least .* {unit} missing.* raise the .* by at least"):
        found(0.0)
    with pytest.raises(NoPlanError, match=rf"{unit}.* is not proven"):
        found(1.02 * missing)
