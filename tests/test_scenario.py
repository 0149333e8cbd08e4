# ruff: noqa: E501 - the table of wrong inputs reads best one case a line
"""Scenario files: what is read, and one clear line for what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import InputError, PerTokenError, ScenarioError
from pertoken.scenario import Scenario, Serving, json_schema, load, requests_per_hour

SHOP = Path(__file__).parents[1] / "examples" / "shop.yaml"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = SHOP.read_text(encoding="utf-8")
    assert old in text
    return write(tmp_path, text.replace(old, new, 1))


def test_the_shop_is_read() -> None:
    shop = load(SHOP)
    assert shop.pools["l40s-owned"].count == 8
    assert len(shop.hours) == 28 * 24
    assert str(shop.hours[0]) == "2027-02-01T08"  # local midnight in Sacramento


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("gpu: L40S", "gpu: L41S", "pools.l40s-owned.gpu: unknown GPU 'L41S': did you mean L40S"),
        ("SMUD CI-TOD1 21-299 kW", "SMUD CI-TOD1 21-299 kV", "sites.warehouse.tariff: unknown tariff 'SMUD CI-TOD1 21-299 kV': did you mean SMUD CI-TOD1 21-299 kW"),
        ("model: Qwen/Qwen3-8B", "model: Qwen3-5B", "workloads.recommender.model: unknown model 'Qwen3-5B': did you mean"),
        ("site: colo", "site: kolo", "pools.h100-colocated.site: unknown site 'kolo': did you mean colo?"),
        ("requests_per_day: 150000", "requests_per_day: -5", "requests_per_day: Input should be greater than 0; found -5"),
        ("requests_per_day: 150000", "requests_per_day: .nan", "requests_per_day: Input should be a finite number"),
        ("requests_per_day: 150000", "requests_per_dya: 150000", "requests_per_dya: unknown field: did you mean requests_per_day"),
        ("pue: 1.35", "pue: 0.9", "sites.warehouse.pue: Input should be greater than or equal to 1; found 0.9"),
        ("timezone: America/Los_Angeles\n\nsites", "timezone: America/Los_Angelos\n\nsites", "horizon.timezone: unknown time zone 'America/Los_Angelos': did you mean America/Los_Angeles"),
        ("  timezone: America/Los_Angeles\n\nsites", "\nsites", "horizon.timezone: this field is missing"),
        ("    timezone: America/Los_Angeles\n    # Time", "    # Time", "sites.warehouse.timezone: this field is missing"),
        ("count: 8", "count: 12", "count 12 is not a whole number of machines of 8 GPUs"),
        ("cached_fraction: 0.4", "cached_fraction: 1.4", "cached_fraction: Input should be less than 1; found 1.4"),
        ("profile: office", "profile: [1, 2]", "a profile has 24 weights"),
        ("kind: training", "kind: learning", "workloads.recommender"),
        ("pue: 1.35", "pue: 1.35\n    pue: 1.4", "'pue' is given twice, first on line"),
        ("tariff: SMUD CI-TOD1 21-299 kW", "carbon_free: true", "carbon_free: unknown field"),
        ("price: {term: api, provider: groq, model: llama-3.3-70b-versatile}", "price: {term: api, provider: groq, model: llama-4-70b}", "llama-4-70b"),
        ("price: {term: on_demand, usd_per_gpu_hour: 2.95}", "price: {term: on_demand}", "give usd_per_gpu_hour, or provider"),
        ("start: 2027-02-01 ", "start: 9999-12-20 ", "horizon.start: a horizon starts between 1970 and 2200"),
        ("interruptions_per_hour: 0.05", "interruptions_per_hour: 50", "pools.h100-spot.price.interruptions_per_hour: so many interruptions"),
        ("usd_per_gpu: 11500", "provider: nobody", "pools.l40s-owned.price: unknown provider 'nobody'"),
        ("requests_per_day: 150000", "requests_per_day: 1e18", "requests_per_day: Input should be less than or equal to 1000000000000"),
        ("tokens_per_week: 2e9", "tokens_per_week: 2e9\n    tokens: 1e9", "give exactly one of tokens and tokens_per_week"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    path = changed(tmp_path, old, new)
    with pytest.raises(ScenarioError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert expected in message
    prefix, line, _ = message.split(":", 2)
    assert prefix == str(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 1 <= int(line) <= len(lines)


def test_the_line_is_the_line_of_the_field(tmp_path: Path) -> None:
    path = changed(tmp_path, "gpu: L40S", "gpu: L41S")
    with pytest.raises(ScenarioError) as caught:
        load(path)
    line = int(str(caught.value).split(":")[1])
    assert path.read_text(encoding="utf-8").splitlines()[line - 1].strip() == "gpu: L41S"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2", "not YAML"),
        ("a: b: c", "not YAML"),
        ("- 1\n- 2\n", "a scenario is a mapping of fields"),
        ("", "a scenario is a mapping of fields, found None"),
        ("42", "found 42"),
        ("\t- x: [", "not YAML"),
        ("name: !!python/object:os.system x", "not YAML"),
        ("a: &a [*a]", "not YAML"),
        ("{" * 5000, "not YAML"),
        (
            "name: x\nhorizon: {start: 2027-02-30}",
            ":2: '2027-02-30' cannot be read: day is out of range for month",
        ),
        ("colour: red", "unknown field: a scenario has sites, pools, "),
    ],
)
def test_malformed_yaml_gets_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load(write(tmp_path, text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ten_megabytes_of_garbage_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "garbage.yaml"
    path.write_bytes(np.random.default_rng(0).bytes(10_000_000))
    with pytest.raises(ScenarioError, match="10000000 bytes is no scenario"):
        load(path)
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    with pytest.raises(ScenarioError, match="not text: byte"):
        load(path)


def test_a_device_or_folder_is_no_scenario(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), tmp_path):
        with pytest.raises(ScenarioError, match="not a file"):
            load(path)


def test_a_horizon_without_requests_is_said(tmp_path: Path) -> None:
    path = changed(tmp_path, "weekend_fraction: 0.8", "weekend_fraction: 0")
    text = (
        path.read_text(encoding="utf-8")
        .replace("start: 2027-02-01", "start: 2027-02-06")
        .replace("days: 28", "days: 2")
    )
    path.write_text(text, encoding="utf-8")
    scenario = load(path)
    workload = scenario.workloads["assistant"]
    assert isinstance(workload, Serving)
    with pytest.raises(InputError, match="no request falls in the horizon"):
        requests_per_hour(scenario, workload)


def test_a_missing_file_offers_its_neighbours() -> None:
    with pytest.raises(ScenarioError, match=r"no file at .*shpo.yaml: did you mean .*shop.yaml"):
        load(SHOP.with_name("shpo.yaml"))


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_no_document_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "s.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    with pytest.raises(PerTokenError) as caught:
        load(path)
    assert str(caught.value)


@settings(max_examples=60)
@given(data=st.data())
def test_no_change_of_one_value_crashes_the_reader(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    document = yaml.safe_load(SHOP.read_text(encoding="utf-8"))
    node = document
    while isinstance(node, dict):
        key = data.draw(st.sampled_from(sorted(node)))
        if not isinstance(node[key], dict) or data.draw(st.booleans()):
            node[key] = data.draw(
                st.sampled_from(
                    [None, -1, 0, 1e400, float("nan"), "", "x" * 300, [], {}, True, "1e3", [1], {"a": 1}]
                )
            )
            break
        node = node[key]
    path = tmp_path_factory.mktemp("fuzz") / "s.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    said = ""
    try:
        assert isinstance(load(path), Scenario)
    except InputError as error:
        said = str(error)
    assert "\n" not in said


def test_requests_follow_the_local_clock() -> None:
    shop = load(SHOP)
    workload = shop.workloads["assistant"]
    assert isinstance(workload, Serving)
    requests = requests_per_hour(shop, workload)
    # Monday 2027-02-01 from local midnight on: 150,000 on the day, most at 10 in the morning.
    assert requests[:24].sum() == pytest.approx(150_000)
    assert int(np.argmax(requests[:24])) in (10, 14, 15)
    assert requests[5 * 24 : 6 * 24].sum() == pytest.approx(0.8 * 150_000)  # Saturday


def test_days_of_23_and_25_hours_count(tmp_path: Path) -> None:
    spring = load(changed(tmp_path, "start: 2027-02-01          # four", "start: 2027-03-14\n  # four"))
    assert len(spring.hours) == 28 * 24 - 1
    autumn = load(changed(tmp_path, "start: 2027-02-01          # four", "start: 2027-11-07\n  # four"))
    assert len(autumn.hours) == 28 * 24 + 1


def test_the_schema_names_every_field() -> None:
    schema = json_schema()
    assert {"horizon", "sites", "pools", "workloads"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
