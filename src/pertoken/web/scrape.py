"""The scrape loop: every target fetched at its interval, read, and journalled with its counters' state."""

from __future__ import annotations

import glob
import json
import logging
import re
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError

from pertoken import meter
from pertoken.errors import InputError, PerTokenError
from pertoken.fleet import FileTargets, ScrapeTarget, Sources, WrittenInstance
from pertoken.meter import State, Target, prometheus
from pertoken.report.books import SCRAPED
from pertoken.web._fetch import fetch

log = logging.getLogger("pertoken.serve")
_WORKERS = 8
_LOOK_S = 5.0
"""How often file_sd files are looked at."""
_TIMEOUT_S = 10.0
_STARTED = re.compile(rb"^process_start_time_seconds(?:\{[^}]*\})?[ \t]+([0-9.eE+]+)", re.MULTILINE)
_TICK_S = 1.0
"""What a process' start may differ by from page to page."""
_ALONE_S, _ALONE_SCRAPES = 300.0, 20
"""For how long, and how many scrapes, nobody else has answered where a process has its address to itself."""


@dataclass
class Watched:
    """A target with what became of its last scrape. Times are POSIX seconds; 0: never."""

    target: Target
    interval_s: float
    authorization_file: Path | None = None
    state: State = field(default_factory=lambda: State(0.0))
    good_s: float = 0.0
    tried_s: float = 0.0
    error: str = ""
    busy: bool = False
    due_s: float = 0.0
    """By the monotonic clock."""
    answered: dict[float, float] = field(default_factory=dict)
    """When each process last answered, by its start: more than one means that they share the address."""
    process_s: float = 0.0
    """Start of the process whose counters `state` holds; 0: that of `state` itself."""


class Scraper:
    """Fetches the targets of a fleet file into a journal until it is stopped."""

    def __init__(
        self, sources: Sources, folder: Path, journal: meter.Journal, clock: Callable[[], float] = time.time
    ) -> None:
        self._sources, self._folder, self._journal, self._clock = sources, folder, journal, clock
        self._lock = threading.Lock()
        self._watched: dict[str, Watched] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(_WORKERS, "scrape")
        self._read: dict[tuple[int, str], list[Watched]] = {}
        """Targets by file_sd file, as they were when it could last be read."""
        self.problem = ""
        """Why the newest look at file_sd files failed."""

    def start(self) -> None:
        """Begin to scrape in threads of its own."""
        self.look()
        self._thread = threading.Thread(target=self._run, name="scrape", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop, once the scrapes under way are journalled."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def watched(self) -> list[Watched]:
        """All targets, by name."""
        with self._lock:
            return [self._watched[name] for name in sorted(self._watched)]

    def look(self) -> None:
        """Take up targets that are new in the file_sd files, let go of those that are gone."""
        found = {w.target.name: w for w in self._listed()}
        marks = self._journal.marks
        with self._lock:
            for name, new in found.items():
                old = self._watched.get(name)
                if old is not None and (old.target, old.interval_s) == (new.target, new.interval_s):
                    continue
                if old is not None:
                    old.target, old.interval_s = new.target, new.interval_s
                    continue
                mark = marks.get(SCRAPED + name)
                new.state = State.from_bytes(mark) if mark else State(self._clock())
                new.good_s = new.state.last_s
                # Spread over the interval by name, so that a hundred targets are not fetched at once.
                spread = zlib.crc32(name.encode()) % 1000 / 1000 if len(found) > _WORKERS else 0.0
                new.due_s = time.monotonic() + spread * new.interval_s
                self._watched[name] = new
            for name in set(self._watched) - set(found):
                del self._watched[name]

    def scrape(self, watched: Watched) -> None:
        """Fetch one target once; what went wrong stands in its `error`."""
        try:
            text, openmetrics = fetch(
                watched.target.url,
                timeout_s=min(_TIMEOUT_S, watched.interval_s),
                authorization_file=watched.authorization_file,
            )
            now_s = self._clock()
            _check_alone(watched, text, now_s)
            rows, state = prometheus.read(
                text, watched.target, watched.state, now_s=now_s, openmetrics=openmetrics
            )
            self._journal.append(rows, marks={SCRAPED + watched.target.name: state.to_bytes()})
            watched.state, watched.good_s, watched.error = state, now_s, ""
        except PerTokenError as error:
            watched.error = str(error)[:500]
        except Exception as error:
            # A page that breaks our reader is one silent target, told of, and not the end of its scraping.
            watched.error = f"{type(error).__name__}: {error}"[:500]
            log.exception("scrape of %r failed", watched.target.name)
        finally:
            watched.tried_s, watched.busy = self._clock(), False

    def _run(self) -> None:
        looked_s = time.monotonic()
        while not self._stop.is_set():
            now_s = time.monotonic()
            if self._sources.files and now_s - looked_s >= _LOOK_S:
                looked_s = now_s
                self.look()
            wait = 1.0
            for watched in self.watched():
                if watched.due_s <= now_s and not watched.busy:
                    watched.busy = True
                    # A slot that passed while the target was slow is left out, not caught up on.
                    missed = max(0.0, now_s - watched.due_s) // watched.interval_s
                    watched.due_s += (missed + 1) * watched.interval_s
                    self._pool.submit(self.scrape, watched)
                wait = min(wait, max(0.0, watched.due_s - now_s))
            self._stop.wait(max(wait, 0.01))

    def _listed(self) -> list[Watched]:
        """Targets of the fleet file and of file_sd files; a file that cannot be read keeps those it had."""
        problems: list[str] = []
        found = [_watched(target) for target in self._sources.scrape]
        kept, self._read = self._read, {}
        for number, group in enumerate(self._sources.files):
            paths = sorted(glob.glob(str(self._folder / group.files)))
            if not paths:
                problems.append(f"no file is called {group.files}")
            for path in paths:
                try:
                    targets = _from_file(Path(path), group)
                except (OSError, ValueError, InputError) as error:
                    problems.append(f"{path}: {_one_line(error)}")
                    targets = kept.get((number, path), [])
                self._read[number, path] = targets
                found += targets
        by_name: dict[str, Watched] = {}
        twice = [one.target.name for one in found if by_name.setdefault(one.target.name, one) is not one]
        problems += [f"{name!r} is given twice: the first is scraped" for name in twice]
        self.problem = "; ".join(problems)[:500]
        return list(by_name.values())


def _check_alone(watched: Watched, page: bytes, now_s: float) -> None:
    """Whether one process has the address to itself: a Service with several replicas answers from another one each
    time, and the difference of two processes' counters is nobody's tokens.

    A process that began after the last answer of the one before has taken its place: that is a restart. Where it ran
    already, its pages are left out until nobody else has answered for a while. Then it counts from its start, if it
    began while this address was watched, and else from now on: its past is not known to be nobody else's.
    Raises InputError.
    """
    starts = _STARTED.findall(page)
    if len(starts) != 1:
        return  # untold, or a page of many processes
    try:
        start_s = float(starts[0])
    except ValueError:
        return  # the reader says what is wrong with it
    alone_s = max(_ALONE_S, _ALONE_SCRAPES * watched.interval_s)
    others = {
        start: at
        for start, at in watched.answered.items()
        if abs(start - start_s) > _TICK_S and now_s - at <= alone_s and start_s <= at
    }
    watched.answered = {**others, start_s: now_s}
    if others:
        raise InputError(
            "two processes answer at this address in turn, so nothing of it is counted: give each replica an address "
            "of its own (docs/grafana.md, Kubernetes)"
        )
    before_s, first_s = watched.process_s or watched.state.start_s, watched.state.first_s
    if before_s and abs(start_s - before_s) > _TICK_S and start_s < max(before_s, first_s):
        watched.state = State(now_s)
    watched.process_s = start_s


def _watched(written: ScrapeTarget) -> Watched:
    target = target_of(written, written.called, written.url)
    return Watched(target, written.interval_s, written.authorization_file)


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}; found {str(first['input'])[:100]!r}"
    return str(error)


def _from_file(path: Path, group: FileTargets) -> list[Watched]:
    """Targets of a file_sd file, JSON or YAML: ``[{"targets": ["host:port"], "labels": {…}}]``."""
    entries = _yaml(path) if path.suffix in (".yml", ".yaml") else json.loads(path.read_bytes())
    if not isinstance(entries, list):
        raise InputError("a file_sd file is a list of groups")
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("targets"), list):
            raise InputError("a file_sd group has targets and labels")
        labels = entry.get("labels") or {}
        if not isinstance(labels, dict):
            raise InputError("labels of a file_sd group are names and values")
        for address in entry["targets"]:
            written = ScrapeTarget(
                url=f"{labels.get('__scheme__', 'http')}://{address}{labels.get('__metrics_path__', '/metrics')}",
                name=str(address),
                pool=str(labels.get("pool", group.pool)),
                model=str(labels.get("model", group.model)),
                tenant=str(labels.get("tenant", group.tenant)),
                gpus=labels.get("gpus", group.gpus),
                names=group.names,
                pools=group.pools,
                interval_s=group.interval_s,
            )
            if not written.pool and not written.pools:
                raise InputError(f"{address!r} says no pool: what it counts would be in no figure")
            found.append(_watched(written))
    return found


def _yaml(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise InputError(f"no YAML: {' '.join(str(error).split())}") from error


def target_of(written: ScrapeTarget | WrittenInstance, name: str, url: str = "") -> Target:
    """What the meter reads, from what the fleet file says of it."""
    return Target(
        name=name,
        pool=written.pool,
        url=url,
        model=written.model,
        tenant=written.tenant,
        gpus=written.gpus,
        names=written.names,
        pools=written.pools,
    )
