"""`doctor` names what is wrong, once, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pertoken import meter
from pertoken.errors import InputError
from pertoken.fleet import load_fleet
from pertoken.meter import prometheus
from pertoken.meter.attribute import FINDINGS
from pertoken.report.books import HOUR, SCRAPED, WRITTEN, Books, open_books
from pertoken.report.doctor import KINDS, Complaint, Diagnosis, Process, examine, told

NOW = datetime(2026, 11, 24, 12, 10, tzinfo=UTC)
FLEET = """
sites:
  dc: {timezone: UTC, pue: 1.2, tariff: {usd_per_kwh: 0.1}}
pools:
  owned: {gpu: L4, site: dc, count: 2, price: {term: owned, usd_per_gpu: 2500}}
  api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}
sources:
  scrape: [{url: "http://vllm-0:8000/metrics", pool: owned}]
  written: [{instance: "vllm-1:8000", pool: owned}]
"""


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    with open_books(load_fleet(path), tmp_path / "data") as found:
        yield found


def told_at(
    books: Books, moment: datetime, name: str, quantity: float, source: str, pool: str = "owned"
) -> None:
    columns: dict[str, Any] = {
        "ts": [moment.timestamp()], "source": source, "key": [f"{moment} {name}"], "pool": pool, "model": "m",
        "tenant": "t", "meter": name, "quantity": [quantity],
    }  # fmt: skip
    books.journal.append(meter.records(columns, 1))


def read(books: Books, mark: str, seconds_ago: float) -> None:
    state = meter.State(0.0, last_s=NOW.timestamp() - seconds_ago)
    books.journal.append(meter.RECORDS.empty_table(), marks={mark: state.to_bytes()})


def texts(found: Diagnosis, kind: str) -> list[str]:
    return [c.text for c in found.complaints if c.kind == kind]


def test_healthy_books_have_nothing_to_complain_of(books: Books) -> None:
    read(books, SCRAPED + "vllm-0:8000", 10)
    read(books, WRITTEN + "vllm-1:8000", 10)
    books.close_due(NOW)
    found = examine(books, NOW)
    assert found.complaints == ()
    assert "nothing to complain of" in str(found)
    assert found.facts["closed until"] == "2026-11-24 12:00 UTC"


def test_silent_sources_are_named(books: Books) -> None:
    read(books, SCRAPED + "vllm-0:8000", 600)
    told_at(books, NOW - 5 * HOUR, "output_tokens", 5, "usage/gateway-a", "api")
    told_at(books, NOW - timedelta(minutes=30), "output_tokens", 5, "usage/gateway-b", "api")
    errors = {"vllm-0:8000": "it answers 503"}
    found = texts(examine(books, NOW, process=Process(errors=errors)), "silent")
    assert found == [
        "no event from 'usage/gateway-a' since 2026-11-24 08:00 UTC",
        "scrape vllm-0:8000 has told nothing since 2026-11-24 12:00 UTC: it answers 503",
        "written vllm-1:8000 was never read",
    ]


def test_targets_that_left_owe_nothing(books: Books) -> None:
    """A pod of last week is in the journal for good; what is scraped now is what should tell."""
    read(books, SCRAPED + "vllm-0:8000", 10)
    read(books, WRITTEN + "vllm-1:8000", 10)
    read(books, SCRAPED + "pod-of-last-week:8000", 600_000)
    read(books, SCRAPED + "pod-of-today:8000", 600)
    read(books, WRITTEN + "no-longer-named:9", 600)
    for running in (Process(), Process(closes=True, targets=frozenset({"vllm-0:8000"}))):
        assert texts(examine(books, NOW, process=running), "silent") == []
    now = Process(closes=True, targets=frozenset({"vllm-0:8000", "pod-of-today:8000"}))
    assert texts(examine(books, NOW, process=now), "silent") == [
        "scrape pod-of-today:8000 has told nothing since 2026-11-24 12:00 UTC"
    ]


def test_usage_without_a_rate_is_named(books: Books) -> None:
    told_at(books, NOW - HOUR, "training_tokens", 5, "training/run", "api")
    books.close_due(NOW)
    (text,) = texts(examine(books, NOW), "unpriced")
    assert (
        text
        == "training_tokens has no rate from 2026-11-24 11:00 UTC on: give the fleet its price, 0 if free"
    )


def test_totals_that_disagree_are_named_with_the_difference(books: Books) -> None:
    hour = NOW.replace(minute=0) - HOUR
    target = meter.Target("e", "owned", gpus=2)
    state = meter.State(hour.timestamp())
    for seconds, count in ((0, 0), (60, 1000)):
        text = f'vllm:generation_tokens_total{{model_name="m"}} {count}\n'
        rows, state = prometheus.read(text, target, state, now_s=hour.timestamp() + seconds)
        books.journal.append(rows)
    told_at(books, hour + timedelta(minutes=1), "output_tokens", 1500, "usage/gw")
    found = examine(books, NOW, hours=1)
    (complaint,) = [c for c in found.complaints if c.kind == "disagree"]
    assert "500 more output_tokens" in complaint.text
    assert (complaint.pool, complaint.amount, complaint.severity) == ("owned", 500.0, "look")


def test_a_pool_the_fleet_does_not_have_is_told_before_the_hour_is_over(books: Books) -> None:
    told_at(books, NOW - timedelta(minutes=1), "output_tokens", 5, "usage/gw", "api")
    assert texts(examine(books, NOW), "unknown_pool") == []
    told_at(books, NOW, "output_tokens", 5, "usage/gw", "ownd")
    told_at(books, NOW - HOUR, "output_tokens", 5, "usage/gw", "ownd")
    (found,) = [c for c in examine(books, NOW).complaints if c.kind == "unknown_pool"]
    assert found.text == (
        "records name the pool 'ownd' and are in no figure, the fleet has owned, api: did you mean owned?"
    )
    assert (found.pool, found.severity, found.hours) == ("ownd", "wrong", 2)


def test_assumed_phases_are_told_of_the_running_hour_too(books: Books) -> None:
    told_at(books, NOW, "output_tokens", 5, "usage/gw")
    told_at(books, NOW, "input_tokens", 5, "usage/gw")
    (found,) = [c for c in examine(books, NOW).complaints if c.kind == "assumed_phase"]
    assert "split by tokens" in found.text
    assert (found.pool, found.severity) == ("owned", "look")


def test_a_torn_and_a_damaged_journal_are_told_apart(books: Books, tmp_path: Path) -> None:
    for number in range(3):
        told_at(books, NOW + timedelta(seconds=number), "output_tokens", 5, "usage/gw", "api")
    books.shut()
    (segment,) = (tmp_path / "data" / "journal" / "segments").glob("*.ptj")
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-7])
    with open_books(books.fleet, tmp_path / "data") as torn:
        (text,) = texts(examine(torn, NOW), "journal")
    assert "cut off by a crash; nothing acknowledged was in them" in text
    broken = bytearray(whole)
    broken[30] ^= 0xFF
    segment.write_bytes(bytes(broken))
    with open_books(books.fleet, tmp_path / "data") as damaged:
        (text,) = texts(examine(damaged, NOW), "journal")
    assert "the disk lost records that were acknowledged" in text


def test_what_a_running_service_knows_is_told(books: Books) -> None:
    process = Process(
        clock_jumps=[(NOW.timestamp(), -3600.0)],
        unknown_instances={"evil\x1b[31m": 3},
        refused={"a time out of range": 2, "the journal takes nothing": 1},
        closing="no price",
        journal="the disk is full",
    )
    found = examine(books, NOW, process=process)
    assert texts(found, "clock") == [
        "2 batches were refused, and stayed with their senders: a time out of range",
        "this machine's clock jumped by -3600 s at 2026-11-24 12:10 UTC",
    ]
    assert "the disk is full" in texts(found, "journal")
    assert "no price" in texts(found, "closing")
    assert "\x1b" not in str(found)
    assert [c.severity for c in found.complaints] == sorted(
        (c.severity for c in found.complaints), reverse=True
    )


def test_hours_nobody_closed_are_named(books: Books) -> None:
    told_at(books, NOW - 3 * HOUR, "output_tokens", 5, "usage/gw", "api")
    (complaint,) = [c for c in examine(books, NOW).complaints if c.kind == "closing"]
    assert complaint.hours == 2  # the one that ended ten minutes ago may still be under way
    assert "2026-11-24 09:00 UTC is the oldest" in complaint.text


def test_a_late_record_is_no_complaint_where_the_service_closes_its_hour_in_a_minute(books: Books) -> None:
    books.close_due(NOW)
    told_at(books, NOW - 3 * HOUR, "output_tokens", 5, "usage/gw", "api")
    assert len([c for c in examine(books, NOW).complaints if c.kind == "closing"]) == 1
    assert not [
        c for c in examine(books, NOW, process=Process(closes=True)).complaints if c.kind == "closing"
    ]
    hung = examine(books, NOW + 2 * HOUR, process=Process(closes=True))
    assert [c.hours for c in hung.complaints if c.kind == "closing"] == [1]


def test_hours_that_are_caught_up_on_are_a_complaint_where_it_takes_more_than_a_minute(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pertoken.report.doctor.CATCH_UP_HOURS", 5)
    running = Process(closes=True)
    books.close_due(NOW)
    told_at(books, NOW - 5 * HOUR, "output_tokens", 5, "usage/gw", "api")
    assert not texts(examine(books, NOW, process=running), "closing")
    told_at(books, NOW - 6 * HOUR, "output_tokens", 5, "usage/gw", "api")
    (found,) = [c for c in examine(books, NOW, process=running).complaints if c.kind == "closing"]
    assert found.text.startswith("from 2026-11-24 06:00 UTC on")
    assert (found.hours, found.severity) == (6, "wrong")
    books.stuck = "hours up to 2026-11-24 08:00 UTC cannot be closed: no price"
    assert texts(examine(books, NOW, process=running), "closing") == [books.stuck]


def test_records_of_days_no_longer_kept_are_a_complaint(books: Books) -> None:
    books.close_due(NOW)
    told_at(books, NOW - 72 * HOUR, "output_tokens", 5, "usage/gw", "api")
    books.close_due(NOW)
    books.tidy(NOW, keep_days=1)
    told_at(books, NOW - 72 * HOUR, "output_tokens", 5, "usage/file", "api")
    (text,) = texts(examine(books, NOW, process=Process(closes=True)), "closing")
    assert text.startswith("records came for 2026-11-21 12:00 UTC, whose day is no longer kept")


def test_every_finding_of_attribution_has_a_place_here() -> None:
    assert set(FINDINGS) <= set(KINDS)


def test_the_window_is_bounded_and_words_are_printable(books: Books) -> None:
    with pytest.raises(InputError, match="0 hours"):
        examine(books, NOW, hours=0)
    nasty = Diagnosis((Complaint("gap", "a\x1b[2Jb\nc", "p"),), {"x": "\x07"})
    assert "\x1b" not in told(nasty.to_dict())
    assert "a\\x1b[2Jb\\nc" in str(nasty)


def test_an_engine_scraped_and_written_is_booked_once(books: Books) -> None:
    hour = NOW.replace(minute=0) - HOUR
    for name in ("vllm-0:8000", "vllm-1:8000"):
        for meter_name, count in (("output_tokens", 5000.0), ("prompt_tokens", 900.0)):
            told_at(books, hour + timedelta(minutes=5), meter_name, count, f"engine/{name}")
    read(books, SCRAPED + "vllm-0:8000", 5)
    read(books, WRITTEN + "vllm-1:8000", 5)
    (text,) = texts(examine(books, NOW), "twice")
    assert text.startswith("engine/vllm-1:8000 (written) repeats engine/vllm-0:8000")
    books.close([hour])
    rows = books.ledger.usage("meter", where={"book": "actual", "meter": "output_tokens"}).to_pylist()
    assert [int(r["quantity"] or 0) for r in rows] == [5000]


def test_an_engine_read_twice_at_other_seconds_is_booked_once(books: Books) -> None:
    hour = NOW.replace(minute=0) - HOUR
    for name, count in (("vllm-0:8000", 5000.0), ("vllm-1:8000", 5020.0), ("vllm-2:8000", 5100.0)):
        told_at(books, hour + timedelta(minutes=5), "output_tokens", count, f"engine/{name}")
    read(books, SCRAPED + "vllm-0:8000", 5)
    read(books, WRITTEN + "vllm-1:8000", 5)
    read(books, WRITTEN + "vllm-2:8000", 5)  # 2 % apart: another engine
    found = examine(books, NOW)
    assert texts(found, "twice") == [
        "engine/vllm-1:8000 (written) repeats engine/vllm-0:8000 (scraped) to 0.40% and is not booked: "
        "drop one of them; if they are two engines, let both reach us the same way"
    ]
    assert not texts(found, "disagree")
    books.close([hour])
    rows = books.ledger.usage("meter", where={"book": "actual", "meter": "output_tokens"}).to_pylist()
    assert [int(r["quantity"] or 0) for r in rows] == [10100]


def test_of_many_alike_each_finds_its_own_twin(books: Books) -> None:
    hour = NOW.replace(minute=0) - HOUR
    for number, counts in enumerate(((5000.0, 5000.0), (5001.0, 5001.0), (5002.0, 5040.0))):
        for way, count in zip((SCRAPED, WRITTEN), counts, strict=True):
            name = f"{'s' if way == SCRAPED else 'w'}{number}"
            told_at(books, hour + timedelta(minutes=5), "output_tokens", count, f"engine/{name}")
            read(books, way + name, 5)
    told_at(books, hour + timedelta(minutes=5), "output_tokens", 900.0, "engine/w9")  # too few to tell
    read(books, WRITTEN + "w9", 5)
    pairs = [text.split(" (scraped)")[0] for text in texts(examine(books, NOW), "twice")]
    assert pairs == [f"engine/w{n} (written) repeats engine/s{n}" for n in range(3)]
    books.close([hour])
    rows = books.ledger.usage("meter", where={"book": "actual", "meter": "output_tokens"}).to_pylist()
    assert [int(r["quantity"] or 0) for r in rows] == [5000 + 5001 + 5002 + 900]
