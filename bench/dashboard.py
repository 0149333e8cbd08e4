"""The dashboard, measured here: the first page from a ledger of 40 M hourly rows, and 200 browsers on one stream.

``python bench/dashboard.py`` makes the ledger once (minutes, 2 GB) in ``--folder`` and measures; ``--rows 4e6`` makes
a smaller one. The page is drawn by a real Chromium; the stream is read by real sockets, and the processor time is that
of the server process alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

END = datetime(2026, 11, 24, 9, tzinfo=UTC)
HOUR = timedelta(hours=1)
POOLS, MODELS, TENANTS = 20, 3, 8
WEEK = 24 * 7
PAGES, SECONDS = 8, 20
FLEET = (
    "sites:\n  dc: {timezone: America/Los_Angeles, pue: 1.2, tariff: {usd_per_kwh: 0.1}}\npools:\n"
    + "".join(
        f"  p{i:02}: {{gpu: H100-SXM, site: dc, count: 80, price: {{term: owned, usd_per_gpu: 35040, life_years: 4, "
        "wacc_fraction: 0, residual_fraction: 0, method: straight-line}}\n"
        for i in range(POOLS)
    )
)
PER_GROUP = (
    ("input", "input_tokens", 3e6), ("input", "cached_input_tokens", 1e6), ("output", "output_tokens", 1e6),
    ("output", "requests", 3e3), ("input", "gpu_hours", 0.5), ("output", "gpu_hours", 2.0),
    ("input", "energy_kwh", 0.4), ("output", "energy_kwh", 1.5), ("waste", "gpu_hours", 0.1),
)  # fmt: skip
IDLE_ROWS = 12
PER_HOUR = POOLS * (MODELS * TENANTS * len(PER_GROUP) + IDLE_ROWS)


def main() -> None:
    """Make what is missing, measure, print."""
    options = argparse.ArgumentParser()
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pertoken-dashboard")
    options.add_argument("--rows", type=float, default=40e6)
    options.add_argument("--browsers", type=int, default=200)
    options.add_argument("--only", choices=["make", "page", "stream"])
    options.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        serve(given.folder, given.serve)
        return
    hours = -int(-given.rows // PER_HOUR)
    folder = given.folder / str(hours)
    if not (folder / "made").exists():
        make(folder, hours)
    if given.only in (None, "page"):
        page(folder)
    if given.only in (None, "stream"):
        stream(folder, given.browsers)


def make(folder: Path, hours: int) -> None:
    """A ledger file of that many hours before `END`, closed."""
    from pertoken.fleet import load_fleet
    from pertoken.ledger import open_ledger
    from pertoken.report._terms import rates_of
    from pertoken.report.books import LEDGER_FILE

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    (folder / "fleet.yaml").write_text(FLEET)
    fleet = load_fleet(folder / "fleet.yaml")
    ledger = open_ledger(folder / "data" / LEDGER_FILE)
    begun_s = time.perf_counter()
    at = END - hours * HOUR
    while at < END:
        until = min(at + WEEK * HOUR, END)
        ledger.add_usage(usage(at, round((until - at) / HOUR)))
        ledger.add_rates(rates_of(fleet, at, until))
        ledger.close("actual", at, until)
        say(f"  made up to {until:%Y-%m-%d}, {time.perf_counter() - begun_s:.0f} s")
        at = until
    ledger.shut()
    (folder / "made").touch()


def usage(start: datetime, hours: int) -> pa.Table:
    """Usage rows of every pool, model and tenant, and what was idle."""
    from pertoken.tables import USAGE
    from pertoken.units import IDLE

    rows: list[tuple[str, str, str, str, str, float]] = []
    for pool in range(POOLS):
        for model in range(MODELS):
            for tenant in range(TENANTS):
                scale = 1 + (pool + 3 * model + 5 * tenant) % 7
                rows += [
                    (f"p{pool:02}", f"model-{model}", f"tenant-{tenant}", *r[:2], r[2] * scale)
                    for r in PER_GROUP
                ]
        for row in range(IDLE_ROWS):
            meter = ("gpu_hours", "energy_kwh")[row % 2]
            rows.append((f"p{pool:02}", f"model-{row // 4}", IDLE, "idle", meter, 1.0 + row))
    columns = list(zip(*rows, strict=True))
    n = len(rows)
    clock = np.arange(hours)
    wave = 1 + 0.5 * np.sin(2 * np.pi * clock / 24)
    quantity = np.floor(np.outer(wave, np.array(columns[5])) * 1e6).astype(np.int64).ravel()
    wide = np.zeros(2 * len(quantity), np.int64)
    wide[::2] = quantity
    first = np.datetime64(start.replace(tzinfo=None), "us")
    stamps = np.repeat(first + clock * np.timedelta64(1, "h"), n)
    texts = {
        name: pa.DictionaryArray.from_arrays(
            np.tile(codes.astype(np.int32), hours), pa.array(values.tolist(), pa.string())
        )
        for name, (values, codes) in {
            name: np.unique(np.array(column), return_inverse=True)
            for name, column in zip(("pool", "model", "tenant", "phase", "meter"), columns[:5], strict=True)
        }.items()
    }
    whole: dict[str, Any] = {
        **{name: array.cast(pa.string()) for name, array in texts.items()},
        "book": pa.repeat("actual", n * hours),
        "basis": pa.repeat("measured", n * hours),
        "hour": pa.array(stamps).cast(USAGE.field("hour").type),
        "quantity": pa.Array.from_buffers(
            USAGE.field("quantity").type, n * hours, [None, pa.py_buffer(wide.tobytes())]
        ),
    }
    return pa.table([whole[name] for name in USAGE.names], schema=USAGE)


def say(text: str) -> None:
    """One line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """The service on the ledger, in a process of its own: its address and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(port), "--folder", str(folder)])
    try:
        until = time.monotonic() + 60
        while True:
            try:
                ask(port, "GET", "/readyz")
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(30)


def serve(folder: Path, port: int) -> None:
    """The service with a clock that began half an hour after the ledger's last hour."""
    import uvicorn

    from pertoken.fleet import load_fleet
    from pertoken.report.books import open_books
    from pertoken.web.app import create_app
    from pertoken.web.service import Service
    from pertoken.web.tokens import Tokens

    begun_s = time.time()
    now_s = (END + HOUR / 2).timestamp()
    books = open_books(load_fleet(folder / "fleet.yaml"), folder / "data")
    service = Service(books, folder, clock=lambda: now_s + time.time() - begun_s)
    app = create_app(service, Tokens(folder / "data"), require_tokens=False)
    uvicorn.run(app, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=5)


def ask(port: int, method: str, path: str, body: Any = None) -> bytes:
    """The body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        return connection.getresponse().read()
    finally:
        connection.close()


_DRAWN = """() => {
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  const [page] = performance.getEntriesByType("navigation");
  const bars = document.querySelectorAll(".spark rect").length;
  return [page.responseStart, page.responseEnd, paint ? paint.startTime : 0, bars];
}"""


def page(folder: Path) -> None:
    """From the click to the drawn figures of the first page, in Chromium, cold and warm."""
    from playwright.sync_api import sync_playwright

    with served(folder) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        found = []
        for turn in range(PAGES):
            context = browser.new_context(viewport={"width": 1200, "height": 800})
            tab = context.new_page()
            begun_s = time.perf_counter()
            tab.goto(address, wait_until="commit")
            tab.locator(".spark rect").nth(10 * 24 - 1).wait_for(state="attached")
            tab.wait_for_timeout(300)
            first, last, paint, bars = tab.evaluate(_DRAWN)
            tab.locator("[data-hour=usd_per_hour]:not(:text-is('–'))").wait_for()
            live_s = time.perf_counter() - begun_s
            found.append((paint, first, last))
            say(
                f"page {turn}: answer {first:.0f} ms, whole {last:.0f} ms, {bars} bars painted at {paint:.0f} ms, "
                f"live figures at {1000 * live_s:.0f} ms"
            )
            context.close()
        browser.close()
        paints = sorted(paint for paint, _, _ in found)
        say(
            f"first page, drawn: first {found[0][0]:.0f} ms, median {paints[len(paints) // 2]:.0f} ms (asked: 500)"
        )


def stream(folder: Path, browsers: int) -> None:
    """Processor time of the server while so many sockets read `/live`, all tenants' filters among them."""
    with served(folder) as (address, pid):
        port = int(address.rpartition(":")[2])
        ended = threading.Event()
        feeding = threading.Thread(target=feed, args=(port, ended))
        feeding.start()
        for count in (0, browsers):
            streams = [looking(port, n) for n in range(count)]
            time.sleep(5)
            received = [0] * count
            readers = selectors.DefaultSelector()
            for n, one in enumerate(streams):
                readers.register(one, selectors.EVENT_READ, n)
            before_s, begun_s = spent_s(pid), time.perf_counter()
            while time.perf_counter() - begun_s < SECONDS:
                if not count:
                    time.sleep(0.2)
                    continue
                for key, _ in readers.select(0.2):
                    received[key.data] += streams[key.data].recv(1 << 16).count(b"event: now")
            gone_s = time.perf_counter() - begun_s
            share = (spent_s(pid) - before_s) / gone_s
            told = f", {min(received)} to {max(received)} messages each in {gone_s:.0f} s" if count else ""
            say(f"{count} browsers: the server takes {share:.3f} of a core{told}")
            for one in streams:
                one.close()
            time.sleep(3)
        ended.set()
        feeding.join()


def looking(port: int, number: int) -> socket.socket:
    """A socket that reads the stream, every ninth that of all and the others of a tenant's filter."""
    query = f"?tenant=tenant-{number % 9}" if number % 9 < TENANTS else ""
    one = socket.create_connection(("127.0.0.1", port), 30)
    one.sendall(f"GET /live{query} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return one


def feed(port: int, ended: threading.Event) -> None:
    """A hundred events each half a second, as of a busy gateway."""
    number = 0
    while not ended.is_set():
        sent = []
        now_s = (END + HOUR / 2).timestamp()
        for _ in range(100):
            number += 1
            sent.append(
                {
                    "key": str(number), "ts": now_s + number / 200, "pool": f"p{number % POOLS:02}",
                    "model": "model-0", "tenant": f"tenant-{number % TENANTS}", "meter": "output_tokens",
                    "quantity": 500,
                }
            )  # fmt: skip
        ask(port, "POST", "/v1/events", sent)
        ended.wait(0.5)


def spent_s(pid: int) -> float:
    """Processor time [s] of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
