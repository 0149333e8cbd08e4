"""The dashboard, measured here: the first page from a ledger of 40 M hourly rows, and 200 browsers on one stream.

``python bench/dashboard.py`` makes the ledger once (minutes, 2 GB) in ``--folder`` and measures; ``--rows 4e6`` makes
a smaller one. The page is drawn by a real Chromium; the stream is read by real sockets, and the processor time is that
of the server process alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import socket
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

from pertoken.units import TERA

END = datetime(2026, 11, 24, 9, tzinfo=UTC)
HOUR = timedelta(hours=1)
POOLS, MODELS, TENANTS = 20, 3, 8
WEEK = 24 * 7
FLEET = "sites:\n  dc: {timezone: America/Los_Angeles, pue: 1.2, tariff: {usd_per_kwh: 0.1}}\npools:\n" + "".join(
    f"  p{i:02}: {{gpu: H100-SXM, site: dc, count: 80, price: {{term: owned, usd_per_gpu: 35040, life_years: 4, "
    "wacc_fraction: 0, residual_fraction: 0, method: straight-line}}\n"
    for i in range(POOLS)
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
    given = options.parse_args()
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
                rows += [(f"p{pool:02}", f"model-{model}", f"tenant-{tenant}", *r[:2], r[2] * scale) for r in PER_GROUP]
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


def page(folder: Path) -> None:
    pass


def stream(folder: Path, browsers: int) -> None:
    pass


if __name__ == "__main__":
    main()
