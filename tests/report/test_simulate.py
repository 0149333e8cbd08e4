"""The report of a simulation: fits a terminal, is plain JSON, and its figures are valid Vega-Lite."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import vl_convert
from rich.console import Console

from pertoken.perf.point import StepTimes
from pertoken.perf.simulate import (
    Engine,
    Found,
    ReplicaGroup,
    Simulation,
    Slo,
    Traffic,
    find_replicas,
    simulate,
)
from pertoken.report.simulate import simulate_report


def step_times() -> StepTimes:
    batch = np.arange(33)
    return StepTimes(
        decode_s=np.where(batch > 0, 0.006 + 4e-5 * batch, 0.0), context_s=6e-9, prefill_s=3e-5,
        prefill_context_s=1e-10, step_s=0.006, kv_capacity_tokens=60_000, idle_power_w=100.0, decode_power_w=450.0,
        prefill_power_w=600.0, gpus=1, basis="assumed",
    )  # fmt: skip


TRAFFIC = Traffic(20 * 86_400.0, 600.0, 1155.0, 211.0, input_most_tokens=14_000, output_most_tokens=1000)
SLO = Slo(ttft_s=0.5, tpot_s=0.03)


@pytest.fixture(scope="module")
def found() -> Found:
    return find_replicas(
        TRAFFIC, ReplicaGroup("a pool with a long name in Sacramento", step_times()), slo=SLO
    )


def printed(result: Simulation, answer: Found | None = None) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(simulate_report(result, answer)[0])
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_table_fits_and_says_the_numbers(found: Found) -> None:
    text = printed(found.simulation, found)
    assert max(map(len, text.splitlines())) <= 100
    assert f"{found.replicas} replicas meet TTFT ≤ 500 ms, TPOT ≤ 30 ms" in text
    assert f"{found.simulation.count('requests'):,}" in text
    assert f"{found.simulation.latency_s('ttft', 0.99)[0] * 1000:,.1f}" in text
    assert "a pool with a long name in Sacramento" in text
    assert "…" not in text


def test_json_is_plain_and_adds_up(found: Found) -> None:
    plain = simulate_report(found.simulation, found)[1]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["replicas"] == found.replicas == round(plain["pools"][0]["replicas"])
    assert plain["gpu_hours"] == pytest.approx(sum(p["gpu_hours"] for p in plain["pools"]))
    assert plain["pools"][0]["utilisation"] == pytest.approx(plain["utilisation"])
    assert plain["counts"]["requests"] == plain["counts"]["arrivals"]
    assert plain["slo_attainment"] >= 0.99


def test_figures_draw(found: Found) -> None:
    figures = simulate_report(found.simulation)[2]
    assert len(figures) == 3
    for figure in figures:
        svg = vl_convert.vegalite_to_svg(
            dict(figure.spec) | ({"width": 600} if "width" in figure.spec else {})
        )
        assert "<path" in svg
        assert figure.caption.endswith(".")


def test_a_run_where_all_are_turned_away() -> None:
    tiny = step_times()
    result = simulate(
        Traffic(86_400.0, 60.0, 90_000.0, 10.0, input_log_sigma=0.0), [ReplicaGroup("p", tiny)], slo=SLO,
        engine=Engine(chunk_tokens=2048),
    )  # fmt: skip
    assert result.count("requests") == 0
    text = printed(result)
    assert "rejected" in text
    assert "nan" not in text
    json.dumps(simulate_report(result)[1], allow_nan=False)
