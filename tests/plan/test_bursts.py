"""A percentile SLO or a trace is planned with what bursts ask for, not with averages."""

from __future__ import annotations

from pathlib import Path

import pytest

from pertoken.plan._from_scenario import instance_from_scenario
from pertoken.plan.options import Market, evaluate
from pertoken.scenario import Scenario, Serving, Slo, Tokens, load, requests_per_hour
from pertoken.units import SECONDS_PER_HOUR

MIDDAY = Path(__file__).parents[2] / "examples" / "midday.yaml"


def bursty(percentile: float) -> Scenario:
    scenario = load(MIDDAY)
    assistant = scenario.workloads["assistant"].model_copy(
        update={
            "slo": Slo(ttft_s=1.0, tpot_s=0.05, percentile=percentile),
            "output_tokens": Tokens(mean=250.0, cv=1.0),
            "input_tokens": Tokens(mean=1200.0, cv=1.0),
            "pools": ["h100-rented"],
            "requests_per_day": 1_500_000.0,
        }
    )
    return scenario.model_copy(update={"workloads": {"assistant": assistant}})


def test_the_planner_reserves_what_the_simulation_of_the_busiest_day_needs() -> None:
    scenario = bursty(99.0)
    option = evaluate(Market(scenario), "assistant", "h100-rented")
    assert option.operation is not None
    assert option.machines is not None
    made, _ = instance_from_scenario(scenario)
    workload = scenario.workloads["assistant"]
    assert isinstance(workload, Serving)
    peak = float(requests_per_hour(scenario, workload).max())
    by_size = {g: k for k, g in enumerate(made.unit_gpus)}
    flows = made.flow_unit == by_size[float(option.operation.candidate.layout.gpus)]
    # Replicas for the busiest hour: load over capacity, times the reserve.
    replicas = peak / (option.operation.requests_per_s * SECONDS_PER_HOUR) * made.flow_reserve[flows][0]
    assert replicas == pytest.approx(option.machines.replicas, rel=0.02)


def test_averages_reserve_the_headroom() -> None:
    made, _ = instance_from_scenario(bursty(50.0))
    assert made.flow_reserve.tolist() == pytest.approx([1 / (1 - 0.2)] * len(made.flow_reserve))
