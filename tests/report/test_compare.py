"""`compare`: every figure is read from the books, and the books keep their promises."""

from __future__ import annotations

import csv
import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pertoken
from pertoken.plan.options import Market, Option, evaluate, options
from pertoken.report.compare import Comparison, compare
from pertoken.scenario import Scenario, Serving, load
from pertoken.units import CATEGORIES, COMPONENTS, PHASES

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOP = EXAMPLES / "shop.yaml"


@pytest.fixture(scope="module")
def shop() -> Comparison:
    return compare(SHOP, sensitivity=True, extra_tokens=0.5)


def flat(scenario: Scenario, **changes: Any) -> Scenario:
    """The scenario with its assistant changed, on any pool."""
    assistant = scenario.workloads["assistant"].model_copy(update={"pools": [], **changes})
    return scenario.model_copy(update={"workloads": {"assistant": assistant}})


def test_categories_phases_and_components_sum_to_the_month(shop: Comparison) -> None:
    checked = 0
    for workload in shop.workloads:
        for option in workload.options:
            if option.refused:
                continue
            assert option.usd_per_month is not None
            for parts in (
                option.usd_per_month_by_category,
                option.usd_per_month_by_component,
                option.usd_per_month_by_phase,
            ):
                assert sum(parts.values()) == pytest.approx(option.usd_per_month, abs=0.005)
            checked += 1
    assert checked >= 10


def test_the_books_sum_to_the_cent(shop: Comparison) -> None:
    total = shop.ledger.cost("book").to_pylist()
    for row in total:
        parts = shop.ledger.cost("phase", "component", where={"book": row["book"]}).to_pylist()
        assert sum((p["cost_usd"] for p in parts), Decimal(0)) == row["cost_usd"]


def test_input_output_idle_and_waste_are_the_total_per_token(shop: Comparison) -> None:
    assistant = shop.workloads[1]
    for option in assistant.options:
        if option.refused:
            continue
        m = option.metrics
        row = {
            r["meter"]: float(r["quantity"])
            for r in shop.ledger.usage("meter", where={"book": option.facts["book"]}).to_pylist()
        }
        prompt = row["input_tokens"] + row["cached_input_tokens"]
        whole = (m["usd_per_mtok_total"] or 0) * (prompt + row["output_tokens"])
        spread = (m["usd_per_mtok_input_with_idle"] or 0) * prompt
        spread += (m["usd_per_mtok_output_with_idle"] or 0) * row["output_tokens"]
        assert spread == pytest.approx(whole, rel=1e-9)


def test_gpu_hours_are_conserved(shop: Comparison) -> None:
    hours = len(shop.scenario.hours)
    for option in shop.workloads[1].options:
        if option.refused or not option.facts["gpu"]:
            continue
        held = shop.ledger.usage("meter", where={"book": option.facts["book"]}).to_pylist()
        gpu_hours = next(float(r["quantity"]) for r in held if r["meter"] == "gpu_hours")
        assert gpu_hours == pytest.approx(option.facts["paid_gpus"] * hours, abs=1e-3)


def test_kwh_are_conserved_across_boundaries(shop: Comparison) -> None:
    for option in shop.workloads[1].options:
        if option.refused or not option.facts["gpu"]:
            continue
        held = {
            r["meter"]: float(r["quantity"])
            for r in shop.ledger.usage("meter", where={"book": option.facts["book"]}).to_pylist()
        }
        pue = shop.scenario.sites[option.facts["site"]].pue
        assert held["energy_kwh"] == pytest.approx(held["it_energy_kwh"] * pue, rel=1e-6)
        assert held["gpu_energy_kwh"] < held["it_energy_kwh"]


def test_quantity_times_rate_is_what_the_ledger_says(shop: Comparison) -> None:
    market = Market(shop.scenario)
    checked = 0
    for option in options(market):
        if option.refused:
            continue
        ledger = shop.ledger.cost(where={"book": option.book}).to_pylist()[0]["cost_usd"]
        assert market.cost_usd(option) == pytest.approx(float(ledger), rel=1e-6)
        checked += 1
    assert checked >= 10


def test_usage_without_a_rate_is_refused_by_the_books(shop: Comparison) -> None:
    from pertoken.errors import MissingRateError
    from pertoken.ledger import open_ledger
    from pertoken.plan.options import usage

    market = Market(shop.scenario)
    ledger = open_ledger()
    ledger.add_usage(usage(market, evaluate(market, "assistant", "h100-owned")))
    ledger.add_rates(market.pool_rates("h100-owned"))
    with pytest.raises(MissingRateError, match=r"peak_kw|site_hours"):
        ledger.close()
    ledger.add_rates(market.site_rates("warehouse"))
    ledger.close()
    ledger.shut()


def test_an_option_that_cannot_says_why(shop: Comparison) -> None:
    refused = {o.facts["pool"]: o.refused for o in shop.workloads[0].options if o.refused}
    assert refused["groq-api"] == "an API serves tokens, it trains nothing"


def test_the_api_costs_its_price_list(shop: Comparison) -> None:
    api = next(o for o in shop.workloads[1].options if o.facts["pool"] == "together-api")
    # 0.88 USD per M tokens, input, cached input and output alike (genai-prices).
    assert api.metrics["usd_per_mtok_total"] == pytest.approx(0.88, rel=1e-6)
    assert api.metrics["joule_per_token_output"] is None


def test_break_even_is_where_costs_cross(shop: Comparison) -> None:
    workload = shop.workloads[1]
    found = {o.facts["pool"]: o for o in workload.options}
    point = next(b for b in found["h100-owned"].break_even if b.other == "groq-api")
    assert np.isfinite(point.tokens_per_month)
    market = Market(shop.scenario)
    scale = point.tokens_per_month / workload.tokens_per_month
    own = market.cost_usd(evaluate(market, "assistant", "h100-owned", scale=scale))
    api = market.cost_usd(evaluate(market, "assistant", "groq-api", scale=scale))
    assert own == pytest.approx(api, rel=0.02)


def test_sensitivity_has_the_widest_first_and_every_option_something(shop: Comparison) -> None:
    for workload in shop.workloads:
        for option in workload.options:
            if option.refused:
                continue
            swings = workload.sensitivity[option.facts["pool"]]
            assert swings
            widths = [abs(s.high_usd_per_mtok - s.low_usd_per_mtok) for s in swings]
            assert widths == sorted(widths, reverse=True)
    owned = {s.parameter: s for s in shop.workloads[1].sensitivity["h100-owned"]}
    assert {"capital price", "life", "WACC", "PUE", "power price", "staff"} <= set(owned)
    assert owned["capital price"].low_usd_per_mtok < owned["capital price"].high_usd_per_mtok
    assert owned["life"].low_usd_per_mtok > owned["life"].high_usd_per_mtok
    api = {s.parameter: s for s in shop.workloads[1].sensitivity["together-api"]}
    assert api["GPU or token price"].high_usd_per_mtok == pytest.approx(0.88 * 1.2, rel=1e-6)


def test_extra_tokens_cost_their_marginal_price(shop: Comparison) -> None:
    for pool, extra in shop.workloads[1].extra_tokens:
        if extra.refused:
            continue
        option = next(o for o in shop.workloads[1].options if o.facts["pool"] == pool)
        average = (option.headline + extra.marginal_usd_per_mtok * 0.5) / 1.5
        assert extra.average_usd_per_mtok == pytest.approx(average, rel=1e-6)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(factor=st.floats(1.0, 4.0), scale=st.floats(0.05, 2.0))
def test_more_throughput_never_costs_more(factor: float, scale: float) -> None:
    market = Market(load(SHOP))
    for pool in ("h100-rented", "h100-owned", "h100-spot", "b200-reserved"):
        for workload in ("assistant", "recommender"):
            slow = evaluate(market, workload, pool, scale=scale)
            fast = evaluate(market, workload, pool, scale=scale, factor=factor)
            if slow.refused:
                continue
            assert not fast.refused
            assert market.cost_usd(fast) <= market.cost_usd(slow) * (1 + 1e-9)


@settings(max_examples=15)
@given(
    requests_per_day=st.floats(10, 400_000),
    prompt=st.floats(10, 6000),
    output=st.floats(2, 1500),
    cached=st.floats(0, 0.95),
    headroom=st.floats(0, 0.6),
)
def test_any_workload_conserves_hours_tokens_and_money(
    requests_per_day: float, prompt: float, output: float, cached: float, headroom: float
) -> None:
    scenario = flat(
        load(SHOP),
        requests_per_day=requests_per_day,
        input_tokens=prompt,
        output_tokens=output,
        cached_fraction=cached,
        headroom_fraction=headroom,
        slo=None,
    )
    market = Market(scenario)
    for pool in ("h100-spot", "h100-owned", "h100-colocated"):
        option = evaluate(market, "assistant", pool)
        if option.refused:
            assert "needs" in option.refused
            continue
        total = sum_of(option, "gpu_hours")
        assert option.machines is not None
        assert total == pytest.approx(option.machines.paid_gpus * len(market.hours), rel=1e-9)
        assert sum_of(option, "energy_kwh") == pytest.approx(
            sum_of(option, "it_energy_kwh") * scenario.sites[scenario.pools[pool].site].pue
        )
        assert all((q >= 0).all() for use in option.uses for q in use.quantities.values())


def sum_of(option: Option, meter: str) -> float:
    return float(
        sum(q.sum() for use in option.uses for (_, name), q in use.quantities.items() if name == meter)
    )


def test_json_csv_html_and_png_are_written(shop: Comparison, tmp_path: Path) -> None:
    text = json.dumps(shop.to_dict(), allow_nan=False)
    assert json.loads(text)["workloads"]["assistant"]["options"][0]["usd_per_month"] > 0
    shop.to_csv(tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    for row in (row for row in rows if row["usd_per_month"]):
        for parts in (CATEGORIES, [f"phase_{p}" for p in PHASES], [f"component_{c}" for c in COMPONENTS]):
            each = [float(row[f"usd_per_month_{part}"]) for part in parts]
            assert sum(each) == pytest.approx(float(row["usd_per_month"]), abs=0.005)
    shop.to_html(tmp_path / "deep" / "s.html")
    page = (tmp_path / "deep" / "s.html").read_text(encoding="utf-8")
    assert "h100-owned" in page
    assert "SMUD CI-TOD1" in page
    assert not list((tmp_path / "deep").glob(".*part"))
    shop.to_png(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_fits_a_hundred_columns(shop: Comparison) -> None:
    lines = str(shop).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert not any("…" in line for line in lines)
    assert "h100-colocated" in str(shop)


def test_the_python_way_gives_arrow_tables() -> None:
    found = pertoken.compare(SHOP)
    assert "usd_per_mtok_total" in found.table.column_names
    assert set(found.usage.column_names) >= {"book", "phase", "meter", "quantity"}
    assert found.rates.num_rows > 0
    assert "assistant" in repr(found)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_has_an_option_for_every_workload(path: Path) -> None:
    found = compare(path)
    for workload in found.workloads:
        assert any(not o.refused for o in workload.options), workload.name


def test_a_workload_nobody_can_serve_is_an_answer_with_numbers() -> None:
    from pertoken.scenario import Slo

    scenario = flat(load(SHOP), slo=Slo(ttft_s=0.001, tpot_s=0.0001))
    found = compare(scenario)
    options = {o.facts["pool"]: o for o in found.workloads[0].options}
    assert "ms" in options["h100-owned"].refused or " s" in options["h100-owned"].refused
    assert options["groq-api"].refused == ""


def test_a_model_too_large_for_the_pool_says_by_how_much() -> None:
    scenario = flat(load(SHOP), model="deepseek-ai/DeepSeek-V3", slo=None)
    found = compare(scenario)
    options = {o.facts["pool"]: o for o in found.workloads[0].options}
    assert "GiB" in options["l40s-owned"].refused or "GB" in options["l40s-owned"].refused


def test_a_workload_may_be_kept_to_pools(tmp_path: Path) -> None:
    scenario = flat(load(SHOP), pools=["h100-owned", "groq-api"])
    found = compare(scenario)
    assert {o.facts["pool"] for o in found.workloads[0].options} == {"h100-owned", "groq-api"}
    assert isinstance(scenario.workloads["assistant"], Serving)


def test_a_model_from_a_config_file_and_a_tariff_from_a_series(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 32000, "torch_dtype": "bfloat16",
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    hours = np.arange("2027-02-01T00", "2027-03-03T00", dtype="datetime64[h]")
    lines = ["hour_utc,usd_per_kwh", *(f"{h}:00Z,{0.05 + 0.01 * (i % 24)}" for i, h in enumerate(hours))]
    (tmp_path / "prices.csv").write_text("\n".join(lines), encoding="utf-8")
    text = SHOP.read_text(encoding="utf-8")
    text = text.replace("model: meta-llama/Llama-3.3-70B-Instruct\n", "model: {config: ./config.json}\n")
    text = text.replace("tariff: SMUD CI-TOD1 21-299 kW", "tariff: {csv: prices.csv}")
    text = text.replace("    pools: [h100-owned,", "    pools: [l40s-owned, h100-owned,")
    path = tmp_path / "shop.yaml"
    path.write_text(text, encoding="utf-8")
    found = compare(path)
    option = next(o for o in found.workloads[1].options if o.facts["pool"] == "l40s-owned")
    assert option.usd_per_month_by_component["energy_charge"] > 0
    assert "demand_charge" not in option.usd_per_month_by_component
    (tmp_path / "prices.csv").write_text("\n".join(lines[:100] + lines[101:]), encoding="utf-8")
    with pytest.raises(pertoken.errors.InputError, match=r"prices.csv.*(line 101|gap)"):
        compare(path)


ONE_GPU = """
name: one
horizon: {start: 2027-05-01, days: 7, timezone: America/Chicago}
sites:
  home: {timezone: America/Chicago, tariff: {usd_per_kwh: 0.12}, pue: 1.2, carbon_g_per_kwh: 420}
pools:
  h100: {gpu: H100, site: home, price: {term: on_demand, usd_per_gpu_hour: 2.5}}
workloads:
  chat:
    kind: serving
    model: Llama-3.1-8B
    requests_per_day: 10000
    input_tokens: 1000
    output_tokens: 200
    slo: {ttft_s: 2, tpot_s: 0.05}
"""


def noted(tmp_path: Path, *changes: tuple[str, str]) -> str:
    text = ONE_GPU
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "one.yaml"
    path.write_text(text, encoding="utf-8")
    return " ".join(compare(path).workloads[0].notes)


def test_notes_say_what_the_columns_hold_and_what_looks_like_another_unit(tmp_path: Path) -> None:
    plain = noted(tmp_path)
    assert "h100 is rented by machines of 8 GPUs, 1 would do" in plain
    assert "TTFT, TPOT: of a full replica" in plain
    assert "one number where they print alike; energy" in plain
    assert "?" not in plain
    odd = noted(
        tmp_path,
        ("on_demand, usd_per_gpu_hour: 2.5}", "on_demand, usd_per_gpu_hour: 2.5}, gpus_per_machine: 1"),
        ("usd_per_kwh: 0.12", "usd_per_kwh: 13.5"),
        ("carbon_g_per_kwh: 420", "carbon_g_per_kwh: 0.21"),
        ("ttft_s: 2, tpot_s: 0.05", "ttft_s: 1000, tpot_s: 50"),
    )
    assert "machines of 8" not in odd
    for text in (
        "13.5 USD per kWh: cents?",
        "0.21 g per kWh: kg?",
        "ttft_s is 1000 seconds",
        "tpot_s is 50 seconds",
    ):
        assert text in odd


def test_a_bare_price_is_no_tariff_and_says_how_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(pertoken.errors.InputError, match=r"tariff: a price is written \{usd_per_kwh: 0.12\}"):
        noted(tmp_path, ("tariff: {usd_per_kwh: 0.12}", "tariff: 0.12"))


def test_nobody_can_is_one_line() -> None:
    from pertoken.errors import CannotServeError
    from pertoken.scenario import Slo

    scenario = flat(load(SHOP), slo=Slo(ttft_s=0.001, tpot_s=0.0001), pools=["h100-owned", "l40s-owned"])
    with pytest.raises(
        CannotServeError, match="no pool can run workload 'assistant': l40s-owned: "
    ) as caught:
        compare(scenario)
    assert "\n" not in str(caught.value)


def test_a_budget_that_is_passed_is_said() -> None:
    from pertoken.scenario import Budget

    scenario = flat(load(SHOP)).model_copy(update={"budget": Budget(usd=4000.0)})
    found = compare(scenario)
    options = {o.facts["pool"]: o for o in found.workloads[0].options}
    assert options["b200-reserved"].over_budget
    assert not options["groq-api"].over_budget
    assert "b200-reserved is over budget" in str(found)


def test_waste_heat_sold_lowers_energy_cost() -> None:
    shop = flat(load(SHOP))
    site = shop.sites["warehouse"].model_copy(update={"heat_reuse_fraction": 0.5, "heat_usd_per_kwh": 0.04})
    heated = shop.model_copy(update={"sites": {**shop.sites, "warehouse": site}})
    before, after = Market(shop), Market(heated)
    option = evaluate(before, "assistant", "h100-owned")
    saved = before.cost_usd(option) - after.cost_usd(evaluate(after, "assistant", "h100-owned"))
    assert saved == pytest.approx(0.5 * 0.04 * sum_of(option, "energy_kwh"), rel=1e-9)


def test_years_three_to_six_of_owned_hardware_by_hand() -> None:
    from pertoken.plan.whatif import life_costs_usd_per_gpu_hour

    costs = life_costs_usd_per_gpu_hour(Market(load(SHOP)), "h100-owned")
    # 35,000 USD, 9 %, 10 % residual, 3 years: (35,000 − 3,500 × 1.09^−3) × 0.09 / (1 − 1.09^−3) / 8,760.
    by_hand = (35_000 - 3_500 * 1.09**-3) * 0.09 / (1 - 1.09**-3) / 8_760
    assert costs[3] == pytest.approx(by_hand)
    assert list(costs) == [3, 4, 5, 6]
    assert costs[3] > costs[4] > costs[5] > costs[6]


def test_every_training_week_counts_and_part_weeks_in_part() -> None:
    from pertoken.plan._training import runs_asked
    from pertoken.scenario import Training

    shop = load(SHOP)
    job = shop.workloads["recommender"]
    assert isinstance(job, Training)
    for days, tokens in ((28, 8e9), (30, 8e9 + 2e9 * 2 / 7), (13, 2e9 + 2e9 * 6 / 7), (1, 2e9 / 7)):
        horizon = shop.horizon.model_copy(update={"days": days})
        asked = runs_asked(shop.model_copy(update={"horizon": horizon}), job)
        assert sum(t for *_, t in asked) == pytest.approx(tokens)
    spring = shop.horizon.model_copy(update={"start": date(2027, 3, 1)})
    asked = runs_asked(shop.model_copy(update={"horizon": spring}), job)
    assert [end - start for start, end, _ in asked] == [168, 167, 168, 168]


def test_a_rented_pool_at_a_metered_site_pays_no_fixed_charge() -> None:
    shop = flat(load(SHOP))
    rented = shop.pools["h100-rented"].model_copy(update={"site": "warehouse"})
    site = shop.sites["warehouse"].model_copy(update={"fixed_charge_fraction": 1.0})
    moved = shop.model_copy(
        update={
            "pools": {**shop.pools, "h100-rented": rented},
            "sites": {**shop.sites, "warehouse": site},
        }
    )
    found = compare(moved)
    options = {o.facts["pool"]: o for o in found.workloads[0].options}
    assert options["h100-rented"].usd_per_month_by_component["energy_charge"] == 0
    # 412.90 USD a month, scaled from the horizon's 672 h to 730 h.
    with_charge = options["h100-owned"].usd_per_month_by_component["energy_charge"]
    without = {o.facts["pool"]: o for o in compare(shop).workloads[0].options}["h100-owned"]
    assert with_charge - without.usd_per_month_by_component["energy_charge"] == pytest.approx(
        412.90 * 730 / 672, abs=0.01
    )


def test_api_prices_step_by_each_workloads_own_prompt() -> None:
    from pertoken.scenario import Api, Pool

    pool = Pool(price=Api(term="api", provider="google", model="gemini-2.5-pro"))
    shop = load(SHOP)
    short = shop.workloads["assistant"].model_copy(update={"slo": None, "pools": []})
    long = short.model_copy(update={"input_tokens": 300_000.0, "requests_per_day": 1.0})
    both = shop.model_copy(update={"pools": {"gemini": pool}, "workloads": {"short": short, "long": long}})
    alone = shop.model_copy(update={"pools": {"gemini": pool}, "workloads": {"short": short}})
    first = compare(both).workloads[0].options[0]
    assert first.headline == pytest.approx(compare(alone).workloads[0].options[0].headline)
    longer = compare(both).workloads[1].options[0].metrics["usd_per_mtok_input"] or 0
    assert longer > (first.metrics["usd_per_mtok_input"] or 0)


def test_idle_overheads_belong_to_nobody(shop: Comparison) -> None:
    rows = shop.ledger.cost("tenant", where={"phase": "idle"}).to_pylist()
    assert {r["tenant"] for r in rows} == {"(idle)"}


def test_cooling_is_capital_and_is_paid_back_once() -> None:
    shop = flat(load(SHOP))
    pool = shop.pools["h100-owned"]
    price = pool.price.model_copy(update={"cooling_usd_per_kw": 2000.0})
    cooled = shop.model_copy(
        update={"pools": {**shop.pools, "h100-owned": pool.model_copy(update={"price": price})}}
    )
    before = {o.facts["pool"]: o for o in compare(shop).workloads[0].options}["h100-owned"]
    after = {o.facts["pool"]: o for o in compare(cooled).workloads[0].options}["h100-owned"]
    assert after.usd_per_month_by_component["capital"] > before.usd_per_month_by_component["capital"]
    others = [c for c in before.usd_per_month_by_component if c != "capital"]
    for component in others:
        assert after.usd_per_month_by_component[component] == pytest.approx(
            before.usd_per_month_by_component[component]
        )
    assert after.facts["purchase_usd"] - before.facts["purchase_usd"] == pytest.approx(
        8 * 2000 * (700 + 350) / 1000
    )


def test_tiny_demand_keeps_its_split() -> None:
    small = compare(flat(load(SHOP), requests_per_day=1.0)).workloads[0]
    more = compare(flat(load(SHOP), requests_per_day=1000.0)).workloads[0]
    for one, thousand in zip(small.options, more.options, strict=False):
        if one.refused or not one.facts["gpu"] or one.facts["pool"] != thousand.facts["pool"]:
            continue
        assert (one.metrics["usd_per_mtok_output_with_idle"] or 0) > 0
    api = next(o for o in small.options if o.facts["pool"] == "together-api")
    assert api.metrics["usd_per_mtok_total"] == pytest.approx(0.88, rel=1e-3)


def test_what_nobody_used_or_met_is_said(shop: Comparison) -> None:
    text = " ".join(str(shop).split())
    assert "the horizon never meets these prices of tariff SMUD CI-TOD1 21-299 kW: summer-peak" in text
    assert "tables must not be added up" in text
    assert "how fast an API answers is not known here" in text


def test_a_percentile_slo_is_simulated() -> None:
    from pertoken.scenario import Slo

    scenario = flat(
        load(SHOP), slo=Slo(ttft_s=1.0, tpot_s=0.05, percentile=99.0), pools=["h100-rented", "groq-api"]
    )
    found = compare(scenario)
    option = next(o for o in found.workloads[0].options if o.facts["pool"] == "h100-rented")
    assert option.facts["requests_in_slo_fraction"] >= 0.99
    row = found.ledger.metric(
        "slo_attainment", "usd_per_mtok_in_slo", where={"book": option.facts["book"]}
    ).to_pylist()[0]
    assert row["slo_attainment"] == pytest.approx(option.facts["requests_in_slo_fraction"], abs=1e-4)
    assert row["usd_per_mtok_in_slo"] > 0
    assert any("simulation of the busiest day" in line for line in found.workloads[0].notes)
