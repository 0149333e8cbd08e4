"""A budget that is used up: a real Alertmanager hears of it and of its recovery, across a restart; verbs agree."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.conftest import Service, free_port, wait_until
from tests.end_to_end.test_prometheus_reads_us import Programs, Webhook, asked, found_program
from tests.end_to_end.test_verbs import pertoken, window

FLEET = """
pools:
  api: {{price: {{term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}}}
budgets:
  - {{name: t, tenant: t, usd: {usd}, hard: true, alert_at: {{actual_percent: [100], forecast_percent: []}}}}
alerts:
  alertmanagers: [{{name: am, url: "http://127.0.0.1:{port}", resend_s: 10}}]
"""
EVENT = {
    "key": "a", "pool": "api", "model": "m", "tenant": "t", "meter": "output_tokens", "quantity": 1_000_000,
}  # fmt: skip


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.server.shutdown()
    made.server.server_close()


def manager(program: Programs, folder: Path, webhook: Webhook) -> int:
    port = free_port()
    hook = [{"url": f"http://127.0.0.1:{webhook.port}/", "send_resolved": True}]
    config = {
        "route": {"receiver": "hook", "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h"},
        "receivers": [{"name": "hook", "webhook_configs": hook}],
    }
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    program(
        found_program("prometheus-alertmanager", "prometheus-alertmanager"),
        f"--config.file={folder / 'alertmanager.yml'}", f"--storage.path={folder / 'alerts'}",
        f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=",
    )  # fmt: skip
    return port


def test_it_fires_lasts_and_resolves_in_a_real_alertmanager(
    service: Callable[..., Service], program: Programs, tmp_path: Path, webhook: Webhook
) -> None:
    port = manager(program, tmp_path, webhook)
    ours = service(FLEET.format(usd=10, port=port))
    ours.start()
    wait_until("the budgets were read", lambda: ours.ask("GET", "/v1/budget/t")[0] == 200)
    assert ours.get("/v1/budget/t")["allowed"]
    assert ours.ask("POST", "/v1/events", [EVENT])[0] == 200
    # 15 USD of 10, in the hour so far.
    wait_until("the request does not fit", lambda: not ours.get("/v1/budget/t")["allowed"], 60)
    wait_until("it fires", lambda: ("PerTokenBudget", "firing") in webhook.told)
    (alert,) = asked(port, "/api/v2/alerts", active="true")
    labels = {"alertname": "PerTokenBudget", "budget": "t", "kind": "actual", "threshold": "100",
              "severity": "critical", "tenant": "t"}  # fmt: skip
    assert alert["labels"] == labels
    assert alert["annotations"]["summary"].startswith(
        "Passed 100 % of the budget t (10.00 USD): spent 15.00 USD"
    )

    def lasts_until() -> datetime:
        (found,) = asked(port, "/api/v2/alerts", active="true")
        return datetime.fromisoformat(found["endsAt"])

    first = lasts_until()
    wait_until("it is sent again", lambda: lasts_until() > first)
    told = pertoken("budget", "--data", str(ours.data))
    assert told.returncode == 1
    assert "spent     15.00 of 10.00 USD (150.0 %), -5.00 left" in told.stdout

    # More is allowed: the service starts again, knows what fired, and says that it is over, once.
    ours.stop()
    ours.fleet.write_text(FLEET.format(usd=100, port=port))
    ours.start()
    wait_until("it resolves", lambda: ("PerTokenBudget", "resolved") in webhook.told, 60)
    time.sleep(2.5)
    assert webhook.told == [("PerTokenBudget", "firing"), ("PerTokenBudget", "resolved")]
    assert asked(port, "/api/v2/alerts", active="true") == []
    assert [c for c in ours.get("/v1/doctor")["complaints"] if c["kind"] == "alerts"] == []


def test_verbs_with_a_service_and_without_one(service: Callable[..., Service], tmp_path: Path) -> None:
    text = FLEET.format(usd=100, port=1).replace("alerts:", "chargeback: {spread_idle: no}\nalerts:")
    ours = service(text)
    ours.start()
    assert ours.ask("POST", "/v1/events", [EVENT])[0] == 200
    start, end = window()
    data, fleet = str(ours.data), str(ours.fleet)
    assert pertoken("close", "--data", data, "--from", start, "--to", end).returncode == 0
    month = f"{datetime.now(UTC):%Y-%m}"
    asking = ("statement", "--data", data, "--tenant", "t", "--month", month)
    page, table = tmp_path / "s.html", tmp_path / "s.csv"
    beside = pertoken(*asking, "--html", str(page), "--csv", str(table))
    assert beside.returncode == 0, beside.stderr
    assert "15.00 USD" in beside.stdout
    assert "on no statement" in page.read_text()
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert (row["usd"], row["output_tokens"], row["pool"]) == ("15.000000000", "1000000.000000", "api")
    everyone = ("statement", "--data", data, "--month", month)
    whole = pertoken(*everyone, "--json")
    assert whole.returncode == 0, whole.stderr
    told = json.loads(whole.stdout)
    assert Decimal(told["ledger_usd"]) == sum(Decimal(s["usd"]) for s in told["tenants"] + told["nobodys"])
    assert [s["usd"] for s in told["tenants"]] == ["15.000000000"]
    refused = pertoken(*asking, "--spread-idle")
    assert refused.returncode == 2
    assert refused.stderr == (
        "pertoken: the fleet's policy spreads no idle: set chargeback.spread_idle in the fleet file\n"
    )
    ours.stop()
    for more in ((), ("--json",)):
        alone = pertoken(*asking, "--fleet", fleet, *more)
        assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout)["usd"] == "15.000000000"
    again = pertoken(*asking, "--fleet", fleet, "--csv", str(tmp_path / "again.csv"))
    assert again.returncode == 0
    assert (tmp_path / "again.csv").read_text() == table.read_text()
    alone = pertoken(*everyone, "--fleet", fleet, "--json", "--csv", str(tmp_path / "all.csv"))
    assert json.loads(alone.stdout) == told
    rows = csv.DictReader((tmp_path / "all.csv").read_text().splitlines())
    assert sum(Decimal(row["usd"]) for row in rows) == Decimal(told["ledger_usd"])
    budgets = pertoken("budget", "--data", data, "--fleet", fleet, "--json")
    assert budgets.returncode == 0, budgets.stderr
    (found,) = json.loads(budgets.stdout)
    assert (found["name"], found["spent"], found["hard"]) == ("t", "15", True)
    assert (
        json.loads(pertoken("budget", "--data", data, "--fleet", fleet, "--tenant", "x", "--json").stdout)
        == []
    )
    nobody = pertoken("statement", "--data", data, "--fleet", fleet, "--tenant", "x", "--month", month)
    assert (nobody.returncode, nobody.stderr.count("\n")) == (2, 1)
