"""The page Sources: doctor's findings with what to do, each source's last word, the journal, the open hours."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from pertoken.fleet import RunningFleet
from pertoken.meter import State
from pertoken.report.doctor import KINDS, Complaint, Diagnosis, Process, examine
from pertoken.report.sources import TO_DO, WAYS, Target, sources_of
from pertoken.web import service as service_module
from pertoken.web.pages.sources import _groups
from pertoken.web.tokens import Tokens
from tests.web.conftest import DARK_PHONE, LIGHT, NOW_S, Client, Clock, serving, watched
from tests.web.test_ingest import event
from tests.web.test_who import bearer

NOW = datetime.fromtimestamp(NOW_S, UTC)


def test_every_complaint_says_what_to_do() -> None:
    assert set(TO_DO) == set(KINDS)


def test_what_is_found_does_not_repeat_what_to_do() -> None:
    told = Complaint("no_energy", TO_DO["no_energy"], "h100")
    (_, _, [row]) = _groups(Diagnosis((told,), {}))[0]
    assert row == ["no_energy", "h100", KINDS["no_energy"], "–", TO_DO["no_energy"]]


def test_each_source_has_its_last_word(fleet: RunningFleet) -> None:
    marks = {
        "scrape/good": State(0.0, last_s=NOW_S - 10).to_bytes(),
        "scrape/quiet": State(0.0, last_s=NOW_S - 1000).to_bytes(),
        "scrape/gone": State(0.0, last_s=NOW_S - 99_000).to_bytes(),
    }
    # A pod that left its file_sd file, and an instance dropped from the fleet file, owe nothing.
    marks["written/dropped"] = State(0.0, last_s=NOW_S - 600).to_bytes()
    heard = {
        "gateway/dropped": NOW,
        "usage/gateway": NOW - timedelta(minutes=50),
        "engine/good": NOW,
        "device/good": NOW,
    }
    targets = [
        Target("good", "h100", 15.0),
        Target("quiet", "h100", 15.0),
        Target("bad", "h100", 5.0, "refused"),
    ]
    found = {s.name: s for s in sources_of(fleet, marks, heard, targets, Process(), NOW)}
    assert {name: s.state for name, s in found.items()} == {
        "bad": "failing", "vllm:8000": "never", "quiet": "silent", "good": "telling",
        "gateway": "telling",
    }  # fmt: skip
    assert (found["good"].silent_s, found["good"].pool, found["good"].interval_s) == (10.0, "h100", 15.0)
    assert found["gateway"].silent_s == 3000.0
    assert found["bad"].last is None
    assert {s.way for s in found.values()} <= set(WAYS)
    assert next(iter(found)) == "bad"  # the troubled first


def test_this_machines_gpus_are_a_source(fleet: RunningFleet) -> None:
    sources = fleet.sources.model_copy(update={"nvml_pool": "h100"})
    here = fleet.model_copy(update={"sources": sources})
    found = {s.name: s for s in sources_of(here, {}, {}, [], Process(nvml="no driver"), NOW)}
    assert (found["local GPUs"].state, found["local GPUs"].error) == ("failing", "no driver")


def test_the_page_tells_what_is_wrong_and_what_mends_it(client: Client, clock: Clock) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    sent = [
        event("1", 5),
        {**event("2", 5), "meter": "training_tokens"},
        {**event("3", 5), "pool": "<i>nobody"},
    ]
    assert client.post("/v1/events", json=sent).status_code == 200
    clock.at_s = NOW_S + 3600 * 2 + 60
    service.books.close_due(service.now())
    text = client.get("/sources").text
    assert "no rate for training_tokens" in text
    assert "&lt;i&gt;nobody" in text
    assert "<i>nobody" not in text
    assert TO_DO["unpriced"].replace("'", "&#39;") in text
    assert "vllm:8000 was never read" in text
    assert "1 never heard" in text
    assert "2026-11-24 11:00 UTC" in text  # closed up to
    diagnosis = client.get("/v1/doctor?hours=24").json()
    for complaint in diagnosis["complaints"]:
        # The test's clock jumps, which may be seen between the two.
        assert complaint["kind"] == "clock" or complaint["kind"] in text
    assert client.get("/sources?hours=0").status_code == 422
    service.health.closing = "the disk is full"
    service.health.journal = "the disk is full there too"
    text = client.get("/sources?hours=1").text
    assert "the disk is full there too" in text
    assert client.get("/sources?hours=6").status_code == 200


def test_senders_of_this_hour_are_heard(client: Client) -> None:
    assert client.post("/v1/events", json=[event("1", 5)]).status_code == 200
    text = client.get("/sources").text
    assert "usage events sent to us" in text
    assert "2026-11-24 09:0" in text


def test_reloading_makes_one_diagnosis(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(*given: Any, **named: Any) -> Any:
        made.append(1)
        return examine(*given, **named)

    monkeypatch.setattr("pertoken.web.pages.sources.examine", counted)
    for _ in range(5):
        assert client.get("/sources").status_code == 200
    assert len(made) == 1


def test_it_is_not_for_tenants(client_of: Callable[..., Client], tmp_path: Path) -> None:
    client = client_of(require_tokens=True)
    tokens = Tokens(tmp_path / "data")
    boss = bearer(tokens.add("boss", ("read",)))
    mine = bearer(tokens.add("shop", ("read",), tenant="a"))
    writes = bearer(tokens.add("w", ("write",)))
    for headers, status in (({}, 401), (writes, 403), (mine, 403), (boss, 200)):
        assert client.get("/sources", headers=headers).status_code == status


def test_records_that_cannot_be_read_end_no_thread(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    told: list[str] = []

    def broken(now: datetime) -> None:
        raise OSError("no such segment")

    monkeypatch.setattr(service.books, "follow", broken)
    monkeypatch.setattr(service_module.log, "warning", lambda *words: told.append(words[0] % words[1:]))
    service._follow()
    assert told == ["the newest records cannot be read: OSError: 'no such segment'"]


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
def test_a_browser_shows_it(client: Client, browser: Browser, looks: dict[str, Any]) -> None:
    with serving(client) as served, watched(browser, served, **looks) as page:
        page.goto(f"{served}/sources")
        page.get_by_role("link", name="Look again").click()
        page.wait_for_url("**/sources?hours=24")
        assert page.locator("table").count() >= 2
        sources = page.get_by_role("region", name="Sources of counters").locator("table")
        assert sources.bounding_box()["width"] >= 800  # type: ignore[index]  # else a word a line on a phone
