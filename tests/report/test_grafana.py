"""Dashboards and rules: what Grafana and Prometheus are given is whole, and rules fire and resolve as written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pertoken.report import grafana
from pertoken.report._panels import DASHBOARDS, Dashboard
from pertoken.report.grafana import ALERTS
from pertoken.web.exporter import FAMILIES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "kubernetes"
COMMAND_S = 30
Boards = pytest.mark.parametrize("board", DASHBOARDS, ids=lambda b: str(b.name))


def promtool() -> str:
    found = shutil.which("promtool")
    assert found, "the Debian package prometheus is missing: python tests/system_packages.py"
    return found


def families_in(expr: str) -> set[str]:
    import re

    return set(re.findall(r"pertoken_[a-z0-9_]+", expr))


@Boards
def test_a_dashboard_is_one_that_grafana_takes(board: Dashboard) -> None:
    found: dict[str, Any] = json.loads(grafana.documents()[f"pertoken-{board.name}.json"])
    assert found["uid"] == f"pertoken-{board.name}"
    assert "id" not in found, "an id of one Grafana is another dashboard's in the next"
    taken: set[tuple[int, int]] = set()
    numbers = set()
    for panel in found["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        numbers.add(panel["id"])
        assert panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            assert target["instant"] is not target["range"]
    assert len(numbers) == len(found["panels"])
    variables = {v["name"] for v in found["templating"]["list"]}
    used = json.dumps(found["panels"])
    for name in variables:
        assert f"${name}" in used or f"${{{name}}}" in used, f"nothing uses ${name}"


@Boards
def test_a_query_asks_for_families_there_are(board: Dashboard) -> None:
    asked = {f for panel in board.panels for query in panel.queries for f in families_in(query.expr)}
    assert asked
    assert asked <= set(FAMILIES)
    for panel in board.panels:
        for query in panel.queries:
            assert 'instance=~"$instance"' in query.expr, "two services in one Prometheus are told apart"


def test_every_figure_is_on_some_dashboard() -> None:
    asked = {
        f
        for b in DASHBOARDS
        for panel in b.panels
        for query in panel.queries
        for f in families_in(query.expr)
    }
    for name in (
        "spend_usd",
        "tokens",
        "cost_per_mtok_usd",
        "energy_joules",
        "utilisation_ratio",
        "source_age_seconds",
    ):
        assert f"pertoken_{name}" in asked


def test_rules_are_sound_to_promtool(tmp_path: Path) -> None:
    grafana.write(tmp_path)
    done = subprocess.run(
        [promtool(), "check", "rules", str(tmp_path / grafana.RULES_FILE)],
        capture_output=True, text=True, timeout=COMMAND_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout
    for alert in ALERTS:
        told = {f.removesuffix("_total") for f in families_in(alert.expr)}
        assert told <= set(FAMILIES), alert.name


HELD = {
    # Alert: series while it is wrong, the values it has, when it fires and when it has resolved (minutes).
    "PerTokenGone": ("pertoken_build_info", "1x2 _x20 1x60", 20, 40),
    "PerTokenSourceSilent": ('pertoken_source_silent{kind="scrape",source="a"}', "0 1x20 0x60", 15, 40),
    "PerTokenJournalRefuses": ("pertoken_journal_writable", "1 0x20 1x60", 5, 40),
    "PerTokenJournalDamaged": ("pertoken_journal_damaged_bytes", "0 12x20 0x60", 2, 40),
    "PerTokenClosingFails": ("pertoken_closing_failed", "0 1x30 0x60", 20, 50),
    "PerTokenClosingLate": ("pertoken_closing_late_seconds", "0 10800x30 0x60", 20, 50),
    "PerTokenUsageUnpriced": ('pertoken_unpriced_seconds{pool="p",meter="gpu_hours"}', "0 3600x30 0x60", 20, 50),
    "PerTokenAbovePlan": (
        'pertoken_plan_variance_usd{window="24h",book="plan:a",driver="price"}', "10 30x90 10x60", 80, 120,
    ),
    "PerTokenBudgetUsedUp": ('pertoken_budget_spent_ratio{budget="b"}', "0.9 1.1x20 0.9x60", 2, 40),
    "PerTokenBudgetWillBeUsedUp": (
        'pertoken_budget_forecast_ratio{budget="b",bound="expected"}', "0.9 1.1x90 0.9x60", 80, 120,
    ),
    "PerTokenAlertsUndelivered": ('pertoken_alerts_failing{channel="ops"}', "0 1x30 0x60", 20, 50),
    "PerTokenMostlyIdle": ('pertoken_utilisation_ratio{window="24h"}', "0.5 0.05x420 0.5x60", 400, 450),
}  # fmt: skip


def test_each_rule_fires_and_resolves(tmp_path: Path) -> None:
    assert {a.name for a in ALERTS} == set(HELD)
    grafana.write(tmp_path)
    tests = []
    for alert in ALERTS:
        series, values, fires, resolved = HELD[alert.name]
        plan = {"series": 'pertoken_plan_spend_usd{window="24h",book="plan:a"}', "values": "100x600"}

        def told(minute: int, alert: grafana.Alert = alert) -> list[str]:
            return [f"ALERTS{{alertname={alert.name!r},alertstate='firing'}}", f"{minute}m"]

        checks = [
            {"expr": f"count({told(m)[0]})", "eval_time": told(m)[1], "exp_samples": samples}
            for m, samples in ((0, []), (fires, [{"labels": "{}", "value": 1}]), (resolved, []))
        ]
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": values}, plan],
                "promql_expr_test": checks,
            }
        )
    path = tmp_path / "test.yaml"
    path.write_text(
        yaml.safe_dump({"rule_files": [grafana.RULES_FILE], "evaluation_interval": "1m", "tests": tests})
    )
    done = subprocess.run(
        [promtool(), "test", "rules", path.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_verb_writes_what_the_code_says(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from pertoken.cli import app

    done = CliRunner().invoke(app, ["grafana", "--out", str(tmp_path / "new" / "folder")])
    assert done.exit_code == 0, done.output
    written = {
        path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new" / "folder").iterdir()
    }
    assert written == grafana.documents()
    assert len(written) == len(DASHBOARDS) + 1
    assert all(name in done.output for name in written)
