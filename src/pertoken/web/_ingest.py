"""What may be sent to the service. An answer of 200 means: it is on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, Field

from pertoken.meter import events
from pertoken.web._doors import Admin, ServiceHere, WholeWriter, Writer, answers
from pertoken.web._limits import body_of, inflated
from pertoken.web.service import Received

router = APIRouter()
_REFUSALS = answers(400, 401, 403, 408, 413, 415, 429, 503)
_REMOTE_WRITE_BYTES = 16 * 1024 * 1024
_OTLP_BYTES = 32 * 1024 * 1024
_ARROW = "application/vnd.apache.arrow.stream"
_DEFLATE = 1032
"""Bytes that one byte of gzip unpacks to at most."""
_PROTOBUF, _JSON = "application/x-protobuf", "application/json"

_EVENT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["key"],
    "properties": {
        "key": {"type": "string", "minLength": 1, "maxLength": 512},
        "ts": {"type": "number", "description": "POSIX seconds; without it, the time of receipt"},
        "pool": {"type": "string"},
        "model": {"type": "string"},
        "tenant": {"type": "string"},
        "meter": {"type": "string", "examples": ["output_tokens"]},
        "quantity": {"type": "number", "minimum": 0},
        "phase": {"type": "string"},
        "usage": {"type": "object", "description": "the usage block of an API's answer"},
    },
}


def body_schema(*kinds: str, schema: Any = None) -> dict[str, Any]:
    """The OpenAPI entry of a body of these media types."""
    binary = {"type": "string", "format": "binary"}
    content = {kind: {"schema": schema if kind == _JSON and schema else binary} for kind in kinds}
    return {"requestBody": {"required": True, "content": content}}


class Taken(BaseModel):
    """What became of a batch: records that are durable now, and those that already were."""

    records: int
    duplicates: int
    unknown_pools: dict[str, int] = Field(
        default_factory=dict,
        description="Records sent that name a pool the fleet does not have, by that name: at most 20 names, the most "
        "frequent first; left out where there are none. They are kept, and in no figure until the fleet has the pool.",
    )
    unplaced_models: dict[str, int] = Field(
        default_factory=dict,
        description="Records sent that name no pool and a model that fits none, by that model (empty: none): "
        "at most 20, the most frequent first; left out where there are none. They are kept, and in no figure until the "
        "event names a pool.",
    )


@router.post(
    "/v1/events",
    responses=_REFUSALS,
    response_model_exclude_defaults=True,
    openapi_extra=body_schema(
        *events.CONTENT_TYPES, schema={"anyOf": [{"type": "array", "items": _EVENT}, _EVENT]}
    ),
)
async def take_events(request: Request, service: ServiceHere, caller: Writer) -> Taken:
    """Usage events as JSON, NDJSON or an Arrow stream, plain or gzip. A key sent twice counts once."""
    kind = kind_of(request, *events.CONTENT_TYPES)
    most = min(events.MAX_BODY_BYTES, request.app.state.limits.body_bytes)
    return await _take(
        request, most, lambda body: service.take_events(body, kind, caller.name, caller.tenant)
    )


@router.post(
    "/v1/records",
    responses=_REFUSALS,
    response_model_exclude_defaults=True,
    openapi_extra=body_schema(_ARROW),
)
async def take_records(request: Request, service: ServiceHere, caller: Admin) -> Taken:
    """Whole records with their sources, an Arrow stream: what `pertoken import` reads from files."""
    kind_of(request, _ARROW)
    return await _take(request, _OTLP_BYTES, service.take_records)


@router.post(
    "/v1/traces",
    responses=_REFUSALS,
    response_model_exclude_defaults=True,
    openapi_extra=body_schema(_PROTOBUF, _JSON),
)
async def take_traces(request: Request, service: ServiceHere, caller: Writer) -> Taken:
    """OTLP/HTTP spans under the GenAI conventions: each call to a model is a request with its tokens."""
    kind = kind_of(request, _PROTOBUF, _JSON)
    return await _take(
        request, _OTLP_BYTES, lambda body: service.take_spans(body, kind, caller.name, caller.tenant)
    )


@router.post(
    "/v1/metrics",
    responses=_REFUSALS,
    response_model_exclude_defaults=True,
    openapi_extra=body_schema(_PROTOBUF, _JSON),
)
async def take_metrics(request: Request, service: ServiceHere, caller: WholeWriter) -> Taken:
    """OTLP/HTTP metrics: engine and exporter counters that a collector passes on."""
    kind = kind_of(request, _PROTOBUF, _JSON)
    return await _take(request, _OTLP_BYTES, lambda body: service.take_metrics(body, kind, caller.name))


@router.post(
    "/api/v1/write",
    responses=_REFUSALS,
    response_model_exclude_defaults=True,
    openapi_extra=body_schema(_PROTOBUF),
)
async def take_samples(request: Request, service: ServiceHere, caller: WholeWriter) -> Taken:
    """Prometheus remote write, version 1: a snappy block of samples."""
    kind_of(request, _PROTOBUF)
    if request.headers.get("content-encoding", "snappy").strip().lower() != "snappy":
        raise HTTPException(415, "remote write is snappy-compressed")
    return await _take(request, _REMOTE_WRITE_BYTES, service.take_samples, coded=True)


async def _take(
    request: Request, most_bytes: int, take: Callable[[bytes], Received], coded: bool = False
) -> Taken:
    """Read a body, hand it on in a thread, and answer once it is durable."""
    async with held(request, most_bytes, coded=coded) as body:
        done = await asyncio.to_thread(take, body)
    return Taken(
        records=done.rows,
        duplicates=done.duplicates,
        unknown_pools=done.unknown_pools,
        unplaced_models=done.unplaced_models,
    )


@asynccontextmanager
async def held(request: Request, most_bytes: int, *, coded: bool = False) -> AsyncIterator[bytes]:
    """The body of a request, unpacked where it is gzip (not where it is `coded`), room taken for it meanwhile.

    413 where it is larger than `most_bytes`, packed or unpacked; 503 where there is no room; else as `body_of`.
    """
    length = request.headers.get("content-length", "")
    size = int(length) if length.isascii() and length.isdigit() else most_bytes
    if length and size > most_bytes:
        raise HTTPException(413, f"a body holds at most {most_bytes} bytes")
    room = request.app.state.room
    packed = not coded and request.headers.get("content-encoding", "").strip().lower() == "gzip"
    async with room.hold(size):
        body = await body_of(request, most_bytes, coded=coded or packed)
        if not packed:
            yield body
            return
    # What it unpacks to has to find room too: a thousand small bodies may be many gigabytes.
    async with room.hold(min(most_bytes, len(body) * _DEFLATE)):
        body = await asyncio.to_thread(inflated, body, most_bytes)
    async with room.hold(len(body)):
        yield body


def kind_of(request: Request, *allowed: str) -> str:
    """The media type of a body; 415 where it is none of those allowed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in allowed:
        raise HTTPException(415, f"send it as {', '.join(allowed)}")
    return kind
