"""Answers in pages: together they are the whole, a cursor is of its question alone, and opens no one else's rows."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pertoken.web import _paging
from pertoken.web.tokens import Tokens
from tests.web.conftest import NOW_S, Client
from tests.web.test_ingest import WINDOW, event
from tests.web.test_who import bearer

QUESTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/cost", {"by": "hour,tenant,model,component"}),
    ("/v1/usage", {"by": "tenant,hour"}),
    ("/v1/metric", {"by": "tenant,hour", "name": "usd_per_mtok_output,utilisation"}),
    ("/v1/metric", {"by": "model,tenant", "name": "utilisation", "start": "2026-11-24T08:00Z"}),
)


@pytest.fixture
def filled(client: Client) -> Client:
    fill(client)
    return client


def fill(client: Client, **headers: str) -> None:
    tenants = ("a", "b", "", "a,b", '"', "é", "null", "<b>")
    sent = [
        event(f"{t}{h}{m}", 1_000_000 + h, tenant=t, model=m, ts=NOW_S - 3600 * h)
        for t in tenants
        for h in (0, 1)
        for m in ("m", "")
    ]
    assert client.post("/v1/events", json=sent, headers=headers).status_code == 200
    assert client.post("/v1/close", json=WINDOW, headers=headers).status_code == 200


def walk(
    client: Client, path: str, params: dict[str, Any], limit: int, **headers: str
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {"limit": limit}
    while True:
        answer = client.get(path, params={**params, **more}, headers=headers)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page["rows"]) <= limit
        rows += page["rows"]
        if page["next"] is None:
            return rows
        assert len(page["rows"]) == limit
        more["cursor"] = page["next"]


@pytest.mark.parametrize(("path", "params"), QUESTIONS)
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_pages_put_together_are_the_whole_answer(
    filled: Client, path: str, params: dict[str, Any], limit: int
) -> None:
    whole = filled.get(path, params=params).json()
    assert whole["next"] is None
    assert len(whole["rows"]) > 3
    assert walk(filled, path, params, limit) == whole["rows"]


def test_rows_that_come_between_two_pages_move_none(filled: Client) -> None:
    params: dict[str, Any] = {"by": "tenant,model", "limit": 8, "pool": "api"}
    first = filled.get("/v1/cost", params=params).json()
    after: dict[str, Any] = {**params, "cursor": first["next"]}
    rest = filled.get("/v1/cost", params=after).json()["rows"]
    filled.post("/v1/events", json=[event("new", 5, tenant="A")])  # sorts before the edge
    filled.post("/v1/close", json=WINDOW)
    assert filled.get("/v1/cost", params=after).json()["rows"] == rest


def test_a_cursor_of_another_question_or_of_nobody_is_refused(filled: Client) -> None:
    params: dict[str, Any] = {"by": "tenant,hour", "limit": 2}
    cursor = filled.get("/v1/cost", params=params).json()["next"]
    read = json.loads(base64.urlsafe_b64decode(cursor + "=="))
    changes: tuple[dict[str, str], ...] = (
        {"by": "tenant"},
        {"by": "hour,tenant"},
        {"pool": "api"},
        {"book": "plan:x"},
    )
    for change in changes:
        answer = filled.get("/v1/cost", params={**params, "cursor": cursor, **change})
        assert answer.status_code == 400, change
        assert "cursor" in answer.json()["detail"]
    assert filled.get("/v1/usage", params={**params, "cursor": cursor}).status_code == 400
    for wrong in (
        [read[0]],
        [read[0], "a"],
        [read[0], "a", "yesterday"],
        [read[0], "a", "2026-11-24T08:00"],
        [read[0], "a", "0001-01-01T00:00+14:00"],
        [read[0], 7, read[2]],
        [read[0], ["a"], read[2]],
        [read[0], "\ud800", read[2]],
        {"a": 1},
        "x",
    ):
        text = base64.urlsafe_b64encode(json.dumps(wrong).encode()).decode()
        answer = filled.get("/v1/cost", params={**params, "cursor": text})
        assert (answer.status_code, "none of ours" in answer.text) == (400, True), wrong
    for limit in (0, -1, 100_001, "all"):
        assert filled.get("/v1/cost", params={"limit": limit}).status_code == 422


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: base64.urlsafe_b64encode(b).decode()))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_as_a_cursor_is_answered(filled: Client, cursor: str) -> None:
    sent = cursor.encode(errors="replace").decode()
    answer = filled.get("/v1/cost", params={"by": "tenant", "cursor": sent})
    assert answer.status_code == (400 if sent else 200)


def test_a_cursor_leads_no_tenant_out_of_its_rows(client_of: Callable[..., Client], tmp_path: Path) -> None:
    client = client_of(require_tokens=True)
    tokens = Tokens(tmp_path / "data")
    boss = bearer(tokens.add("boss", ("admin",)))
    mine = bearer(tokens.add("shop", ("read",), tenant="b"))
    fill(client, **boss)
    params: dict[str, Any] = {"by": "tenant,hour", "limit": 1}
    theirs = client.get("/v1/cost", params=params, headers=boss).json()["next"]
    scopes: tuple[dict[str, str], ...] = ({}, {"tenant": "a"}, {"tenant": "b"})
    for asked in scopes:
        refused = client.get("/v1/cost", params={**params, **asked, "cursor": theirs}, headers=mine)
        assert refused.status_code == 400
        rows = walk(client, "/v1/cost", {**params, **asked}, 1, **mine)
        assert {r["tenant"] for r in rows} == {"b"}
        assert rows == client.get("/v1/cost", params={"by": "tenant,hour"}, headers=mine).json()["rows"]
    # Even one made by hand, with the right question and another's key, begins among its own rows.
    mark = json.loads(
        base64.urlsafe_b64decode(client.get("/v1/cost", params=params, headers=mine).json()["next"] + "==")
    )[0]
    forged = base64.urlsafe_b64encode(json.dumps([mark, "a", "2026-11-24T08:00:00+00:00"]).encode()).decode()
    answer = client.get("/v1/cost", params={**params, "limit": 100, "cursor": forged}, headers=mine)
    assert {r["tenant"] for r in answer.json()["rows"]} == {"b"}


def test_too_many_rows_name_the_way_on(filled: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paging, "MOST_ROWS", 5)
    answer = filled.get("/v1/cost", params={"by": "tenant,hour,model"})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(
        "more than 5 rows: ask by fewer dimensions or hours, or in pages"
    )


def test_openapi_tells_of_pages(client: Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v1/metric", "/v1/cost", "/v1/usage"):
        told = {p["name"]: p.get("description", "") for p in paths[path]["get"]["parameters"]}
        assert "next" in told["cursor"]
        assert told["limit"]
