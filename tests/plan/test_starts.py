"""What a start costs is in the plan and in the books, and a plan that pays for starts starts less often."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pertoken.ledger import open_ledger
from pertoken.plan.schedule import Plan, plan
from pertoken.scenario import Scenario


def day_and_night(startup_usd: float, **pool: Any) -> Scenario:
    rented = {
        "gpu": "L40S",
        "gpus_per_machine": 1,
        "site": "cloud",
        "startup_usd": startup_usd,
        "price": {"term": "on_demand", "usd_per_gpu_hour": 0.9},
    }
    return Scenario.model_validate(
        {
            "name": "starts",
            "horizon": {"start": "2027-03-01", "days": 3, "timezone": "Europe/Berlin"},
            "sites": {"cloud": {"timezone": "Europe/Berlin", "pue": 1.2, "tariff": {"usd_per_kwh": 2.5}}},
            "pools": {"rented": rented | pool},
            "workloads": {
                "chat": {
                    "kind": "serving",
                    "model": "meta-llama/Llama-3.1-8B-Instruct",
                    "requests_per_day": 400000,
                    "input_tokens": 500,
                    "output_tokens": 200,
                    "profile": "office",
                }
            },
        }
    )


def closed(found: Plan) -> dict[str, float]:
    """What the ledger makes of the plan's rows, by component."""
    ledger = open_ledger()
    ledger.add_rates(found.rate_rows())
    ledger.add_usage(found.usage_rows())
    ledger.close()
    rows = ledger.cost("component").to_pylist()
    ledger.shut()
    return {row["component"]: float(row["cost_usd"]) for row in rows}


def test_starts_are_paid_alike_in_plan_and_ledger() -> None:
    found = plan(day_and_night(7.0), gap=0.0, time_limit_s=60)
    starts = float(found.schedule.starts.sum())
    assert starts > 0
    rows = [row for row in found.usage_rows().to_pylist() if row["meter"] == "starts"]
    assert sum(float(row["quantity"]) for row in rows) == starts
    assert {row["phase"] for row in rows} == {"waste"}
    paid = closed(found)
    assert sum(paid.values()) == pytest.approx(found.objective, rel=1e-6)
    hours = float(found.schedule.rented.sum())
    assert paid["rent"] == pytest.approx(0.9 * hours + 7.0 * starts, rel=1e-6)
    assert not [note for note in found.notes if "startup_usd" in note]


def test_dear_starts_are_fewer_and_the_plan_is_dearer() -> None:
    free, dear = (plan(day_and_night(usd), gap=0.0, time_limit_s=60) for usd in (0.0, 20.0))
    assert dear.schedule.starts.sum() < free.schedule.starts.sum()
    assert dear.objective > free.objective
    # Not dearer than the free plan with its starts paid for.
    assert dear.objective <= free.objective + 20.0 * free.schedule.starts.sum() + 1e-6


def test_a_start_of_owned_machines_is_capital() -> None:
    scenario = day_and_night(0.3, count=4, price={"term": "owned", "usd_per_gpu": 11500}, have=True)
    found = plan(scenario, gap=0.0, time_limit_s=60)
    starts = float(found.schedule.starts.sum())
    assert starts > 0
    usd = found.instance.price("rented", "starts")
    assert usd == pytest.approx(np.full(72, 0.3))
    paid = closed(found)
    assert sum(paid.values()) == pytest.approx(found.objective, rel=1e-6)
    capital = found.instance.price("rented", "gpu_hours").sum() * 4
    assert paid["capital"] == pytest.approx(capital + 0.3 * starts, rel=1e-6)
