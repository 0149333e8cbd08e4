"""Remote write and OTLP: our decoders agree with the real protobuf library; deliveries repeated count once."""

from __future__ import annotations

import json
from typing import Any

import cramjam
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

from pertoken.errors import InputError
from pertoken.meter import otlp
from pertoken.meter._counters import State
from pertoken.meter._remote_write import decode
from pertoken.meter.prometheus import Target, read_remote_write

T0 = 1_795_503_700.0
Series = tuple[dict[str, str], list[tuple[int, float]]]


def _messages() -> Any:
    """The messages of the remote-write 1.0 specification, built here so that the real library encodes them."""
    file = descriptor_pb2.FileDescriptorProto(
        name="pertoken_test_remote.proto", package="pt", syntax="proto3"
    )
    fields: dict[str, list[tuple[str, int, int, str]]] = {
        "Label": [("name", 1, 9, ""), ("value", 2, 9, "")],
        "Sample": [("value", 1, 1, ""), ("timestamp", 2, 3, "")],
        "TimeSeries": [("labels", 1, 11, "Label"), ("samples", 2, 11, "Sample"), ("later", 4, 9, "")],
        "WriteRequest": [("timeseries", 1, 11, "TimeSeries"), ("metadata", 3, 9, "")],
    }
    for name, members in fields.items():
        message = file.message_type.add(name=name)
        for field, number, kind, of in members:
            repeated = kind == 11 or field in ("later", "metadata")
            added = message.field.add(name=field, number=number, type=kind, label=3 if repeated else 1)
            if of:
                added.type_name = f".pt.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("pt.WriteRequest"))


WriteRequest = _messages()


def body(series: list[Series], extra: bool = False) -> bytes:
    request = WriteRequest()
    for labels, samples in series:
        one = request.timeseries.add()
        for name, value in labels.items():
            one.labels.add(name=name, value=value)
        for ms, number in samples:
            one.samples.add(value=number, timestamp=ms)
        if extra:
            one.later.append("a field of a later version")
    if extra:
        request.metadata.append("metadata")
    return bytes(cramjam.snappy.compress_raw(request.SerializeToString()))


_SERIES = st.lists(
    st.tuples(
        st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4),
        st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)), max_size=4),
    ),
    max_size=5,
)


@settings(max_examples=200)
@given(_SERIES, st.booleans())
def test_what_the_real_library_encodes_is_decoded(series: list[Series], extra: bool) -> None:
    assert decode(body(series, extra)) == series


@settings(max_examples=300)
@given(st.binary(max_size=120), st.booleans())
def test_any_bytes_are_decoded_or_refused(raw: bytes, packed: bool) -> None:
    try:
        decode(bytes(cramjam.snappy.compress_raw(raw)) if packed else raw)
    except InputError:
        return


def test_a_body_that_claims_a_huge_size_is_refused_unread() -> None:
    with pytest.raises(InputError, match="unpacks to"):
        decode(b"\xff\xff\xff\xff\x0f" + b"\x00" * 20)
    with pytest.raises(InputError, match="snappy"):
        decode(b"")


def test_a_body_of_millions_of_empty_fields_is_refused() -> None:
    for raw in (b"\x0a\x00" * 300_000, b"\x0a\x80\x80\x40" + b"\x12\x00" * (1 << 19)):
        with pytest.raises(InputError, match="over 200000"):
            decode(bytes(cramjam.snappy.compress_raw(raw)))


def counter(value: float, at_s: float, name: str = "vllm:generation_tokens_total", **labels: str) -> Series:
    return {"__name__": name, "job": "v", "instance": "a:8000", "model_name": "m", **labels}, [
        (int(at_s * 1000), value)
    ]


def deliver(
    *bodies: bytes, targets: dict[str, Target] | None = None
) -> tuple[dict[str, float], dict[str, int]]:
    wanted = targets if targets is not None else {"a:8000": Target("a:8000", pool="h100")}
    states: dict[str, State] = {}
    sums: dict[str, float] = {}
    strangers: dict[str, int] = {}
    for one in bodies:
        table, new, unknown = read_remote_write(one, wanted, states, now_s=T0 + 600)
        states |= {name: State.from_bytes(state.to_bytes()) for name, state in new.items()}
        strangers |= unknown
        for row in table.to_pylist():
            sums[row["meter"]] = sums.get(row["meter"], 0.0) + row["quantity"]
    return sums, strangers


def test_requests_repeated_late_and_split_count_once() -> None:
    first, second, third = (body([counter(v, T0 + i * 15)]) for i, v in enumerate((100, 160, 200)))
    sums, _ = deliver(first, second, second, first, third, third)
    assert sums["output_tokens"] == 100
    together = body(
        [({**counter(0, 0)[0]}, [(int((T0 + i * 15) * 1000), v) for i, v in enumerate((100, 160, 200))])]
    )
    assert deliver(together, together)[0]["output_tokens"] == 100


def test_series_of_one_scrape_in_several_requests_are_no_news() -> None:
    one, other = counter(1000, T0), counter(5000, T0, name="vllm:prompt_tokens_total")
    later = [counter(1010, T0 + 15), counter(5100, T0 + 15, name="vllm:prompt_tokens_total")]
    sums, _ = deliver(body([one]), body([other]), body(later[:1]), body(later[1:]))
    assert (sums["output_tokens"], sums["prompt_tokens"]) == (10, 100)


def test_a_series_that_appears_later_is_counted_from_zero() -> None:
    bodies = [body([counter(0, T0 + i * 15)]) for i in range(8)]
    new = counter(30, T0 + 120, model_name="n")
    assert deliver(*bodies, body([counter(0, T0 + 120), new]))[0]["output_tokens"] == 30


def test_a_restart_is_seen_by_its_start_time_or_its_fall() -> None:
    def start(value: float, at_s: float) -> Series:
        return counter(value, at_s, name="process_start_time_seconds")

    sums, _ = deliver(
        body([start(T0 - 99, T0), counter(100, T0)]),
        body([start(T0 + 10, T0 + 15), counter(130, T0 + 15)]),
        body([counter(20, T0 + 30)]),
    )
    assert sums["output_tokens"] == 130 + 20


@pytest.mark.parametrize(("together", "held"), [(True, 1200.0), (False, 0.0)])
def test_a_start_told_in_a_later_request_does_not_hold_gpus(together: bool, held: float) -> None:
    """Counters in one request and the start in the next: it may be the start of another process."""
    start = counter(T0 - 99, T0 + 600, name="process_start_time_seconds")
    before = [counter(T0 - 99, T0, name="process_start_time_seconds"), counter(100, T0)]
    after = counter(130, T0 + 600)
    later = [body([start, after])] if together else [body([after]), body([start])]
    sums, _ = deliver(body(before), *later, targets={"a:8000": Target("a:8000", pool="h100", gpus=2.0)})
    assert (sums["gap_seconds"], sums.get("held_unseen", 0.0)) == (600, held)


def test_stale_markers_and_strange_instances_add_nothing() -> None:
    stale = counter(float("nan"), T0 + 15)
    strange = ({"__name__": "vllm:generation_tokens_total", "instance": "zz"}, [(1, 1.0)])
    sums, unknown = deliver(body([counter(5, T0)]), body([stale, strange]), body([counter(9, T0 + 30)]))
    assert sums["output_tokens"] == 4
    assert unknown == {"zz": 1}


# -- OTLP


def spans(*rows: dict[str, Any]) -> tuple[bytes, bytes]:
    """The same request in protobuf and in OTLP's JSON."""
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="tenant.id").value.string_value = "blue"
    scope = group.scope_spans.add()
    plain = []
    for row in rows:
        span = scope.spans.add(kind=row.get("kind", 3), end_time_unix_nano=int(T0 * 1e9))
        span.trace_id, span.span_id = bytes.fromhex("ab" * 16), bytes.fromhex(row["id"] * 8)
        attributes = []
        for key, value in row["attributes"].items():
            if isinstance(value, int):
                span.attributes.add(key=key).value.int_value = value
                attributes.append({"key": key, "value": {"intValue": str(value)}})
            else:
                span.attributes.add(key=key).value.string_value = value
                attributes.append({"key": key, "value": {"stringValue": value}})
        plain.append(
            {"traceId": "ab" * 16, "spanId": row["id"] * 8, "kind": row.get("kind", 3), "name": "x",
             "endTimeUnixNano": str(int(T0 * 1e9)), "attributes": attributes}
        )  # fmt: skip
    resource = {"attributes": [{"key": "tenant.id", "value": {"stringValue": "blue"}}]}
    text = {
        "resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "s"}, "spans": plain}]}]
    }
    return request.SerializeToString(), json.dumps(text).encode()


CHAT = {
    "gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.response.model": "m-2026",
    "gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 40, "gen_ai.usage.cache_read.input_tokens": 64,
}  # fmt: skip


def test_spans_of_model_calls_count_once_in_either_encoding() -> None:
    agent = {**CHAT, "gen_ai.operation.name": "invoke_agent"}
    pair = spans(
        {"id": "01", "attributes": CHAT},
        {"id": "02", "attributes": agent},
        {"id": "03", "attributes": CHAT, "kind": 2},
        {"id": "04", "attributes": {"http.method": "GET"}},
    )
    tables = [
        otlp.read_spans(raw, kind, source="usage/otlp", now_s=T0, pool="h100")
        for raw, kind in zip(pair, otlp.CONTENT_TYPES, strict=True)
    ]
    assert tables[0].equals(tables[1])
    rows = tables[0].to_pylist()
    assert {r["meter"]: r["quantity"] for r in rows} == {
        "input_tokens": 36, "cached_input_tokens": 64, "output_tokens": 40, "requests": 1,
    }  # fmt: skip
    assert {(r["tenant"], r["model"], r["pool"], r["key"]) for r in rows} == {
        ("blue", "m-2026", "h100", f"{'ab' * 16}:{'01' * 8}")
    }


def test_metrics_of_a_collector_count_as_a_scrape_and_token_usage_as_a_gateway() -> None:
    def request(value: float, at_s: float) -> bytes:
        message = ExportMetricsServiceRequest()
        group = message.resource_metrics.add()
        group.resource.attributes.add(key="service.instance.id").value.string_value = "a:8000"
        scope = group.scope_metrics.add()
        total = scope.metrics.add(name="vllm:generation_tokens")
        total.sum.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
        total.sum.data_points.add(time_unix_nano=int(at_s * 1e9), as_double=value)
        prefill = scope.metrics.add(name="vllm:request_prefill_time_seconds")
        prefill.histogram.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
        prefill.histogram.data_points.add(time_unix_nano=int(at_s * 1e9), sum=value / 10, count=1)
        usage = scope.metrics.add(name="gen_ai.client.token.usage")
        usage.histogram.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
        point = usage.histogram.data_points.add(
            start_time_unix_nano=int((at_s - 15) * 1e9), time_unix_nano=int(at_s * 1e9), sum=7, count=1
        )
        point.attributes.add(key="gen_ai.token.type").value.string_value = "output"
        return bytes(message.SerializeToString())

    targets = {"a:8000": Target("a", pool="h100", model="m")}
    states: dict[str, State] = {}
    rows = []
    for value, at_s in ((100.0, T0), (160.0, T0 + 15)):
        table, states, unknown = otlp.read_metrics(
            request(value, at_s), otlp.CONTENT_TYPES[0], targets, states, source="usage/otlp", now_s=at_s
        )
        assert not unknown
        rows += table.to_pylist()
    found = {(r["source"], r["meter"]): r["quantity"] for r in rows}
    assert found["engine/a", "output_tokens"] == 60
    assert found["engine/a", "prefill_seconds"] == pytest.approx(6)
    assert sum(r["quantity"] for r in rows if r["source"] == "gateway/otlp") == 14


@pytest.mark.parametrize(
    ("name", "form", "refused"),
    [
        ("vllm:generation_tokens", "sum", True),
        ("vllm:request_prefill_time_seconds", "histogram", True),
        ("http.server.duration", "histogram", False),  # none of ours: whatever it is like
    ],
)
def test_deltas_of_counters_we_count_are_refused_and_never_dropped(
    name: str, form: str, refused: bool
) -> None:
    points = [{"asDouble": 5, "sum": 5, "timeUnixNano": int(T0 * 1e9)}]
    metric = {"name": name, form: {"aggregationTemporality": 1, "dataPoints": points}}
    sent = json.dumps({"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}]}).encode()
    options: dict[str, Any] = {"source": "gateway/o", "now_s": T0}
    if refused:
        with pytest.raises(InputError, match=f"{name} must come with cumulative temporality"):
            otlp.read_metrics(sent, "application/json", {}, {}, **options)
    else:
        assert otlp.read_metrics(sent, "application/json", {}, {}, **options)[0].num_rows == 0


@settings(max_examples=200)
@given(st.binary(max_size=120), st.sampled_from([*otlp.CONTENT_TYPES, "text/plain"]))
def test_any_otlp_body_is_read_or_refused(raw: bytes, kind: str) -> None:
    for start in (b"", b'{"resourceSpans": [{"scopeSpans": [{"spans": ['):
        for read in (
            lambda b: otlp.read_spans(b, kind, source="usage/o", now_s=T0),
            lambda b: otlp.read_metrics(b, kind, {}, {}, source="usage/o", now_s=T0),
        ):
            try:
                read(start + raw)
            except InputError:
                continue


_VALUE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["stringValue", "intValue"]), inner)
    ),
    max_leaves=4,
)


@settings(max_examples=200)
@given(_VALUE, _VALUE, st.sampled_from(sorted(CHAT)))
def test_any_attribute_value_is_read_or_refused(value: Any, moment: Any, key: str) -> None:
    counted = {"key": "gen_ai.usage.output_tokens", "value": {"intValue": 3}}
    attributes = [counted, {"key": key, "value": value}]
    span = {"traceId": "ab", "spanId": "cd", "endTimeUnixNano": moment, "attributes": attributes}
    text = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).encode()
    try:
        otlp.read_spans(text, "application/json", source="usage/o", now_s=T0)
    except InputError:
        return


def _points(*times: Any) -> bytes:
    """Generation tokens of one engine at these times (nanoseconds, as JSON has them)."""
    points = [{"asDouble": n, "timeUnixNano": at} for n, at in enumerate(times)]
    metric = {"name": "vllm:generation_tokens", "sum": {"aggregationTemporality": 2, "dataPoints": points}}
    resource = {"attributes": [{"key": "service.instance.id", "value": {"stringValue": "a:8000"}}]}
    group = {"resource": resource, "scopeMetrics": [{"metrics": [metric]}]}
    return json.dumps({"resourceMetrics": [group]}).encode()


@pytest.mark.parametrize("moment", ["1E795510800", "inf", "nan", "-1", -1, "", 10**30])
def test_times_that_fuzzing_found_are_refused(moment: Any) -> None:
    with pytest.raises(InputError):
        otlp.read_metrics(
            _points(moment),
            "application/json",
            {"a:8000": Target("a", pool="h100")},
            {},
            source="gateway/o",
            now_s=T0,
        )


def test_a_silence_since_1970_is_no_silence() -> None:
    # Each of its half a million hours was a row of gap_seconds once, from a body of 200 bytes.
    target = {"a:8000": Target("a", pool="h100")}
    sent = _points(1, 10**9, int((T0 - 60) * 1e9), int(T0 * 1e9))
    table, states, _ = otlp.read_metrics(sent, "application/json", target, {}, source="gateway/o", now_s=T0)
    assert table.num_rows < 5
    assert states["a:8000"].last_s == T0
    written = [
        counter(float(n), at_s) for n, at_s in enumerate((0.001, 1e6, T0 - 4 * 365 * 86_400, T0 - 60, T0))
    ]
    table, states, _ = read_remote_write(body(written), {"a:8000": target["a:8000"]}, {}, now_s=T0)
    assert table.num_rows < 5
