"""Small bodies that want to be large: each is answered as documented, and memory stays bounded."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cramjam
import pyarrow as pa
import pytest

ROOT = Path(__file__).parents[2]
ARROW, NDJSON, PROTOBUF = (
    "application/vnd.apache.arrow.stream",
    "application/x-ndjson",
    "application/x-protobuf",
)
MOST_BYTES = 1 << 29
"""What one body may take while it is read: sixteen times the largest."""
Bomb = tuple[str, str, dict[str, str], bytes]


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def coded(text: str, rows: int) -> Any:
    """A text kept once and pointed to by every row."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int8()), pa.array([text]))


def bombs() -> Iterator[tuple[str, Bomb]]:
    zeros = gzip.compress(bytes(65 << 20))
    for method, path in (
        ("POST", "/v1/events"), ("POST", "/v1/records"), ("POST", "/v1/traces"), ("POST", "/v1/metrics"),
        ("PUT", "/v1/books/plan:x"),
    ):  # fmt: skip
        kind = {"/v1/events": "application/json", "/v1/traces": PROTOBUF, "/v1/metrics": PROTOBUF}.get(
            path, ARROW
        )
        yield f"gzip {path}", (method, path, {"content-type": kind, "content-encoding": "gzip"}, zeros)
    rows = 900_000
    long = pa.table(
        {
            "key": coded("k" * 500, rows),
            "meter": coded("m" * 500, rows),
            "quantity": pa.nulls(rows, pa.float64()),
        }
    )
    yield "coded texts", ("POST", "/v1/events", {"content-type": ARROW}, stream(long))
    nothing = pa.table({name: pa.nulls((1 << 31) - 1) for name in ("key", "meter", "quantity")})
    for method, path in (("POST", "/v1/events"), ("POST", "/v1/records"), ("PUT", "/v1/books/plan:x")):
        yield f"billions of nothing {path}", (method, path, {"content-type": ARROW}, stream(nothing))
    views = pa.table(
        {"key": pa.array(["v" * 100_000] * 4, pa.string_view()), "meter": ["m"] * 4, "quantity": [1.0] * 4}
    )
    yield "views", ("POST", "/v1/events", {"content-type": ARROW}, stream(views))
    names = ("book", "hour", "pool", "model", "tenant", "phase", "meter", "quantity", "basis")
    book = pa.table({name: coded("t" * 60_000, rows) for name in names})
    yield "coded book", ("PUT", "/v1/books/plan:x", {"content-type": ARROW}, stream(book))
    for path in ("/v1/events", "/v1/traces", "/v1/metrics"):
        as_json = {"content-type": "application/json"}
        yield f"deep {path}", ("POST", path, as_json, b"[" * 8_000_000)
        yield f"wide {path}", ("POST", path, as_json, b"[" + b"{}," * 2_000_000 + b"{}]")
    yield "lines", ("PUT", "/v1/books/plan:x", {"content-type": NDJSON}, b"{}\n" * 8_000_000)
    spans = b"\x12\x00" * 3_000_000  # empty messages inside one another's list
    inner = b"\x0a" + varint(len(spans)) + spans
    for path in ("/v1/traces", "/v1/metrics"):
        yield f"empty messages {path}", ("POST", path, {"content-type": PROTOBUF}, inner)
    claims = varint((1 << 32) - 1) + b"\x00" * 100
    yield "snappy that claims", ("POST", "/api/v1/write", {"content-type": PROTOBUF}, claims)
    small = bytes(cramjam.snappy.compress_raw(b"\x0a\x00" * (30 << 20)))
    yield "snappy of empty series", ("POST", "/api/v1/write", {"content-type": PROTOBUF}, small)
    events = [{"key": str(n), "meter": "requests", "quantity": 1} for n in range(600_000)]
    yield (
        "the largest batch",
        ("POST", "/v1/events", {"content-type": "application/json"}, json.dumps(events).encode()),
    )


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def memory(what: str) -> int:
    """Bytes this process has (VmRSS) or had at most (VmHWM) in memory, as Linux tells it."""
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(what))
    return int(line.split()[1]) * 1024


def main(folder: Path) -> None:
    """In a process of its own, so that its memory is the service's: one line of JSON per bomb in the folder."""
    from fastapi.testclient import TestClient

    from pertoken.fleet import load_fleet
    from pertoken.report.books import open_books
    from pertoken.web.app import create_app
    from pertoken.web.service import Service
    from pertoken.web.tokens import Tokens
    from tests.web.conftest import FLEET

    path = folder / "fleet.yaml"
    path.write_text(FLEET)
    service = Service(open_books(load_fleet(path), folder / "data"), folder, grace_s=3600.0)
    app = create_app(service, Tokens(folder / "data"), require_tokens=False)
    with TestClient(app, base_url="http://127.0.0.1:8700", raise_server_exceptions=False) as client:
        for name, method, address, headers, file in json.loads((folder / "bombs.json").read_text()):
            body = Path(file).read_bytes()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = memory("VmRSS")
            status = client.request(method, address, content=body, headers=headers).status_code
            grown = memory("VmHWM") - before
            sys.stdout.write(json.dumps({"name": name, "status": status, "grown": grown}) + "\n")
            sys.stdout.flush()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("memory")
    told = []
    for number, (name, (method, address, headers, body)) in enumerate(bombs()):
        file = folder / f"{number}.body"
        file.write_bytes(body)
        told.append((name, method, address, headers, str(file)))
    (folder / "bombs.json").write_text(json.dumps(told))
    code = f"from pathlib import Path; from tests.web.test_memory import main; main(Path({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in found] == [name for name, *_ in told]
    return {row["name"]: row for row in found}


def test_every_bomb_is_answered_and_memory_stays_bounded(answers: dict[str, dict[str, Any]]) -> None:
    for name, row in answers.items():
        assert row["status"] in ((200,) if name == "the largest batch" else (200, 400, 413, 415)), row
        assert row["grown"] < MOST_BYTES, row
    assert all(row["status"] == 413 for name, row in answers.items() if name.startswith("gzip"))
