"""Who may ask and send: tokens, scopes, tenants, foreign pages, and how fast."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pertoken.errors import InputError, UnknownNameError
from pertoken.web._fetch import fetch
from pertoken.web._limits import Pace
from pertoken.web.app import Limits
from pertoken.web.tokens import Tokens
from tests.web.conftest import NOW_S, Client
from tests.web.test_ingest import WINDOW, event


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens(tmp_path / "data")


def test_a_token_is_kept_as_its_hash_alone(tokens: Tokens, tmp_path: Path) -> None:
    text = tokens.add("grafana", ("read",))
    path = tmp_path / "data" / "tokens.json"
    kept = path.read_text()
    assert text.split("_", 2)[2] not in kept
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    caller = tokens.caller(text)
    assert caller is not None
    assert (caller.name, caller.may("read"), caller.may("write"), caller.may("admin")) == (
        "grafana", True, False, False,
    )  # fmt: skip
    for wrong in (
        text[:-1],
        text + "x",
        text.upper(),
        "",
        "pt_",
        "pt_x_y",
        text.replace("pt_", "qt_"),
        "\udcff",
    ):
        assert tokens.caller(wrong) is None
    assert [t.name for t in tokens.all()] == ["grafana"]


def test_another_process_sees_new_and_removed_tokens(tokens: Tokens, tmp_path: Path) -> None:
    other = Tokens(tmp_path / "data")
    text = tokens.add("a", ("admin",))
    assert [t.name for t in other.all()] == ["a"]
    assert other.caller(text) is not None
    tokens.remove("a")
    assert other.all() == []
    assert other.caller(text) is None


def test_tokens_that_make_no_sense_are_refused(tokens: Tokens, tmp_path: Path) -> None:
    tokens.add("a", ("read",))
    with pytest.raises(InputError, match="'a' exists"):
        tokens.add("a", ("read",))
    with pytest.raises(UnknownNameError, match="did you mean write"):
        tokens.add("b", ("wirte",))
    with pytest.raises(InputError, match="needs a scope"):
        tokens.add("b", ())
    with pytest.raises(InputError, match="sees all tenants"):
        tokens.add("b", ("admin",), tenant="shop")
    with pytest.raises(InputError, match="printable"):
        tokens.add("b\n", ("read",))
    with pytest.raises(UnknownNameError, match="did you mean a"):
        tokens.remove("aa")
    (tmp_path / "data" / "tokens.json").write_text("[{}]")
    with pytest.raises(InputError, match=r"tokens\.json cannot be read"):
        tokens.all()


def test_each_scope_opens_its_own_doors(client_of: Callable[..., Client], tokens: Tokens) -> None:
    client = client_of(require_tokens=True)
    keys = {scope: tokens.add(scope, (scope,)) for scope in ("read", "write", "admin")}
    doors: dict[str, Callable[[dict[str, str]], Any]] = {
        "read": lambda h: client.get("/v1/cost", headers=h),
        "write": lambda h: client.post("/v1/events", json=[event("a")], headers=h),
        "admin": lambda h: client.post("/v1/close", json=WINDOW, headers=h),
    }
    for scope, knock in doors.items():
        assert knock({}).status_code == 401
        assert knock({}).headers["www-authenticate"] == "Bearer"
        assert knock(bearer("pt_0_0")).status_code == 401
        for mine, key in keys.items():
            assert knock(bearer(key)).status_code == (200 if mine in (scope, "admin") else 403)
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200


def test_a_tenants_token_sees_and_writes_its_own_rows_alone(
    client_of: Callable[..., Client], tokens: Tokens
) -> None:
    client = client_of(require_tokens=True)
    boss = bearer(tokens.add("boss", ("admin",)))
    mine = bearer(tokens.add("shop", ("read", "write"), tenant="shop"))
    client.post("/v1/events", json=[event("a", 1000, tenant="other")], headers=boss)
    # Whatever tenant the events name, and the key of another sender: they are the shop's.
    client.post("/v1/events", json=[event("a", 10, tenant="other")], headers=mine)
    assert client.post("/v1/close", json=WINDOW, headers=boss).status_code == 200
    for query in ({}, {"tenant": "other"}, {"tenant": "other,shop"}, {"by": "tenant"}):
        rows = client.get("/v1/usage", params=query, headers=mine).json()["rows"]
        assert sum(Decimal(r["quantity"]) for r in rows if r["meter"] == "output_tokens") == 10
        assert {r.get("tenant", "shop") for r in rows} == {"shop"}
    (cost,) = client.get("/v1/cost", params={"by": "tenant"}, headers=mine).json()["rows"]
    assert cost == {"tenant": "shop", "cost_usd": "0.000150000"}
    names = {"name": ["usd_per_mtok_total", "utilisation"], "by": "tenant"}
    assert [r["tenant"] for r in client.get("/v1/metric", params=names, headers=mine).json()["rows"]] == [
        "shop"
    ]
    for path in ("/v1/doctor", "/v1/books", "/v1/report?book=actual&book=plan:x"):
        assert client.get(path, headers=mine).status_code == 403
    binary = {"content-type": "application/x-protobuf", **mine}
    assert client.post("/api/v1/write", content=b"", headers=binary).status_code == 403
    assert client.post("/v1/metrics", json={}, headers=mine).status_code == 403


def test_without_tokens_a_foreign_page_gets_nothing(client: Client) -> None:
    assert client.get("/v1/cost").status_code == 200
    assert client.get("/v1/cost", headers={"origin": "http://127.0.0.1:8700"}).status_code == 200
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"host": "evil.example"},
        {"host": "evil.example:8700"},
        {"host": "127.0.0.1.evil.example"},
    ):
        answer = client.post("/v1/close", json=WINDOW, headers=headers)
        assert answer.status_code == 403
    assert client.get("/v1/cost", headers={"host": "localhost:8700"}).status_code == 200
    assert client.get("/v1/cost", headers={"host": "[::1]:8700"}).status_code == 200


def test_further_names_can_be_allowed(client_of: Callable[..., Client]) -> None:
    client = client_of(hosts=frozenset({"meter.lan"}))
    assert client.get("/v1/cost", headers={"host": "meter.lan:8700"}).status_code == 200
    assert client.get("/v1/cost").status_code == 403


def test_too_fast_is_429_with_a_time_to_wait(client_of: Callable[..., Client], tokens: Tokens) -> None:
    client = client_of(require_tokens=True, limits=Limits(requests_per_s=0.001, burst=3))
    mine, other = bearer(tokens.add("a", ("read",))), bearer(tokens.add("b", ("read",)))
    answers = [client.get("/v1/cost", headers=mine).status_code for _ in range(5)]
    assert answers == [200, 200, 200, 429, 429]
    assert int(client.get("/v1/cost", headers=mine).headers["retry-after"]) > 100
    assert client.get("/v1/cost", headers=other).status_code == 200


def test_guessing_tokens_is_slowed_down(client_of: Callable[..., Client]) -> None:
    client = client_of(require_tokens=True)
    answers = [client.get("/v1/cost", headers=bearer(f"pt_{n}_guess")).status_code for n in range(30)]
    assert answers[:20] == [401] * 20
    assert set(answers[20:]) <= {401, 429}
    assert 429 in answers


def test_a_broken_file_of_tokens_is_not_told_to_who_asks(
    client_of: Callable[..., Client], tokens: Tokens, tmp_path: Path
) -> None:
    text = tokens.add("a", ("read",))
    (tmp_path / "data" / "tokens.json").write_text("{")
    answer = client_of(require_tokens=True).get("/v1/cost", headers=bearer(text))
    assert (answer.status_code, answer.json()) == (503, {"detail": "no token can be looked up here now"})


def test_a_header_that_is_none_gives_no_secret_away(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("Bearer one-line\nBearer another")
    with pytest.raises(InputError) as raised:
        fetch("http://127.0.0.1:9/metrics", timeout_s=1.0, authorization_file=secret)
    assert "Bearer" not in str(raised.value)
    with pytest.raises(InputError, match="refused"):
        fetch("http://127.0.0.1:9/metrics", timeout_s=1.0)


def test_the_pace_refills_and_forgets() -> None:
    pace = Pace(per_s=2.0, burst=2.0)
    assert [pace.wait_s("a", 0.0) for _ in range(3)] == [0.0, 0.0, 0.5]
    assert pace.wait_s("b", 0.0) == 0.0
    assert pace.wait_s("a", 0.5) == 0.0
    for number in range(20_000):
        pace.wait_s(f"caller {number}", 1.0)
    assert len(pace._left) == 10_000


def test_hostile_text_comes_back_as_json_and_never_as_markup(client: Client) -> None:
    nasty = "<script>alert(1)</script>'; DROP TABLE usage_hourly; --\x1b[31m\r\nSet-Cookie: a=b"
    taken = client.post("/v1/events", json=[event("a", 7, tenant=nasty, model=nasty)])
    assert taken.status_code == 200, taken.text
    assert client.post("/v1/close", json=WINDOW).status_code == 200
    answer = client.get("/v1/usage", params={"by": "tenant,model", "tenant": nasty})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    (row,) = answer.json()["rows"]
    assert (row["tenant"], row["quantity"]) == (nasty, "7.000000")
    assert "\x1b" not in answer.text
    for name, value in (("by", nasty), ("name", nasty), ("start", nasty)):
        query = {"name": "usd_per_mtok_total", name: value}
        refused = client.get("/v1/metric", params=query)
        assert refused.status_code in (400, 422)
        assert refused.headers["content-type"] == "application/json"
        assert "\x1b" not in refused.text
        json.loads(refused.text)


def test_figures_of_a_window(client: Client) -> None:
    client.post("/v1/events", json=[event("a", 10), event("b", 20, ts=NOW_S - 3600)])
    client.post("/v1/close", json=WINDOW)
    by_hour = client.get("/v1/usage", params={"by": "hour", "pool": "api"}).json()["rows"]
    assert [(r["hour"], r["quantity"]) for r in by_hour] == [
        ("2026-11-24T08:00:00Z", "20.000000"),
        ("2026-11-24T09:00:00Z", "10.000000"),
    ]
    late = client.get("/v1/usage", params={"pool": "api", "start": "2026-11-24T09:00:00Z"}).json()["rows"]
    assert [r["quantity"] for r in late] == ["10.000000"]
    found = client.get(
        "/v1/metric", params={"name": "usd_per_mtok_total,usd_per_mtok_output", "pool": "api"}
    ).json()
    assert found["units"]["usd_per_mtok_output"] == "USD per M output tokens"
    assert found["rows"] == [{"usd_per_mtok_total": 15.0, "usd_per_mtok_output": 15.0}]
    assert client.get("/v1/metric", params={"name": "usd_per_mtok_outputs"}).status_code == 400
    assert client.get("/v1/metric").status_code == 422
    assert client.get("/v1/cost", params={"start": "2026-11-24T09:00"}).status_code == 422
    future = {"start": "2026-11-24T09:00Z", "end": "2026-11-24T12:00Z"}
    assert client.post("/v1/close", json=future).status_code == 400
    backwards = {"start": "2026-11-24T09:00Z", "end": "2026-11-24T08:00Z"}
    assert "not after" in client.post("/v1/close", json=backwards).json()["detail"]


def test_the_local_admin_is_let_in_by_its_own_word(client_of: Callable[..., Client]) -> None:
    client = client_of(require_tokens=True, admin=lambda text: text == "own")
    assert client.post("/v1/close", json=WINDOW, headers=bearer("own")).status_code == 200
    assert client.post("/v1/close", json=WINDOW, headers=bearer("other")).status_code == 401


def test_data_is_private_to_its_owner(client: Client, tmp_path: Path) -> None:
    assert client.get("/healthz").status_code == 200
    assert stat.S_IMODE(os.stat(tmp_path / "data").st_mode) == 0o700
