"""Start the service, and find one that runs."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import logging
import os
import secrets
import signal
import socket
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pyarrow as pa

from pertoken.client import Client
from pertoken.errors import InputError
from pertoken.fleet import load_fleet
from pertoken.ledger import open_ledger
from pertoken.meter.attribute import BOOK, stray_pool, stray_pools
from pertoken.meter.events import unplaced
from pertoken.report.actual import Facts, LedgerSource, Source, Variance, compare_books
from pertoken.report.books import LEDGER_FILE, Books, hours_in, open_books
from pertoken.report.doctor import examine
from pertoken.report.imports import FileOf, batches
from pertoken.report.plan_book import to_body
from pertoken.report.reconcile import Reconciliation, read_bill
from pertoken.report.reconcile import reconcile as beside_the_bill

PORT = 8700
_HERE = "service.json"
_SENT_ROWS = 50_000
_REASONS = 10
_STRAYS = 20
log = logging.getLogger("pertoken.serve")


@dataclass(frozen=True)
class Bind:
    """Where the service listens, and how."""

    host: str = "127.0.0.1"
    port: int = PORT
    tls_cert: Path | None = None
    tls_key: Path | None = None
    require_tokens: bool = False
    keep_days: int = 400
    """Days whose records are kept, and how late an event may come."""
    hosts: tuple[str, ...] = ()
    """Further names it may be called by where no tokens are required."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Remote:
    """A service that is not on this machine."""

    url: str
    token: str = ""

    def __str__(self) -> str:
        return self.url


def remote(url: str, token_file: Path | None = None) -> Remote:
    """The service at a URL, with the token in a file. Raises InputError where either cannot be used."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.username:
        raise InputError(f"{url!r} is no address of a service: write https://meter.example:8700")
    try:
        token = token_file.read_text().strip() if token_file else ""
    except (OSError, ValueError) as error:
        raise InputError(f"the token file {token_file} cannot be read: {error}") from error
    if not token.isascii() or any(c.isspace() for c in token):
        raise InputError(f"the token file {token_file} holds no token")
    return Remote(url, token)


def serve(fleet_file: Path, folder: Path, bind: Bind | None = None) -> None:
    """Run the service until SIGTERM or SIGINT; what was acknowledged is on the disk.

    Raises InputError where the fleet cannot be read, another process holds the folder, tokens are required and there
    are none, or the address is taken.
    """
    from pertoken.meter import predicted_work
    from pertoken.web.app import create_app
    from pertoken.web.service import Service
    from pertoken.web.tokens import Tokens

    where = bind or Bind()
    fleet = load_fleet(fleet_file)
    required = where.require_tokens or not where.loopback
    tokens = Tokens(folder)
    if required and not tokens.all():
        raise InputError(
            f"{where.host} is not loopback, so each request needs a token, and {folder} has none: "
            f"pertoken token add NAME --scope admin --data {folder}"
        )
    if (where.tls_cert is None) != (where.tls_key is None):
        raise InputError("give both --tls-cert and --tls-key, or neither")
    books = open_books(fleet, folder, predicted_work)
    own = secrets.token_urlsafe(32)
    app = create_app(
        Service(books, fleet_file.resolve().parent, keep_days=where.keep_days),
        tokens,
        require_tokens=required,
        hosts=frozenset({"localhost", "127.0.0.1", "::1", where.host, *where.hosts}),
        admin=lambda text: hmac.compare_digest(text.encode(), own.encode()),
    )
    try:
        _run(app, where, folder, own)
    finally:
        (folder / _HERE).unlink(missing_ok=True)
        books.shut()  # a second time where the service has stopped, which is no harm


def _run(app: Any, where: Bind, folder: Path, own: str) -> None:
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    config = uvicorn.Config(
        app,
        host=where.host,
        port=where.port,
        ssl_certfile=where.tls_cert,
        ssl_keyfile=where.tls_key,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=20,
        timeout_keep_alive=75,
        limit_concurrency=1000,
        h11_max_incomplete_event_size=64 * 1024,
        server_header=False,
        lifespan="on",
    )
    listening = _listening(where)
    port = listening.getsockname()[1]
    scheme = "https" if where.tls_cert else "http"
    host = "127.0.0.1" if where.host in ("0.0.0.0", "::", "") else where.host
    shown = f"[{host}]" if ":" in host else host
    here = {"url": f"{scheme}://{shown}:{port}", "token": own, "cert": str(where.tls_cert or "")}
    _write_private(folder / _HERE, json.dumps(here).encode())
    log.info("PerToken listens on %s://%s:%d", scheme, where.host, port)
    if not where.loopback and not where.tls_cert:
        log.warning("tokens go over the wire in clear: give --tls-cert and --tls-key, or put TLS before it")
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn shuts down gently, then raises the signal again for whoever was there before it: us.
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening])


def _listening(where: Bind) -> socket.socket:
    """A socket bound to the address; uvicorn's own way ends the process with a traceback's words."""
    listening = socket.socket(socket.AF_INET6 if ":" in where.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((where.host, where.port))
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {where.port} of {where.host} is taken by another process: "
                "give another with --port, 0 for a free one"
            ) from error
        raise InputError(
            f"cannot listen on {where.host}, port {where.port}: {error.strerror}: give --host or --port another"
        ) from error
    return listening


def close(folder: Path, fleet_file: Path | None, start: datetime, end: datetime) -> dict[str, Any]:
    """Close hours through the service that holds the folder, else directly: hours closed, left out as before
    anything was metered, and left open with the reason.

    Raises InputError where no service runs and no fleet file is given.
    """
    window = {"start": start.isoformat(), "end": end.isoformat()}
    found = ask(folder, "POST", "/v1/close", window)
    if found is not None:
        answer: dict[str, Any] = found
        return answer
    with _books(folder, fleet_file) as books:
        now = datetime.now(UTC)
        hours = [h for h in hours_in(start, end) if h <= now]
        metered = books.metered(hours)
        done = books.close_span(metered, now)
    unpriced = {h.isoformat(): why for h, why in done.unpriced.items()}
    return {"hours": len(done.hours), "unmetered": len(hours) - len(metered), "unpriced": unpriced}


def import_file(
    folder: Path,
    fleet_file: Path | None,
    path: Path,
    what: FileOf,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Put a file's records into the journal, through the service that holds the folder, else directly.

    Gives `records` now durable, `duplicates` that already were, `refused` rows, and the first reasons (`why`);
    `unknown_pools`, where records name pools the fleet does not have, counted by name, and `unplaced_models`, where
    they name none and a model that fits none, each told in `why` too. The hours it touches are closed by the running
    service within a minute, else by `pertoken close`.

    Raises InputError where no service runs and no fleet file is given, or the file cannot be opened.
    """
    found: dict[str, Any] = {"records": 0, "duplicates": 0, "refused": 0, "why": []}
    strays: Counter[str] = Counter()
    loose: Counter[str] = Counter()
    fleet = load_fleet(fleet_file) if fleet_file else None
    with ExitStack() as stack:
        running = ask(folder, "GET", "/healthz") is not None
        books = None if running else stack.enter_context(_books(folder, fleet_file, make=True))
        for rows, refused, share in batches(path, what, fleet, now=datetime.now(UTC)):
            found["refused"] += len(refused)
            found["why"] += refused[: _REASONS - len(found["why"])]
            for at in range(0, rows.num_rows, _SENT_ROWS):
                taken = _take(folder, books, rows.slice(at, _SENT_ROWS))
                found["records"] += taken["records"]
                found["duplicates"] += taken["duplicates"]
                strays.update(taken.get("unknown_pools", {}))
                loose.update(taken.get("unplaced_models", {}))
            progress(share)
        pools = books.fleet.pools if books else fleet.pools if fleet else None
    if strays:
        found["unknown_pools"] = dict(strays.most_common(_STRAYS))
        found["why"] += [f"{count} {_stray(name, pools)}" for name, count in strays.most_common(_STRAYS)]
    if loose:
        found["unplaced_models"] = dict(loose.most_common(_STRAYS))
        found["why"] += unplaced(found["unplaced_models"])
    return found


def _stray(name: str, pools: Collection[str] | None) -> str:
    if pools is not None and name not in pools:
        return stray_pool(name, pools)
    return f"records name the pool {name[:100]!r}, which the service's fleet does not have: see `pertoken doctor`"


def _take(folder: Path, books: Books | None, rows: pa.Table) -> dict[str, Any]:
    """As the service answers: records now durable, those that already were, those of pools the fleet lacks."""
    if books is not None:
        done = books.take_file(rows)
        strays = stray_pools(rows, books.fleet.pools)
        loose = books.unplaced(rows, datetime.now(UTC))
        return {
            "records": done.rows, "duplicates": done.duplicates, "unknown_pools": strays, "unplaced_models": loose,
        }  # fmt: skip
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    answer: dict[str, Any] | None = ask(folder, "POST", "/v1/records", sink.getvalue().to_pybytes())
    if answer is None:
        raise InputError(f"the service on {folder} has just stopped: import again, what it has counts once")
    return answer


def put_book(where: Path | Remote, book: str, usage: pa.Table, rates: pa.Table) -> dict[str, Any]:
    """Put a plan's book into the ledger of a data folder, through the service that holds it, else directly; or into
    that of a service elsewhere.

    Raises InputError where there is neither, or the service's reason why it keeps nothing.
    """
    path, body = f"/v1/books/{quote(book)}", to_body(usage, rates)
    if isinstance(where, Remote):
        here = {"url": where.url, "token": where.token, "cert": ""}
        answer: dict[str, Any] | None = _asked(here, "PUT", path, body, 600.0)
        if answer is None:
            raise InputError(f"nothing answers at {where.url}")
        return answer
    found: dict[str, Any] | None = ask(where, "PUT", path, body)
    if found is not None:
        return found
    if not where.is_dir():
        raise InputError(f"there is no folder {where}: give --data as it was given to `pertoken serve`")
    with ExitStack() as stack:
        ledger = open_ledger(where / LEDGER_FILE)
        stack.callback(ledger.shut)
        ledger.put_book(book, usage, rates)
    return {"book": book, "usage_rows": usage.num_rows, "rate_rows": rates.num_rows}


def diagnose(folder: Path, fleet_file: Path | None, hours: int = 24) -> dict[str, Any]:
    """What `doctor` finds, through the service that holds the folder, else directly."""
    found = ask(folder, "GET", f"/v1/doctor?hours={hours}")
    if found is not None:
        answer: dict[str, Any] = found
        return answer
    with _books(folder, fleet_file) as books:
        diagnosis = examine(books, datetime.now(UTC), hours=hours).to_dict()
    diagnosis["facts"] = {"service": "not running", **diagnosis["facts"]}
    return diagnosis


def report(
    folder: Path,
    books: Sequence[str],
    by: Sequence[str],
    start: datetime | None = None,
    end: datetime | None = None,
    plan: Path | None = None,
) -> Variance:
    """Forecast against actual, from the ledger of a data folder (through its service, where one runs).

    `plan`: a ledger file that holds the books other than ``actual``. Raises InputError where a ledger is missing.
    """
    with ExitStack() as stack:
        here = _source(folder, stack)
        there = here if plan is None else _opened(plan, stack)
        return compare_books(
            lambda book: here if book == BOOK else there, books=books, by=by, start=start, end=end
        )


def reconcile(
    folder: Path, bill: Path, start: datetime, end: datetime, tolerance_fraction: float = 0.01
) -> Reconciliation:
    """The book ``actual`` of a data folder beside a bill (CSV)."""
    with ExitStack() as stack:
        source = _source(folder, stack)
        return beside_the_bill(source, read_bill(bill), start, end, tolerance_fraction=tolerance_fraction)


def _source(folder: Path, stack: ExitStack) -> Source:
    """The books of a folder: through the service that holds it, else its ledger, opened until `stack` unwinds."""
    if ask(folder, "GET", "/healthz") is not None:
        return _Remote(folder)
    return _opened(folder / LEDGER_FILE, stack)


def _opened(path: Path, stack: ExitStack) -> Source:
    if not path.is_file():
        raise InputError(f"there is no ledger at {path}")
    ledger = open_ledger(path)
    stack.callback(ledger.shut)
    return LedgerSource(ledger)


class _Remote:
    """Books of a running service."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def spans(self) -> dict[str, tuple[datetime, datetime]]:
        """By book, its first hour and the one after its last."""
        rows = self._get("/v1/books")
        return {
            r["book"]: (datetime.fromisoformat(r["start"]), datetime.fromisoformat(r["end"])) for r in rows
        }

    def facts(self, book: str, by: Sequence[str], start: datetime, end: datetime) -> Facts:
        """Sums of a book over hours."""
        window = {"book": book, "start": start.isoformat(), "end": end.isoformat()}
        costs = self._get("/v1/cost?" + urlencode({**window, "by": ",".join([*by, "phase", "component"])}))
        usage = self._get("/v1/usage?" + urlencode({**window, "by": ",".join([*by, "phase"])}))
        return Facts.of(by, costs["rows"], usage["rows"])

    def _get(self, path: str) -> Any:
        found = ask(self._folder, "GET", path)
        if found is None:
            raise InputError(f"the service on {self._folder} has just stopped: ask again")
        return found


def _books(folder: Path, fleet_file: Path | None, make: bool = False) -> Books:
    from pertoken.meter import predicted_work

    if fleet_file is None:
        raise InputError(
            f"no service runs on {folder}: give its fleet file with --fleet, or start `pertoken serve`"
        )
    if not make and not folder.is_dir():
        raise InputError(f"there is no folder {folder}: give --data as it was given to `pertoken serve`")
    return open_books(load_fleet(fleet_file), folder, predicted_work)


def ask(folder: Path, method: str, path: str, body: Any = None, timeout_s: float = 600.0) -> Any | None:
    """The answer (JSON) of the service that holds a data folder; None where none runs there.

    Parameters: body, sent as JSON, or bytes of an Arrow stream.

    Raises InputError with the service's own words where it refuses.
    """
    try:
        note = json.loads((folder / _HERE).read_bytes())
        here = {name: str(note[name]) for name in ("url", "token", "cert")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return _asked(here, method, path, body, timeout_s)


def _asked(here: Mapping[str, str], method: str, path: str, body: Any, timeout_s: float) -> Any | None:
    """The answer (JSON) of the service at `here["url"]`; None where nothing listens there."""
    # Our own certificate need not name loopback: it must be the very one the service was started with.
    cert = here["cert"]
    with Client(
        here["url"], here["token"], ca_file=cert or None, check_name=not cert, timeout_s=timeout_s
    ) as client:
        try:
            return client.ask(method, path, body)
        except InputError as error:
            if isinstance(error.__cause__, (ConnectionRefusedError, ConnectionResetError)):
                return None  # it was killed and left its note behind
            raise


def _write_private(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".part")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    temporary.replace(path)
