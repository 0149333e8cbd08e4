"""Keeps in memory how every budget stands, so that a gateway is answered at once; and raises the alarm."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from pertoken.errors import PerTokenError
from pertoken.report._scope import running_of
from pertoken.report.books import HOUR, Books
from pertoken.report.budgets import Ground, Standing, grounds, stand
from pertoken.web.alerts import Alarm

FRESH_S = 15.0
"""How often the hour so far is asked."""
_LATE = timedelta(minutes=15)

log = logging.getLogger("pertoken.serve")


@dataclass(frozen=True)
class Fit:
    """Whether a request fits into what is left of one budget."""

    standing: Standing
    fits: bool

    @property
    def left_fraction(self) -> Decimal:
        """What is left, over the amount."""
        return self.standing.remaining / self.standing.budget.amount


class Watch:
    """The budgets of a service. Start it once, stop it once; with no budget in the fleet it does nothing."""

    def __init__(
        self, books: Books, clock: Callable[[], float] = time.time, fresh_s: float = FRESH_S
    ) -> None:
        self.alarm = Alarm(books.fleet.alerts, books.folder, clock)
        self.problem = ""
        """Why the budgets could not be looked at the last time; empty: they could."""
        self._books, self._clock, self._fresh_s = books, clock, fresh_s
        self._standings: tuple[Standing, ...] | None = None if books.fleet.budgets else ()
        self._by_tenant: dict[str, list[Standing]] = {}
        """Those of a tenant and of all; under the empty name, those of all alone."""
        self._grounds: list[Ground] = []
        self._asked: datetime | None = None
        self._looking = threading.Lock()
        self._closed, self._wake, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch, and to send what the last run left."""
        if self._books.fleet.budgets or self._books.fleet.alerts.channels:
            self.alarm.start()
            self._thread = threading.Thread(target=self._run, name="budgets", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop; what waits to be sent stays on the disk."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self.alarm.stop()

    def closed(self) -> None:
        """Hours were closed: look again, soon and elsewhere."""
        self._closed.set()
        self._wake.set()

    @property
    def standings(self) -> tuple[Standing, ...] | None:
        """How the budgets stand, in the fleet's order; None until they were first looked at."""
        return self._standings

    def fits(
        self, tenant: str, model: str, pool: str, usd: Decimal, tokens: int, own: bool = False
    ) -> tuple[list[Fit], bool] | None:
        """By budget that a tenant's request falls under, whether it fits; and whether the hard ones allow it.

        A budget of models (pools) is asked where the request names one of them. Without an amount in its unit a budget
        says whether anything is left; so does one of more than the tenant where its `own` token asks, which
        could else find out the remainder by asking for ever closer amounts. None until the budgets were first
        looked at.
        """
        if self._standings is None:
            return None
        known, found = self._by_tenant, []
        for standing in known.get(tenant, known.get("", [])):
            budget = standing.budget
            if (budget.models and model not in budget.models) or (budget.pools and pool not in budget.pools):
                continue
            need = usd if budget.usd is not None else Decimal(tokens)
            if own and not budget.tenant:
                need = Decimal(0)
            found.append(Fit(standing, standing.remaining > 0 and need <= standing.remaining))
        return found, all(fit.fits for fit in found if fit.standing.budget.hard)

    def refresh(self) -> None:
        """Look now: closed hours where some were closed since, the hour so far, and what has crossed."""
        with self._looking:
            now = datetime.fromtimestamp(self._clock(), UTC)
            current = now.replace(minute=0, second=0, microsecond=0)
            until = self._books.closed_until
            if self._standings and until is not None and until < current and now - until - HOUR < _LATE:
                return  # the last hour is over and not yet closed: without it less would seem spent
            if self._stale(now, current):
                self._closed.clear()
                self._asked = None  # should this fail, it is asked again
                self._grounds = grounds(self._books, self._books.fleet, now)
                self._asked = current
            running = running_of(self._books.so_far(now, self._fresh_s)) if self._grounds else None
            found = tuple(stand(ground, now, running) for ground in self._grounds)
            names = {standing.budget.tenant for standing in found} | {""}
            self._by_tenant = {n: [s for s in found if s.budget.tenant in ("", n)] for n in names}
            self._standings = found
            self.alarm.look(self._standings, now)

    def _stale(self, now: datetime, current: datetime) -> bool:
        """Whether closed hours are to be asked anew: after a close, with each hour, and when a period is over."""
        if self._closed.is_set() or self._asked != current:
            return True
        return any(not g.period.start <= now < g.period.end for g in self._grounds)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self.refresh()
                self.problem = ""
            except PerTokenError as error:
                self.problem = str(error)
                log.warning("budgets could not be looked at: %r", str(error))
            except Exception as error:
                # Whatever it is, the next look must find this thread alive.
                self.problem = f"{type(error).__name__}: {error}"[:500]
                log.exception("budgets could not be looked at")
            self._wake.wait(self._fresh_s)
