"""The first page moves while a real LLM server answers, and its streams do not keep the service from stopping."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page

from tests.end_to_end.conftest import Service, free_port, wait_until
from tests.end_to_end.test_real_parts import Power, complete, power
from tests.web.conftest import LIGHT, watched

__all__ = ["power"]  # a fixture of others

FLEET = """
sites:
  lab: {{timezone: UTC, pue: 1.2, tariff: {{usd_per_kwh: 0.08}}}}
pools:
  scraped:
    gpu: L4
    site: lab
    count: 1
    price: {{term: owned, usd_per_gpu: 35040, life_years: 4, wacc_fraction: 0, residual_fraction: 0,
             method: straight-line}}
sources:
  scrape:
    - {{name: llm, url: "http://127.0.0.1:{llm}/metrics", pool: scraped, model: tiny, interval_s: 1}}
    - {{name: power, url: "http://127.0.0.1:{power}/metrics", pool: scraped, interval_s: 1}}
"""


def number(page: Page, name: str, part: str = "now") -> float:
    """What a tile shows; 0 for a dash."""
    text = page.locator(f"[data-{part}={name}]").inner_text()
    return 0.0 if text == "–" else float(text.replace(",", ""))


def test_the_live_figure_moves_while_an_engine_answers(
    service: Callable[..., Service],
    program: Callable[..., subprocess.Popen[bytes]],
    power: Power,
    browser: Browser,
    tmp_path: Path,
) -> None:
    llm = free_port()
    script = str(Path(__file__).with_name("tiny_llm.py"))
    program(sys.executable, script, str(tmp_path / "tiny.gguf"), str(llm))
    wait_until("the LLM server answers", lambda: "ready" in (tmp_path / "program0.log").read_text(), 60)
    here = service(FLEET.format(llm=llm, power=power.port))
    here.start()
    wait_until("two pages were read", lambda: power.asked >= 2, 30)
    served = here.here["url"]
    done, counted = threading.Event(), [0]

    def answering() -> None:
        while not done.is_set():
            power.joules += 300
            counted[0] += complete(llm, "what does a token cost?", 64)["usage"]["completion_tokens"]

    with watched(browser, served, **LIGHT) as page:
        page.goto(f"{served}/")
        page.locator("[data-now=utilisation]:not(:text-is('–'))").wait_for()
        assert number(page, "output_per_s") == 0
        client = threading.Thread(target=answering)
        client.start()
        try:
            seen: list[tuple[float, float]] = []

            def moved() -> bool:
                found = number(page, "output_per_s"), number(page, "output_per_s", "hour")
                if not seen or seen[-1] != found:
                    seen.append(found)
                return len({last for last, _ in seen}) >= 4

            wait_until("the live figure moves", moved, 60)
        finally:
            done.set()
            client.join()
        rates = [last for last, _ in seen]
        assert rates == sorted(rates)  # a minute has not gone: what came stays within it
        # The minute holds all that the clients were told of, and the page says so once the last scrape was read.
        wait_until(
            "all tokens count",
            lambda: abs(number(page, "output_per_s") - counted[0] / 60) < counted[0] / 6000,
        )
        assert number(page, "power_w") > 0
        assert number(page, "joule_per_token_total") > 0
        assert 0 < number(page, "utilisation") <= 100
        assert number(page, "usd_per_mtok_output") > 0
        assert number(page, "usd_per_hour") >= 1.0  # 35,040 USD over 4 years, and the energy
        # The hour so far catches up within its few seconds, on another base.
        wait_until("the hour moves", lambda: number(page, "output_per_s", "hour") > seen[0][1], 30)
    streams = [stream(served) for _ in range(5)]
    began_s = time.monotonic()
    assert here.stop() == 0
    assert time.monotonic() - began_s < 10  # uvicorn alone would wait 20 s for them
    for connection, answer in streams:
        answer.read()  # to its end
        connection.close()


def stream(served: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A stream of which the first line was read."""
    url = urlsplit(served)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
    connection.request("GET", "/live")
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.readline() == b"retry: 3000\n"
    return connection, answer
