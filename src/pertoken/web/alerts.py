"""Who is told of budgets: what has crossed, what was sent and what waits, kept in the data folder.

What happened is on the disk before it is sent, so that a restart neither forgets it nor tells it anew; where the
process dies between sending and noting it, it is sent twice under the same id. Each channel has a thread of its own:
one that does not answer keeps no other waiting, and none of them ever keeps the books waiting.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from pertoken.errors import InputError
from pertoken.fleet import Alertmanager, Alerts, Email, Webhook
from pertoken.report._crossings import Event, crossings
from pertoken.report._written import counted
from pertoken.report.budgets import Standing
from pertoken.web._send import send_alertmanager, send_email, send_webhook

FILE = "budget-alerts.json"
GIVE_UP = timedelta(hours=24)
"""An event that no try could deliver for so long is dropped, and `doctor` says so."""
LONGEST_WAIT_S = 300.0
_FIRST_WAIT_S = 1.0
_PATIENCE_S = 12.0
_HISTORY = 500
_MOST_WAITING = 1_000

Channel = Webhook | Alertmanager | Email
log = logging.getLogger("pertoken.serve")


class Kept(msgspec.Struct):
    """What survives a restart."""

    firing: dict[str, Event] = {}
    history: list[Event] = []
    """Newest last."""
    waiting: dict[str, list[Event]] = {}
    """By channel, what it was not yet sent; oldest first."""


class Alarm:
    """Watches standings for crossings and tells its channels. Start it once, stop it once."""

    def __init__(self, alerts: Alerts, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = folder / FILE, clock
        self._lock = threading.Lock()
        self._kept = Kept()
        self._opened = False
        self._writing = ""
        """Why the state cannot be kept; empty: it can."""
        self._lost: dict[str, int] = {}
        """By channel, events given up since the start."""
        self._workers = [_Worker(self, channel) for channel in alerts.channels]

    def start(self) -> None:
        """Take up what the last run left, and begin to send."""
        self._open()
        for worker in self._workers:
            worker.start()

    def stop(self) -> None:
        """Stop sending; what waits stays on the disk. A message under way is waited for, but not for long."""
        for worker in self._workers:
            worker.stopped.set()
            worker.wake.set()
        for worker in self._workers:
            worker.join(_PATIENCE_S)

    def look(self, standings: Sequence[Standing], now: datetime) -> list[Event]:
        """Note what has crossed or recovered since the last look, and have it sent; the events."""
        self._open()
        with self._lock:
            firing, events = crossings(self._kept.firing, standings, now)
            if not events:
                return []
            self._kept.firing = firing
            self._kept.history = [*self._kept.history, *events][-_HISTORY:]
            for worker in self._workers:
                mine = [e for e in events if worker.wants(e)]
                waiting = [*self._kept.waiting.get(worker.channel.name, []), *mine]
                self._kept.waiting[worker.channel.name] = waiting[-_MOST_WAITING:]
            self._keep()
        for event in events:
            log.info("%s", event.text)
        for worker in self._workers:
            worker.wake.set()
        return events

    def history(self) -> list[Event]:
        """What happened, newest first."""
        self._open()
        with self._lock:
            return self._kept.history[::-1]

    def firing(self) -> list[Event]:
        """What fires now, oldest first."""
        self._open()
        with self._lock:
            return sorted(self._kept.firing.values(), key=lambda e: (e.since, e.key))

    def problems(self) -> dict[str, str]:
        """By channel, why it was not told; and why the state cannot be kept."""
        with self._lock:
            lost = dict(self._lost)
        found = {w.channel.name: w.problem for w in self._workers if w.problem}
        for name, count in lost.items():
            tail = f"; {found[name]}" if name in found else ""
            found[name] = f"{counted(count, 'alert')} given up after {GIVE_UP // timedelta(hours=1)} h{tail}"
        return found | ({"state": self._writing} if self._writing else {})

    def failing(self) -> dict[str, bool]:
        """By channel, whether its newest try failed."""
        return {worker.channel.name: bool(worker.problem) for worker in self._workers}

    # -- for the workers

    def now(self) -> datetime:
        """The time by the service's clock."""
        return datetime.fromtimestamp(self._clock(), UTC)

    def waiting(self, channel: str) -> list[Event]:
        """What a channel was not yet sent; too old ones are given up."""
        oldest = self.now() - GIVE_UP
        with self._lock:
            all_of_it = self._kept.waiting.get(channel, [])
            kept = [event for event in all_of_it if event.at >= oldest]
            if len(kept) < len(all_of_it):
                self._lost[channel] = self._lost.get(channel, 0) + len(all_of_it) - len(kept)
                self._kept.waiting[channel] = kept
                self._keep()
            return list(kept)

    def sent(self, channel: str, events: Sequence[Event]) -> None:
        """Note what a channel has been told."""
        gone = {event.id for event in events}
        with self._lock:
            waiting = self._kept.waiting.get(channel, [])
            self._kept.waiting[channel] = [event for event in waiting if event.id not in gone]
            self._keep()

    # -- the file

    def _open(self) -> None:
        with self._lock:
            if self._opened:
                return
            self._opened = True
            try:
                self._kept = msgspec.json.decode(self._path.read_bytes(), type=Kept)
            except FileNotFoundError:
                return
            except (OSError, msgspec.MsgspecError) as error:
                # Alerts must not keep a service from starting: begin anew, and say so.
                self._writing = f"{FILE} could not be read and was begun anew: {type(error).__name__}"
                log.warning("%s", self._writing)
                return
            names = {worker.channel.name for worker in self._workers}
            self._kept.waiting = {k: v for k, v in self._kept.waiting.items() if k in names}

    def _keep(self) -> None:
        """Write the state so that a crash leaves the old one or the new one. The lock is held."""
        temporary = self._path.with_suffix(".part")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(msgspec.json.encode(self._kept))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self._writing = f"{FILE} cannot be written: {error.strerror}"
            log.warning("%s", self._writing)
            return
        self._writing = ""


class _Worker(threading.Thread):
    """Tells one channel, in order, again and again until it has heard."""

    def __init__(self, alarm: Alarm, channel: Channel) -> None:
        super().__init__(name=f"alerts-{channel.name}", daemon=True)
        self.channel, self.problem = channel, ""
        self.wake, self.stopped = threading.Event(), threading.Event()
        self._alarm = alarm
        self._tries = 0

    def wants(self, event: Event) -> bool:
        """Whether the channel is told of this budget."""
        return not self.channel.budgets or event.budget in self.channel.budgets

    def run(self) -> None:
        """Send what waits; an Alertmanager also hears again what lasts."""
        pause_s: float | None = 0.0
        while not self.stopped.is_set():
            if pause_s != 0.0:
                self.wake.wait(pause_s)
            if self.stopped.is_set():
                return
            self.wake.clear()
            try:
                self._tell()
            except InputError as error:
                self._failed(str(error))
            except Exception as error:
                # Whatever it is, the next try must find this thread alive; its text may hold what is secret.
                self._failed(f"{type(error).__name__}")
            else:
                self.problem, self._tries = "", 0
            pause_s = self._pause_s()
            if self.problem:
                self.stopped.wait(pause_s)
                pause_s = 0.0

    def _failed(self, why: str) -> None:
        self._tries += 1
        if why != self.problem:
            log.warning("alert channel %s: %s", self.channel.name, why)
        self.problem = why

    def _pause_s(self) -> float | None:
        if self.problem:
            return min(_FIRST_WAIT_S * float(1 << min(self._tries - 1, 16)), LONGEST_WAIT_S)
        return self.channel.resend_s if isinstance(self.channel, Alertmanager) else None

    def _tell(self) -> None:
        channel, alarm = self.channel, self._alarm
        waiting = alarm.waiting(channel.name)
        if isinstance(channel, Alertmanager):
            firing = [event for event in alarm.firing() if self.wants(event)]
            still = {event.key for event in firing}
            resolved = [e for e in waiting if e.state == "resolved" and e.key not in still]
            if firing or resolved:
                send_alertmanager(channel, firing, resolved, alarm.now())
            if waiting:
                alarm.sent(channel.name, waiting)
        elif isinstance(channel, Email):
            if waiting:
                send_email(channel, waiting, alarm.now())
                alarm.sent(channel.name, waiting)
        else:
            for event in waiting:
                if self.stopped.is_set():
                    return
                send_webhook(channel, event, alarm.now())
                alarm.sent(channel.name, [event])
