"""Plans put into the service's ledger: closed at their own rates, whole or not at all, and beside the actual book."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pertoken.ledger import Ledger, LedgerBrokenError
from pertoken.report import plan_book
from pertoken.report.plan_book import to_body
from pertoken.tables import RATES, USAGE, Hours, rate_rows, usage_rows
from pertoken.web.tokens import Tokens
from tests.web.conftest import NOW_S, Client

NOW = datetime.fromtimestamp(NOW_S, UTC)
HOURS: Hours = np.array([np.datetime64(NOW.replace(tzinfo=None), "h")])
ARROW = "application/vnd.apache.arrow.stream"
USAGE_LINE = {
    "table": "usage", "hour": NOW.isoformat(), "pool": "api", "model": "m", "tenant": "t", "phase": "output",
    "meter": "output_tokens", "quantity": 2_000_000, "basis": "assumed",
}  # fmt: skip
RATE_LINE = {
    "table": "rates", "hour": NOW.isoformat(), "pool": "api", "meter": "output_tokens", "category": "compute",
    "component": "api", "usd_per_unit": "0.000005", "basis": "quoted", "source": "a list",
}  # fmt: skip


def rows(usd_per_token: float = 5e-6, pool: str = "api") -> tuple[pa.Table, pa.Table]:
    """Two million tokens in the running hour, and their price."""
    usage = usage_rows(
        HOURS, {("output", "output_tokens"): 2e6},
        book="plan:shop", pool=pool, model="m", tenant="t", basis="assumed",
    )  # fmt: skip
    rates = rate_rows(
        HOURS,
        usd_per_token,
        pool=pool,
        meter="output_tokens",
        component="api",
        basis="quoted",
        source="a list",
    )
    return usage, rates


def put(client: Client, body: bytes, name: str = "plan:shop", kind: str = ARROW, **headers: str) -> Any:
    return client.put(f"/v1/books/{name}", content=body, headers={"content-type": kind, **headers})


def lines(*these: dict[str, Any]) -> bytes:
    return b"\n".join(json.dumps(line).encode() for line in these)


def costs(client: Client) -> dict[str, str]:
    return {
        row["book"]: row["cost_usd"]
        for row in client.get("/v1/cost?by=book&book=actual,plan:shop").json()["rows"]
    }


def used(client: Client) -> None:
    """A million tokens of the actual book, priced by the fleet at 15 USD per million."""
    event = {
        "key": "a", "ts": NOW_S, "pool": "api", "model": "m", "tenant": "t", "meter": "output_tokens",
        "quantity": 1e6,
    }  # fmt: skip
    assert client.post("/v1/events", json=[event]).status_code == 200
    closed = client.post("/v1/close", json={"start": NOW.isoformat(), "end": "2026-11-24T10:00:00Z"})
    assert closed.json()["hours"] == 1


def test_a_plan_stands_beside_the_actual_book(client: Client) -> None:
    used(client)
    before = costs(client)
    for usd_per_token in (7e-6, 5e-6):
        answer = put(client, to_body(*rows(usd_per_token)))
        assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "book": "plan:shop", "usage_rows": 1, "rate_rows": 1, "cost_usd": "10.000000000",
    }  # fmt: skip
    assert costs(client) == {**before, "plan:shop": "10.000000000"}
    assert [row["book"] for row in client.get("/v1/books").json()] == ["actual", "plan:shop"]
    report = client.get("/v1/report?book=actual&book=plan:shop&by=pool,model&pool=api").json()
    (line,) = [row for row in report["lines"] if row["pool"] == "api"]
    # By hand: 2 M tokens planned at 5 USD per million, 1 M taken at 15.
    assert (line["forecast_usd"], line["actual_usd"]) == ("10.000000000", "15.000000000")
    assert (Decimal(line["price_usd"]), Decimal(line["volume_usd"])) == (Decimal(10), Decimal(-5))
    # What the plan charges changes nothing in the actual book, closed again.
    used(client)
    assert costs(client) == {**before, "plan:shop": "10.000000000"}


def test_the_same_rows_as_lines(client: Client) -> None:
    for kind in ("application/x-ndjson", "application/jsonl"):
        answer = put(client, lines(USAGE_LINE, RATE_LINE), "shop", kind)
        assert answer.status_code == 200, answer.text
        assert answer.json()["cost_usd"] == "10.000000000"
    packed = gzip.compress(to_body(*rows(6e-6)))
    assert put(client, packed, **{"content-encoding": "gzip"}).json()["cost_usd"] == "12.000000000"
    assert costs(client) == {"plan:shop": "12.000000000"}


def test_a_plan_is_forgotten(client: Client) -> None:
    assert client.delete("/v1/books/plan:shop").status_code == 400
    assert put(client, to_body(*rows())).status_code == 200
    assert client.delete("/v1/books/plan:shop").json() == {"book": "plan:shop"}
    assert costs(client) == {}
    gone = client.delete("/v1/books/plan:shop")
    assert (gone.status_code, gone.json()["detail"]) == (
        400,
        "there is no book 'plan:shop': the ledger has none",
    )
    assert client.delete("/v1/books/actual").status_code == 400


def test_unpriced_usage_is_refused_and_nothing_is_half_written(client: Client) -> None:
    assert put(client, to_body(*rows())).status_code == 200
    usage, _ = rows(9e-6)
    answer = put(client, to_body(usage, rows(9e-6, pool="elsewhere")[1]))
    assert answer.status_code == 409
    assert "no rate for output_tokens in pool 'api'" in answer.json()["detail"]
    assert costs(client) == {"plan:shop": "10.000000000"}
    assert client.get("/v1/usage?book=plan:shop").json()["rows"][0]["quantity"] == "2000000.000000"


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("actual", 400, "'actual' is what the meter found"),
        ("plan:", 400, "no plan can be named ''"),
        ("plan:" + "x" * 65, 400, "no plan can be named"),
        ("a;DROP TABLE rates", 400, "no plan can be named"),
        ("plan:<b>", 400, "no plan can be named"),
        ("x" * 101, 422, "at most 100"),
    ],
)
def test_names_that_no_plan_has(client: Client, name: str, status: int, says: str) -> None:
    answer = put(client, to_body(*rows()), name)
    assert answer.status_code == status
    assert says in answer.json()["detail"]
    assert costs(client) == {}


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (b"", ARROW, "Arrow stream of usage cannot be read"),
        (to_body(*rows())[:-8], ARROW, "has no end"),
        (to_body(*rows()) + b"x", ARROW, "1 bytes follow"),
        (to_body(rows()[1], rows()[0]), ARROW, "usage rows have the columns"),
        (to_body(USAGE.empty_table(), rows()[1]), ARROW, "no usage row came"),
        (to_body(rows()[0], RATES.empty_table()), ARROW, "no rate row came"),
        (lines({**USAGE_LINE, "table": "cost"}), "application/x-ndjson", "Invalid value 'cost'"),
        (lines({**USAGE_LINE, "colour": 1}), "application/x-ndjson", "unknown field `colour`"),
        (lines({**USAGE_LINE, "quantity": "NaN"}), "application/x-ndjson", "NaN is no number"),
        (lines({**USAGE_LINE, "quantity": "0.1234567"}), "application/x-ndjson", "quantity: a value does not fit"),
        (lines({**USAGE_LINE, "hour": "2026-11-24T09:00:00"}, RATE_LINE), "application/x-ndjson", "no time zone"),
        (lines({**USAGE_LINE, "hour": "2026-11-24T09:00:01Z"}, RATE_LINE), "application/x-ndjson", "full hours"),
        (lines({**USAGE_LINE, "book": "actual"}, RATE_LINE), "application/x-ndjson", "book 'actual' is not"),
        (lines(USAGE_LINE), "application/x-ndjson", "no rate row came"),
        (b"[" * 200_000, "application/x-ndjson", "rows cannot be read"),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_changes_nothing(
    client: Client, body: bytes, kind: str, says: str
) -> None:
    assert put(client, to_body(*rows())).status_code == 200
    answer = put(client, body, kind=kind)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["detail"]
    assert costs(client) == {"plan:shop": "10.000000000"}


def test_a_book_has_a_largest_size(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    body = to_body(*rows())
    monkeypatch.setattr(plan_book, "MAX_BODY_BYTES", len(body) - 1)
    assert put(client, body).status_code == 413
    assert put(client, gzip.compress(body), **{"content-encoding": "gzip"}).status_code == 413
    assert put(client, body, kind="application/json").status_code == 415
    assert costs(client) == {}


def test_a_compressed_stream_is_refused(client: Client) -> None:
    usage, rates = rows()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, usage.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(usage)
    answer = put(client, sink.getvalue().to_pybytes() + to_body(usage, rates))
    assert (answer.status_code, "compressed inside" in answer.text) == (400, True)


def test_only_an_admin_of_no_tenant_puts_and_forgets(
    client_of: Callable[..., Client], tmp_path: Path
) -> None:
    tokens = Tokens(tmp_path / "data")
    given = (("w", ("write", "read"), ""), ("t", ("write", "read"), "t"), ("a", ("admin",), ""))
    bearers = {name: tokens.add(name, scopes, tenant) for name, scopes, tenant in given}
    client = client_of(require_tokens=True)
    body = to_body(*rows())
    for name, token in bearers.items():
        bearer = {"authorization": f"Bearer {token}"}
        wanted = 200 if name == "a" else 403
        assert put(client, body, **bearer).status_code == wanted
        assert client.delete("/v1/books/plan:shop", headers=bearer).status_code == wanted
    assert put(client, body).status_code == 401
    assert client.delete("/v1/books/plan:shop").status_code == 401


def test_a_disk_that_fails_is_503_and_nothing_is_kept(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert put(client, to_body(*rows())).status_code == 200

    def full(*_: object) -> None:
        raise LedgerBrokenError("the ledger cannot be written: No space left on /secret/place")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "put_book", full)
        answer = put(client, to_body(*rows(9e-6)))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert "secret" not in answer.text
    assert costs(client) == {"plan:shop": "10.000000000"}


def test_hostile_names_in_a_plan_stay_names(client: Client) -> None:
    nasty = "<script>alert(1)</script>'; DROP TABLE rates; --"
    body = lines(
        {**USAGE_LINE, "tenant": nasty, "pool": nasty}, {**RATE_LINE, "pool": nasty, "source": nasty}
    )
    assert put(client, body, kind="application/x-ndjson").status_code == 200
    answer = client.get("/v1/cost", params={"by": "pool,tenant", "book": "plan:shop"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["rows"] == [{"pool": nasty, "tenant": nasty, "cost_usd": "10.000000000"}]
    page = client.get("/figure/usd_per_mtok_total", params={"by": "tenant", "book": "plan:shop"})
    assert page.status_code == 200
    assert "<script>alert(1)" not in page.text
