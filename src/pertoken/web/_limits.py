"""What one sender may ask of us at once: bytes of a body, bytes in flight, requests a second."""

from __future__ import annotations

import asyncio
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import HTTPException, Request

_CLIENTS = 10_000
"""Callers remembered at once; the longest silent is forgotten first."""


class Pace:
    """A token bucket per caller: `per_s` requests a second on average, `burst` at once."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_s(self, caller: str, now_s: float | None = None) -> float:
        """0 where the caller may go on, else the seconds until it may."""
        now = time.monotonic() if now_s is None else now_s
        with self._lock:
            left, at = self._left.pop(caller, (self._burst, now))
            left = min(self._burst, left + (now - at) * self._per_s)
            wait = 0.0 if left >= 1.0 else (1.0 - left) / self._per_s
            self._left[caller] = (left - 1.0 if wait == 0.0 else left, now)
            while len(self._left) > _CLIENTS:
                self._left.popitem(last=False)
        return wait


class Room:
    """Bytes of bodies we hold at once; who finds no room is asked to come back."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._used = most_bytes, 0

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Take room for a body; 503 where there is none. For the event loop's own thread."""
        if self._used + size > self._most and self._used:
            raise HTTPException(503, "too much is on its way in: send it again", {"Retry-After": "1"})
        self._used += size
        try:
            yield
        finally:
            self._used -= size


async def body_of(
    request: Request, most_bytes: int, *, coded: bool = False, patience_s: float = 30.0
) -> bytes:
    """The body of a request, unpacked where it is gzip (not where it is `coded`, its reader's affair).

    413 where it is larger than `most_bytes`, packed or unpacked; 408 where it does not arrive; 415 on another coding;
    400 on one that cannot be unpacked.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(patience_s):
            async for part in request.stream():
                size += len(part)
                if size > most_bytes:
                    raise HTTPException(413, f"a body holds at most {most_bytes} bytes")
                parts.append(part)
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {patience_s:g} s") from error
    body = b"".join(parts)
    if coded:
        return body
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding == "gzip":
        return await asyncio.to_thread(inflated, body, most_bytes)
    if coding != "identity":
        raise HTTPException(415, "send the body plain, or with Content-Encoding: gzip")
    return body


def inflated(body: bytes, most_bytes: int) -> bytes:
    """A gzip body unpacked, never to more than `most_bytes` (then 413)."""
    stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        plain = stream.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise HTTPException(400, "the body is not gzip") from error
    if len(plain) > most_bytes:
        raise HTTPException(413, f"a body unpacks to at most {most_bytes} bytes")
    if not stream.eof or stream.unused_data:
        raise HTTPException(400, "the gzip body ends too early or too late")
    return plain
