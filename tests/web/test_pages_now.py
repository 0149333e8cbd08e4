"""The page Now and its stream: to each its own, one computation for all, an end when the service stops."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException
from playwright.sync_api import Browser

from pertoken.fleet import RunningFleet, ScrapeTarget
from pertoken.report.now import TILES
from pertoken.report.so_far import window_s
from pertoken.web import live as live_module
from pertoken.web.live import Live, live_of, snapshots
from pertoken.web.tokens import Tokens
from tests.web.conftest import DARK_PHONE, LIGHT, NOW_S, Client, Clock, awaited, serving, watched
from tests.web.test_ingest import event
from tests.web.test_who import bearer

HOUR_S = 3600.0


def told(client: Client, at_s: float, key: str, tokens: int, tenant: str = "a", **headers: str) -> None:
    sent = [{**event(key, tokens, tenant=tenant), "ts": at_s}]
    answer = client.post("/v1/events", json=sent, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.fixture
def day(client: Client, clock: Clock) -> Client:
    """Five closed hours of an API's tokens, and some in the hour that is not over."""
    fill_day(client, clock)
    return client


def fill_day(client: Client, clock: Clock, **headers: str) -> None:
    for hour in range(5):
        for tenant, tokens in (("a", 1_000_000 * (hour + 1)), ("<b>'x", 500_000)):
            told(client, NOW_S - HOUR_S * (hour + 1) + 60, f"{hour}{tenant}", tokens, tenant, **headers)
    clock.at_s = NOW_S + 1800
    service = client.app.state.service  # type: ignore[attr-defined]
    service.books.close_due(service.now())
    told(client, clock.at_s - 10, "now", 600_000, **headers)


def value(text: str, name: str) -> str:
    found = re.search(rf'data-day="{name}">([^<]+)<', text)
    assert found
    return found[1]


def test_the_page_shows_the_closed_hours_and_where_they_are_from(day: Client) -> None:
    text = day.get("/").text
    assert "Nothing was metered" not in text
    for tile in TILES:
        assert f'data-now="{tile.name}"' in text
    assert value(text, "usd_per_mtok_output") == "15.00"
    link = re.search(r'href="(/figure/usd_per_mtok_total\?[^"]+)"', text)
    assert link
    figure = day.get(link[1].replace("&amp;", "&").replace("total?", "total.json?"))
    assert len(figure.json()["rows"]) == 5
    whole = day.get("/v1/metric?name=usd_per_mtok_total&start=2026-11-23T09:00Z&end=2026-11-24T09:00Z").json()
    assert float(value(text, "usd_per_mtok_total").replace(",", "")) == pytest.approx(
        whole["rows"][0]["usd_per_mtok_total"], rel=1e-3
    )
    # Hours with tokens have a bar that says its figure.
    assert "08:00 UTC: 15.00 USD per M output tokens" in text


def test_nothing_metered_is_said(client: Client) -> None:
    text = client.get("/?pool=api&model=nothing").text
    assert "Nothing was metered" in text
    assert 'href="/sources"' in text


def test_a_snapshot_is_of_the_last_minute_and_the_hour_so_far(day: Client) -> None:
    service = day.app.state.service  # type: ignore[attr-defined]
    found = snapshots(service, {(): live_module._Scoped({}), ("t",): live_module._Scoped({"tenant": ["a"]})})  # type: ignore[dict-item]
    message = found[()]
    assert message["now"]["output_per_s"] == "10,000"
    assert message["now"]["usd_per_mtok_output"] == "15.00"
    assert message["hour"]["output_per_s"] == "333.3"
    assert message["since"] == "09:00"
    assert message["problem"] == ""
    assert not message["quiet"]
    mine = found["t",]  # type: ignore[index]
    assert "utilisation" not in mine["now"]
    # 10,000 tokens/s at 15 USD per M; the pool that idles is nobody's.
    assert mine["now"]["usd_per_hour"] == "540.0"


def read(client: Client, address: str, events: int, **headers: str) -> list[tuple[str, Any]]:
    """Events of a stream, over a real socket: a test client would wait for the end of it."""
    found: list[tuple[str, Any]] = []
    with serving(client) as served:
        connection = http.client.HTTPConnection(served.removeprefix("http://"), timeout=20)
        connection.request("GET", address, headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        name = ""
        while len(found) < events:
            line = answer.readline().decode().strip()
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            if line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
        answer.close()
        connection.close()
    return found


def test_the_stream_tells_the_past_and_then_what_is_new(day: Client) -> None:
    found = read(day, "/live", 3)
    assert [name for name, _ in found] == ["past", "now", "now"]
    assert found[1][1]["now"]["output_per_s"] == "10,000"
    until = 100
    live = day.app.state.live  # type: ignore[attr-defined]
    while live.listeners and until:
        until -= 1
        time.sleep(0.05)
    assert live.listeners == 0
    assert not live._scopes


def test_a_tenant_sees_its_own_alone(client_of: Callable[..., Client], tmp_path: Path, clock: Clock) -> None:
    client = client_of(require_tokens=True)
    tokens = Tokens(tmp_path / "data")
    boss = bearer(tokens.add("boss", ("admin",)))
    mine = bearer(tokens.add("shop", ("read",), tenant="a"))
    writes = bearer(tokens.add("w", ("write",)))
    fill_day(client, clock, **boss)
    for address in ("/", "/live"):
        assert client.get(address).status_code == 401
        assert client.get(address, headers=writes).status_code == 403
    plain = client.get("/", headers=mine)
    asked = client.get("/", params={"tenant": "<b>'x"}, headers=mine)
    assert plain.content == asked.content
    for other in (b"<b>'", b"&lt;b", b"%3Cb", b"/sources", b'data-now="utilisation'):
        assert other not in plain.content
    assert value(plain.text, "output_per_s") == value(
        client.get("/?tenant=a", headers=boss).text, "output_per_s"
    )
    assert value(plain.text, "output_per_s") != value(client.get("/", headers=boss).text, "output_per_s")
    told(client, clock.at_s - 5, "theirs", 6_000_000, "<b>'x", **boss)
    [_, (_, message)] = read(client, "/live?tenant=%3Cb%3E'x", 2, **mine)
    assert message["now"]["output_per_s"] == "10,000"
    [_, (_, message)] = read(client, "/live", 2, **boss)
    assert message["now"]["output_per_s"] == "110,000"


def test_many_listeners_cost_one_computation_and_slow_ones_get_the_newest(
    day: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = day.app.state.service  # type: ignore[attr-defined]
    ticks: list[int] = []
    real = live_module.snapshots

    def counted(*given: Any) -> Any:
        ticks.append(len(given[1]))
        return real(*given)

    monkeypatch.setattr(live_module, "snapshots", counted)

    async def look() -> None:
        live = Live(service, tick_s=0.2)
        streams = [await live.listen({}) for _ in range(50)]
        for stream in streams:
            assert b"event: past" in await anext(stream)
        for _ in range(3):
            for stream in streams[:49]:
                assert b'"output_per_s": "10,000"' in await anext(stream)
        assert live.listeners == 50
        assert max(len(s.queues) for s in live._scopes.values()) == 50
        assert all(q.qsize() <= 2 for s in live._scopes.values() for q in s.queues)
        live.end()
        async with asyncio.timeout(1):
            for stream in streams:
                [_ async for _ in stream]
        assert live.listeners == 0
        with pytest.raises(HTTPException):
            await live.listen({})

    awaited(look())
    assert set(ticks) == {1}
    assert len(ticks) <= 8


def test_there_is_a_most_of_listeners_and_silence_has_a_heartbeat(
    day: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "MOST_LISTENERS", 2)
    monkeypatch.setattr(live_module, "HEARTBEAT_S", 0.05)
    service = day.app.state.service  # type: ignore[attr-defined]

    async def look() -> None:
        live = Live(service, tick_s=60.0)
        one, two = await live.listen({}), await live.listen({"tenant": ["a"]})
        await anext(one), await anext(two)
        with pytest.raises(HTTPException) as refused:
            await live.listen({})
        assert refused.value.status_code == 503
        await two.aclose()  # type: ignore[attr-defined]
        assert live.listeners == 1
        heard = [await anext(one) for _ in range(4)]
        assert b": still here\n\n" in heard
        live.end()

    awaited(look())


def test_a_stream_ends_so_that_its_token_is_asked_for_again(
    day: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "STREAM_S", 0.2)
    service = day.app.state.service  # type: ignore[attr-defined]

    async def look() -> None:
        live = Live(service, tick_s=0.05)
        async with asyncio.timeout(10):
            messages = [message async for message in await live.listen({})]
        assert len(messages) >= 2
        assert live.listeners == 0

    awaited(look())


def test_a_tick_that_fails_is_told_and_the_next_may_succeed(
    day: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = day.app.state.service  # type: ignore[attr-defined]
    real, calls = live_module.snapshots, [0]

    def sometimes(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise OSError("the disk went away")
        return real(*given)

    monkeypatch.setattr(live_module, "snapshots", sometimes)

    async def look() -> tuple[bytes, bytes]:
        live = Live(service, tick_s=0.05)
        stream = await live.listen({})
        await anext(stream)
        found = await anext(stream), await anext(stream)
        live.end()
        return found

    first, second = awaited(look())
    assert b"OSError" in first
    assert b"disk" not in first
    assert b"10,000" in second


def test_the_window_holds_whole_intervals(fleet: RunningFleet) -> None:
    assert window_s(fleet) == 60
    for interval_s, want in ((15.0, 60), (7.0, 63), (300.0, 300), (1.0, 60)):
        target = ScrapeTarget(url="http://h/m", pool="h100", interval_s=interval_s)
        sources = fleet.sources.model_copy(update={"scrape": [target]})
        assert window_s(fleet.model_copy(update={"sources": sources})) == want


def test_one_live_for_an_application(day: Client) -> None:
    async def look() -> None:
        request = type("Request", (), {"app": day.app})()
        service = day.app.state.service  # type: ignore[attr-defined]
        assert live_of(request, service) is live_of(request, service)

    awaited(look())


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
def test_a_browser_is_told_without_asking(
    day: Client, browser: Browser, clock: Clock, looks: dict[str, Any]
) -> None:
    with serving(day) as served, watched(browser, served, **looks) as page:
        page.goto(f"{served}/")
        tokens = page.locator("[data-now=output_per_s]")
        assert not page.locator("#quiet").is_visible()
        page.locator("[data-now=output_per_s]", has_text="10,000").wait_for()
        assert page.locator(".spark rect").count() > 20
        told(day, clock.at_s - 1, "more", 600_000)
        page.locator("[data-now=output_per_s]", has_text="20,000").wait_for()
        assert tokens.count() == 1
        assert page.locator("#line path").get_attribute("d")
        page.locator("summary").click()
        assert page.locator("tbody tr").count() == 5
        page.locator("tbody a").first.click()
        page.wait_for_url("**/figure/cost_usd?*")
        clock.at_s += 300
        page.goto(f"{served}/")
        page.locator("#quiet", has_text="No source told anything in the last 60 s").wait_for()
        page.goto(f"{served}/?pool=h100")
        page.locator("#quiet", has_text="Nothing of these was counted").wait_for()
        page.goto(f"{served}/figure/cost_usd?by=component")
        page.wait_for_selector(".figure svg path", state="attached")


def test_a_tenant_signs_in_and_sees_its_own_live(
    client_of: Callable[..., Client], tmp_path: Path, clock: Clock, browser: Browser
) -> None:
    client = client_of(require_tokens=True)
    tokens = Tokens(tmp_path / "data")
    boss = bearer(tokens.add("boss", ("admin",)))
    mine = tokens.add("shop", ("read",), tenant="a")
    fill_day(client, clock, **boss)
    told(client, clock.at_s - 5, "theirs", 6_000_000, "<b>'x", **boss)
    with serving(client) as served, watched(browser, served, **LIGHT) as page:
        page.goto(f"{served}/")
        page.get_by_label("Token").fill(mine)
        page.get_by_role("button", name="Sign in").click()
        page.locator("[data-now=output_per_s]", has_text="10,000").wait_for()
        assert page.get_by_role("link", name="Sources").count() == 0
        # A stream that ends is asked for again, without a word.
        live = client.app.state.live  # type: ignore[attr-defined]
        assert live.listeners == 1
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        told(client, clock.at_s - 1, "more", 600_000, **boss)
        page.locator("[data-now=output_per_s]", has_text="20,000").wait_for()
