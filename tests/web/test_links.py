"""Every address that a page names opens, and a tenant's token finds nobody else behind any of them."""

from __future__ import annotations

import html
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urldefrag, urljoin, urlsplit

import pytest

from pertoken.fleet import RunningFleet
from pertoken.web._frame import NAVIGATION
from pertoken.web.tokens import Tokens
from tests.web import test_budget_pages
from tests.web.conftest import Client, Clock
from tests.web.test_budget_pages import OTHER, fill
from tests.web.test_who import bearer

HTML = {"accept": "text/html"}
fleet = test_budget_pages.fleet


@pytest.fixture
def grace_s() -> float:
    return 60.0


def kind(address: str) -> tuple[str, ...]:
    """One address of a kind is opened: of a path (all metrics have the same), its parameters and dimensions."""
    asked = parse_qsl(urlsplit(address).query, keep_blank_values=True)
    path = re.sub("/figure/[a-z_0-9]+", "/figure/", urlsplit(address).path)
    return (path, *sorted({k for k, _ in asked}), *(v for k, v in asked if k == "by"))


def opened(client: Client, headers: dict[str, str], begin: list[str]) -> Iterator[tuple[str, int, str]]:
    """Address, status and text of all that can be come to by links, forms that only ask among them."""
    waiting, known = deque(begin), set(map(kind, begin))
    while waiting:
        address = waiting.popleft()
        answer = client.get(address, headers=HTML | headers, follow_redirects=False)
        is_page = answer.headers["content-type"].startswith("text/html")
        yield (
            address,
            answer.status_code,
            "" if answer.headers["content-type"] == "image/png" else answer.text,
        )
        posts = set(re.findall(r'<form method="post" action="([^"]*)"', answer.text)) if is_page else set()
        for link in re.findall(r'(?:href|action)="([^"#][^"]*)"', answer.text) if is_page else ():
            if link in posts or link.startswith("data:"):
                continue
            assert not urlsplit(link).netloc, f"{address} leads elsewhere: {link}"
            following = urldefrag(urljoin(address, html.unescape(link)))[0]
            if kind(following) not in known:
                known.add(kind(following))
                waiting.append(following)


def test_every_link_opens(client_of: Callable[..., Client], clock: Clock, fleet: RunningFleet) -> None:
    client = client_of()
    clock.at_s += 120
    fill(client.app.state.service)  # type: ignore[attr-defined]
    found = list(opened(client, {}, ["/"]))
    assert [(address, status) for address, status, _ in found if status != 200] == []
    assert {path for path, *_ in NAVIGATION} <= {address for address, *_ in found}
    assert len(found) > 200


def test_a_tenants_links_lead_to_its_own_alone(
    client_of: Callable[..., Client], clock: Clock, tmp_path: Path, fleet: RunningFleet
) -> None:
    mine = bearer(Tokens(tmp_path / "data").add("mine", ("read",), tenant="blue"))
    client = client_of(require_tokens=True)
    clock.at_s += 120
    fill(client.app.state.service)  # type: ignore[attr-defined]
    found = list(opened(client, mine, ["/"]))
    assert [(address, status) for address, status, _ in found if status != 200] == []
    assert len(found) > 100
    for address, _, text in found:
        # A statement names whose rows it asks for, and has none of them.
        nobody = [] if ".sql" in address else ["(idle)"]
        for other in (OTHER, html.escape(OTHER), "everything", *nobody):
            assert other not in text, f"{other} stands in {address}"
