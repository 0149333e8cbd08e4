"""A service in this process, asked through its ASGI application."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvicorn
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Page

from pertoken.fleet import RunningFleet, load_fleet
from pertoken.report.books import open_books
from pertoken.web.app import Limits, create_app
from pertoken.web.service import Service
from pertoken.web.tokens import Tokens

FLEET = """
sites:
  dc: {timezone: UTC, pue: 1.2, tariff: {usd_per_kwh: 0.1}}
pools:
  h100:
    gpu: H100-SXM
    site: dc
    count: 8
    price: {term: owned, usd_per_gpu: 35040, life_years: 4, wacc_fraction: 0, residual_fraction: 0,
            method: straight-line}
  api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}
sources:
  written:
    - {instance: "vllm:8000", pool: h100}
"""
NOW_S = 1_795_510_800.0  # 2026-11-24 09:00 UTC
Client = TestClient
T = TypeVar("T")


class Clock:
    """A wall clock that stands where it is put."""

    def __init__(self, at_s: float = NOW_S) -> None:
        self.at_s = at_s

    def __call__(self) -> float:
        return self.at_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(tmp_path: Path) -> RunningFleet:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    return load_fleet(path)


@pytest.fixture
def grace_s() -> float:
    """How long after its end an hour closes [s]; by itself in no test that does not want it."""
    return 3600.0


@pytest.fixture
def client_of(
    tmp_path: Path, fleet: RunningFleet, clock: Clock, grace_s: float
) -> Iterator[Callable[..., Client]]:
    """Makes a client of a service on this test's folder; options go to `create_app`."""
    opened: list[Client] = []

    def make(*, limits: Limits | None = None, require_tokens: bool = False, **options: Any) -> Client:
        books = open_books(fleet, tmp_path / "data")
        service = Service(books, tmp_path, clock=clock, grace_s=grace_s)
        app = create_app(
            service, Tokens(tmp_path / "data"), require_tokens=require_tokens, limits=limits, **options
        )
        client = Client(app, base_url="http://127.0.0.1:8700")
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def client(client_of: Callable[..., Client]) -> Client:
    return client_of()


def awaited(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine answers, run in a thread of its own: a browser keeps a loop running in this one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


@contextmanager
def serving(client: Client) -> Iterator[str]:
    """The client's application behind a real socket; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(client.app, port=port, lifespan="off", log_level="error", timeout_graceful_shutdown=3)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


LIGHT = {"color_scheme": "light", "viewport": {"width": 1200, "height": 800}}
DARK_PHONE = {"color_scheme": "dark", "viewport": {"width": 390, "height": 800}}


@contextmanager
def watched(browser: Browser, served: str, **looks: Any) -> Iterator[Page]:
    """A page of its own context that may neither complain nor ask elsewhere nor be wider than its window."""
    problems: list[str] = []
    requests: list[str] = []
    context = browser.new_context(**looks)
    page = context.new_page()
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    yield page
    width = page.evaluate("window.innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    assert [u for u in requests if not u.startswith((served, "data:", "blob:"))] == []
    context.close()
