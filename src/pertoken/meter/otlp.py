"""OTLP/HTTP as a source: spans and metrics under OpenTelemetry's GenAI semantic conventions, JSON or
protobuf.

Spans of calls to a model become usage events, one span one request. Metrics that carry an engine's or
exporter's Prometheus names (a collector that scraped them) are read as in `prometheus`;
``gen_ai.client.token.usage`` counts as a gateway's. Source: OpenTelemetry semantic conventions 1.38 for
generative AI; OTLP 1.7, HTTP transport.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

import msgspec
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.meter import events
from pertoken.meter._counters import State
from pertoken.meter._names import rules_of
from pertoken.meter._usage_block import UsageBlock
from pertoken.meter.prometheus import Target, by_instance
from pertoken.meter.records import concat, records
from pertoken.units import GIGA, MILLISECONDS_PER_SECOND

MAX_BODY_BYTES = 8 * 1024 * 1024
CONTENT_TYPES = ("application/x-protobuf", "application/json")

NAME_MAP: dict[str, tuple[str, ...]] = {
    "prompt_tokens": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"),
    "completion_tokens": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"),
    "cached_tokens": ("gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens"),
    "model": ("gen_ai.response.model", "gen_ai.request.model"),
    "pool": ("pertoken.pool",),
    "tenant": ("pertoken.tenant", "tenant.id", "enduser.id", "user.id"),
    "operation": ("gen_ai.operation.name",),
    "token_type": ("gen_ai.token.type", "gen_ai.usage.token_type"),
}
"""Ours to the attributes that tell it, the first found counts: of the span, else of its resource."""

_COUNTED = ("", "chat", "text_completion", "generate_content", "embeddings")
"""Operations that are one call to a model. An agent's span sums up its calls and would count them twice."""
_LAST_S = 1e11
_SERVER_KIND = 2
_CUMULATIVE = 2
_TOKEN_USAGE = ("gen_ai.client.token.usage", "gen_ai.server.token.usage")


class _Struct(msgspec.Struct, rename="camel", gc=False):
    """Fields as in the protobuf messages, JSON names as OTLP has them."""


Number = int | float | str


class _AnyValue(_Struct):
    string_value: str | None = None
    int_value: int | str | None = None
    double_value: float | str | None = None
    bool_value: bool | None = None


class _KeyValue(_Struct):
    key: str = ""
    value: _AnyValue | None = None


class _Resource(_Struct):
    attributes: list[_KeyValue] = []


class _Span(_Struct):
    trace_id: str = ""
    span_id: str = ""
    kind: int | str = 0
    end_time_unix_nano: int | str = 0
    attributes: list[_KeyValue] = []


class _ScopeSpans(_Struct):
    spans: list[_Span] = []


class _ResourceSpans(_Struct):
    resource: _Resource | None = None
    scope_spans: list[_ScopeSpans] = []


class _Spans(_Struct):
    resource_spans: list[_ResourceSpans] = []


class _Point(_Struct):
    attributes: list[_KeyValue] = []
    start_time_unix_nano: int | str = 0
    time_unix_nano: int | str = 0
    as_double: float | str | None = None
    as_int: int | str | None = None
    sum: float | str = 0.0
    count: int | str = 0


class _Data(_Struct):
    data_points: list[_Point] = []
    aggregation_temporality: int | str = 0


class _Metric(_Struct):
    name: str = ""
    gauge: _Data | None = None
    sum: _Data | None = None
    histogram: _Data | None = None


class _ScopeMetrics(_Struct):
    metrics: list[_Metric] = []


class _ResourceMetrics(_Struct):
    resource: _Resource | None = None
    scope_metrics: list[_ScopeMetrics] = []


class _Metrics(_Struct):
    resource_metrics: list[_ResourceMetrics] = []


Decoded = TypeVar("Decoded", _Spans, _Metrics)


def read_spans(
    body: bytes, content_type: str, *, source: str, now_s: float, pool: str = "", tenant: str = ""
) -> pa.Table:
    """The records of an ExportTraceServiceRequest: each span of a call to a model, one request with its
    tokens.

    Parameters as `events.read`. A span's identity is its trace and span id: one exported twice counts once.
    Spans of kind SERVER are the served side of the same call and left to the engine's own counters. Raises
    InputError.
    """
    found: list[events.Event] = []
    for group in _decode(body, content_type, _Spans, "trace").resource_spans:
        shared = _attributes(group.resource.attributes if group.resource else ())
        for scope in group.scope_spans:
            for span in scope.spans:
                event = _event(span, shared)
                if event is not None:
                    found.append(event)
    return events.from_events(found, source=source, now_s=now_s, pool=pool, tenant=tenant)


def read_metrics(
    body: bytes,
    content_type: str,
    targets: Mapping[str, Target],
    states: Mapping[str, State],
    *,
    source: str,
    now_s: float,
    pool: str = "",
) -> tuple[pa.Table, dict[str, State], dict[str, int]]:
    """The records of an ExportMetricsServiceRequest, new states and unknown instances, as
    `read_remote_write`.

    A target is found by the resource's ``service.instance.id``. `source` names the sender of GenAI metrics.
    Raises InputError.
    """
    written: list[tuple[dict[str, str], list[tuple[int, float]]]] = []
    used: list[pa.Table] = []
    for group in _decode(body, content_type, _Metrics, "metrics").resource_metrics:
        shared = _attributes(group.resource.attributes if group.resource else ())
        instance = {
            "instance": shared.get("service.instance.id", shared.get("instance", "")),
            "job": shared.get("service.name", ""),
        }
        for scope in group.scope_metrics:
            for metric in scope.metrics:
                if metric.name in _TOKEN_USAGE:
                    used += _token_usage(metric, shared, source, pool)
                else:
                    written += _readings(metric, instance)
    table, new, unknown = by_instance(written, targets, states, now_s=now_s)
    return concat([table, *used]), new, unknown


def _decode(body: bytes, content_type: str, kind: type[Decoded], name: str) -> Any:
    """A request as our structs (JSON) or protobuf messages: both have the fields we read."""
    if len(body) > MAX_BODY_BYTES:
        raise InputError(f"a body of {len(body)} bytes is refused: at most {MAX_BODY_BYTES} are read")
    form = content_type.partition(";")[0].strip().lower()
    if form == "application/json":
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"an OTLP {name} request cannot be read: {error}") from error
    if form != "application/x-protobuf":
        raise InputError(f"content type {content_type!r} is none of {', '.join(CONTENT_TYPES)}")
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    message: Any = ExportTraceServiceRequest() if kind is _Spans else ExportMetricsServiceRequest()
    try:
        message.ParseFromString(body)
    except import_module("google.protobuf.message").DecodeError as error:
        raise InputError(f"an OTLP {name} request cannot be read: {error}") from error
    return message


def _event(span: Any, shared: Mapping[str, str]) -> events.Event | None:
    kind = span.kind
    if kind in (_SERVER_KIND, str(_SERVER_KIND), "SPAN_KIND_SERVER"):
        return None
    mine = _attributes(span.attributes)
    prompt, output = _count(mine, "prompt_tokens"), _count(mine, "completion_tokens")
    if (prompt is None and output is None) or _first(mine, "operation") not in _COUNTED:
        return None
    cached = _count(mine, "cached_tokens") or 0
    trace, own = _hex(span.trace_id), _hex(span.span_id)
    if not own:
        raise InputError("a span has no id")
    return events.Event(
        key=f"{trace}:{own}",
        ts=_seconds(span.end_time_unix_nano) or None,
        pool=_first(mine, "pool") or _first(shared, "pool"),
        model=_first(mine, "model"),
        tenant=_first(mine, "tenant") or _first(shared, "tenant"),
        usage=UsageBlock(
            prompt_tokens=prompt or 0,
            completion_tokens=output or 0,
            # Some instrumentations leave cache reads out of the input they report.
            cache_read_input_tokens=cached if cached <= (prompt or 0) else None,
        ),
    )


def _token_usage(metric: Any, shared: Mapping[str, str], source: str, pool: str) -> Iterator[pa.Table]:
    data = metric.histogram
    if data is None or _temporality(data) == _CUMULATIVE:
        raise InputError(f"{metric.name} must come as a histogram of delta temporality: set it at the sender")
    for point in data.data_points:
        mine = _attributes(point.attributes)
        kind = _first(mine, "token_type")
        start, end = _seconds(point.start_time_unix_nano), _seconds(point.time_unix_nano)
        if kind not in ("input", "output") or not end:
            continue
        text = "\x1f".join(f"{k}={v}" for k, v in sorted((dict(shared) | mine).items()))
        yield records(
            {
                "ts": [end],
                "source": f"gateway/{source.partition('/')[2] or source}",
                "key": [f"{start:.3f}-{end:.3f}:{text}"[:500]],
                "pool": _first(mine, "pool") or _first(shared, "pool") or pool,
                "model": _first(mine, "model"),
                "tenant": _first(mine, "tenant") or _first(shared, "tenant"),
                "meter": "prompt_tokens" if kind == "input" else "output_tokens",
                "quantity": [_number(point.sum)],
            },
            1,
        )


def _readings(
    metric: Any, instance: dict[str, str]
) -> Iterator[tuple[dict[str, str], list[tuple[int, float]]]]:
    """A metric's points under their Prometheus names: a histogram is its ``_sum`` and ``_count``."""
    for field in ("gauge", "sum", "histogram"):
        data = _field(metric, field)
        if data is None:
            continue
        if field != "gauge" and _temporality(data) != _CUMULATIVE:
            if rules_of(f"{metric.name}_sum" if field == "histogram" else metric.name):
                raise InputError(f"{metric.name} must come with cumulative temporality: set it at the sender")
            continue
        for point in data.data_points:
            labels = {**instance, **_attributes(point.attributes)}
            ms = int(_seconds(point.time_unix_nano) * MILLISECONDS_PER_SECOND)
            if field == "histogram":
                yield {**labels, "__name__": f"{metric.name}_sum"}, [(ms, _number(point.sum))]
                yield {**labels, "__name__": f"{metric.name}_count"}, [(ms, _number(point.count))]
            else:
                yield {**labels, "__name__": metric.name}, [(ms, _value(point))]


def _field(metric: Any, name: str) -> Any:
    if isinstance(metric, _Metric):
        return getattr(metric, name)
    return getattr(metric, name) if metric.HasField(name) else None


def _temporality(data: Any) -> int:
    value = data.aggregation_temporality
    names = {"AGGREGATION_TEMPORALITY_DELTA": 1, "AGGREGATION_TEMPORALITY_CUMULATIVE": _CUMULATIVE}
    return names[value] if value in names else int(_number(value))


def _value(point: Any) -> float:
    if isinstance(point, _Point):
        return _number(point.as_double if point.as_double is not None else (point.as_int or 0))
    return float(point.as_double if point.HasField("as_double") else point.as_int)


def _attributes(attributes: Sequence[Any]) -> dict[str, str]:
    """Attributes with plain values as text."""
    found: dict[str, str] = {}
    for one in attributes:
        value = one.value
        if isinstance(value, _AnyValue):
            plain = (value.string_value, value.int_value, value.double_value, value.bool_value)
            told = next((v for v in plain if v is not None), None)
        elif value is None:
            told = None
        else:
            which = value.WhichOneof("value")
            told = getattr(value, which) if which and which.partition("_")[0] in _PLAIN else None
        if told is not None:
            found[one.key] = str(told)
    return found


_PLAIN = ("string", "int", "double", "bool")


def _first(attributes: Mapping[str, str], name: str) -> str:
    return next((attributes[key] for key in NAME_MAP[name] if attributes.get(key)), "")


def _count(attributes: Mapping[str, str], name: str) -> int | None:
    text = _first(attributes, name)
    if not text:
        return None
    value = _number(text)
    if not 0 <= value < 1e12:
        raise InputError(f"a span counts {text} tokens")
    return int(value)


def _number(value: Number) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{str(value)[:40]!r} is no number") from error


def _seconds(nanoseconds: Number) -> float:
    seconds = _number(nanoseconds) / GIGA
    if not 0 <= seconds < _LAST_S:
        raise InputError(f"{str(nanoseconds)[:40]!r} is no time in nanoseconds since 1970")
    return seconds


def _hex(identifier: bytes | str) -> str:
    """Ids are bytes in protobuf, hexadecimal in OTLP's JSON, base64 in plain protobuf's: one spelling for
    all."""
    if isinstance(identifier, bytes):
        return identifier.hex()
    if len(identifier) in (12, 24) and not all(c in "0123456789abcdefABCDEF" for c in identifier):
        try:
            return base64.b64decode(identifier, validate=True).hex()
        except ValueError as error:
            raise InputError(f"a span's id {identifier!r} is neither hexadecimal nor base64") from error
    return identifier.lower()
