"""Fields of a form become a scenario that loads, or one line about one field."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from pertoken.errors import InputError
from pertoken.fleet import load_fleet
from pertoken.report.form import STARTS, FieldError, defaults, fleet_text, offers, row_numbers, scenario_text
from pertoken.scenario import Api, Owned, Serving, Training, parse

DAY = date(2027, 2, 1)
FLEET = """
sites:
  dc: {timezone: Europe/Berlin, pue: 1.2, tariff: {csv: prices.csv}}
  other: {timezone: Europe/Berlin, pue: 1.2, tariff: {csv: more/prices.csv}}
pools:
  h100:
    gpu: H100-SXM
    site: dc
    count: 8
    points: points.csv
    price: {term: owned, usd_per_gpu: 35040.0}
  rented: {gpu: H100-SXM, site: other, price: {term: on_demand, usd_per_gpu_hour: 2.5}}
changes:
  - {from: 2027-01-01, pool: h100, count: 16}
"""


@pytest.mark.parametrize("start", STARTS)
def test_the_defaults_can_be_run(start: str, tmp_path: Path) -> None:
    fleet = fleet_text(load_fleet(_fleet(tmp_path)))
    found = parse(scenario_text(defaults(start, DAY, 7), fleet), fleet.files)
    kinds = {type(w) for w in found.workloads.values()}
    assert kinds == {"serving": {Serving}, "training": {Training}, "both": {Serving, Training}}.get(
        start, {Serving}
    )
    assert (found.horizon.start, found.horizon.days) == (DAY, 7)
    assert len(found.pools) >= 2


def test_each_field_is_where_it_belongs() -> None:
    fields = {
        "name": "my plan", "start": "2027-03-01", "days": "14", "timezone": "Europe/Berlin",
        "usd_per_kwh": "0.21", "usd_per_kw": "12", "pue": "1.25", "carbon": "380", "budget_usd": "1e5",
        "term-1": "owned", "gpu-1": "h100", "count-1": "8", "usd-1": "35000.50", "have-1": "on",
        "term-2": "reserved", "gpu-2": "B200", "count-2": "16", "usd-2": "3.9",
        "term-3": "api", "api-3": "together/meta-llama/Llama-3.3-70B-Instruct-Turbo",
        "serve_model": "meta-llama/Llama-3.3-70B-Instruct", "precision": "fp8", "volume": "145", "volume_unit": "mtok",
        "input_tokens": "1200", "output_tokens": "250", "cached_percent": "40", "profile": "evening", "ttft_s": "1.5",
        "tpot_ms": "40", "train_model": "Qwen/Qwen3-8B", "train_tokens_b": "2.5", "train_deadline_days": "6",
        "train_method": "lora",
    }  # fmt: skip
    text = scenario_text(fields)
    found = parse(text)
    assert (found.name, found.horizon.days, found.horizon.timezone) == ("my plan", 14, "Europe/Berlin")
    assert found.budget.usd == 1e5
    owned, reserved, api = (found.pools[n] for n in ("h100-sxm-owned", "b200-reserved", "together-api"))
    assert isinstance(owned.price, Owned)
    assert (owned.price.usd_per_gpu, owned.count, owned.have) == (35000.5, 8, True)
    assert (reserved.count, reserved.have, getattr(reserved.price, "usd_per_gpu_hour", None)) == (
        16,
        False,
        3.9,
    )
    assert isinstance(api.price, Api)
    assert (api.price.provider, api.price.model) == ("together", "meta-llama/Llama-3.3-70B-Instruct-Turbo")
    site = found.sites[owned.site]
    assert site.tariff is not None
    assert not isinstance(site.tariff, str)
    assert site.tariff.model_dump() == {"usd_per_kwh": 0.21, "demand_usd_per_kw": 12}
    assert (site.pue, site.carbon_g_per_kwh) == (1.25, 380)
    assert found.sites[reserved.site].tariff is None
    serving, training = found.workloads["serving"], found.workloads["training"]
    assert isinstance(serving, Serving)
    # 145 M tokens a day of 1,450 tokens each.
    assert (serving.requests_per_day, serving.cached_fraction, serving.profile) == (100_000, 0.4, "evening")
    assert serving.slo is not None
    assert (serving.slo.ttft_s, serving.slo.tpot_s) == (1.5, 0.04)
    assert isinstance(training, Training)
    assert (training.tokens, training.deadline_days, training.method) == (2.5e9, 6, "lora")
    assert "2500000000.0" not in text


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("pue", "much", "PUE: 'much' is no number"),
        ("pue", "0.5", "at least 1"),
        ("pue", "nan", "is no number"),
        ("pue", "9", "less than or equal to 4"),
        ("gpu-1", "H1OO", "unknown GPU"),
        ("gpu-1", "", "choose a GPU"),
        ("count-1", "2.5", "no whole number"),
        ("usd-2", "", "the catalogue has"),
        ("usd-2", "-1", "at least 0"),
        ("term-3", "leased", "choose a price term"),
        ("api-3", "groq", "provider/model"),
        ("api-3", "grok/llama", "did you mean groq"),
        ("serve_model", "Llama 3.3 70B Instruc", "did you mean"),
        ("timezone", "Mars", "unknown time zone"),
        ("tariff", "SMUD", "unknown tariff"),
        ("name", "<b>", "begins with a letter"),
        ("days", "5000", "3660"),
        ("days", "", "give a number"),
        ("start", "tomorrow", "is no date"),
        ("ttft_s", "", "two halves"),
        ("profile", "x", "'flat'"),
        ("precision", "fp5", "'bf16'"),
        ("cached_percent", "120", "below 100"),
        ("volume_unit", "pages", "requests a day or"),
        ("train_method", "x", "'pretrain'"),
        ("budget_usd", "0", "above 0"),
    ],
)
def test_what_is_wrong_is_said_once_with_its_field(field: str, value: str, told: str) -> None:
    with pytest.raises(FieldError, match=told) as caught:
        scenario_text({**defaults("both", DAY, 7), field: value})
    assert caught.value.field == field
    assert len(str(caught.value).splitlines()) == 1


def test_a_form_without_work_or_hardware_says_so() -> None:
    fields = defaults("serving", DAY, 7)
    with pytest.raises(FieldError, match="nothing to run:"):
        scenario_text({**fields, "volume": ""})
    bare = {k: v for k, v in fields.items() if k.rpartition("-")[0] not in ("gpu", "usd", "api")}
    with pytest.raises(FieldError, match="nothing to run on"):
        scenario_text(bare)
    with pytest.raises(FieldError, match="not both") as caught:
        scenario_text({**fields, "usd_per_kwh": "0.1"})
    assert caught.value.field == "usd_per_kwh"
    with pytest.raises(FieldError, match="choose a tariff"):
        scenario_text({**fields, "tariff": ""})
    with pytest.raises(InputError, match="starts from one of"):
        defaults("nothing", DAY, 7)


def test_the_fleet_is_there_with_its_files_and_todays_terms(tmp_path: Path) -> None:
    running = load_fleet(_fleet(tmp_path))
    found = fleet_text(running)
    # Two files of one name stay two.
    assert found.sites["dc"]["tariff"] == {"csv": "prices.csv"}
    assert found.sites["other"]["tariff"] == {"csv": "other-prices.csv"}
    assert found.files["other-prices.csv"] == tmp_path / "more" / "prices.csv"
    assert found.pools["h100"]["points"] == "points.csv"
    assert str(tmp_path) not in str((found.sites, found.pools))
    scenario = parse(scenario_text(defaults("fleet", DAY, 7, "Europe/Berlin"), found), found.files)
    assert (scenario.pools["h100"].have, scenario.pools["rented"].have) == (True, False)
    fields = {**defaults("serving", DAY, 7), "fleet": "on", "gpu-1": "h100", "have-1": ""}
    both = parse(scenario_text(fields, found), found.files)
    assert set(both.pools) == {"h100", "rented", "h100-sxm-owned", "h100-sxm-rented", "groq-api"}
    assert both.pools["h100"].count == 8


def test_rows_shown_are_those_written_and_one_more() -> None:
    assert row_numbers({}) == [1]
    assert row_numbers({"gpu-1": "x", "api-3": "y"}) == [1, 2, 3]
    assert row_numbers({f"gpu-{n}": "x" for n in range(1, 13)}) == list(range(1, 13))


def test_offers_are_the_catalogues_newest_cheapest_first() -> None:
    found = offers()["H100-SXM"]
    assert set(found) == {"owned", "on_demand", "reserved"}
    prices = [usd for usd, _ in found["on_demand"]]
    assert prices == sorted(prices)
    # Of one offer the newest observation alone: aws was seen twice.
    assert [who for _, who in found["on_demand"] if who.startswith("aws")] == ["aws, 2026-11-09"]


def _fleet(folder: Path) -> Path:
    (folder / "more").mkdir()
    for name in ("prices.csv", "more/prices.csv"):
        hours = "".join(f"2027-02-{d:02d}T{h:02d}:00Z,0.1\n" for d in range(1, 29) for h in range(24))
        (folder / name).write_text("hour_utc,usd_per_kwh\n" + hours)
    (folder / "points.csv").write_text("")
    (folder / "fleet.yaml").write_text(FLEET)
    return folder / "fleet.yaml"
