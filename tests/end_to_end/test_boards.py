"""Watts of boards, read by the real nvidia-ml-py through a stub of NVIDIA's library, under a real LLM server's tokens.

Two boards: one with an energy counter, under the engine that we scrape; one that tells only its power and how busy it
is, in a pool whose gateway sends us usage events.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pertoken.catalog import gpus
from pertoken.meter import open_journal
from tests.end_to_end.conftest import Service, free_port, wait_until
from tests.end_to_end.test_real_parts import complete, converse, llm_answers, totals
from tests.nvml_stub import compiled, stand

JOULES, WATTS, BUSY = 18_000, 60, 40  # 0.005 kWh of the first board; the second draws 60 W and is 40 % busy
PUE, USD_PER_KWH = 1.25, 0.1
USD_PER_HOUR = 1  # 35,040 USD straight-line over 4 years of 8,760 h
FLEET = """
sites:
  lab: {{timezone: UTC, pue: {pue}, tariff: {{usd_per_kwh: {usd_per_kwh}}}}}
pools:
  engine: &bought
    gpu: L4
    site: lab
    count: 1
    price: {{term: owned, usd_per_gpu: 35040, life_years: 4, wacc_fraction: 0, residual_fraction: 0,
             method: straight-line}}
  gateway: *bought
sources:
  scrape:
    - {{name: llm, url: "http://127.0.0.1:{llm}/metrics", pool: engine, model: tiny, interval_s: 1}}
  nvml_pools: {{GPU-stub-0: engine, GPU-stub-1: gateway}}
"""


def away_from_the_hour() -> datetime:
    """The running hour, once there are two minutes left of it."""
    now = datetime.now(UTC)
    if now.minute >= 58:
        time.sleep(3601 - now.minute * 60 - now.second)
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def calls(port: int) -> list[dict[str, Any]]:
    """Calls of the LLM server as a gateway tells of them."""
    usages = [complete(port, f"call {n}", 20 + n)["usage"] for n in range(3)]
    return [
        {"key": f"call{n}", "pool": "gateway", "model": "tiny", "tenant": "blue", "usage": usage}
        for n, usage in enumerate(usages)
    ]


def test_joules_of_boards_in_usd_per_million_tokens(
    service: Callable[..., Service], program: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    llm, boards = free_port(), tmp_path / "boards"
    program(
        sys.executable, str(Path(__file__).with_name("tiny_llm.py")), str(tmp_path / "tiny.gguf"), str(llm)
    )
    wait_until("the LLM server answers", lambda: llm_answers(llm))
    first = away_from_the_hour()
    stand(boards, (1_000_000, 30, 10), (-1, WATTS, BUSY))
    ours = service(FLEET.format(llm=llm, pue=PUE, usd_per_kwh=USD_PER_KWH))
    ours.environment = {"LD_LIBRARY_PATH": str(compiled(tmp_path)), "PT_STUB_FILE": str(boards)}
    ours.start()

    def silent() -> list[str]:
        return [c["text"] for c in ours.get("/v1/doctor")["complaints"] if c["kind"] == "silent"]

    wait_until("engine and boards were read once", lambda: not silent())
    stand(boards, (1_000_000 + JOULES, 70, 90), (-1, WATTS, BUSY))
    prompt, output = converse(llm)
    sent = calls(llm)
    status, told = ours.ask("POST", "/v1/events", sent)
    assert status == 200, told
    prompt += sum(e["usage"]["prompt_tokens"] for e in sent)
    output += sum(e["usage"]["completion_tokens"] for e in sent)

    def arrived() -> bool:
        found, _ = totals(ours, first)
        read = found.get(("engine", "gpu_energy_kwh"), 0) and found.get(("gateway", "gpu_energy_kwh"), 0)
        return bool(read) and found.get(("engine", "output_tokens"), 0) >= output

    wait_until("tokens and joules arrived", arrived, 60)
    found, hours = totals(ours, first)
    window = {"start": first.isoformat(), "end": (first + timedelta(hours=hours)).isoformat()}
    by_pool = {
        row["pool"]: row
        for row in ours.get(
            "/v1/metric",
            name="usd_per_mtok_total,joule_per_token_total,utilisation",
            by="pool",
            **window,
        )["rows"]
    }
    assert ours.stop() == 0
    with open_journal(ours.data / "journal") as journal:
        read = journal.totals(first).records.to_pylist()

    def journaled(meter: str) -> float:
        return sum(float(r["quantity"]) for r in read if r["pool"] == "gateway" and r["meter"] == meter)

    # What the boards drew: the counter's growth; watts over the seconds between readings.
    seen_s = journaled("gpu_seen_seconds")
    assert seen_s > 5
    board_kwh = {"engine": JOULES / 3.6e6, "gateway": WATTS * seen_s / 3.6e6}
    assert found["engine", "gpu_energy_kwh"] == Decimal("0.005")
    assert float(found["gateway", "gpu_energy_kwh"]) == pytest.approx(board_kwh["gateway"], abs=1e-6)
    # How busy: by the engine's own count of running requests; by the board's utilisation where no engine is scraped.
    assert journaled("active_seconds") == pytest.approx(seen_s * BUSY / 100, rel=1e-9)
    assert 0 < by_pool["engine"]["utilisation"] < 0.5
    assert by_pool["gateway"]["utilisation"] == pytest.approx(BUSY / 100, abs=1e-6)
    assert (found["engine", "input_tokens"], found["engine", "output_tokens"]) == (prompt, output)
    tokens = {
        "engine": prompt + output,
        "gateway": sum(e["usage"]["prompt_tokens"] + e["usage"]["completion_tokens"] for e in sent),
    }
    card = gpus.gpu("L4")
    for pool, kwh in board_kwh.items():
        # By hand: boards and host at the plug, × PUE at the utility meter; a GPU-hour is 1 USD, a kWh 0.1.
        assert found[pool, "gpu_hours"] == hours
        host_w = card.host_idle_w + (card.host_busy_w - card.host_idle_w) * by_pool[pool]["utilisation"]
        utility_kwh = (kwh + host_w / 1000 * hours) * PUE
        assert float(found[pool, "energy_kwh"]) == pytest.approx(utility_kwh, abs=2e-6)
        joules = utility_kwh * 3.6e6 / tokens[pool]
        usd = (USD_PER_HOUR * hours + utility_kwh * USD_PER_KWH) / tokens[pool] * 1e6
        assert by_pool[pool]["joule_per_token_total"] == pytest.approx(joules, rel=1e-4)
        assert by_pool[pool]["usd_per_mtok_total"] == pytest.approx(usd, rel=1e-6)
