"""The meter's figures: exposition parsing, a scraped fleet, decoding of events, the journal, attribution of an hour.

Run: python bench/meter.py [million rows of the hour, 2]. CPU seconds of this process are what to quote on a shared
machine (`cpu`); `wall` includes the disk's flushes and whoever else runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from prometheus_client.parser import text_string_to_metric_families

from pertoken.meter import _exposition as exposition
from pertoken.meter import attribute, events, open_journal, records
from pertoken.meter._counters import State
from pertoken.meter.prometheus import Target, read
from pertoken.scenario import Fleet

HOUR = datetime(2026, 11, 24, 7, tzinfo=UTC)
BATCH = 10_000
NOW = HOUR.timestamp() + 60


def timed(what: Callable[[], object], repeat: int = 5) -> tuple[float, float]:
    """The best (cpu, wall) seconds of several runs."""
    best_cpu = best_wall = float("inf")
    for _ in range(repeat):
        cpu, wall = time.process_time(), time.perf_counter()
        what()
        best_cpu = min(best_cpu, time.process_time() - cpu)
        best_wall = min(best_wall, time.perf_counter() - wall)
    return best_cpu, best_wall


def exposition_of(lines: int) -> str:
    """An exposition of histogram buckets, as most lines of an engine's are."""
    return "".join(
        f'vllm:request_{i % 7}_s_bucket{{engine="{i % 4}",le="{i / 10}",model_name="Qwen/Qwen3-30B"}} {i * 1.5e3}\n'
        for i in range(lines)
    )


def parsing() -> None:
    text = exposition_of(2_000)
    ours = exposition.parse(text)
    theirs = [s for f in text_string_to_metric_families(text) for s in f.samples]
    assert [(s.name, s.labels, s.value) for s in theirs] == [
        (s.name, dict(s.labels), v) for s, v in zip(ours.series, ours.values, strict=True)
    ]

    def first_time() -> None:
        exposition.forget_series()
        exposition.parse(text)

    def with_labels() -> None:
        exposition.forget_series()
        for series in exposition.parse(text).series:
            series.labels  # noqa: B018 - taken apart when asked for

    reference, _ = timed(lambda: [s for f in text_string_to_metric_families(text) for s in f.samples])
    cold, _ = timed(first_time)
    labels, _ = timed(with_labels)
    warm, _ = timed(lambda: exposition.parse(text))
    print(
        f"2,000-line exposition: prometheus_client {reference * 1e3:.1f} ms, ours {warm * 1e3:.2f} ms "
        f"({reference / warm:.0f} times), the first time {cold * 1e3:.1f} ms ({reference / cold:.1f} times), "
        f"every label taken apart {labels * 1e3:.1f} ms"
    )


def fleet_of_targets() -> None:
    text = exposition_of(1_900) + "".join(
        f'vllm:{name}{{engine="0",model_name="m"}} 100\n'
        for name in (
            "prompt_tokens_total", "prompt_tokens_cached_total", "generation_tokens_total", "num_requests_running",
            "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum", "request_success_total",
        )
    )  # fmt: skip
    targets = [Target(f"t{i}", pool="h100") for i in range(100)]
    states = {t.name: State(NOW) for t in targets}

    def sweep(now_s: float) -> None:
        for target in targets:
            _, states[target.name] = read(text, target, states[target.name], now_s=now_s)

    clock = iter(range(1, 100))
    cpu, _ = timed(lambda: sweep(NOW + 15 * next(clock)), repeat=3)
    print(f"100 targets of 2,000 lines: {cpu:.2f} s CPU a sweep, {cpu / 15:.1%} of a core (no HTTP)")


def decoding() -> None:
    count = 100_000
    rows = [
        {"key": f"chatcmpl-{i:012d}", "ts": NOW + i * 1e-3, "pool": "h100", "model": "llama-3.3-70b",
         "tenant": f"team{i % 50}", "meter": "output_tokens", "quantity": float(i % 900)}
        for i in range(count)
    ]  # fmt: skip
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    usage = [
        {**{k: r[k] for k in ("key", "ts", "pool", "model", "tenant")},
         "usage": {"prompt_tokens": 100, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 64}}}
        for r in rows
    ]  # fmt: skip
    bodies = {
        "JSON": (json.dumps(rows).encode(), "application/json"),
        "NDJSON": ("\n".join(map(json.dumps, rows)).encode(), "application/x-ndjson"),
        "JSON usage blocks": (json.dumps(usage).encode(), "application/json"),
        "Arrow": (sink.getvalue().to_pybytes(), "application/vnd.apache.arrow.stream"),
    }
    for name, (body, kind) in bodies.items():
        cpu, _ = timed(lambda b=body, k=kind: events.read(b, k, source="usage/bench", now_s=NOW), repeat=3)  # type: ignore[misc]
        print(f"{name} to records: {count / cpu / 1e6:.2f} M events/s a core")


def batch(number: int) -> pa.Table:
    rng = np.random.default_rng(number)
    models = pa.array([f"model-{i}" for i in range(5)])
    tenants = pa.array([f"team-{i}" for i in range(40)])
    meters = pa.array(["input_tokens", "output_tokens"])
    return records(
        {
            "ts": HOUR.timestamp() + rng.random(BATCH) * 3599,
            "source": "usage/bench",
            "key": [f"chatcmpl-{number:08d}{i:08d}" for i in range(BATCH)],
            "pool": "h100",
            "model": models.take(pa.array(rng.integers(0, 5, BATCH).tolist(), pa.int64())),
            "tenant": tenants.take(pa.array(rng.integers(0, 40, BATCH).tolist(), pa.int64())),
            "meter": meters.take(pa.array(rng.integers(0, 2, BATCH).tolist(), pa.int64())),
            "quantity": rng.integers(1, 2000, BATCH).astype(np.float64),
        },
        BATCH,
    )


def journal_and_hour(million_rows: float) -> None:
    count = int(million_rows * 1e6 / BATCH)
    batches = [batch(i) for i in range(min(count, 200))]
    with (
        tempfile.TemporaryDirectory() as folder,
        open_journal(Path(folder), window_rows=1_000_000) as journal,
    ):
        cpu, wall = time.process_time(), time.perf_counter()
        for one in batches:
            journal.append(one)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        rows = len(batches) * BATCH
        print(
            f"journal, one writer, batches of 10,000: {rows / wall / 1e6:.2f} M rows/s durable, "
            f"{rows / cpu / 1e6:.2f} M rows a CPU second"
        )
        for number in range(len(batches), count):
            journal.append(batch(number))
        cpu, wall = time.process_time(), time.perf_counter()
        read_hour = journal.totals(HOUR)
        pool = {
            "gpu": "H100-SXM",
            "site": "s",
            "count": 8,
            "price": {"term": "owned", "usd_per_gpu": 25_000.0},
        }
        site = {"timezone": "UTC", "pue": 1.2, "tariff": {"usd_per_kwh": 0.1}}
        done = attribute(
            read_hour.records, Fleet.model_validate({"sites": {"s": site}, "pools": {"h100": pool}}), [HOUR]
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(
            f"hour of {count * BATCH / 1e6:.0f} M rows to {done.usage.num_rows} usage rows: "
            f"{cpu:.2f} s CPU, {wall:.2f} s wall"
        )
    with (
        tempfile.TemporaryDirectory() as folder,
        open_journal(Path(folder), window_rows=1_000_000) as journal,
    ):
        halves = [batches[::2], batches[1::2]]
        threads = [threading.Thread(target=lambda h=h: [journal.append(b) for b in h]) for h in halves]
        wall = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall = time.perf_counter() - wall
        print(f"journal, two writers: {len(batches) * BATCH / wall / 1e6:.2f} M rows/s durable")
    with tempfile.TemporaryDirectory() as folder, open_journal(Path(folder)) as journal:
        small = [b.slice(0, 10) for b in batches]
        wall = time.perf_counter()
        for one in small:
            journal.append(one)
        wall = time.perf_counter() - wall
        print(f"journal, batches of 10: {len(small) / wall:.0f} acknowledged batches/s")


def main() -> None:
    parsing()
    fleet_of_targets()
    decoding()
    journal_and_hour(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)


if __name__ == "__main__":
    main()
