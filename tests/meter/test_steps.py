"""API calls are priced at the step of their prompt's length."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pertoken.fleet import RunningFleet
from pertoken.meter import concat, events, open_journal
from pertoken.meter._steps import stepped
from pertoken.plan._pricing import api_meter
from pertoken.report.books import open_books
from pertoken.units import base_meter

HOUR = datetime(2026, 11, 24, 7, tzinfo=UTC)
PRICE = {"term": "api", "provider": "google", "model": "gemini-2.5-pro"}
FLEET = RunningFleet.model_validate({"pools": {"gemini": {"price": PRICE}}})


def call(key: str, prompt: int, cached: int, output: int, **more: Any) -> events.Event:
    block = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    ours = {"ts": HOUR.timestamp() + 60, "pool": "gemini", "model": "gemini-2.5-pro", "tenant": "t", **more}
    return msgspec.convert({"key": key, "usage": block, **ours}, events.Event)


def rows_of(*calls: events.Event) -> Any:
    return events.from_events(calls, source="usage/x", now_s=HOUR.timestamp())


# 200,000 is still the lower step; cached tokens are part of the prompt's length.
CALLS = (
    call("short", 200_000, 0, 1_000),
    call("long", 200_001, 150_000, 2_000),
    call("loose", 250_000, 0, 3_000, pool=""),
)


def test_a_calls_tokens_go_to_the_step_of_its_prompt() -> None:
    told = {(r["key"], r["meter"]): r["quantity"] for r in stepped(rows_of(*CALLS), FLEET).to_pylist()}
    assert told == {
        ("short", "input_tokens"): 200_000, ("short", "output_tokens"): 1_000, ("short", "requests"): 1,
        ("long", "input_tokens:above200000"): 50_001, ("long", "cached_input_tokens:above200000"): 150_000,
        ("long", "output_tokens:above200000"): 2_000, ("long", "requests"): 1,
        ("loose", "input_tokens:above200000"): 250_000, ("loose", "output_tokens:above200000"): 3_000,
        ("loose", "requests"): 1,
    }  # fmt: skip
    assert ("long", api_meter("input_tokens", 200_000)) in told


def test_a_bare_meter_or_a_written_price_has_no_step() -> None:
    sums = [events.Event(key="day", ts=HOUR.timestamp(), pool="gemini", meter="input_tokens", quantity=9e6)]
    rows = events.from_events(sums, source="usage/x", now_s=0.0)
    assert stepped(rows, FLEET) is rows
    price = {**PRICE, "input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2.0}
    written = RunningFleet.model_validate({"pools": {"gemini": {"price": price}}})
    rows = rows_of(*CALLS)
    assert stepped(rows, written) is rows


def test_a_call_sent_again_is_the_same_call_stepped_or_not(tmp_path: Path) -> None:
    rows = rows_of(CALLS[1])
    with open_journal(tmp_path / "journal") as journal:
        assert journal.append(rows).rows == 4
        again = journal.append(stepped(rows, FLEET))
        assert (again.rows, again.duplicates) == (0, 4)


def test_money_by_hand(tmp_path: Path) -> None:
    """Gemini 2.5 Pro (ai.google.dev/gemini-api/docs/pricing, 2026-11-09), USD per M tokens: up to 200,000 prompt
    tokens 1.25 in, 0.125 cached, 10 out; above 2.5, 0.25, 15."""
    with open_books(FLEET, tmp_path / "data") as books:
        books.take(rows_of(*CALLS))
        closed = books.close([HOUR])
        assert not closed.unpriced
        assert not closed.findings
        cost = books.ledger.cost(where={"book": "actual"})["cost_usd"].to_pylist()
        low = Decimal("0.2") * Decimal("1.25") + Decimal("0.001") * 10
        high = (
            Decimal("0.300001") * Decimal("2.5") + Decimal("0.15") * Decimal("0.25") + Decimal("0.005") * 15
        )
        assert cost == [low + high]
        used = books.ledger.usage("meter", where={"book": "actual"}).to_pylist()
        prompts = [r["quantity"] for r in used if base_meter(r["meter"]) == "input_tokens"]
        assert sum(prompts) == 200_000 + 50_001 + 250_000
        rate = books.ledger.metric("usd_per_mtok_total", where={"book": "actual"})
        (value,) = rate["usd_per_mtok_total"].to_pylist()
        assert value == pytest.approx(float((low + high) / Decimal("0.656001")), rel=1e-9)
        assert books.first_hour() == HOUR


def test_a_gateways_count_keeps_the_events_steps(tmp_path: Path) -> None:
    from pertoken.meter import records

    counted = records(
        {
            "ts": [HOUR.timestamp() + 9], "source": "gateway/router", "key": ["g"], "pool": "gemini",
            "model": "gemini-2.5-pro", "meter": "output_tokens", "quantity": [2_500.0],
        },
        1,
    )  # fmt: skip
    with open_books(FLEET, tmp_path / "data") as books:
        books.take(concat([rows_of(CALLS[1]), counted]))
        books.close([HOUR])
        rows = books.ledger.usage("tenant", "meter", where={"book": "actual"}, end=HOUR + timedelta(hours=1))
        told = {(r["tenant"], r["meter"]): r["quantity"] for r in rows.to_pylist()}
        assert told["t", "output_tokens:above200000"] == 2_000
        assert told["", "output_tokens"] == 500
