"""From a real LLM server to USD per million tokens, both ways in: scraped by us, and remote-written by Prometheus."""

from __future__ import annotations

import http.client
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Service, free_port, wait_until

JOULES = 45_000  # 0.0125 kWh at the server's plug, drawn while we watch
PUE, USD_PER_KWH = Decimal("1.2"), Decimal("0.08")
OWNED_USD_PER_HOUR = Decimal(1)  # 35,040 USD straight-line over 4 years of 8,760 h
RESERVED_USD_PER_HOUR = Decimal("2.5")

FLEET = """
sites:
  lab: {{timezone: UTC, pue: {pue}, tariff: {{usd_per_kwh: {usd_per_kwh}}}}}
  rented: {{timezone: UTC, pue: 1.1}}
pools:
  scraped:
    gpu: L4
    site: lab
    count: 1
    price: {{term: owned, usd_per_gpu: 35040, life_years: 4, wacc_fraction: 0, residual_fraction: 0,
             method: straight-line}}
  written:
    gpu: L4
    site: rented
    count: 1
    price: {{term: reserved, usd_per_gpu_hour: 2.5}}
sources:
  scrape:
    - {{name: llm, url: "http://127.0.0.1:{llm}/metrics", pool: scraped, model: tiny, interval_s: 1}}
    - {{name: power, url: "http://127.0.0.1:{power}/metrics", pool: scraped, interval_s: 1}}
  written:
    - {{instance: "127.0.0.1:{llm}", pool: written, model: tiny}}
"""
PROMETHEUS = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: llm
    static_configs: [{{targets: ["127.0.0.1:{llm}"]}}]
remote_write:
  - url: {url}/api/v1/write
    queue_config: {{batch_send_deadline: 500ms}}
"""


class Power:
    """A node exporter as Kepler and dcgm-exporter are, whose counters stand where the test puts them."""

    def __init__(self) -> None:
        self.joules, self.asked = 1_000_000.0, 0
        power = self

        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = (
                    f'kepler_node_platform_joules_total{{instance="n1"}} {power.joules}\n'
                    f'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{gpu="0",UUID="GPU-1"}} {power.joules / 2 * 1000}\n'
                ).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                power.asked += 1

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def power() -> Iterator[Power]:
    found = Power()
    yield found
    found.server.shutdown()
    found.server.server_close()


def complete(port: int, prompt: str, tokens: int, cache: bool = False) -> dict[str, Any]:
    """One request to the LLM server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "cache_prompt": cache}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found: dict[str, Any] = json.loads(answer.read())
    connection.close()
    assert answer.status == 200, found
    return found


def converse(port: int) -> tuple[int, int]:
    """Requests from three clients at once; prompt and output tokens by the clients' own count.

    The model's vocabulary is one token per character, after a start token and a leading space: what a prompt takes can
    be counted without asking the server. With the end token ignored, an answer has as many tokens as were asked for.
    """
    counted: list[tuple[int, int]] = []

    def client(number: int) -> None:
        for turn in range(8):
            prompt, tokens = f"client {number} asks {'again ' * turn}", 5 + 3 * turn + number
            usage = complete(port, prompt, tokens)["usage"]
            assert usage["prompt_tokens"] == len(prompt) + 2
            assert usage["completion_tokens"] == tokens
            counted.append((len(prompt) + 2, tokens))

    clients = [threading.Thread(target=client, args=(n,)) for n in range(3)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert len(counted) == 24
    return sum(p for p, _ in counted), sum(o for _, o in counted)


def totals(service: Service, first: datetime) -> tuple[dict[tuple[str, str], Decimal], int]:
    """Close from the first hour on, and quantities by pool and meter, with the number of hours closed."""
    end = datetime.now(UTC) + timedelta(hours=1)
    window = {"start": first.isoformat(), "end": end.replace(minute=0, second=0, microsecond=0).isoformat()}
    status, closed = service.ask("POST", "/v1/close", window)
    assert status == 200, closed
    assert not closed["unpriced"]
    found: dict[tuple[str, str], Decimal] = {}
    for row in service.get("/v1/usage", by="pool")["rows"]:
        found[row["pool"], row["meter"]] = Decimal(row["quantity"])
    return found, closed["hours"]


def test_tokens_watts_and_money_of_a_real_server(
    service: Callable[..., Service],
    program: Callable[..., subprocess.Popen[bytes]],
    power: Power,
    tmp_path: Path,
) -> None:
    prometheus = shutil.which("prometheus")
    assert prometheus, "the Debian package prometheus is missing: python tests/system_packages.py"
    llm = free_port()
    program(
        sys.executable, str(Path(__file__).with_name("tiny_llm.py")), str(tmp_path / "tiny.gguf"), str(llm)
    )
    wait_until("the LLM server answers", lambda: llm_answers(llm))
    first = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    ours = service(FLEET.format(llm=llm, power=power.port, pue=PUE, usd_per_kwh=USD_PER_KWH))
    ours.start()
    config = tmp_path / "prometheus.yml"
    config.write_text(PROMETHEUS.format(llm=llm, url=ours.here["url"]))
    program(
        prometheus, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{free_port()}",
    )  # fmt: skip

    def silent() -> list[str]:
        found = ours.get("/v1/doctor")["complaints"]
        return [c["text"] for c in found if c["kind"] == "silent"]

    wait_until("every source was read once", lambda: not silent())
    power.joules += JOULES
    asked = power.asked
    prompt, output = converse(llm)
    wait_until("the node was read after its counter rose", lambda: power.asked >= asked + 2)

    def arrived() -> bool:
        found, _ = totals(ours, first)
        return all(found.get((pool, "output_tokens"), 0) >= output for pool in ("scraped", "written"))

    wait_until("the tokens arrived both ways", arrived)
    found, hours = totals(ours, first)
    for pool in ("scraped", "written"):
        assert found[pool, "input_tokens"] == prompt
        assert found[pool, "output_tokens"] == output
        assert found[pool, "gpu_hours"] == hours
    kwh = Decimal(JOULES) / 3_600_000
    assert found["scraped", "it_energy_kwh"] == kwh
    assert found["scraped", "gpu_energy_kwh"] == kwh / 2
    assert found["scraped", "energy_kwh"] == kwh * PUE

    # By hand: (hours held × 1 USD + 0.0125 kWh × 1.2 × 0.08 USD) over all tokens; rented power is in the rent.
    tokens = prompt + output
    by_hand = {
        "scraped": (hours * OWNED_USD_PER_HOUR + kwh * PUE * USD_PER_KWH) / tokens * 1_000_000,
        "written": hours * RESERVED_USD_PER_HOUR / tokens * 1_000_000,
    }
    rows = ours.get("/v1/metric", name="usd_per_mtok_total", by="pool")["rows"]
    shown = {row["pool"]: row["usd_per_mtok_total"] for row in rows}
    for pool, usd in by_hand.items():
        assert shown[pool] == pytest.approx(float(usd), rel=1e-12)

    # A restart counts nothing twice: the counters' states are in the journal.
    assert ours.stop() == 0
    ours.start()
    again = converse(llm)
    prompt, output = prompt + again[0], output + again[1]
    # What the server's prefix cache holds is computed once: the second time it is no computed input.
    repeated = "the same long prompt, sent twice over"
    cached = 0
    for _ in range(2):
        usage = complete(llm, repeated, 4, cache=True)["usage"]
        told = usage["prompt_tokens_details"]["cached_tokens"]
        prompt, cached, output = prompt + len(repeated) + 2 - told, cached + told, output + 4
    assert cached > 20
    wait_until("the second conversation arrived", arrived)
    found, _ = totals(ours, first)
    for pool in ("scraped", "written"):
        assert found[pool, "input_tokens"] == prompt
        assert found[pool, "output_tokens"] == output
        assert found[pool, "cached_input_tokens"] == cached


def llm_answers(port: int) -> bool:
    """Whether the LLM server is up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
