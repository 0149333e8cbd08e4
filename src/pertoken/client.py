"""A running service asked from Python: its figures, books and health; and told: usage events.

Nothing but the standard library, so that a gateway can carry it; Arrow only where a table is asked for.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from pertoken.errors import InputError, PerTokenError

if TYPE_CHECKING:
    import pyarrow as pa

Where = Mapping[str, str | Sequence[str]]
Moment = datetime | str
"""A time with its zone; text in ISO 8601."""

_JSON, _NDJSON, _ARROW = "application/json", "application/x-ndjson", "application/vnd.apache.arrow.stream"
_TEXTS = ("book", "pool", "model", "tenant", "phase", "category", "component", "meter")
_DECIMALS = {"cost_usd": 9, "quantity": 6}
"""Columns of exact decimals, and the digits behind their point."""
_PAGE_ROWS = 10_000
_BATCH_EVENTS, _BATCH_BYTES = 10_000, 8 * 1024 * 1024
_LATER = (429, 503)
_STALE = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


class Client:
    """The service at a URL. One connection, kept open; threads wait for one another.

    Parameters: token, as `pertoken token add` shows it; ca_file, certificates to trust instead of the system's;
    check_name, whether the certificate must name the host; timeout_s, of each answer.

    Every method raises PerTokenError (InputError where what was asked cannot be) with the service's own line.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        ca_file: str | Path | None = None,
        check_name: bool = True,
        timeout_s: float = 60.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise InputError(f"{url!r} is no address of a service: write https://meter.example:8700")
        if not token.isascii() or any(c.isspace() for c in token):
            raise InputError("a token is one word, as `pertoken token add` shows it")
        self.url, self._parts = url, parts
        self._headers = {"User-Agent": "pertoken"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._ca_file, self._check_name, self._timeout_s = ca_file, check_name, timeout_s
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut()

    def shut(self) -> None:
        """Close the connection; the next question opens one again."""
        with self._lock:
            self._drop()

    # -- figures

    def metric(
        self,
        *names: str,
        by: Sequence[str] = (),
        where: Where | None = None,
        start: Moment | None = None,
        end: Moment | None = None,
    ) -> Rows:
        """Metrics by dimensions, as `Ledger.metric` gives them; the book is ``actual`` unless `where` names one."""
        return self._rows("/v1/metric", by, where, start, end, name=names)

    def cost(
        self, *by: str, where: Where | None = None, start: Moment | None = None, end: Moment | None = None
    ) -> Rows:
        """Cost [USD] by dimensions: `by`, then ``cost_usd``, exact."""
        return self._rows("/v1/cost", by, where, start, end)

    def usage(
        self, *by: str, where: Where | None = None, start: Moment | None = None, end: Moment | None = None
    ) -> Rows:
        """Quantities by dimensions and meter: `by`, ``meter``, then ``quantity`` [the meter's unit], exact."""
        return self._rows("/v1/usage", by, where, start, end)

    def figure(
        self,
        name: str,
        twin: str = "json",
        *,
        by: Sequence[str] = (),
        where: Where | None = None,
        start: Moment | None = None,
        end: Moment | None = None,
    ) -> Any:
        """A figure's twin: ``json`` and ``vl.json`` read, ``csv`` and ``sql`` as text, ``png`` as bytes."""
        query = _query(by, where, {"from": start, "to": end})
        found = self.bytes_of("GET", f"/figure/{quote(name, safe='')}.{quote(twin)}?{query}")
        if twin.endswith("json"):
            return self._read(found)
        return found if twin == "png" else found.decode()

    def report(
        self,
        *books: str,
        by: Sequence[str] = (),
        start: Moment | None = None,
        end: Moment | None = None,
    ) -> dict[str, Any]:
        """Two books side by side, the difference by price, volume, efficiency and mix; USD as text, exact."""
        query = _query(by, {"book": books}, {"start": start, "end": end})
        found: dict[str, Any] = self.ask("GET", f"/v1/report?{query}")
        return found

    def books(self) -> dict[str, tuple[datetime, datetime]]:
        """The ledger's books, each with its first hour and the one after its last (UTC)."""
        return {
            row["book"]: (datetime.fromisoformat(row["start"]), datetime.fromisoformat(row["end"]))
            for row in self.ask("GET", "/v1/books")
        }

    # -- how it fares, and what it is told

    def doctor(self, hours: int = 24) -> dict[str, Any]:
        """What is wrong with the books of the last hours."""
        found: dict[str, Any] = self.ask("GET", f"/v1/doctor?hours={hours}")
        return found

    def budget(
        self, tenant: str, *, tokens: int = 0, usd: Decimal | float = 0, model: str = "", pool: str = ""
    ) -> dict[str, Any]:
        """Whether a tenant's next request fits its budgets (``allowed``), and what is left."""
        asked = {"tokens": tokens, "usd": usd, "model": model, "pool": pool}
        query = urlencode({key: value for key, value in asked.items() if value})
        found: dict[str, Any] = self.ask("GET", f"/v1/budget/{quote(tenant, safe='')}?{query}")
        return found

    def close(self, start: Moment, end: Moment) -> dict[str, Any]:
        """Close the hours from `start` up to, not with, `end` again: how many closed, and which stayed open and why."""
        window = {"start": _moment(start), "end": _moment(end)}
        found: dict[str, Any] = self.ask("POST", "/v1/close", window)
        return found

    def send_events(self, events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Send usage events in batches: `records` that are durable now, `duplicates` that already were.

        ``unknown_pools``, where there are any, counts by name the records of pools that the fleet does not have,
        ``unplaced_models`` by model those that name no pool and fit none: they are kept and in no figure. A key sent
        twice counts once: after an error, send all of them again. ``ts`` may be a datetime.
        """
        sums = {"records": 0, "duplicates": 0}
        strays: dict[str, Counter[str]] = {"unknown_pools": Counter(), "unplaced_models": Counter()}
        for body in _batches(events):
            taken = self.ask("POST", "/v1/events", body, kind=_NDJSON)
            for name in sums:
                sums[name] += taken[name]
            for name, counts in strays.items():
                counts.update(taken.get(name) or {})
        return {**sums, **{name: dict(counts) for name, counts in strays.items() if counts}}

    # -- plain

    def ask(self, method: str, path: str, body: Any = None, *, kind: str = "") -> Any:
        """The answer (JSON) to a request: `body` is sent as JSON, bytes as an Arrow stream or of the `kind` given."""
        return self._read(self.bytes_of(method, path, body, kind=kind))

    def bytes_of(self, method: str, path: str, body: Any = None, *, kind: str = "") -> bytes:
        """The answer as it is; an error of the service, or of the way to it, is raised."""
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body, default=_plain).encode()
        headers = dict(self._headers)
        if sent is not None:
            headers["Content-Type"] = kind or (_ARROW if isinstance(body, bytes) else _JSON)
        with self._lock:
            try:
                status, found, again = self._once(method, self._parts.path.rstrip("/") + path, sent, headers)
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                raise InputError(f"the service at {self.url} does not answer: {error}") from error
        if status >= 400:
            raise self._refusal(status, found, again)
        return found

    def _once(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes, str]:
        kept = self._connection
        connection = kept or self._connect()
        self._connection = connection
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
        except (*_STALE, http.client.RemoteDisconnected):
            self._drop()
            if kept is None:
                raise
            # The service closes what is idle. Asked again at no risk: keys, hours and books count once.
            return self._once(method, path, body, headers)
        found = answer.read()
        if answer.will_close:
            self._drop()
        return answer.status, found, answer.headers.get("Retry-After") or ""

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        context = ssl.create_default_context(cafile=str(self._ca_file) if self._ca_file else None)
        context.check_hostname = self._check_name
        return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise InputError(f"what answers at {self.url} is no PerToken service") from error

    def _refusal(self, status: int, text: bytes, again: str) -> PerTokenError:
        found = self._read(text)
        told = str(found.get("detail", status)) if isinstance(found, dict) else str(status)
        if status in _LATER and again:
            told += f" (again after {again} s)"
        return InputError(told) if status < 500 and status not in (409, *_LATER) else PerTokenError(told)

    def _rows(
        self,
        path: str,
        by: Sequence[str],
        where: Where | None,
        start: Moment | None,
        end: Moment | None,
        **more: Sequence[str],
    ) -> Rows:
        query = _query(by, where, {"start": start, "end": end, **more})
        return Rows(self, f"{path}?{query}&limit={_PAGE_ROWS}")


class Rows:
    """Rows of an answer, fetched page by page while they are read; read again, they are asked for again.

    Hours are datetimes (UTC), costs and quantities Decimals, metrics floats, None where they have no denominator.
    """

    def __init__(self, client: Client, path: str) -> None:
        self._client, self._path = client, path
        self._first: dict[str, Any] = client.ask(
            "GET", path
        )  # here, so that a bad question fails where it is put
        self.units: dict[str, str] = self._first["units"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        page, self._first = self._first or self._client.ask("GET", self._path), {}
        while True:
            for row in page["rows"]:
                yield {key: _typed(key, value) for key, value in row.items()}
            if not page["next"]:
                return
            page = self._client.ask("GET", f"{self._path}&{urlencode({'cursor': page['next']})}")

    def to_arrow(self) -> pa.Table:
        """All rows as one table. Needs pyarrow."""
        import pyarrow as pa

        rows = list(self)
        kinds: dict[str, pa.DataType] = {
            "hour": pa.timestamp("us", tz="UTC"),
            **dict.fromkeys(_TEXTS, pa.string()),
        }
        kinds |= {name: pa.decimal128(38, digits) for name, digits in _DECIMALS.items()}
        names = list(rows[0]) if rows else list(self.units)
        return pa.table(
            {name: pa.array([row[name] for row in rows], kinds.get(name, pa.float64())) for name in names}
        )


def quoted(name: str) -> str:
    """A name as one value of a query, whatever is in it: values are taken apart at commas unless they are in quotes.

    >>> quoted("chat"), quoted("a,b"), quoted("")
    ('chat', '"a,b"', '""')
    """
    plain = name and "," not in name and not name.startswith('"')
    return name if plain else '"' + name.replace('"', '""') + '"'


def _query(by: Sequence[str], where: Where | None, more: Mapping[str, Any]) -> str:
    pairs = [("by", key) for key in by]
    for key, value in (where or {}).items():
        pairs += [(key, quoted(name)) for name in ([value] if isinstance(value, str) else value)]
    for key, value in more.items():
        if isinstance(value, datetime):
            pairs.append((key, _moment(value)))
        elif value is not None:
            pairs += [(key, one) for one in ([value] if isinstance(value, str) else value)]
    return urlencode(pairs)


def _moment(value: Moment) -> str:
    if isinstance(value, str):
        return value
    if value.tzinfo is None:
        raise InputError(f"{value.isoformat()} has no time zone: give one, such as {value.isoformat()}+00:00")
    return value.astimezone(UTC).isoformat()


def _typed(key: str, value: Any) -> Any:
    if value is None or not isinstance(value, str):
        return value
    if key == "hour":
        return datetime.fromisoformat(value)
    return Decimal(value) if key in _DECIMALS else value


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return datetime.fromisoformat(_moment(value)).timestamp()
    if isinstance(value, Decimal):
        return float(value)
    raise InputError(f"a {type(value).__name__} cannot be sent: {value!r}")


def _batches(events: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    lines: list[bytes] = []
    size = 0
    for event in events:
        line = json.dumps(dict(event), default=_plain).encode()
        if lines and (len(lines) == _BATCH_EVENTS or size + len(line) > _BATCH_BYTES):
            yield b"\n".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    if lines:
        yield b"\n".join(lines)
