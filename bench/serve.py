"""The running service, measured here: events to the disk, scraping, closing, asking.

Each figure with what it is beside: the same events through FastAPI and pydantic, undurable, in the same run.
``python bench/serve.py [--scale 0.1]`` runs it all on a tenth of the rows.
"""

from __future__ import annotations

import argparse
import http.client
import http.server
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

BATCH = 10_000
ARROW_BATCH = 100_000
SENDERS = 2
FLEET = """
sites:
  dc: {timezone: UTC, pue: 1.2, tariff: {usd_per_kwh: 0.1}}
pools:
  h100: {gpu: H100-SXM, site: dc, count: 8, price: {term: reserved, usd_per_gpu_hour: 2}}
  api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}
"""
PEER = """
from fastapi import FastAPI
from pydantic import BaseModel
class Event(BaseModel):
    key: str
    ts: float
    pool: str
    model: str
    tenant: str
    meter: str
    quantity: float
app = FastAPI()
@app.post("/v1/events")
def take(events: list[Event]) -> dict[str, int]:
    return {"records": len(events)}
"""


def main() -> None:
    """Measure and print."""
    parts: dict[str, Callable[[float], None]] = {
        "events": events, "scrape": scrape, "close": close, "query": query,
    }  # fmt: skip
    options = argparse.ArgumentParser()
    options.add_argument("--scale", type=float, default=1.0)
    options.add_argument("--only", default="", choices=list(parts))
    chosen = options.parse_args()
    for name, part in parts.items():
        if chosen.only in ("", name):
            part(chosen.scale)


def events(scale: float) -> None:
    """Events a second through HTTP, JSON and Arrow, to the disk; and the peer, to nowhere."""
    count = int(2_000_000 * scale) // ARROW_BATCH * ARROW_BATCH or ARROW_BATCH
    now_s = time.time()
    with tempfile.TemporaryDirectory() as folder:
        with serving(Path(folder), FLEET) as (port, _):
            for what, kind, batch, body in (
                ("Arrow", "application/vnd.apache.arrow.stream", ARROW_BATCH, arrow_body),
                ("JSON", "application/json", BATCH, json_body),
            ):
                bodies = [body(f"{what}{n}", batch, now_s) for n in range(count // batch)]
                seconds = send(port, kind, bodies)
                print(
                    f"events, {what}, durable: {count / seconds:,.0f} a second, {batch:,} a batch, {SENDERS} senders"
                )
        with peer(Path(folder)) as port:
            bodies = [json_body(f"peer{n}", BATCH, now_s) for n in range(count // BATCH)]
            seconds = send(port, "application/json", bodies)
            print(f"events, JSON, FastAPI + pydantic, undurable: {count / seconds:,.0f} a second")


def scrape(scale: float) -> None:
    """Share of a core that a hundred targets take, each a page of some 2,000 lines every 15 s."""
    targets, watched_s = 100, max(30.0, 60.0 * scale)
    page, lines = exposition()
    with tempfile.TemporaryDirectory() as folder, pages(page) as port:
        entries = "".join(
            f"    - {{name: t{n}, url: 'http://127.0.0.1:{port}/t{n}', pool: h100, gpus: 0.08}}\n"
            for n in range(targets)
        )
        with serving(Path(folder), f"{FLEET}sources:\n  scrape:\n{entries}") as (_, process):
            time.sleep(17)  # every target was read once
            before, began = cpu_s(process), time.monotonic()
            time.sleep(watched_s)
            share = (cpu_s(process) - before) / (time.monotonic() - began)
    print(f"scrape, {targets} targets of {lines:,} lines at 15 s: {share:.1%} of one core")


def close(scale: float) -> None:
    """Seconds to close an hour that holds ten million events."""
    from pertoken.fleet import load_fleet
    from pertoken.meter import events as event_source
    from pertoken.report.books import open_books

    count = int(10_000_000 * scale) // ARROW_BATCH * ARROW_BATCH or ARROW_BATCH
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    now_s = hour.timestamp() + 1800
    with tempfile.TemporaryDirectory() as folder:
        fleet = Path(folder) / "fleet.yaml"
        fleet.write_text(FLEET)
        with open_books(load_fleet(fleet), Path(folder) / "data") as books:
            for n in range(count // ARROW_BATCH):
                body = arrow_body(f"c{n}", ARROW_BATCH, now_s)
                kind = "application/vnd.apache.arrow.stream"
                books.journal.append(event_source.read(body, kind, source="usage/bench", now_s=now_s))
            began = time.perf_counter()
            done = books.close([hour])
            seconds = time.perf_counter() - began
            assert len(done.hours) == 1
            (told,) = books.ledger.usage("meter", where={"meter": "output_tokens"}).to_pylist()
            one_batch = int((np.arange(ARROW_BATCH) % 900).sum())
            assert told["quantity"] == one_batch * (count // ARROW_BATCH)
            print(f"close of an hour with {count:,} events: {seconds:.2f} s")


def query(scale: float) -> None:
    """Milliseconds of a dashboard's questions on a year of hours × 20 pools × 30 models × 200 tenants.

    Dense that would be a thousand million cells. Here each pool serves three of the models, each model seven tenants in
    an hour, drawn anew every hour with some far busier than others; each of these has twelve usage and six cost rows:
    5,040 usage rows an hour, 44 million a year.
    """
    from pertoken.ledger import open_ledger

    days = max(40, int(365 * scale))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.duckdb"
        ledger = open_ledger(path)
        rows = 0
        for first in range(0, days, 15):
            parts = [a_day(day) for day in range(first, min(days, first + 15))]
            for at, table in enumerate(("usage_hourly", "cost_hourly")):
                ledger._engine.load(table, pa.concat_tables([part[at] for part in parts]))
            rows += sum(usage.num_rows for usage, _ in parts)
        began = time.perf_counter()
        ledger.sum_up()
        print(f"query, {rows:,} usage rows: days and months summed in {time.perf_counter() - began:.0f} s")
        ledger.shut()
        print(f"query, ledger file: {path.stat().st_size / 1e6:,.0f} MB")
        ledger = open_ledger(path)
        for name, ask in questions(ledger, days).items():
            times = []
            for _ in range(7):
                began = time.perf_counter()
                ask()
                times.append(time.perf_counter() - began)
            print(
                f"query, {name}: {sorted(times[1:])[3] * 1000:.0f} ms, best {min(times) * 1000:.0f}, "
                f"first {times[0] * 1000:.0f}"
            )
        ledger.shut()


def questions(ledger: Any, days: int) -> dict[str, Callable[[], Any]]:
    """What the pages of a dashboard ask."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    all_of: dict[str, Any] = {"where": {"book": "actual"}}
    week = {**all_of, "start": start + timedelta(days=days - 8), "end": start + timedelta(days=days - 1)}
    local = {**all_of, "start": start + timedelta(hours=8), "end": start + timedelta(days=31, hours=7)}
    one = {"where": {"book": "actual", "tenant": "tenant007"}}
    headline = (
        "usd_per_mtok_output",
        "usd_per_mtok_input",
        "usd_per_mtok_total",
        "joule_per_token_total",
        "utilisation",
    )
    return {
        "five metrics, the year": lambda: ledger.metric(*headline, **all_of),
        "usd_per_mtok_output by model, the year": lambda: ledger.metric(
            "usd_per_mtok_output", by=["model"], **all_of
        ),
        "usd_per_mtok_total by pool, the year": lambda: ledger.metric(
            "usd_per_mtok_total", by=["pool"], **all_of
        ),
        "usd_per_mtok_total by hour, the year": lambda: ledger.metric(
            "usd_per_mtok_total", by=["hour"], **all_of
        ),
        "usd_per_mtok_output by hour of a tenant, the year": lambda: ledger.metric(
            "usd_per_mtok_output", by=["hour"], **one
        ),
        "cost by tenant, the year": lambda: ledger.cost("tenant", **all_of),
        "cost by tenant and model, the year": lambda: ledger.cost("tenant", "model", **all_of),
        "cost by component and phase, the year": lambda: ledger.cost("component", "phase", **all_of),
        "cost by hour and component, a week": lambda: ledger.cost("hour", "component", **week),
        "cost by tenant, a month of another time zone": lambda: ledger.cost("tenant", **local),
        "books and their hours": ledger.books,
    }


# -- parts


USED = (
    ("input", "input_tokens", 1e6), ("input", "cached_input_tokens", 1e6), ("output", "output_tokens", 1e5),
    ("output", "output_tokens_in_slo", 1e5), ("output", "requests", 500.0), ("input", "gpu_hours", 8.0),
    ("output", "gpu_hours", 8.0), ("waste", "gpu_hours", 2.0), ("input", "energy_kwh", 4.0),
    ("output", "energy_kwh", 4.0), ("input", "gpu_energy_kwh", 4.0), ("output", "gpu_energy_kwh", 4.0),
)  # fmt: skip
PAID = (
    ("input", "compute", "capital"), ("output", "compute", "capital"), ("waste", "compute", "capital"),
    ("input", "energy", "energy_charge"), ("output", "energy", "energy_charge"),
    ("output", "infrastructure", "network"),
)  # fmt: skip


def a_day(day: int) -> tuple[pa.Table, pa.Table]:
    """A day's usage and cost rows, the rows of an hour together as a close writes them."""
    from pertoken.tables import COSTS, USAGE

    random = np.random.default_rng(day)
    hours, pools, models, tenants = 24, 20, 3, 7
    each = hours * pools * models * tenants
    base = np.datetime64("2026-01-01T00") + np.timedelta64(24 * day, "h")
    hour = (base + np.repeat(np.arange(hours), each // hours)).astype("datetime64[us]")
    pool = np.tile(np.repeat(np.arange(pools), models * tenants), hours)
    model = (pool * 3 + np.tile(np.repeat(np.arange(models), tenants), hours * pools)) % 30
    tenant = np.floor(200 * random.random(each) ** 2)

    def coded(names: list[str], codes: Any) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(names))

    def rows(schema: pa.Schema, parts: Any, texts: tuple[str, ...], column: str, values: Any) -> pa.Table:
        count = len(parts)
        columns = {
            "book": coded(["actual"], np.zeros(each * count)),
            "basis": coded(["measured"], np.zeros(each * count)),
            "hour": pa.array(np.repeat(hour, count)).cast(pa.timestamp("us", tz="UTC")),
            "pool": coded([f"pool{n:02d}" for n in range(pools)], np.repeat(pool, count)),
            "model": coded([f"model{n:02d}" for n in range(30)], np.repeat(model, count)),
            "tenant": coded([f"tenant{n:03d}" for n in range(200)], np.repeat(tenant, count)),
            column: pa.array(values).cast(schema.field(column).type),
        }
        for at, name in enumerate(texts):
            known = sorted({part[at] for part in parts})
            columns[name] = coded(known, np.tile([known.index(part[at]) for part in parts], each))
        return pa.table({name: columns[name] for name in schema.names})

    most = np.array([part[2] for part in USED])
    used = np.floor(random.random((each, len(USED))) * most + 1).ravel()
    paid = random.integers(1, 9, each * len(PAID)).astype(float)
    return (
        rows(USAGE, USED, ("phase", "meter"), "quantity", used),
        rows(COSTS, PAID, ("phase", "category", "component"), "cost_usd", paid),
    )


def json_body(prefix: str, count: int, now_s: float) -> bytes:
    """Events as a sender would write them."""
    rows = [
        {
            "key": f"{prefix}-{n}", "ts": now_s, "pool": "api", "model": f"model{n % 8}", "tenant": f"tenant{n % 200}",
            "meter": "output_tokens", "quantity": n % 900,
        }
        for n in range(count)
    ]  # fmt: skip
    return json.dumps(rows, separators=(",", ":")).encode()


def arrow_body(prefix: str, count: int, now_s: float) -> bytes:
    """The same as an Arrow stream."""
    numbers = np.arange(count)
    table = pa.table(
        {
            "key": pa.array([f"{prefix}-{n}" for n in range(count)]),
            "ts": pa.array(np.full(count, now_s)),
            "pool": pa.repeat("api", count),
            "model": pa.array([f"model{n}" for n in range(8)]).take(numbers % 8),
            "tenant": pa.array([f"tenant{n}" for n in range(200)]).take(numbers % 200),
            "meter": pa.repeat("output_tokens", count),
            "quantity": pa.array((numbers % 900).astype(float)),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def send(port: int, kind: str, bodies: list[bytes]) -> float:
    """Post all bodies over a few kept connections; seconds."""
    waiting = list(bodies)
    failed: list[int] = []

    def sender() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while waiting:
            connection.request("POST", "/v1/events", waiting.pop(), {"Content-Type": kind})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                failed.append(answer.status)
        connection.close()

    threads = [threading.Thread(target=sender) for _ in range(SENDERS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return time.perf_counter() - began


@contextmanager
def serving(folder: Path, fleet: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A `pertoken serve` of its own."""
    path, port = folder / "fleet.yaml", free_port()
    path.write_text(fleet)
    command = [
        str(Path(sys.executable).with_name("pertoken")), "serve", "--fleet", str(path), "--data", str(folder / "data"),
        "--port", str(port),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def peer(folder: Path) -> Iterator[int]:
    """FastAPI and pydantic, as most would write it."""
    (folder / "peer.py").write_text(PEER)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "peer:app", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def pages(page: Callable[[int], bytes]) -> Iterator[int]:
    """A server of exposition pages in a process of its own, so that its CPU is not ours."""
    port = free_port()
    pid = os.fork()
    if pid == 0:

        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = page(int(time.time()))
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        http.server.ThreadingHTTPServer(("127.0.0.1", port), Page).serve_forever()
    try:
        wait_for(port)
        yield port
    finally:
        os.kill(pid, 15)
        os.waitpid(pid, 0)


def exposition() -> tuple[Callable[[int], bytes], int]:
    """A vLLM page: its own counters, and the histograms around them that nobody here counts."""
    buckets = "".join(
        f'vllm:time_to_first_token_seconds_bucket{{engine="{e}",le="{b}",model_name="m"}} 0.0\n'
        for e in range(8)
        for b in range(240)
    )
    names = (
        "prompt_tokens_total", "generation_tokens_total", "request_prefill_time_seconds_sum",
        "request_decode_time_seconds_sum", "num_requests_running", "prefix_cache_hits_total",
    )  # fmt: skip

    def page(count: int) -> bytes:
        own = "".join(
            f'vllm:{name}{{engine="{e}",model_name="m"}} {count % 10**6}\n'
            for name in names
            for e in range(8)
        )
        return (own + buckets).encode()

    return page, page(0).count(b"\n")


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds a process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    """Return once something listens."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"nothing listens on {port}")


if __name__ == "__main__":
    main()
