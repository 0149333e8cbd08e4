"""What is sent: taken once, refused with one line, never half kept."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import cramjam
import pyarrow as pa
import pytest

from pertoken.meter.journal import JournalFullError
from pertoken.web.app import Limits
from tests.web.conftest import NOW_S, Client, Clock

JSON = {"content-type": "application/json"}
WINDOW = {"start": "2026-11-24T08:00Z", "end": "2026-11-24T10:00Z"}


def event(key: str, quantity: float = 100, **more: Any) -> dict[str, Any]:
    return {
        "key": key, "ts": NOW_S, "pool": "api", "model": "m", "tenant": "a", "meter": "output_tokens",
        "quantity": quantity, **more,
    }  # fmt: skip


def counted(client: Client, meter: str = "output_tokens") -> Decimal:
    """What the ledger holds of a meter after a close."""
    closed = client.post("/v1/close", json=WINDOW)
    assert closed.status_code == 200, closed.text
    rows = client.get("/v1/usage").json()["rows"]
    return sum((Decimal(r["quantity"]) for r in rows if r["meter"] == meter), Decimal(0))


def test_json_ndjson_and_arrow_say_the_same(client: Client) -> None:
    assert client.post("/v1/events", json=[event("a"), event("b")]).json() == {"records": 2, "duplicates": 0}
    lines = "\n".join(json.dumps(event(k)) for k in ("b", "c"))
    taken = client.post("/v1/events", content=lines, headers={"content-type": "application/x-ndjson"})
    assert taken.json() == {"records": 1, "duplicates": 1}
    table = pa.table({k: [event("c")[k], event("d")[k]] for k in event("")})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    kind = {"content-type": "application/vnd.apache.arrow.stream"}
    assert (
        client.post("/v1/events", content=sink.getvalue().to_pybytes(), headers=kind).json()["records"] == 1
    )
    assert counted(client) == 400


def test_a_gzip_body_is_unpacked_within_bounds(client_of: Callable[..., Client]) -> None:
    client = client_of(limits=Limits(body_bytes=10_000))
    body = gzip.compress(json.dumps([event("a")]).encode())
    coded = {**JSON, "content-encoding": "gzip"}
    assert client.post("/v1/events", content=body, headers=coded).json()["records"] == 1
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < 100_000
    for content, status in ((bomb, 413), (gzip.compress(b" " * 10_001), 413), (body[:-5], 400), (b"no", 400)):
        assert client.post("/v1/events", content=content, headers=coded).status_code == status
    plain = client.post("/v1/events", content=b" " * 10_001, headers=JSON)
    assert plain.status_code == 413
    assert plain.json() == {"detail": "a body holds at most 10000 bytes"}
    assert (
        client.post("/v1/events", content=b"[]", headers={**JSON, "content-encoding": "br"}).status_code
        == 415
    )


def test_a_body_of_unknown_length_is_bounded_too(client_of: Callable[..., Client]) -> None:
    client = client_of(limits=Limits(body_bytes=10_000))
    pieces = (b"x" * 1000 for _ in range(100))
    assert client.post("/v1/events", content=pieces, headers=JSON).status_code == 413


@pytest.mark.parametrize(
    ("content", "kind", "status", "says"),
    [
        (b"[{", "application/json", 400, "cannot be read"),
        (b'[{"key":"a","meter":"ouput_tokens","quantity":1}]', "application/json", 400, "output_tokens"),
        (
            b'[{"key":"a"},{"key":"b","meter":"requests"}]',
            "application/json",
            400,
            "key 'a': it has neither a meter",
        ),
        (b'[{"key":"","meter":"output_tokens","quantity":1}]', "application/json", 400, "empty key"),
        (b'[{"key":"a","meter":"output_tokens","quantity":-1}]', "application/json", 400, "between 0 and"),
        (
            b'[{"key":"a","meter":"output_tokens","quantity":1,"ts":1}]',
            "application/json",
            400,
            "sender's clock",
        ),
        (
            b'[{"key":"a","meter":"output_tokens","quantity":1,"ts":4e9}]',
            "application/json",
            400,
            "sender's clock",
        ),
        (b"[]", "text/plain", 415, "send it as"),
        (b"[]", "", 415, "send it as"),
    ],
)
def test_what_cannot_be_used_is_refused_with_one_line(
    client: Client, content: bytes, kind: str, status: int, says: str
) -> None:
    answer = client.post("/v1/events", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert says in detail
    assert "\n" not in detail
    assert counted(client) == 0


def test_a_batch_with_one_bad_event_is_refused_whole(client: Client) -> None:
    assert client.post("/v1/events", json=[event("a"), event("b", -1)]).status_code == 400
    assert counted(client) == 0
    assert client.post("/v1/events", json=[event("a"), event("b")]).json()["records"] == 2
    assert counted(client) == 200


def test_a_late_event_closes_its_hour_again(client: Client, clock: Clock) -> None:
    client.post("/v1/events", json=[event("a", ts=NOW_S - 7200)])
    service = client.app.state.service  # type: ignore[attr-defined]
    clock.at_s = NOW_S + 7200
    assert len(service.close_due().hours) >= 2
    (before,) = client.get("/v1/cost", params={"pool": "api"}).json()["rows"]
    assert Decimal(before["cost_usd"]) == Decimal("0.0015")
    client.post("/v1/events", json=[event("late", ts=NOW_S - 7100)])
    assert len(service.close_due().hours) == 1
    (after,) = client.get("/v1/cost", params={"pool": "api"}).json()["rows"]
    assert Decimal(after["cost_usd"]) == Decimal("0.0030")
    assert not service.close_due().hours


def test_a_full_journal_is_503_and_nothing_is_kept(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]

    def full(*_: object, **__: object) -> None:
        raise JournalFullError("less than 64 MiB are free: free some, then send again")

    with monkeypatch.context() as patch:
        patch.setattr(service.books.journal, "append", full)
        answer = client.post("/v1/events", json=[event("a")])
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "30"
        assert client.get("/readyz").status_code == 503
        complaints = client.get("/v1/doctor").json()["complaints"]
        assert any(c["kind"] == "journal" and "free some" in c["text"] for c in complaints)
    assert client.post("/v1/events", json=[event("a")]).json()["records"] == 1
    assert client.get("/readyz").status_code == 200


def test_too_much_in_flight_is_503(client_of: Callable[..., Client]) -> None:
    client = client_of(limits=Limits(in_flight_bytes=1))
    room = client.app.state.room  # type: ignore[attr-defined]
    room._used = 1
    answer = client.post("/v1/events", json=[event("a")])
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    room._used = 0
    assert client.post("/v1/events", json=[event("a")]).status_code == 200
    assert room._used == 0


def write_request(samples: dict[str, float], ms: int, **labels: str) -> bytes:
    """A remote-write body of one sample per series."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(content)) + content

    def varint(value: int) -> bytes:
        out = b""
        while value > 0x7F:
            out += bytes([value & 0x7F | 0x80])
            value >>= 7
        return out + bytes([value])

    series = b""
    for name, value in samples.items():
        pairs = {"__name__": name, **labels}
        text = b"".join(
            field(1, field(1, k.encode()) + field(2, v.encode())) for k, v in sorted(pairs.items())
        )
        sample = b"\x09" + struct.pack("<d", value) + b"\x10" + varint(ms)
        series += field(1, text + field(2, sample))
    return bytes(cramjam.snappy.compress_raw(series))


def test_remote_write_counts_growth_once(client: Client, clock: Clock) -> None:
    headers = {"content-type": "application/x-protobuf", "content-encoding": "snappy"}
    start_ms = int(NOW_S * 1000)
    bodies = []
    for step in range(4):
        clock.at_s = NOW_S + 15 * step
        body = write_request(
            {
                "vllm:generation_tokens_total": 1000.0 + 50 * step,
                "vllm:prompt_tokens_total": 9000.0 + 500 * step,
            },
            start_ms + 15_000 * step,
            instance="vllm:8000",
            job="llm",
            model_name="m",
        )
        bodies.append(body)
        assert client.post("/api/v1/write", content=body, headers=headers).status_code == 200
    for body in bodies:  # a sender repeats what it believes was lost
        assert client.post("/api/v1/write", content=body, headers=headers).json()["records"] == 0
    assert counted(client) == 150
    assert counted(client, "input_tokens") == 1500
    stranger = write_request({"vllm:generation_tokens_total": 5.0}, start_ms, instance="other:1")
    assert client.post("/api/v1/write", content=stranger, headers=headers).json()["records"] == 0
    complaints = client.get("/v1/doctor").json()["complaints"]
    assert [c["text"] for c in complaints if c["kind"] == "unknown_instance"] == [
        "'other:1': name it under sources.written"
    ]
    assert client.post("/api/v1/write", content=b"junk", headers=headers).status_code == 400
    wrong = {**headers, "content-encoding": "gzip"}
    assert client.post("/api/v1/write", content=b"", headers=wrong).status_code == 415


def test_states_do_not_move_on_where_the_journal_refused(
    client: Client, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"content-type": "application/x-protobuf"}
    service = client.app.state.service  # type: ignore[attr-defined]

    def send(step: int) -> int:
        clock.at_s = NOW_S + 15 * step
        body = write_request(
            {"vllm:generation_tokens_total": 100.0 * step}, int(clock.at_s * 1000), instance="vllm:8000"
        )
        status: int = client.post("/api/v1/write", content=body, headers=headers).status_code
        return status

    def full(*_: object, **__: object) -> None:
        raise JournalFullError("full")

    assert send(0) == 200
    with monkeypatch.context() as patch:
        patch.setattr(service.books.journal, "append", full)
        assert send(1) == 503
    assert send(2) == 200
    assert counted(client) == 200


def test_a_pool_the_fleet_does_not_have_is_told_at_once_and_kept(client: Client) -> None:
    batch = [event("a"), event("b", pool="h10"), event("c", pool="h10"), event("d", pool="")]
    taken = client.post("/v1/events", json=batch).json()
    strange = {"unknown_pools": {"h10": 2}, "unplaced_models": {"m": 1}}
    assert taken == {"records": 4, "duplicates": 0, **strange}
    complaints = client.get("/v1/doctor").json()["complaints"]
    (found,) = [c for c in complaints if c["kind"] == "unknown_pool"]
    assert "'h10'" in found["text"]
    assert "the fleet has h100, api: did you mean h100?" in found["text"]
    assert (found["severity"], found["pool"]) == ("wrong", "h10")
    again = client.post("/v1/events", json=batch).json()
    assert again == {"records": 0, "duplicates": 4, **strange}


def test_a_model_that_fits_no_pool_is_told_unless_an_engine_serves_it(client: Client, clock: Clock) -> None:
    """A router names the model alone: its engines may be known, by their own name of it."""

    def loose(key: str, model: str) -> dict[str, int]:
        taken = client.post("/v1/events", json=[event(key, pool="", model=model)]).json()
        found: dict[str, int] = taken.get("unplaced_models", {})
        return found

    assert loose("a", "tiny") == {"tiny": 1}
    body = write_request(
        {"vllm:generation_tokens_total": 5.0},
        int(clock.at_s * 1000),
        instance="vllm:8000",
        model_name="org/Tiny",
    )
    headers = {"content-type": "application/x-protobuf"}
    assert client.post("/api/v1/write", content=body, headers=headers).status_code == 200
    clock.at_s += 90
    later = write_request(
        {"vllm:generation_tokens_total": 9.0},
        int(clock.at_s * 1000),
        instance="vllm:8000",
        model_name="org/Tiny",
    )
    assert client.post("/api/v1/write", content=later, headers=headers).status_code == 200
    assert loose("b", "tiny") == {}
    assert loose("c", "gpt-4.1-mini") == {"gpt-4.1-mini": 1}


def test_of_many_unknown_pools_the_most_frequent_are_named(client: Client) -> None:
    batch = [event(f"{n} {i}", pool=f"p{n:02}") for n in range(30) for i in range(1 + n // 29)]
    found = client.post("/v1/events", json=batch).json()["unknown_pools"]
    assert len(found) == 20
    assert list(found.items())[:2] == [("p29", 2), ("p00", 1)]
    schema = client.get("/openapi.json").json()["components"]["schemas"]["Taken"]
    assert schema["required"] == ["records", "duplicates"]
    assert "at most 20 names" in schema["properties"]["unknown_pools"]["description"]


def test_otlp_spans_are_requests(client: Client) -> None:
    span = {
        "traceId": "0af7651916cd43dd8448eb211c80319c",
        "spanId": "b7ad6b7169203331",
        "kind": 3,
        "endTimeUnixNano": str(int(NOW_S * 1e9)),
        "attributes": [
            {"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}},
            {"key": "gen_ai.response.model", "value": {"stringValue": "m"}},
            {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "120"}},
            {"key": "gen_ai.usage.output_tokens", "value": {"intValue": "30"}},
            {"key": "pertoken.pool", "value": {"stringValue": "api"}},
        ],
    }
    body = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}
    assert client.post("/v1/traces", json=body).json()["records"] == 3
    assert client.post("/v1/traces", json=body).json() == {"records": 0, "duplicates": 3}
    assert counted(client, "input_tokens") == 120
    assert client.post("/v1/metrics", json={"resourceMetrics": []}).json()["records"] == 0
