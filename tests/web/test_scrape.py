"""The scrape loop against real HTTP servers: slow, wrong, huge, gone, and back."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pertoken.errors import InputError
from pertoken.fleet import Sources
from pertoken.meter import Journal, open_journal
from pertoken.report.books import SCRAPED
from pertoken.web import _fetch
from pertoken.web._fetch import fetch
from pertoken.web.scrape import Scraper
from tests.web.conftest import NOW_S, Clock

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Target:
    """A page whose answer the test sets."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.answer: Answer = lambda handler: send(handler, b"")
        target = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                target.asked.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
                target.answer(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"http://{self.address}/metrics"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def send(handler: http.server.BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def tokens(count: int) -> bytes:
    return f'vllm:generation_tokens_total{{model_name="m"}} {count}\n'.encode()


@pytest.fixture
def target() -> Iterator[Target]:
    found = Target()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / "journal") as found:
        yield found


def scraper(journal: Journal, folder: Path, clock: Clock, **sources: Any) -> Scraper:
    found = Scraper(Sources.model_validate(sources), folder, journal, clock)
    found.look()
    return found


def counted(journal: Journal) -> float:
    totals = journal.totals(datetime.fromtimestamp(NOW_S, UTC)).records.to_pylist()
    return float(sum(r["quantity"] for r in totals if r["meter"] == "output_tokens"))


def test_a_silence_is_counted_when_it_ends(
    target: Target, journal: Journal, tmp_path: Path, clock: Clock
) -> None:
    one = scraper(journal, tmp_path, clock, scrape=[{"url": target.url, "pool": "p"}])
    (watched,) = one.watched()

    def at(seconds: float, answer: Answer) -> str:
        clock.at_s, target.answer = NOW_S + seconds, answer
        one.scrape(watched)
        return watched.error

    assert at(0, lambda h: send(h, tokens(100))) == ""
    assert at(15, lambda h: send(h, tokens(150))) == ""
    assert "answers 500" in at(30, lambda h: send(h, b"oops", 500))
    assert "answers 302" in at(45, lambda h: send(h, b"", 302, Location="http://169.254.169.254/"))
    assert "exposition" in at(60, lambda h: send(h, b"\xff\xfe not metrics {{{"))
    assert counted(journal) == 50
    assert at(75, lambda h: send(h, gzip.compress(tokens(400)), Content_Encoding="gzip")) == ""
    assert counted(journal) == 300
    assert at(90, lambda h: send(h, tokens(7))) == ""  # it started again
    assert counted(journal) == 307
    assert {a["path"] for a in target.asked} == {"/metrics"}


def test_the_state_survives_a_restart(target: Target, journal: Journal, tmp_path: Path, clock: Clock) -> None:
    written = [{"url": target.url, "pool": "p", "name": "engine-0"}]
    target.answer = lambda h: send(h, tokens(100))
    first = scraper(journal, tmp_path, clock, scrape=written)
    first.scrape(first.watched()[0])
    assert SCRAPED + "engine-0" in journal.marks
    clock.at_s += 15
    target.answer = lambda h: send(h, tokens(130))
    second = scraper(journal, tmp_path, clock, scrape=written)
    second.scrape(second.watched()[0])
    assert counted(journal) == 30


def test_secrets_are_sent_and_never_told(
    target: Target, journal: Journal, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("Bearer very-secret\n")
    written = [{"url": target.url, "pool": "p", "authorization_file": str(secret)}]
    one = scraper(journal, tmp_path, clock, scrape=written)
    (watched,) = one.watched()
    one.scrape(watched)
    assert target.asked[0]["authorization"] == "Bearer very-secret"
    target.answer = lambda h: send(h, b"", 401)
    one.scrape(watched)
    assert "very-secret" not in watched.error + caplog.text
    secret.unlink()
    one.scrape(watched)
    assert "No such file" in watched.error


def test_a_page_is_bounded_in_size_and_time(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fetch, "MAX_PAGE_BYTES", 100_000)
    target.answer = lambda h: send(h, gzip.compress(b"# " + b"x" * 10_000_000), Content_Encoding="gzip")
    with pytest.raises(InputError, match="larger than"):
        fetch(target.url, timeout_s=5)
    target.answer = lambda h: send(h, gzip.compress(tokens(1))[:-8], Content_Encoding="gzip")
    with pytest.raises(InputError, match="ends too early"):
        fetch(target.url, timeout_s=5)

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b"# slow\n" * 40_000)
                time.sleep(0.05)
        except OSError:
            return  # the scraper hung up

    monkeypatch.setattr(_fetch, "MAX_PAGE_BYTES", 1 << 30)
    target.answer = drip
    began = time.monotonic()
    with pytest.raises(InputError, match="in time"):
        fetch(target.url, timeout_s=0.3)
    assert time.monotonic() - began < 4
    target.server.shutdown()
    target.server.server_close()
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch(target.url, timeout_s=1)


def test_openmetrics_is_told_apart(target: Target) -> None:
    target.answer = lambda h: send(
        h, tokens(1) + b"# EOF\n", Content_Type="application/openmetrics-text; version=1.0.0"
    )
    assert fetch(target.url, timeout_s=5) == (tokens(1) + b"# EOF\n", True)


def test_targets_come_and_go_with_their_file(
    target: Target, journal: Journal, tmp_path: Path, clock: Clock
) -> None:
    path = tmp_path / "targets" / "a.json"
    path.parent.mkdir()

    def write(*addresses: str, **labels: str) -> None:
        path.write_text(json.dumps([{"targets": list(addresses), "labels": labels}]))

    write(target.address, pool="b", gpus="2", tenant="shop")
    one = scraper(journal, tmp_path, clock, files=[{"files": "targets/*.json", "pool": "a"}])
    (watched,) = one.watched()
    assert watched.target.url == target.url
    assert (watched.target.pool, watched.target.gpus, watched.target.tenant) == ("b", 2.0, "shop")
    state = watched.state
    write(target.address, "10.0.0.1:9", __metrics_path__="/m")
    one.look()
    assert [w.target.name for w in one.watched()] == ["10.0.0.1:9", target.address]
    assert one.watched()[0].target.url == "http://10.0.0.1:9/m"
    assert one.watched()[1].state is state
    path.write_text('{"not": "a list"}')
    one.look()
    assert len(one.watched()) == 2  # as Prometheus has it: what cannot be read keeps what it last said
    assert one.watched()[1].state is state
    assert "list of groups" in one.problem
    path.write_text('[{"targets": ["x"], "labels": {"__scheme__": "file"}}]')
    one.look()
    assert (
        one.problem
        == f"{path}: url: String should match pattern '^https?://[^\\s@]+$'; found 'file://x/metrics'"
    )
    write(target.address)
    one.look()
    assert len(one.watched()) == 1
    assert one.problem == ""
    path.unlink()
    one.look()
    assert one.watched() == []
    assert one.problem == "no file is called targets/*.json"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "{", "Expecting property name"),
        ("a.json", "[1]", "a file_sd group has targets and labels"),
        (
            "a.json",
            '[{"targets": ["x:1"], "labels": ["pool"]}]',
            "labels of a file_sd group are names and values",
        ),
        ("a.json", '[{"targets": ["x:1"]}]', "'x:1' says no pool"),
        (
            "a.json",
            '[{"targets": ["x:1"], "labels": {"pool": "a", "gpus": "two"}}]',
            "gpus: Input should be a valid n",
        ),
        (
            "a.json",
            '[{"targets": ["x:1", "x:1"], "labels": {"pool": "a"}}]',
            "'x:1' is given twice: the first is scraped",
        ),
        ("a.yml", "- targets: [x:1\n", "no YAML: while parsing a flow sequence"),
        ("a.yml", "- targets: ['x:1']\n  labels: {pool: a}\n", ""),
    ],
)
def test_a_file_of_targets_that_cannot_be_used_is_told_in_a_line(
    journal: Journal, tmp_path: Path, clock: Clock, name: str, text: str, says: str
) -> None:
    (tmp_path / name).write_text(text)
    one = scraper(journal, tmp_path, clock, files=[{"files": "a.*"}])
    one.look()
    assert says in one.problem
    assert bool(says) == bool(one.problem)
    assert "\n" not in one.problem


def test_the_loop_keeps_its_interval_and_stops(target: Target, journal: Journal, tmp_path: Path) -> None:
    count = [0]

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        count[0] += 10
        send(handler, tokens(count[0]))

    target.answer = answer
    sources = Sources.model_validate({"scrape": [{"url": target.url, "pool": "p", "interval_s": 1}]})
    one = Scraper(sources, tmp_path, journal)
    one.start()
    until = time.monotonic() + 15
    while len(target.asked) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    one.stop()
    asked = len(target.asked)
    assert asked >= 4
    time.sleep(1.2)
    assert len(target.asked) == asked
    assert one.watched()[0].good_s > 0


def page(count: int, started_s: float) -> bytes:
    return tokens(count) + f"process_start_time_seconds {started_s}\n".encode()


REPLICAS = ((1_000_000, NOW_S - 9000.0), (900_000, NOW_S - 5000.0))
"""Two processes' counters when they were first asked, and when they began; each grows by 10 a scrape."""


@pytest.mark.parametrize(("stays", "counts"), [(0, 690), (1, 100)])
def test_an_address_that_two_processes_share_counts_nothing_and_says_why(
    target: Target, journal: Journal, tmp_path: Path, clock: Clock, stays: int, counts: int
) -> None:
    """A Service with two replicas, of which one leaves after 10 minutes and the other stays.

    Once nobody else has answered for 5 minutes it counts: from its last page, or, where none was read, from now on.
    """
    one = scraper(journal, tmp_path, clock, scrape=[{"url": target.url, "pool": "p"}])
    (watched,) = one.watched()

    def scrape(turn: int, which: int) -> str:
        count, started_s = REPLICAS[which]
        clock.at_s = NOW_S + 15 * turn
        target.answer = lambda h: send(h, page(count + 10 * turn, started_s))
        one.scrape(watched)
        return watched.error

    assert scrape(0, 0) == ""
    for turn in range(1, 40):
        assert "two processes answer at this address" in scrape(turn, turn % 2)
    assert counted(journal) == 0
    told = [scrape(turn, stays) for turn in range(40, 70)]
    assert (told[0] != "", told[-1]) == (True, "")
    assert counted(journal) == counts


def test_a_process_that_takes_over_counts_from_its_start(
    target: Target, journal: Journal, tmp_path: Path, clock: Clock
) -> None:
    """A new replica starts, gets ready, and then has the address to itself: counted late, and whole."""
    one = scraper(journal, tmp_path, clock, scrape=[{"url": target.url, "pool": "p"}])
    (watched,) = one.watched()

    def at(seconds: float, count: int, started_s: float) -> str:
        clock.at_s, target.answer = NOW_S + seconds, lambda h: send(h, page(count, started_s))
        one.scrape(watched)
        return watched.error

    assert at(0, 100, NOW_S - 9000) == ""
    assert at(15, 150, NOW_S - 9000) == ""
    assert "two processes" in at(30, 20, NOW_S + 5)  # it was loading while the old one answered
    assert "two processes" in at(300, 60, NOW_S + 5)
    assert at(345, 70, NOW_S + 5) == ""
    assert counted(journal) == 50 + 70
    assert at(360, 5, NOW_S + 350) == ""  # a restart: it began after the old one's last answer
    assert counted(journal) == 50 + 70 + 5
