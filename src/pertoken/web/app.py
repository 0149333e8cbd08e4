"""The HTTP face of the service: what may be sent and asked, by whom, and how much at once."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from pertoken import __version__
from pertoken.errors import InputError, PerTokenError, nearest
from pertoken.meter.journal import JournalBrokenError, JournalFullError
from pertoken.web import _ask, _books, _budget, _frame, _ingest, exporter, figures, pages
from pertoken.web._doors import COOKIE
from pertoken.web._limits import Pace, Room
from pertoken.web.service import Service
from pertoken.web.tokens import LOCAL, Caller, Tokens

log = logging.getLogger("pertoken.serve")


@dataclass(frozen=True)
class Limits:
    """What the service takes at most."""

    body_bytes: int = 32 * 1024 * 1024
    in_flight_bytes: int = 128 * 1024 * 1024
    """Bodies held at once; decoded, small events take some fifteen times the room."""
    requests_per_s: float = 500.0
    burst: float = 1000.0


def create_app(
    service: Service,
    tokens: Tokens,
    *,
    require_tokens: bool,
    limits: Limits | None = None,
    hosts: frozenset[str] | None = None,
    admin: Callable[[str], bool] = lambda text: False,
) -> FastAPI:
    """The application; the service starts and stops with it.

    Parameters: require_tokens, whether each request needs one; hosts: names it may be called by where tokens are not
    required (None: those of loopback), so that a web page cannot reach it under a name of its own; admin: whether a
    token is the process's own, for `pertoken close` on this machine.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        import asyncio

        await asyncio.to_thread(service.start)
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    bounds = limits or Limits()
    app = FastAPI(
        title="PerToken",
        version=__version__,
        summary="The meter and the ledger of real tokens, real watts, real money.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service, app.state.limits = service, bounds
    app.state.room = Room(bounds.in_flight_bytes)
    app.state.gate = _Gate(
        tokens, require_tokens, hosts, admin, Pace(bounds.requests_per_s, bounds.burst), Pace(1.0, 20.0)
    )
    app.middleware("http")(_guarded)
    app.include_router(_ingest.router)
    app.include_router(_books.router)
    app.include_router(_ask.router)
    app.include_router(_budget.router)
    app.include_router(figures.router)
    app.include_router(_frame.router)
    for router in pages.ROUTERS:
        app.include_router(router)
    exporter.add_to(app, service)
    _errors(app)
    return app


@dataclass
class _Gate:
    """Who is let in."""

    tokens: Tokens
    required: bool
    hosts: frozenset[str] | None
    admin: Callable[[str], bool]
    pace: Pace
    failures: Pace
    """Wrong tokens by address: guessing is slowed down long before it could succeed."""

    def caller(self, request: Request) -> Caller:
        """Who asks. 401 without a good token where one is needed, 403 from a foreign page, 429 above the pace."""
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        found: Caller | None = None
        if kind.lower() == "bearer" and text:
            found = self.known(request, text.strip())
        elif cookie := request.cookies.get(COOKIE):
            found = self.known(request, cookie)
            self.own_page(request)
        elif self.required:
            raise HTTPException(
                401, "send a token: Authorization: Bearer pt_…", {"WWW-Authenticate": "Bearer"}
            )
        else:
            self._same_site(request)
            found = LOCAL
        if wait := self.pace.wait_s(f"{_address(request)} {found.name}"):
            raise _too_fast(wait)
        request.state.caller = found
        return found

    def known(self, request: Request, text: str) -> Caller:
        """Whose token it is. 401 where it is nobody's, 429 to an address that has tried too many."""
        try:
            found = LOCAL if self.admin(text) else self.tokens.caller(text)
        except InputError as error:
            # Where the file lies, and what is wrong with it, is the owner's affair.
            log.error("%s", error)
            raise HTTPException(503, "no token can be looked up here now", {"Retry-After": "30"}) from error
        if found is None:
            if wait := self.failures.wait_s(_address(request)):
                raise _too_fast(wait)
            raise HTTPException(401, "this token is not known", {"WWW-Authenticate": "Bearer"})
        return found

    def _same_site(self, request: Request) -> None:
        """Without tokens, the browser of whoever sits at this machine must not be lent to a foreign page."""
        host = _hostname(request.headers.get("host", ""))
        known = host in self.hosts if self.hosts is not None else _is_loopback(host)
        if not known:
            raise HTTPException(403, "without tokens this service answers to its loopback name alone")
        self.own_page(request)

    def own_page(self, request: Request) -> None:
        """What a browser sends on its own account (a cookie, a form) counts from our own pages alone: else 403."""
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        foreign = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if foreign or (origin is not None and _hostname(urlsplit(origin).netloc) != _hostname(host)):
            raise HTTPException(403, "a page of another site may not call this service")


def _address(request: Request) -> str:
    return request.client.host if request.client else "local"


def _too_fast(wait_s: float) -> HTTPException:
    return HTTPException(429, "too many requests: slow down", {"Retry-After": str(int(wait_s) + 1)})


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _told(request: Request, error: StarletteHTTPException) -> str:
    """What was wrong, where the router itself refused: it says no more than a status does."""
    path = request.url.path[:80]
    if error.status_code == 404 and error.detail == "Not Found":
        near = nearest(path, [page for page, *_ in _frame.NAVIGATION if page != "/"], count=1)
        return f"there is nothing at {path!r}: " + (
            f"did you mean {near[0]}?" if near else "see /openapi.json, or /"
        )
    if error.status_code == 405 and error.detail == "Method Not Allowed":
        return f"{path!r} takes no {request.method}: see /openapi.json"
    return str(error.detail)


async def _guarded(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
    answer = await go_on(request)
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers.setdefault("Cache-Control", "no-store")
    return answer


def _errors(app: FastAPI) -> None:
    """Every error is one line, with nothing unescaped: JSON with `detail`, or a page to who looks with a browser."""

    def plain(request: Request, status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
        looking = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1/")
        if looking and status == 401 and request.method == "GET":
            address = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"/login?{urlencode({'to': address})}", 303)
        if looking:
            return _frame.page(
                request, "error.html", title="This cannot be shown", status=status, text=text[:1000]
            )
        return JSONResponse({"detail": text[:1000]}, status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def _refused(request: Request, error: StarletteHTTPException) -> Response:
        return plain(request, error.status_code, _told(request, error), error.headers)

    # Which disk it is, and why, is the owner's affair: doctor tells.
    @app.exception_handler(JournalFullError)
    async def _full(request: Request, __: JournalFullError) -> Response:
        return plain(
            request,
            503,
            "the disk is full here and nothing was kept: send it again later",
            {"Retry-After": "30"},
        )

    @app.exception_handler(JournalBrokenError)
    async def _broken(request: Request, __: JournalBrokenError) -> Response:
        return plain(
            request,
            503,
            "the disk failed here and nothing was kept: send it again later",
            {"Retry-After": "60"},
        )

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, __: Exception) -> Response:
        return plain(request, 500, "this went wrong here, not at your end: the log has more")

    @app.exception_handler(InputError)
    async def _input(request: Request, error: InputError) -> Response:
        return plain(request, 400, str(error))

    @app.exception_handler(PerTokenError)
    async def _other(request: Request, error: PerTokenError) -> Response:
        return plain(request, 409, str(error))

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return plain(request, 422, f"{place}: {first['msg']}")
