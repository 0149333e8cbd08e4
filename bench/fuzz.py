"""Every parser of the meter under coverage-guided fuzzing (atheris, libFuzzer): whatever comes is read or refused.

``python bench/fuzz.py [--seconds 60] [--only exposition]`` gives each parser that long, in a process of its own, on a
corpus that starts from good input and stays in ``--corpus``. A crash is any error that is not ours, a result that does
not belong in the journal, 2 GiB of memory, or 10 s for one input; its input is printed as Base64 for a regression test.
Needs atheris (``pip install 'pertoken[fuzz]'``).
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

NOW_S = 1_795_510_800.0
SAMPLES = Path(__file__).parents[1] / "tests" / "samples"
EVENTS = [
    {
        "key": "a",
        "ts": NOW_S,
        "pool": "p",
        "model": "m",
        "tenant": "t",
        "meter": "output_tokens",
        "quantity": 7,
    },
    {
        "key": "b",
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
    },
    {"key": "c", "ts": "2026-11-24T09:00:00Z", "usage": {"input_tokens": 5, "cache_read_input_tokens": 1}},
]
SPAN = {
    "traceId": "a1", "spanId": "b2", "kind": 3, "endTimeUnixNano": str(int(NOW_S * 1e9)),
    "attributes": [
        {"key": "gen_ai.request.model", "value": {"stringValue": "m"}},
        {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "5"}},
        {"key": "gen_ai.usage.output_tokens", "value": {"intValue": 3}},
    ],
}  # fmt: skip
METRIC = {
    "name": "vllm:generation_tokens",
    "sum": {"aggregationTemporality": 2, "dataPoints": [
        {"asDouble": 5.5, "timeUnixNano": str(int(NOW_S * 1e9)), "startTimeUnixNano": "1",
         "attributes": [{"key": "model_name", "value": {"stringValue": "m"}}]}]},
}  # fmt: skip
FILES: dict[str, tuple[str, ...]] = {
    "litellm": ('{"request_id":"a","startTime":"2026-11-24T09:00:00Z","model":"m","prompt_tokens":5,'
                '"completion_tokens":3,"metadata":{"user_api_key_alias":"t"}}', "request_id,model\na,m\n"),
    "openai": ('{"id":"a","created":1795510800,"model":"m","usage":{"prompt_tokens":5,"completion_tokens":3}}',),
    "langfuse": ('{"id":"a","startTime":"2026-11-24T09:00:00Z","model":"m","usage":{"input":5,"output":3}}',),
    "opencost": ('{"code":200,"data":[{"n":{"name":"n","start":"2026-11-24T09:00:00Z","end":"2026-11-24T10:00:00Z",'
                 '"gpuHours":2.0,"properties":{"namespace":"n"}}}]}',),
    "pertoken": ('{"key":"a","ts":1795510800,"pool":"p","model":"m","output_tokens":5}', "key,output_tokens\na,5\n"),
}  # fmt: skip
Target = tuple[Callable[[bytes], Any], Iterable[bytes]]


def targets() -> dict[str, Target]:
    """By name: what is called with bytes, and good input to start from."""
    import cramjam
    import pyarrow as pa

    from pertoken.meter import State, events, otlp, prometheus, training
    from pertoken.meter import Target as Scraped
    from pertoken.report import plan_book

    engine = Scraped("e", pool="p", model="m", gpus=2.0)
    known = {"e": engine}
    kinds = {name: kind for kind, name in events.CONTENT_TYPES.items()}
    arrow, ndjson, protobuf = kinds["arrow"], "application/x-ndjson", "application/x-protobuf"
    old = State(NOW_S - 60)
    asking: dict[str, Any] = {"source": "usage/f", "now_s": NOW_S}

    def events_as(kind: str) -> Callable[[bytes], Any]:
        return lambda body: events.read(body, kind, **asking)

    def book_as(kind: str) -> Callable[[bytes], Any]:
        return lambda body: _kept(*plan_book.from_body(body, kind, "plan:f"))

    def spans_as(kind: str) -> Callable[[bytes], Any]:
        return lambda body: otlp.read_spans(body, kind, **asking)

    def metrics_as(kind: str) -> Callable[[bytes], Any]:
        return lambda body: otlp.read_metrics(body, kind, known, {"e": old}, source="gateway/f", now_s=NOW_S)[
            0
        ]

    def scraped(body: bytes) -> Any:
        first, state = prometheus.read(body, engine, old, now_s=NOW_S)
        return pa.concat_tables([first, prometheus.read(body, engine, state, now_s=NOW_S + 15)[0]])

    def written(body: bytes) -> Any:
        return prometheus.read_remote_write(body, known, {"e": old}, now_s=NOW_S)[0]

    def packed(body: bytes) -> Any:
        return written(bytes(cramjam.snappy.compress_raw(body)))

    table = pa.table({"key": ["a", "b"], "meter": ["requests", "output_tokens"], "quantity": [1.0, 2.0]})
    coded = table.set_column(0, "key", table["key"].dictionary_encode())
    told = _event_rows()
    groups = {"resource": {"attributes": [{"key": "service.instance.id", "value": {"stringValue": "e"}}]}}
    spans = {"resourceSpans": [{**groups, "scopeSpans": [{"spans": [SPAN]}]}]}
    metrics = {"resourceMetrics": [{**groups, "scopeMetrics": [{"metrics": [METRIC]}]}]}
    pages = [path.read_bytes()[:4000] for path in sorted(SAMPLES.glob("*.prom"))]
    found: dict[str, Target] = {
        "exposition": (scraped, pages),
        "remote_write": (written, [bytes(cramjam.snappy.compress_raw(_write_request()))]),
        "remote_write_unpacked": (packed, [_write_request()]),
        "spans_json": (spans_as("application/json"), [json.dumps(spans).encode()]),
        "spans_protobuf": (spans_as(protobuf), [_protobuf("trace", spans)]),
        "metrics_json": (metrics_as("application/json"), [json.dumps(metrics).encode()]),
        "metrics_protobuf": (metrics_as(protobuf), [_protobuf("metrics", metrics)]),
        "events_json": (
            events_as(kinds["json"]),
            [json.dumps(EVENTS).encode(), json.dumps(EVENTS[0]).encode()],
        ),
        "events_ndjson": (events_as(ndjson), [b"\n".join(json.dumps(e).encode() for e in EVENTS)]),
        "events_arrow": (events_as(arrow), [_stream(table), _stream(coded)]),
        "records_arrow": (events.read_records, [_stream(told)]),
        "book_arrow": (book_as(arrow), [plan_book.to_body(*_book())]),
        "book_ndjson": (book_as(ndjson), [_book_lines()]),
        "training": (_logged(training), [b"{'loss': 2.1, 'num_input_tokens_seen': 81920, 'step': 10}\n"]),
        "journal": (_opened, [_segment(told)]),
    }
    for name, texts in FILES.items():
        found[f"file_{name}"] = (_file(name), [t.encode() for t in texts])
    return found


def _logged(training: Any) -> Callable[[bytes], Any]:
    run = training.Run("r", "p", "m", "t", 8.0, 4096.0)

    def read(body: bytes) -> Any:
        return training.read(body.decode(errors="replace").splitlines(), run, now_s=NOW_S)[0]

    return read


def _file(name: str) -> Callable[[bytes], Any]:
    from pertoken.meter import files

    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    suffixes = (".json", ".jsonl", ".csv", ".parquet")

    def read(body: bytes) -> Any:
        path = folder / f"file{suffixes[body[0] % 4] if body[:1].isdigit() else '.jsonl'}"
        path.write_bytes(body[1:] if body[:1].isdigit() else body)
        import pyarrow as pa

        parts = [part.records for part in files.read(path, name, files.Where("usage/f", "p"), now_s=NOW_S)]
        return pa.concat_tables(parts) if parts else None

    return read


def _opened(body: bytes) -> None:
    """A journal whose only segment holds anything: what is good of it is read, the rest told, and it takes more."""
    from pertoken.meter import open_journal

    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        (Path(folder) / "segments").mkdir()
        (Path(folder) / "segments" / "00000001.ptj").write_bytes(body)
        with open_journal(folder) as journal:
            for hour in journal.dirty_hours()[:3]:
                journal.totals(hour).records.validate(full=True)
            journal.append(_event_rows())


def _event_rows() -> Any:
    from pertoken.meter import events

    return events.read(json.dumps(EVENTS).encode(), "application/json", source="usage/f", now_s=NOW_S)


def _segment(rows: Any) -> bytes:
    from pertoken.meter import open_journal

    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        with open_journal(folder) as journal:
            journal.append(rows)
        (segment,) = (Path(folder) / "segments").glob("*.ptj")
        return segment.read_bytes()


def _book() -> tuple[Any, Any]:
    import numpy as np

    from pertoken.tables import rate_rows, usage_rows

    hours = np.array(["2026-11-24T09"], "datetime64[h]")
    usage = usage_rows(
        hours,
        {("output", "output_tokens"): 5.0},
        book="plan:f",
        pool="p",
        model="m",
        tenant="t",
        basis="fitted",
    )
    rates = rate_rows(
        hours, 1.5, pool="p", meter="output_tokens", component="api", basis="quoted", source="s"
    )
    return usage, rates


def _book_lines() -> bytes:
    usage, rates = _book()
    rows = [{"table": "usage", **r} for r in usage.to_pylist()] + [
        {"table": "rates", **r} for r in rates.to_pylist()
    ]
    return b"\n".join(json.dumps(row, default=lambda v: v.isoformat() if hasattr(v, "isoformat") else str(v)).encode()
                      for row in rows)  # fmt: skip


def _kept(usage: Any, rates: Any) -> None:
    """What a ledger does with a book before it keeps it."""
    from pertoken.ledger._book import book_rates, book_usage

    book_usage(usage, "plan:f").validate(full=True)
    book_rates(rates).validate(full=True)


def _stream(table: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _write_request() -> bytes:
    """Two series of one sample each, as Prometheus writes them."""
    from struct import pack

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    series = b""
    for name, value in ((b"vllm:generation_tokens_total", 5.0), (b"vllm:prompt_tokens_total", 9.0)):
        labels = b"".join(
            field(1, field(1, key) + field(2, text))
            for key, text in ((b"__name__", name), (b"instance", b"e"), (b"model_name", b"m"))
        )
        sample = b"\x09" + pack("<d", value) + b"\x10" + varint(int(NOW_S * 1000))
        series += field(1, labels + field(2, sample))
    return series


def _protobuf(kind: str, message: dict[str, Any]) -> bytes:
    from google.protobuf import json_format

    module = import_module(f"opentelemetry.proto.collector.{kind}.v1.{kind}_service_pb2")
    name = {"trace": "ExportTraceServiceRequest", "metrics": "ExportMetricsServiceRequest"}[kind]
    text = json.dumps(message).replace('"a1"', '"' + "a1" * 16 + '"').replace('"b2"', '"' + "b2" * 8 + '"')
    content: bytes = json_format.Parse(text, getattr(module, name)()).SerializeToString()
    return content


def _checked(found: Any) -> None:
    """Records that a parser gave belong in the journal."""
    from pertoken.meter.records import checked

    if found is not None and found.num_rows:
        found.validate(full=True)
        checked(found)


def fuzz(name: str, options: list[str]) -> None:
    """One parser, in this process, until it crashes or time is up."""
    try:
        atheris: Any = import_module("atheris")
    except ImportError as error:
        raise SystemExit("this needs atheris: pip install 'pertoken[fuzz]'") from error

    with atheris.instrument_imports(include=["pertoken"]):
        from pertoken.errors import PerTokenError

        call, _ = targets()[name]

    def one(body: bytes) -> None:
        try:
            found = call(body)
        except PerTokenError:
            return
        _checked(found)

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def main() -> None:
    """Fuzz the parsers, each in a process of its own, and print what became of them."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--seconds", type=int, default=60)
    asked.add_argument("--only", default="")
    asked.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "pertoken-fuzz")
    asked.add_argument("--one", default="", help=argparse.SUPPRESS)
    chosen, options = asked.parse_known_args()
    if chosen.one:
        fuzz(chosen.one, options)
        return
    crashed = 0
    for name, (_, seeds) in targets().items():
        if chosen.only not in ("", name):
            continue
        folder = chosen.corpus / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            (folder / f"seed{number}").write_bytes(seed)
        crash = chosen.corpus / f"{name}.crash"
        command = [
            sys.executable, __file__, "--one", name, str(folder), f"-max_total_time={chosen.seconds}",
            "-max_len=8192", "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1",
            f"-exact_artifact_path={crash}",
        ]  # fmt: skip
        crash.unlink(missing_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        tried = [
            line.rpartition(":")[2].strip() for line in done.stderr.splitlines() if "executed_units" in line
        ]
        print(f"{name:24} {'crashed' if done.returncode else 'held'} {''.join(tried):>10} inputs", flush=True)
        if done.returncode:
            crashed += 1
            print("\n".join([*done.stdout.splitlines()[-12:], *done.stderr.splitlines()[-8:]]))
            if crash.exists():
                print(base64.b64encode(crash.read_bytes()).decode())
    raise SystemExit(1 if crashed else 0)


if __name__ == "__main__":
    main()
