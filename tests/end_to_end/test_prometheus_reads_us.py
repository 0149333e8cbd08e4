"""Real Prometheus servers scrape the real service, every panel shows something, alerts reach a real Alertmanager."""

from __future__ import annotations

import http.client
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from pertoken.fleet import load_fleet
from pertoken.ledger import open_ledger
from pertoken.report import grafana
from pertoken.report._terms import hours_between, rates_of
from pertoken.tables import usage_rows
from tests.end_to_end.conftest import Service, free_port, wait_until
from tests.web.test_ingest import write_request

HOURS = 60
PLAN = "plan:shop"
FLEET = """
sites:
  lab: {timezone: UTC, pue: 1.2, tariff: {usd_per_kwh: 0.1}}
pools:
  h100:
    gpu: H100-SXM
    site: lab
    count: 8
    price: {term: owned, usd_per_gpu: 35040, life_years: 4, wacc_fraction: 0, residual_fraction: 0,
            method: straight-line}
  api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}
sources:
  written:
    - {instance: "vllm:8000", pool: h100}
budgets:
  - {name: all, usd: 100000}
  - {name: blue, tenant: blue, usd: 1000, period: week}
"""
PROMETHEUS = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
scrape_configs:
  - job_name: pertoken
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
Programs = Callable[..., subprocess.Popen[bytes]]


def found_program(name: str, package: str) -> str:
    found = shutil.which(name)
    assert found, f"the Debian package {package} is missing: python tests/system_packages.py"
    return found


def asked(port: int, path: str, **query: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", f"{path}?{urlencode(query)}")
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        return json.loads(text)
    finally:
        connection.close()


class Prometheus:
    """A Prometheus server of our own."""

    def __init__(
        self, program: Programs, folder: Path, scraped: int, more: dict[str, Any] | None = None
    ) -> None:
        self.port = free_port()
        folder.mkdir()
        config = yaml.safe_load(PROMETHEUS.format(port=scraped)) | (more or {})
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        program(
            found_program("prometheus", "prometheus"), f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{self.port}",
        )  # fmt: skip

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an instant query."""
        found = asked(self.port, "/api/v1/query", query=expr)
        return [(r["metric"], float(r["value"][1])) for r in found["data"]["result"]]

    def one(self, expr: str) -> float:
        """The value of a query with one answer."""
        ((_, value),) = self.query(expr)
        return value

    def ready(self) -> bool:
        """Whether the service was scraped twice."""
        try:
            found = self.query("count_over_time(pertoken_build_info[1m])")
        except (OSError, AssertionError):
            return False
        return bool(found) and found[0][1] >= 2

    def reads_us(self) -> bool:
        """Whether all scrapes of the last five seconds were good, and four of them made."""
        newest = self.query("min_over_time(up[5s])")
        counted = self.query("count_over_time(up[5s])")
        return bool(newest) and newest[0][1] == 1 and counted[0][1] >= 4


def fill(ours: Service) -> None:
    """Hours of two models, two tenants and an API, idle and energy among them, and a plan beside them."""
    fleet = load_fleet(ours.fleet)
    ours.data.mkdir(mode=0o700)
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start = end - timedelta(hours=HOURS)
    hours = hours_between(start, end)
    ledger = open_ledger(ours.data / "ledger.duckdb")
    ledger.add_rates(rates_of(fleet, start, end))
    for book, more in (("actual", 1.0), (PLAN, 0.8)):

        def put(
            pool: str, model: str, tenant: str, amounts: dict[tuple[str, str], float], book: str = book
        ) -> None:
            ledger.add_usage(
                usage_rows(hours, amounts, book=book, pool=pool, model=model, tenant=tenant, basis="measured")
            )

        for model, tenant, size in (("llama", "blue", 1.0), ("qwen", "red", 2.0)):
            tokens = size * more * 1e6
            put("h100", model, tenant, {
                ("input", "input_tokens"): tokens, ("input", "cached_input_tokens"): tokens / 4,
                ("output", "output_tokens"): tokens / 2, ("output", "requests"): tokens / 1000,
                ("input", "gpu_hours"): 0.5 * size, ("output", "gpu_hours"): size,
            } | energy("input", size) | energy("output", 2 * size))  # fmt: skip
        put("h100", "", "(idle)", {("idle", "gpu_hours"): 3.5} | energy("idle", 1.0))
        put(
            "api", "claude", "blue", {("input", "input_tokens"): 1e5, ("output", "output_tokens"): 1e5 * more}
        )
    ledger.close()
    ledger.shut()


def energy(phase: str, kwh: float) -> dict[tuple[str, str], float]:
    """At the meter, the plug and the board."""
    return {
        (phase, "energy_kwh"): kwh * 1.2, (phase, "it_energy_kwh"): kwh, (phase, "gpu_energy_kwh"): kwh * 0.75,
    }  # fmt: skip


def speak(ours: Service) -> None:
    """What a Prometheus would write of the one source there is."""
    body = write_request(
        {"vllm:generation_tokens_total": 1.0}, int(datetime.now(UTC).timestamp() * 1000),
        instance="vllm:8000", model_name="llama",
    )  # fmt: skip
    headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "snappy"}
    status, found = ours.ask("POST", "/api/v1/write", body, headers)
    assert status == 200, found


def filled_in(expr: str, **values: str) -> str:
    """A panel's query as Grafana sends it."""
    for name, value in values.items():
        expr = re.sub(rf"\${name}\b", value, expr)
    assert "$" not in expr
    return expr


def test_no_panel_is_empty_on_two_servers_at_once(
    service: Callable[..., Service], program: Programs, tmp_path: Path
) -> None:
    ours = service(FLEET)
    fill(ours)
    ours.start()
    wait_until("the first close", lambda: "never" not in ours.get("/v1/doctor")["facts"]["closed until"])
    speak(ours)
    servers = [Prometheus(program, tmp_path / name, ours.port) for name in ("one", "two")]
    for server in servers:
        wait_until("it was scraped twice", server.ready)

    everything = {"instance": ".+", "model": ".+", "tenant": ".+", "book": PLAN, "budget": ".+"}
    some = {**everything, "model": "llama", "tenant": "blue|red", "budget": "blue"}
    queries = [(b.name, p.title, q.expr) for b in grafana.DASHBOARDS for p in b.panels for q in p.queries]
    for server in servers:
        empty = [
            (board, title, window)
            for board, title, expr in queries
            for window in ("1h", "24h", "30d")
            for values in (everything, some)
            if not server.query(filled_in(expr, window=window, **values))
        ]
        assert empty == []
        # A machine that is busy may miss a second while the panels are asked: then five seconds without a miss follow.
        wait_until("it was up for five seconds", server.reads_us)
        answered = server.one("sum_over_time(up[10m]) / count_over_time(up[10m])")
        assert answered >= 0.9, f"{answered:.0%} of the scrapes were good"

    # What a viewer may choose is there to choose.
    for board in grafana.DASHBOARDS:
        if board.variable:
            label, family = board.variable
            names = asked(servers[0].port, f"/api/v1/label/{label}/values", **{"match[]": family})["data"]
            wanted = {"model": {"llama", "qwen", "claude", "(none)"}, "tenant": {"blue", "red", "(idle)"}}
            wanted |= {"book": {PLAN}, "budget": {"all", "blue"}}
            assert set(names) == wanted[label]

    # It came as OpenMetrics: the text format has no units.
    told = asked(servers[0].port, "/api/v1/metadata", metric="pertoken_spend_usd")["data"][
        "pertoken_spend_usd"
    ]
    assert (told[0]["type"], told[0]["unit"]) == ("gauge", "usd")
    for server in servers:
        figures_are_the_ledgers(server, ours)


def figures_are_the_ledgers(server: Prometheus, ours: Service) -> None:
    """What Prometheus holds is what the service answers, and what it answers is right by hand."""
    until = datetime.fromtimestamp(server.one("pertoken_closed_until_timestamp_seconds"), UTC)
    window = {"book": "actual", "start": (until - timedelta(hours=24)).isoformat(), "end": until.isoformat()}
    (whole,) = ours.get("/v1/cost", **window)["rows"]
    for scope in ("", "pool_", "model_", "tenant_"):
        spend = server.one(f'sum(pertoken_{scope}spend_usd{{window="24h"}})')
        assert spend == pytest.approx(float(whole["cost_usd"]), rel=1e-12)
    # 8 GPUs at 1 USD, 10 kWh at the plug × PUE at 0.1 USD, and 100,000 tokens each way of the API.
    kwh = 1.2 * (1 + 2 + 2 + 4 + 1)
    hour = 8 + 0.1 * kwh + 0.1 * 3 + 0.1 * 15
    assert Decimal(whole["cost_usd"]) == pytest.approx(Decimal(24 * hour), rel=Decimal("1e-6"))
    tokens = 3 * (1e6 + 0.25e6 + 0.5e6) + 2e5
    usd = server.one('pertoken_cost_per_mtok_usd{window="24h",metric="usd_per_mtok_total"}')
    assert usd == pytest.approx(hour / tokens * 1e6, rel=1e-6)
    assert server.one('pertoken_energy_joules{window="24h"}') == pytest.approx(24 * kwh * 3.6e6)
    assert server.one('pertoken_utilisation_ratio{window="24h"}') == pytest.approx(4.5 / 8)
    report = ours.get(
        "/v1/report", book=f"actual,{PLAN}", by="pool", start=window["start"], end=window["end"]
    )
    for driver in ("price", "volume", "efficiency", "mix"):
        told = server.one(f'pertoken_plan_variance_usd{{window="24h",driver="{driver}"}}')
        assert told == pytest.approx(float(report["total"][f"{driver}_usd"]), abs=1e-9)


class Webhook:
    """What an Alertmanager tells."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        hook = self

        class Page(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.told += [(a["labels"]["alertname"], a["status"]) for a in body["alerts"]]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_an_alert_reaches_alertmanager_and_resolves(
    service: Callable[..., Service], program: Programs, tmp_path: Path, webhook: Webhook
) -> None:
    ours = service(FLEET)
    ours.start()
    manager = free_port()
    config = {
        "route": {"receiver": "hook", "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h"},
        "receivers": [
            {
                "name": "hook",
                "webhook_configs": [{"url": f"http://127.0.0.1:{webhook.port}/", "send_resolved": True}],
            }
        ],
    }
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump(config))
    program(
        found_program("prometheus-alertmanager", "prometheus-alertmanager"),
        f"--config.file={tmp_path / 'alertmanager.yml'}", f"--storage.path={tmp_path / 'alerts'}",
        f"--web.listen-address=127.0.0.1:{manager}", "--cluster.listen-address=",
    )  # fmt: skip
    rules = grafana.rules()
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "0s"  # ten minutes are promtool's affair, in tests/report/test_grafana.py
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    more = {
        "rule_files": [str(tmp_path / "rules.yml")],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{manager}"]}]}]},
    }
    server = Prometheus(program, tmp_path / "one", ours.port, more)
    wait_until("the alert fires", lambda: ("PerTokenSourceSilent", "firing") in webhook.told)
    speak(ours)
    wait_until("it resolves", lambda: ("PerTokenSourceSilent", "resolved") in webhook.told)
    assert server.query('ALERTS{alertname="PerTokenSourceSilent"}') == []
    active = asked(manager, "/api/v2/alerts", active="true")
    assert "PerTokenSourceSilent" not in {a["labels"]["alertname"] for a in active}
