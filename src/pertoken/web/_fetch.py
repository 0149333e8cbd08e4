"""One page of metrics over HTTP: bounded in time and size, plain or gzip, redirects not followed."""

from __future__ import annotations

import http.client
import ssl
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

from pertoken.errors import InputError

MAX_PAGE_BYTES = 64 * 1024 * 1024
_ACCEPT = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.9,*/*;q=0.1"
_PIECE = 256 * 1024


def fetch(url: str, *, timeout_s: float, authorization_file: Path | None = None) -> tuple[bytes, bool]:
    """The page at `url`, and whether it is OpenMetrics.

    Raises InputError on anything but an answer 200 of at most 64 MiB within `timeout_s`.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    until_s = time.monotonic() + timeout_s
    headers = {"Accept": _ACCEPT, "Accept-Encoding": "gzip", "User-Agent": "pertoken"}
    try:
        if authorization_file is not None:
            headers["Authorization"] = authorization_file.read_text().strip()
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
        try:
            connection.request(
                "GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), None, headers
            )
            answer = connection.getresponse()
            if answer.status != 200:
                raise InputError(f"it answers {answer.status}")
            body = _read(answer, until_s)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, zlib.error, ssl.SSLError, ValueError) as error:
        # The text of an OSError names the address; that of a ValueError may be a header's own, token and all.
        told = isinstance(error, OSError | http.client.HTTPException | zlib.error)
        why = f": {error}" if told else ""
        raise InputError(f"it cannot be fetched: {type(error).__name__}{why}") from error
    return body, "openmetrics" in (answer.headers.get("Content-Type") or "")


def _read(answer: http.client.HTTPResponse, until_s: float) -> bytes:
    coding = (answer.headers.get("Content-Encoding") or "identity").lower()
    stream = zlib.decompressobj(16 + zlib.MAX_WBITS) if coding == "gzip" else None
    parts: list[bytes] = []
    size = 0
    while piece := answer.read(_PIECE):
        while piece:
            plain = stream.decompress(piece, _PIECE) if stream else piece
            piece = stream.unconsumed_tail if stream else b""
            size += len(plain)
            if size > MAX_PAGE_BYTES:
                raise InputError(f"its page is larger than {MAX_PAGE_BYTES} bytes")
            parts.append(plain)
        if time.monotonic() > until_s:
            raise InputError("its page did not arrive in time")
    if stream and not stream.eof:
        raise InputError("its gzip page ends too early")
    return b"".join(parts)
