"""`GET /live`: the figures of the last minute as they change, sent to browsers as events.

One computation per tick for all who look, one message per filter for all who share it. A browser that is slow gets the
newest message and not the ones it missed; nobody looking, nothing is computed. Streams end at once when the service
is told to stop, since it waits for its connections.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import StreamingResponse

from pertoken.errors import PerTokenError
from pertoken.report._written import shown
from pertoken.report.now import TILES, Sums, Tile, Where, lately_sums, so_far_sums
from pertoken.web._doors import ServiceHere
from pertoken.web._question import Looking, Question
from pertoken.web.service import Service

router = APIRouter(include_in_schema=False)
TICK_S = 2.0
HEARTBEAT_S = 15.0
STREAM_S = 900.0
"""A stream ends after this long, and the browser asks again: a token that was removed sees nothing more by then."""
MOST_LISTENERS = 400
MOST_SCOPES = 64
_KEPT = 150
"""Messages of a filter that a browser is shown when it comes: five minutes of them."""
_RETRY_MS = 3000
log = logging.getLogger("pertoken.serve")

Scope = tuple[tuple[str, tuple[str, ...]], ...]
"""A filter that can be looked up: names by pool, model and tenant."""


@dataclass
class _Scoped:
    """Those who look through one filter."""

    where: Where
    queues: set[asyncio.Queue[bytes | None]] = field(default_factory=set)
    points: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    last: bytes = b""


class Live:
    """The streams of one application; lives in its event loop."""

    def __init__(self, service: Service, tick_s: float = TICK_S) -> None:
        self._service, self._tick_s = service, tick_s
        self._scopes: dict[Scope, _Scoped] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._over = False

    @property
    def listeners(self) -> int:
        """How many browsers look."""
        return sum(len(scoped.queues) for scoped in self._scopes.values())

    async def listen(self, where: Where) -> AsyncIterator[bytes]:
        """Messages of a filter until the browser goes or the service stops.

        Raises HTTPException (503) above the most listeners or filters at once.
        """
        key: Scope = tuple(sorted((name, tuple(sorted(values))) for name, values in where.items()))
        full = self.listeners >= MOST_LISTENERS or (
            key not in self._scopes and len(self._scopes) >= MOST_SCOPES
        )
        if full or self._over:
            raise HTTPException(503, "too many look already: come back in a minute", {"Retry-After": "60"})
        return self._messages(key, where)

    async def _messages(self, key: Scope, where: Where) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=2)
        scoped = self._scopes.setdefault(key, _Scoped(where))
        scoped.queues.add(queue)
        try:
            if not scoped.last:
                self._wake.set()
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._run())
            past = json.dumps(list(scoped.points))
            yield f"retry: {_RETRY_MS}\nevent: past\ndata: {past}\n\n".encode() + scoped.last
            until_s = asyncio.get_running_loop().time() + STREAM_S
            while not self._over and asyncio.get_running_loop().time() < until_s:
                try:
                    message = await asyncio.wait_for(queue.get(), HEARTBEAT_S)
                except TimeoutError:
                    message = b": still here\n\n"
                if message is None:
                    return
                yield message
        finally:
            scoped.queues.discard(queue)
            if not scoped.queues:
                self._scopes.pop(key, None)

    def end(self) -> None:
        """End all streams; from the event loop's thread."""
        self._over = True
        for scoped in self._scopes.values():
            for queue in scoped.queues:
                _put(queue, None)
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        """A tick after the other while somebody looks."""
        loop = asyncio.get_running_loop()
        try:
            while self._scopes:
                begun_s = loop.time()
                self._wake.clear()
                scopes = dict(self._scopes)
                try:
                    found = await asyncio.to_thread(snapshots, self._service, scopes)
                except PerTokenError as error:
                    found = {key: {"problem": str(error)} for key in scopes}
                except Exception as error:
                    # The next tick may well succeed: the stream says that this one did not.
                    log.exception("the live figures failed")
                    found = {
                        key: {"problem": f"this went wrong here ({type(error).__name__}): the log has more"}
                        for key in scopes
                    }
                for key, message in found.items():
                    self._tell(scopes[key], message)
                with suppress(TimeoutError):
                    await asyncio.wait_for(
                        self._wake.wait(), max(0.1, self._tick_s - (loop.time() - begun_s))
                    )
        finally:
            self._task = None

    @staticmethod
    def _tell(scoped: _Scoped, message: dict[str, Any]) -> None:
        if "point" in message:
            scoped.points.append(message["point"])
        scoped.last = f"event: now\ndata: {json.dumps(message)}\n\n".encode()
        for queue in list(scoped.queues):
            _put(queue, scoped.last)


def _put(queue: asyncio.Queue[bytes | None], message: bytes | None) -> None:
    """The newest message, in place of the oldest where a browser has not fetched it."""
    if queue.full():
        with suppress(asyncio.QueueEmpty):
            queue.get_nowait()
    queue.put_nowait(message)


def snapshots(service: Service, scopes: dict[Scope, _Scoped]) -> dict[Scope, dict[str, Any]]:
    """What each filter is told now: of one look at the last minute and one at the hour so far."""
    now = service.now()
    lately = service.books.lately(now)
    so_far = service.books.so_far(now)
    elapsed_s = (so_far.until - so_far.hour).total_seconds()
    found: dict[Scope, dict[str, Any]] = {}
    for key, scoped in scopes.items():
        last = lately_sums(lately, scoped.where)
        hour = so_far_sums(so_far.ledger, scoped.where, so_far.hour, elapsed_s, bool(so_far.unpriced))
        tiles = tiles_of(scoped.where)
        found[key] = {
            "now": _figures(last, tiles),
            "hour": _figures(hour, tiles),
            # A filter is quiet where nothing of it was counted; all is, where no source said a word.
            "quiet": not (last.told if scoped.where else lately.heard),
            "since": f"{so_far.hour:%H:%M}",
            "problem": _no_price(lately.unpriced or so_far.unpriced, "tenant" in scoped.where),
            "point": {"at": round(now.timestamp()), **{tile.name: last.value(tile) for tile in tiles}},
        }
    return found


def tiles_of(where: Where) -> list[Tile]:
    """The figures of a filter: one of a tenant has none of what nobody used."""
    return [tile for tile in TILES if not (tile.of_pools and "tenant" in where)]


def _figures(sums: Sums, tiles: list[Tile]) -> dict[str, str]:
    return {tile.name: shown(sums.value(tile)) for tile in tiles}


def _no_price(unpriced: str, own: bool) -> str:
    if not unpriced:
        return ""
    # What is missing may be another's: a tenant is told that its costs wait, not why.
    return "some of this hour's usage has no price yet, so its cost is not shown" + (
        "" if own else f": {unpriced}"
    )


def scope_of(question: Question) -> Where:
    """What of a question narrows live figures."""
    return {k: v for k, v in question.where.items() if k in ("pool", "model", "tenant")}


def live_of(request: Request, service: Service) -> Live:
    """The application's streams, made for the first who looks."""
    state = request.app.state
    found: Live | None = getattr(state, "live", None)
    if found is None:
        found = state.live = Live(service)
        _end_on_signal(found)
    return found


def _end_on_signal(live: Live) -> None:
    """The server waits for its connections before it stops: streams must not keep it waiting.

    Whoever handled the signals before (uvicorn) handles them after.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        if callable(before):  # else the signal ends the process by itself, or is ignored: it shall stay so

            def leave(got: int, frame: FrameType | None, before: Any = before) -> None:
                loop.call_soon_threadsafe(live.end)
                before(got, frame)

            signal.signal(number, leave)


@router.get("/live")
async def live(request: Request, service: ServiceHere, question: Looking) -> StreamingResponse:
    """Live figures as server-sent events: ``past`` once, then ``now`` as they change."""
    messages = await live_of(request, service).listen(scope_of(question))
    return StreamingResponse(
        messages,
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )
