"""Budgets, alerts and chargeback of a fleet file: what is taken, and what is refused in one line."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from pertoken.errors import ScenarioError
from pertoken.fleet import COUNTED, load_fleet
from pertoken.units import METERS, METRICS

ROOT = Path(__file__).parents[1]
FLEET = """
sites:
  dc: {timezone: UTC, pue: 1.2, tariff: {usd_per_kwh: 0.1}}
pools:
  h100: {gpu: H100-SXM, site: dc, count: 8, price: {term: reserved, usd_per_gpu_hour: 2}}
"""
HOOK = "{name: hook, url: 'https://x.example/y', secret_file: secret}"


def written(folder: Path, text: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(FLEET + text)
    return path


def test_amounts_are_exact_and_defaults_are_told(tmp_path: Path) -> None:
    text = """
budgets:
  - {name: all, usd: 1000.10}
  - {name: blue, usd: '0.000000001', tenant: blue, pools: [h100, '(site:dc)'], alert_at: {actual_percent: [90, 10, 90]}}
  - {name: tokens, tokens: 5, counts: total, period: week}
chargeback: {spread_idle: no}
"""
    everything, blue, tokens = load_fleet(written(tmp_path, text)).budgets
    assert (everything.amount, everything.unit, everything.with_idle) == (Decimal("1000.1"), "USD", True)
    assert (blue.amount, blue.with_idle, blue.alert_at.actual_percent) == (Decimal("1e-9"), False, [10, 90])
    assert (tokens.amount, tokens.unit, tokens.with_idle) == (Decimal(5), "total tokens", False)


def test_what_is_counted_is_what_the_metric_divides_by() -> None:
    for name, meters in COUNTED.items():
        assert METRICS[f"usd_per_mtok_{name}"].denominator == "+".join(meters)
        assert set(meters) <= set(METERS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("budgets: [{name: a}]", "gives usd or tokens"),
        ("budgets: [{name: a, usd: 1, tokens: 1, counts: total}]", "gives usd or tokens"),
        ("budgets: [{name: a, tokens: 1}]", "says which it counts"),
        ("budgets: [{name: a, usd: 1, counts: output}]", "says which it counts"),
        ("budgets: [{name: a, usd: 0}]", "greater than 0"),
        ("budgets: [{name: a, usd: .inf}]", "finite"),
        ("budgets: [{name: a, usd: 1e-10}]", "decimal"),
        ("budgets: [{name: a/b, usd: 1}]", "pattern"),
        ("budgets: [{name: a, usd: 1}, {name: a, usd: 2}]", "the budget 'a' is given twice"),
        ("sources: {scrape: [{url: 'http://a:1/x', pool: h100}, {url: 'http://a:1/y', pool: h100}]}",
         "the scrape target 'a:1' is given twice: give each a name of its own"),
        ("sources: {scrape: [{url: 'http://a:1/x'}]}", "'a:1' says no pool"),
        ("sources: {written: [{instance: w}]}", "'w' says no pool"),
        ("changes: [{from: 2027-01-01, pool: h100, count: 2}, {from: 2027-01-01, pool: h100, count: 3}]",
         "changes give the count of h100 from 2027-01-01 twice: which of them holds?"),
        ("budgets: [{name: a, usd: 1, pools: [h10]}]", "budgets name the pool 'h10', the fleet has h100"),
        ("budgets: [{name: a, usd: 1, tenant: b, idle: true}]", "chargeback.spread_idle"),
        ("budgets: [{name: a, usd: 1, timezone: Mars/Base}]", "unknown time zone"),
        ("budgets: [{name: a, usd: 1, alert_at: {actual_percent: [0]}}]", "greater than 0"),
        (f"alerts: {{webhooks: [{HOOK}, {HOOK}]}}", "the alert channel 'hook' is given twice"),
        (f"alerts: {{webhooks: [{HOOK.replace('secret}', 'nowhere}')}]}}", "no file at nowhere"),
        (f"alerts: {{webhooks: [{HOOK.replace('secret}', 'short}')}]}}", "the secret in short is shorter than 16"),
        (f"alerts: {{webhooks: [{HOOK.replace('x.example', 'u:p@x.example')}]}}", "pattern"),
        (f"alerts: {{webhooks: [{HOOK.replace('}', ', budgets: [b]}')}]}}", "alerts name the budget 'b'"),
        ("alerts: {emails: [{name: m, host: h, sender: a@b, to: [nobody]}]}", "pattern"),
        ("alerts: {emails: [{name: m, host: h, sender: a@b, to: [a@b], user: u}]}", "both user and password_file"),
        (
            "alerts: {emails: [{name: m, host: h, sender: a@b, to: [a@b], user: u, password_file: secret, "
            "security: none}]}",
            "not sent in the clear",
        ),
        ("chargeback: {spread_idle: evenly}", "by_gpu_hours"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef\n")
    (tmp_path / "short").write_text("hush\n")
    with pytest.raises(ScenarioError) as refused:
        load_fleet(written(tmp_path, text))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a fleet is a mapping of fields, found None"),
        (f"{FLEET}workloads: {{}}\n", "unknown field: a fleet has sites, pools, sources, changes"),
    ],
    ids=["empty", "a scenario"],
)
def test_what_is_no_fleet_is_told_what_a_fleet_has(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError) as caught:
        load_fleet(path)
    assert says in str(caught.value)


def test_the_example_has_budgets() -> None:
    fleet = load_fleet(ROOT / "examples" / "serve" / "fleet.yaml")
    assert [b.name for b in fleet.budgets if b.hard] == ["team-blue"]
    assert fleet.chargeback.spread_idle == "by_gpu_hours"
