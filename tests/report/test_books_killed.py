"""A close of hours that were closed before is killed: the books say what they said, or all of what they now should."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from pertoken import meter
from pertoken.fleet import load_fleet
from pertoken.ledger import open_ledger
from pertoken.report.books import LEDGER_FILE, hours_in, open_books
from tests.report import _killed_close
from tests.report._killed_close import END, START

FLEET = """
sites:
  dc:
    timezone: UTC
    pue: 1.0
    tariff:
      usd_per_kwh: 0.1
      demand_usd_per_kw: 10
pools:
  owned:
    gpu: L4
    site: dc
    count: {count}
    price: {{term: owned, usd_per_gpu: {price}, life_years: 4, wacc_fraction: 0, residual_fraction: 0,
            method: straight-line}}
"""


def said(folder: Path) -> tuple[list[Any], ...]:
    """All usage, cost and rates of a ledger; its kept sums must say the same as its hours."""
    ledger = open_ledger(folder / LEDGER_FILE)
    try:
        usage = ledger.usage("hour", "pool", "tenant", "phase", "meter")
        costs = ledger.cost("hour", "pool", "tenant", "phase", "component")
        rates = ledger.rates().to_pylist()
        sums = ledger.cost("pool").to_pylist()
    finally:
        ledger.shut()
    rows = [sorted(table.to_pylist(), key=str) for table in (usage, costs)]
    total = sum(row["cost_usd"] for row in rows[1])
    assert total == sum(row["cost_usd"] for row in sums), "kept sums are not those of the hours"
    return (*rows, rates)


def test_usage_rates_and_cost_change_together_or_not_at_all(tmp_path: Path) -> None:
    """What is changed: the price (rates, cost), the count (usage), and with it the month's peak."""
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(FLEET.format(count=2, price=35040))
    new.write_text(FLEET.format(count=3, price=70080))
    folder = tmp_path / "data"
    hours = hours_in(START, END)
    with open_books(load_fleet(old), folder) as books:
        for name, source, quantity in (("output_tokens", "usage/a", 1000.0), ("energy_kwh", "site/m", 0.5)):
            columns = {
                "ts": [(hour + timedelta(minutes=5)).timestamp() for hour in hours], "source": source,
                "key": [f"{name} {hour}" for hour in hours], "pool": "owned", "model": "m", "tenant": "t",
                "meter": name, "quantity": [quantity] * len(hours),
            }  # fmt: skip
            books.journal.append(meter.records(columns, len(hours)))
        books.close(hours)
    before = said(folder)
    outcomes = []
    with subprocess.Popen(
        [sys.executable, _killed_close.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as closer:
        assert closer.stdin is not None
        assert closer.stdout is not None
        for statement in (*range(1, 34, 4), 1000):
            one = tmp_path / f"at{statement}"
            shutil.copytree(folder, one)
            closer.stdin.write(f"{one} {new} {statement}\n")
            closer.stdin.flush()
            outcomes.append((closer.stdout.readline().strip(), said(one)))
        closer.stdin.close()
    after = outcomes[-1][1]
    assert outcomes[-1][0] == "done 0"
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert before[2] != after[2]
    killed = [state for how, state in outcomes if how == "killed"]
    assert len(killed) >= 5
    assert all(state in (before, after) for state in killed)
    assert before in killed
