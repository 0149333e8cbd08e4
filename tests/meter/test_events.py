"""Usage events: three encodings give the same records; nothing is counted twice; hostile bodies are refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import InputError
from pertoken.meter import events
from pertoken.meter._usage_block import Tokens, UsageBlock, tokens

NOW = 1_795_503_600.0
ARROW = "application/vnd.apache.arrow.stream"
EVENTS: list[dict[str, Any]] = [
    {
        "key": "a",
        "ts": NOW - 1,
        "pool": "p",
        "model": "m",
        "tenant": "t",
        "meter": "output_tokens",
        "quantity": 5.0,
    },
    {
        "key": "b",
        "ts": NOW - 2.5,
        "pool": "q",
        "model": "m/é",
        "tenant": "",
        "meter": "energy_kwh",
        "quantity": 0.25,
    },
]


def read(body: bytes, kind: str = "application/json", **more: str) -> pa.Table:
    return events.read(body, kind, source="usage/test", now_s=NOW, **more)


def arrow(rows: list[dict[str, Any]], **options: Any) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_every_encoding_gives_the_same_records() -> None:
    first = read(json.dumps(EVENTS).encode())
    assert first.to_pylist()[1]["quantity"] == 0.25
    assert first.to_pylist()[0]["phase"] == "output"
    lines = "\n".join(map(json.dumps, EVENTS)).encode()
    assert read(lines, "application/x-ndjson; charset=utf-8").equals(first)
    assert read(json.dumps({"events": EVENTS}).encode()).equals(first)
    assert read(json.dumps(EVENTS[0]).encode()).equals(first.slice(0, 1))
    assert read(arrow(EVENTS), ARROW).equals(first)


def test_iso_times_receipt_time_and_the_tenant_of_the_token() -> None:
    body = [{"key": "a", "meter": "requests", "quantity": 1, "ts": "2026-11-24T07:00:00+01:00", "tenant": "evil"},
            {"key": "b", "meter": "requests", "quantity": 1}]  # fmt: skip
    rows = read(json.dumps(body).encode(), tenant="blue", pool="h100").to_pylist()
    assert [r["ts"].timestamp() for r in rows] == [1_795_500_000.0, NOW]
    assert [(r["tenant"], r["pool"]) for r in rows] == [("blue", "h100")] * 2
    with pytest.raises(InputError, match="time zone"):
        read(b'{"key": "a", "meter": "requests", "ts": "2026-11-24T07:00:00"}')


def test_a_usage_block_becomes_four_rows() -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 40, "total_tokens": 140,
             "prompt_tokens_details": {"cached_tokens": 64, "audio_tokens": 0},
             "completion_tokens_details": {"reasoning_tokens": 30}}  # fmt: skip
    body = json.dumps([{"key": "k", "model": "m", "usage": usage}, EVENTS[0]]).encode()
    rows = {(r["meter"], r["key"]): r["quantity"] for r in read(body).to_pylist()}
    assert rows == {
        ("input_tokens", "k"): 36, ("cached_input_tokens", "k"): 64, ("output_tokens", "k"): 40,
        ("requests", "k"): 1, ("output_tokens", "a"): 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"input_tokens": 100, "output_tokens": 9, "input_tokens_details": {"cached_tokens": 30}}, (70, 30, 9)),
        ({"input_tokens": 10, "cache_read_input_tokens": 80, "cache_creation_input_tokens": 5, "output_tokens": 9},
         (15, 80, 9)),
        ({"prompt_tokens": 95, "cache_read_input_tokens": 80, "completion_tokens": 9}, (15, 80, 9)),
        ({"promptTokenCount": 50, "candidatesTokenCount": 7, "thoughtsTokenCount": 20, "cachedContentTokenCount": 40},
         (10, 40, 27)),
        ({"input_tokens": 10, "cached_input_tokens": 80, "output_tokens": 9}, (10, 80, 9)),
        ({"prompt_tokens": 12, "completion_tokens": 0}, (12, 0, 0)),
    ],
)  # fmt: skip
def test_every_providers_block_counts_each_token_once(
    block: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert tokens(msgspec.convert(block, UsageBlock)) == Tokens(*expected)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"[", "application/json", "cannot be read"),
        (b'[{"key": "a", "meter": "tokens", "quantity": 1}]', "application/json", "output_tokens"),
        (b'[{"key": "a", "meter": "requests", "quantity": -1}]', "application/json", "-1"),
        (b'[{"key": "a", "meter": "requests", "quantity": 1, "kay": 2}]', "application/json", "kay"),
        (b'[{"key": "", "meter": "requests", "quantity": 1}]', "application/json", "empty key"),
        (b'[{"meter": "requests", "quantity": 1}]', "application/json", "key"),
        (b'[{"key": "a", "meter": "requests", "quantity": 1, "ts": 1e300}]', "application/json", "POSIX"),
        (b'[{"key": "a", "usage": {}}]', "application/json", "no token counts"),
        (b'[{"key": "a", "usage": {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}}]',
         "application/json", "2 cached tokens"),
        (b'[{"key": "a", "meter": "requests", "quantity": 1, "usage": {"prompt_tokens": 1}}]',
         "application/json", "both"),
        (b"", "text/plain", "content type"),
        (b"\xff\xfe", "application/x-ndjson", "cannot be read"),
        (b"ARROW1", ARROW, "Arrow"),
        (arrow([{"key": "a", "meter": "requests"}]), ARROW, "quantity"),
        (arrow([{"key": "", "meter": "requests", "quantity": 1.0}]), ARROW, "empty key"),
        (arrow([{"key": None, "meter": "requests", "quantity": 1.0}]), ARROW, "key"),
        (arrow(EVENTS, compression="zstd"), ARROW, "compressed"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_whole_and_named(body: bytes, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(body, kind)


def test_dictionary_encoded_arrow_is_taken_and_compressed_dictionaries_are_not() -> None:
    table = pa.table(
        {
            "key": ["a", "b"],
            "meter": pa.array(["requests", "requests"]).dictionary_encode(),
            "quantity": pa.array([1, 2], pa.int32()),
            "ts": pa.array([1_700_000_000, 1_700_000_001], pa.timestamp("s", tz="UTC")),
        }
    )
    for compression in (None, "lz4"):
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        if compression:
            with pytest.raises(InputError, match="compressed"):
                read(sink.getvalue().to_pybytes(), ARROW)
        else:
            assert read(sink.getvalue().to_pybytes(), ARROW).column("quantity").to_pylist() == [1.0, 2.0]


def test_arrow_columns_that_unfold_or_are_of_another_kind_are_refused() -> None:
    columns: dict[str, Any] = {"key": ["a"] * 3, "meter": ["requests"] * 3, "quantity": [1.0] * 3}
    huge = pa.DictionaryArray.from_arrays(pa.array([0, 0, 0], pa.int8()), pa.array(["x" * 1_000_000]))
    for name, value in (
        ("model", huge),
        ("quantity", pa.array(["1", "2", "3"])),
        ("model", pa.array([1, 2, 3])),
        ("tenant", pa.nulls(3)),
        ("ts", pa.array([[1], [2], [3]])),
    ):
        table = pa.table({**columns, name: value})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(InputError, match=name):
            read(sink.getvalue().to_pybytes(), ARROW)


_NAMES = st.sampled_from([*EVENTS[0], "usage", "events", "prompt_tokens", "x"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.one_of(_JSON.map(lambda v: json.dumps(v).encode()), st.binary(max_size=100)))
def test_any_json_is_read_or_refused(body: bytes) -> None:
    for kind in ("application/json", "application/x-ndjson"):
        try:
            found = read(body, kind)
        except InputError:
            continue
        assert found.num_rows >= 0


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_arrow_stream_is_read_or_refused(data: st.DataObject) -> None:
    body = bytearray(arrow(EVENTS * 3))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    size = data.draw(st.integers(0, len(body)))
    try:
        read(bytes(body[:size]), ARROW)
    except InputError:
        return


def test_a_coded_text_that_spells_out_to_gigabytes_is_refused() -> None:
    rows = 600_000
    long = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int8()), pa.array(["k" * 500]))
    table = pa.table({"key": long, "meter": pa.repeat("requests", rows), "quantity": pa.repeat(1.0, rows)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(InputError, match="column 'key' spells out to 300000000 bytes"):
        events.read(
            sink.getvalue().to_pybytes(), "application/vnd.apache.arrow.stream", source="usage/e", now_s=NOW
        )
