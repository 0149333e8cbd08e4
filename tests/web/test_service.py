"""The service's own loops: they close by the clock, notice when it jumps, and survive what nobody foresaw."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pertoken.errors import InputError
from pertoken.fleet import RunningFleet
from pertoken.meter import Journal, nvml
from pertoken.report._month import month_named
from pertoken.report.actual import LedgerSource
from pertoken.report.books import open_books
from pertoken.report.doctor import examine
from pertoken.report.imports import FileOf
from pertoken.report.now import closed_day
from pertoken.report.statement import chargeback, statement
from pertoken.web import service as module
from pertoken.web.charged import statement as charged
from pertoken.web.serve import Bind, close, diagnose, import_file, serve
from pertoken.web.service import Service
from tests.web.conftest import FLEET, NOW_S, Clock

NOW = datetime.fromtimestamp(NOW_S, UTC)
EVENT = (
    b'[{"key":"%s","ts":%d,"pool":"api","model":"m","tenant":"t","meter":"output_tokens","quantity":1000000}]'
)


@pytest.fixture
def service(
    fleet: RunningFleet, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    monkeypatch.setattr(module, "_LOOK_S", 0.02)
    made = Service(open_books(fleet, tmp_path / "data"), tmp_path, clock=clock, grace_s=0.05)
    yield made
    made.stop()


def wait(check: Callable[[], Any]) -> None:
    until = time.monotonic() + 20
    while not check():
        assert time.monotonic() < until
        time.sleep(0.02)


def usd(service: Service) -> Decimal:
    """What the actual book costs in all."""
    (row,) = service.books.ledger.cost(where={"book": "actual"}).to_pylist()
    found: Decimal = row["cost_usd"]
    return found


def send(service: Service, key: bytes, at_s: float) -> None:
    service.take_events(EVENT % (key, at_s), "application/json", "test", "")


@pytest.mark.usefixtures("fleet")
def test_an_address_that_cannot_be_had_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is taken by another process"):
            serve(tmp_path / "fleet.yaml", tmp_path / "data", Bind(port=port))
    assert not (tmp_path / "data" / "service.json").exists()


def test_an_hour_closes_by_itself_once_it_is_over(service: Service, clock: Clock) -> None:
    service.start()
    wait(lambda: service.books.closed_until)
    send(service, b"a", NOW_S + 60)
    clock.at_s = NOW_S + 3600 + 30
    wait(lambda: service.books.closed_until == NOW + timedelta(hours=1))
    rows = service.books.ledger.cost(where={"pool": "api"}).to_pylist()
    assert rows == [{"cost_usd": 15}]
    send(service, b"late", NOW_S + 120)
    wait(lambda: service.books.ledger.cost(where={"pool": "api"}).to_pylist() == [{"cost_usd": 30}])


def test_an_event_of_hours_ago_books_what_was_held_since(
    fleet: RunningFleet, tmp_path: Path, clock: Clock
) -> None:
    """Ledger, statement, report and the day so far tell the same, before and after a restart."""

    def told(service: Service) -> None:
        books = service.books
        end = service.now()
        month = month_named("2026-11", books.fleet, books.ledger, books.closed_until)
        assert chargeback(books.ledger, books.fleet, month).ledger_usd == 32
        assert statement(books.ledger, books.fleet, month, "t", None).usd == 8
        source = LedgerSource(books.ledger)
        facts = source.facts("actual", ["pool"], end - timedelta(hours=24), end)
        assert sum(facts.costs.values()) == 32
        day = closed_day(books.ledger, {}, end, until=books.closed_until)
        assert [hour.hour for hour in day.hours] == [5, 6, 7, 8]

    first = Service(open_books(fleet, tmp_path / "data"), tmp_path, clock=clock)
    first.close_due()
    clock.at_s += 120
    event = EVENT.replace(b'"api"', b'"h100"') % (b"a", NOW_S - 4 * 3600)
    first.take_events(event, "application/json", "test", "")
    first.close_due()
    told(first)
    first.stop()
    clock.at_s += 3600 * 24 * 3
    second = Service(open_books(fleet, tmp_path / "data"), tmp_path, clock=clock)
    second.close_due()
    assert usd(second) == 32 + 3 * 24 * 8
    second.stop()


def test_a_close_without_a_service_is_remembered(tmp_path: Path) -> None:
    path, data = tmp_path / "fleet.yaml", tmp_path / "data"
    path.write_text(FLEET)
    now = datetime.now(UTC)
    row = {
        "key": "a",
        "ts": (now - timedelta(hours=5)).timestamp(),
        "pool": "h100",
        "tenant": "t",
        "model": "m",
    }
    file = tmp_path / "usage.jsonl"
    file.write_text(json.dumps({**row, "input_tokens": 5, "output_tokens": 5}))
    import_file(data, path, file, FileOf("pertoken"))
    assert diagnose(data, path)["facts"]["closed until"] == "never closed"
    assert close(data, path, now - timedelta(hours=9), now)["hours"] == 6
    found = diagnose(data, path)
    assert found["facts"]["closed until"] == f"{now:%Y-%m-%d %H}:00 UTC"
    assert not [c for c in found["complaints"] if c["kind"] == "closing"]
    told = charged(data, path, "t", f"{now - timedelta(hours=5):%Y-%m}")
    if f"{now:%Y-%m}" == told.month.name:
        assert any(note.startswith("Provisional: the month is closed up to") for note in told.month.notes)


def test_a_clock_that_jumps_is_told(service: Service, clock: Clock) -> None:
    service.start()
    time.sleep(0.1)
    clock.at_s -= 7200
    wait(lambda: service.health.clock_jumps)
    ((_, jump),) = service.health.clock_jumps
    assert jump == pytest.approx(-7200, abs=5)
    found = examine(service.books, service.now(), process=service.process())
    assert any("clock jumped by -72" in c.text or "clock jumped by -71" in c.text for c in found.complaints)
    send(service, b"now", clock.at_s)
    with pytest.raises(InputError, match="sender's clock"):
        send(service, b"from before the jump", NOW_S)
    assert service.health.refused == {"a time out of range": 1}


@pytest.mark.parametrize(
    "error", [InputError("no price of the day"), RuntimeError("the ledger's disk is full")]
)
def test_a_close_that_fails_is_told_and_tried_again(
    service: Service, clock: Clock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(_: datetime) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(service.books, "close_due", failing)
        service.start()
        clock.at_s += 3600 + 30
        wait(lambda: service.health.closing)
        assert str(error) in service.health.closing
        found = examine(service.books, service.now(), process=service.process())
        assert any(c.kind == "closing" and str(error) in c.text for c in found.complaints)
    wait(lambda: not service.health.closing)
    assert service.books.closed_until == NOW + timedelta(hours=1)


def test_states_of_remote_write_come_back_from_the_journal(
    fleet: RunningFleet, tmp_path: Path, clock: Clock
) -> None:
    from tests.web.test_ingest import write_request

    def body(count: float, seconds: int) -> bytes:
        ms = int((NOW_S + seconds) * 1000)
        return write_request(
            {"vllm:generation_tokens_total": count}, ms, instance="vllm:8000", model_name="m"
        )

    first = Service(open_books(fleet, tmp_path / "data"), tmp_path, clock=clock)
    first.take_samples(body(1000, 0))
    first.take_samples(body(1050, 15))
    first.stop()
    clock.at_s += 60
    second = Service(open_books(fleet, tmp_path / "data"), tmp_path, clock=clock)
    second.take_samples(body(1050, 15))  # sent again: its acknowledgement was lost
    second.take_samples(body(1080, 30))
    second.close([NOW])
    rows = second.books.ledger.usage("meter", where={"meter": "output_tokens"}).to_pylist()
    assert [r["quantity"] for r in rows] == [80]
    second.stop()


def test_gpus_that_cannot_be_read_are_told(
    fleet: RunningFleet, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise InputError("NVML cannot be used on this machine")

    monkeypatch.setattr(nvml, "read", broken)
    sources = fleet.sources.model_copy(update={"nvml_pool": "h100"})
    with_gpus = fleet.model_copy(update={"sources": sources})
    service = Service(open_books(with_gpus, tmp_path / "data"), tmp_path, clock=clock)
    service.start()
    wait(lambda: service.health.nvml)
    found = examine(service.books, service.now(), process=service.process())
    assert "nvml local GPUs was never read: NVML cannot be used on this machine" in [
        c.text for c in found.complaints
    ]
    service.stop()


def test_past_days_are_exported_by_the_loop(service: Service, clock: Clock) -> None:
    send(service, b"a", NOW_S)
    service.start()
    clock.at_s += 24 * 3600
    journal: Journal = service.books.journal
    wait(lambda: not journal.dirty_hours())
    days = service.books.folder / "journal" / "days"
    wait(lambda: [p.name for p in days.glob("*.parquet")] == ["2026-11-24.parquet"])
