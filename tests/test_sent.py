"""A scenario that comes over a network: read as a file is, opening nothing, and cheap to refuse whatever is in it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from pertoken.errors import ScenarioError
from pertoken.scenario import load, parse

ROOT = Path(__file__).parents[1]
SHOP = (ROOT / "examples" / "shop.yaml").read_text()
TARIFF = "tariff: SMUD CI-TOD1 21-299 kW"


def test_it_is_what_the_file_would_be() -> None:
    assert parse(SHOP) == load(ROOT / "examples" / "shop.yaml")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        (TARIFF, "tariff: {csv: /etc/passwd}", "sites.warehouse.tariff.csv"),
        (TARIFF, "tariff: {urdb: ../../secret.json}", "sites.warehouse.tariff.urdb"),
        ("model: Qwen/Qwen3-8B", "model: {config: /etc/passwd}", "workloads.recommender.model.config"),
        ("profile: office", "trace: /dev/zero", "workloads.assistant.trace"),
        ("    gpu: L40S\n", "    gpu: L40S\n    points: points.csv\n", "pools.l40s-owned.points"),
    ],
)
def test_it_opens_no_file(old: str, new: str, field: str) -> None:
    with pytest.raises(ScenarioError, match="no file of this machine is opened") as caught:
        parse(SHOP.replace(old, new, 1))
    assert caught.value.field == field
    assert len(str(caught.value).splitlines()) == 1


def test_it_may_name_the_fleets_files(tmp_path: Path) -> None:
    prices = tmp_path / "prices.csv"
    prices.write_text("hour_utc,usd_per_kwh\n")
    text = SHOP.replace(TARIFF, "tariff: {csv: prices.csv}", 1)
    found = parse(text, {"prices.csv": prices}).sites["warehouse"].tariff
    assert getattr(found, "csv", None) == prices
    with pytest.raises(ScenarioError, match=r"but those of its fleet: prices\.csv"):
        parse(text.replace("prices.csv", "../prices.csv"), {"prices.csv": prices})


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "anchors and aliases"),
        ("a: &b 1\n", "anchors and aliases"),
        ("x" * 10_000_000, "at most 65536 are taken"),
        ("[" * 60_000, "nested deeper"),
        ("{a: " * 10_000, "nested deeper"),
        ("- " * 30_000, "nested deeper"),
        ("\n".join(f"k{i}: 1" for i in range(3_000)), "at most 100 entries"),
        (f"pools: [{'a, ' * 3_000}]", "at most 100 entries"),
        ("name: !!python/object/apply:os.system ['touch /tmp/x']", "not YAML"),
        ("name: !!python/name:os.system", "not YAML"),
        ("a: " + "1" * 60_000, "cannot be read"),
        ("a: 2001-13-45", "cannot be read: month"),
        ("a: b: c", "not YAML"),
        ("name: \x00", "not YAML"),
        ("", "a scenario is a mapping"),
        ("%YAML 9.9\n---\na: 1", "not YAML"),
        ("name: x\nname: y", "given twice"),
        ("a: 1\n---\nb: 2", "not YAML"),
    ],
)
def test_hostile_text_costs_little_and_gets_one_line(text: str, told: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ScenarioError, match=told) as caught:
            parse(text)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
    assert most < 64 << 20
