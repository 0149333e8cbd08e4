"""`simulate` on a scenario: traces, replicas found, and a book that adds up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pertoken.errors import InputError
from pertoken.report.replay import Replay, replay

ROOT = Path(__file__).parents[2]
SHOP = ROOT / "examples" / "shop.yaml"
AZURE = ROOT.parent / "shared" / "data" / "traces" / "AzureLLMInferenceTrace_conv.csv"


@pytest.fixture(scope="module")
def day() -> Replay:
    return replay(SHOP, pool="h100-rented", days=1)


def test_a_generated_day_has_the_scenarios_requests(day: Replay) -> None:
    # 150,000 requests on a weekday; Poisson arrivals stay within 1 %.
    assert day.result.count("requests") == pytest.approx(150_000, rel=0.01)
    assert day.result.count("output_tokens") == pytest.approx(150_000 * 250, rel=0.01)


def test_what_compare_calls_busy_is_what_the_simulation_sees(day: Replay) -> None:
    from pertoken.report.compare import compare

    found = compare(SHOP)
    option = next(o for o in found.workloads[1].options if o.facts["pool"] == "h100-rented")
    busy, cost = option.metrics["utilisation"], option.metrics["usd_per_mtok_total"]
    assert busy is not None
    assert cost is not None
    assert day.metrics["utilisation"] == pytest.approx(busy, abs=0.08)
    assert day.metrics["usd_per_mtok_total"] == pytest.approx(cost, rel=0.08)


def test_cost_in_slo_is_no_less_than_cost_of_all_output(day: Replay) -> None:
    assert day.metrics["slo_attainment"] is not None
    assert 0 < day.metrics["slo_attainment"] <= 1
    in_slo, everything = day.metrics["usd_per_mtok_in_slo"], day.usd / day.result.count("output_tokens") * 1e6
    assert in_slo == pytest.approx(
        everything / (day.result.count("output_tokens_in_slo") / day.result.count("output_tokens"))
    )


def test_json_and_page(day: Replay, tmp_path: Path) -> None:
    text = json.dumps(day.to_dict(), allow_nan=False)
    assert json.loads(text)["metrics"]["usd_per_mtok_in_slo"] > 0
    day.to_html(tmp_path / "sim.html")
    assert "request by request" in (tmp_path / "sim.html").read_text(encoding="utf-8")


def test_the_fewest_replicas_for_a_trace_are_found(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    arrivals = np.cumsum(generator.exponential(0.05, 20_000))
    lines = ["arrival_s,input_tokens,output_tokens", *(f"{t:.4f},1200,250" for t in arrivals)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = replay(SHOP, pool="h100-rented", trace=trace, find=True)
    assert found.found is not None
    assert found.found.replicas > 1
    assert found.result.attainment >= 0.5
    fewer = replay(SHOP, pool="h100-rented", trace=trace, replicas=found.found.replicas - 1)
    assert fewer.result.attainment < 0.5


@pytest.mark.skipif(not AZURE.exists(), reason="../shared/data/traces is absent")
def test_the_azure_trace_is_replayed_whole() -> None:
    found = replay(SHOP, pool="h100-rented", trace=AZURE, replicas=2)
    assert found.result.count("requests") == 19_366
    assert found.result.count("output_tokens") > 4_000_000


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"workload": "assistent"}, "no serving workload 'assistent' in scenario 'shop': there is assistant"),
        ({"workload": "recommender"}, "no serving workload 'recommender'"),
        ({"pool": "h100-ownd"}, "no GPU pool 'h100-ownd' that may run 'assistant': there is h100-owned"),
        ({"pool": "groq-api"}, "no GPU pool 'groq-api'"),
        ({"replicas": -1}, "--replicas -1"),
    ],
)
def test_wrong_names_get_one_line(wrong: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected.replace("(", r"\(")) as caught:
        replay(SHOP, **wrong)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_bad_trace_names_its_line(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n1,10,10\n0.5,10,10\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"trace\.csv:3|line 3"):
        replay(SHOP, pool="h100-rented", trace=trace)
