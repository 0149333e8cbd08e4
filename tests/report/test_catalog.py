"""`pertoken catalog`: every kind and item prints within 100 columns and says unit, source and date."""

from __future__ import annotations

import io
import json
from datetime import date

import pytest
from rich.console import Console, RenderableType

from pertoken.catalog.gpus import gpus
from pertoken.catalog.models import models
from pertoken.catalog.prices import prices
from pertoken.catalog.tariffs import tariff, tariffs
from pertoken.errors import PerTokenError
from pertoken.report.catalog import KINDS, _hours, catalog

TODAY = date(2026, 11, 24)
WIDTH = 100


def printed(table: RenderableType) -> str:
    console = Console(width=WIDTH, file=io.StringIO(), force_terminal=False)
    console.print(table)
    out = console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue()


def flat(text: str) -> str:
    return "".join(text.split())


ITEMS = [
    *(("gpus", name) for name in gpus()),
    *(("models", name) for name in list(models())[::6]),
    *(("tariffs", name) for name in tariffs()),
]


@pytest.mark.parametrize("kind", KINDS)
def test_list_fits_and_holds_every_row(kind: str) -> None:
    table, rows = catalog(kind, on=TODAY)
    text = printed(table)
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    json.dumps(rows, allow_nan=False)
    names = {"gpus": list(gpus()), "models": list(models()), "tariffs": list(tariffs())}.get(kind)
    if names is None:
        assert len(rows) >= 100
        assert len({row["provider"] for row in rows}) >= 8
    else:
        assert [row["name"] for row in rows] == names
        for row in rows:
            assert row["sources"]
            assert row["checked"]


@pytest.mark.parametrize(("kind", "name"), ITEMS)
def test_item_shows_sources_and_date(kind: str, name: str) -> None:
    table, (row,) = catalog(kind, name)
    text = printed(table)
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    json.dumps(row, allow_nan=False)
    squeezed = flat(text)
    assert flat(name) in squeezed
    assert f"checked:{row['checked']}" in squeezed
    for source in row["sources"]:
        assert flat(source) in squeezed


def test_gpu_shows_units_and_what_is_assumed() -> None:
    table, (row,) = catalog("gpus", "DGX-H100")
    text = printed(table)
    for part in ("H100-SXM", "989.4", "TFLOP/s", "3,350", "GB/s", "700", "measured: ", "no fp4 in hardware"):
        assert part in text
    assert row["memory_bytes_per_s"] == 3.35e12
    assert row["flops"]["fp8"] == 1978.9e12
    assert row["power_notes"]["host_w"].startswith("measured")


def test_model_shows_what_is_computed() -> None:
    table, (row,) = catalog("models", "Llama-3.3-70B-Instruct")
    assert "70.55 B" in printed(table)
    assert row["parameters"] == models()["meta-llama/Llama-3.3-70B-Instruct"].parameters
    assert row["kv_values_per_token"] == 163_840


def test_tariff_shows_hours_and_charges() -> None:
    text = flat(printed(catalog("tariffs", "SMUD CI-TOD4")[0]))
    for part in (
        "0.2367",
        "USD/kWh",
        "11.609",
        "USD/kW",
        "16–21hsummer-peak",
        "ratchet",
        "America/Los_Angeles",
    ):
        assert flat(part) in text


def test_hours_of_a_schedule_in_words() -> None:
    row = tariff("SMUD CI-TOD4")
    names = [band.name for band in row.energy]
    year = _hours(row.weekday, names)
    assert year.split("; ")[1] == (
        "Jun–Sep: 0–16 h summer-off-peak, 16–21 h summer-peak, 21–24 h summer-off-peak"
    )
    assert _hours(((0,) * 24,) * 12, ["all"]) == "all"
    assert _hours(((0,) * 24,) * 11 + ((1,) * 24,), ["a", "b"]) == "Jan–Nov: a; Dec: b"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h100_sxm", ("aws", "6.880", "reserved", "p5.48xlarge", "AWS public price list", "2026-11-09")),
        ("coreweave", ("GB200", "10.500", "spot", "coreweave.com/pricing")),
        ("purchase", ("39,625", "Thinkmate", "whole 8-GPU server", "2024-08-22 old")),
        ("groq", ("openai/gpt-oss-120b", "0.15", "0.60", "genai-prices")),
        ("gpt-oss-120b", ("groq", "together", "cerebras")),
        (
            "anthropic/claude-sonnet-4-5",
            ("3.00", "prompts above 200,000", "22.50", "USD/M tokens", "checked:"),
        ),
        ("deepseek/deepseek-chat", ("dearest hour",)),
    ],
)
def test_prices_by_any_name(name: str, says: tuple[str, ...]) -> None:
    table, rows = catalog("prices", name, on=TODAY)
    text = printed(table)
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    for part in says:
        assert flat(part) in flat(text)
    assert rows
    json.dumps(rows, allow_nan=False)


def test_list_of_prices_shows_the_newest_and_the_name_shows_history() -> None:
    def secure(name: str | None) -> list[float]:
        found = catalog("prices", name, on=TODAY)[1]
        return [
            row["usd_per_gpu_hour"]
            for row in found
            if (row["provider"], row["gpu"], row["instance"]) == ("runpod", "H100-SXM", "Secure Cloud")
        ]

    assert secure(None) == [3.99]
    assert secure("H100") == [3.49, 3.99]
    assert len(catalog("prices", on=TODAY)[1]) < len(prices())


def test_age_depends_on_the_day() -> None:
    def old(on: date) -> int:
        return sum(row["stale"] for row in catalog("prices", on=on)[1])

    assert 0 < old(TODAY) < old(date(2028, 1, 1)) == len(catalog("prices", on=TODAY)[1])


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("gpus", "h1000", "did you mean H100"),
        ("models", "llama-3.3-71b", "did you mean"),
        ("tariffs", "smud-ci", "did you mean SMUD"),
        ("prices", "coreweve", "did you mean coreweave"),
        ("prices", "groq/gpt-oss-121b", "did you mean"),
        ("prices", "Apple-M3-Ultra", "no price of Apple-M3-Ultra"),
        ("gpu", None, "one of gpus, models, tariffs, prices"),
    ],
)
def test_wrong_names_get_one_line(kind: str, name: str | None, says: str) -> None:
    with pytest.raises(PerTokenError) as error:
        catalog(kind, name, on=TODAY)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
