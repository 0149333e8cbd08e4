"""Runs of `compare` and `plan` asked for in a browser: one at a time in a process of its own, a short line behind it.

A run's address is the SHA-256 of what is asked, so that the same question is answered once. What is asked is kept in
``runs`` of the data folder; results live as long as the service, the newest only, and are made again when asked for.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pertoken.errors import InputError, PerTokenError
from pertoken.report._page import write_whole
from pertoken.report.job import PAGE, Job, job_named

State = Literal["waiting", "running", "done", "stopped", "failed"]
_STEPS = 2_000
_LINE_BYTES = 1 << 16
log = logging.getLogger("pertoken.serve")


@dataclass(frozen=True)
class Bounds:
    """What runs may take."""

    waiting: int = 4
    """Runs in line behind the one that is running; who comes then is asked to come back."""
    kept: int = 20
    """Results kept, the newest."""
    asked: int = 500
    """Questions kept on the disk, the newest."""
    wall_s: float = 300.0
    """Then a run is stopped; a plan keeps the best it has."""
    memory_bytes: int = 4 << 30


class BusyError(PerTokenError):
    """No room for another run now."""


@dataclass
class Run:
    """A run and how it fares."""

    id: str
    job: Job
    owner: str
    folder: Path
    files: Mapping[str, Path]
    state: State = "waiting"
    steps: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    """Why there is no result, or why it is not whole."""
    refused: bool = False
    """Whether the worker itself said that there is none."""
    causes: list[dict[str, Any]] = field(default_factory=list)
    """Of a plan that cannot be: what would free it."""
    kept: str = ""
    """The book its plan was kept as."""
    asked_s: float = field(default_factory=time.time)
    began_s: float | None = None
    ended_s: float | None = None

    @property
    def name(self) -> str:
        """What its scenario is called."""
        found = re.search(r"^name: *(.+)$", self.job.scenario, re.MULTILINE)
        return found[1].strip(" '\"")[:64] if found else "without a name"

    @property
    def asked(self) -> str:
        """When it was asked for (UTC)."""
        return datetime.fromtimestamp(self.asked_s, UTC).strftime("%Y-%m-%d %H:%M")

    @property
    def ways_out(self) -> list[tuple[str, str, str, str, str]]:
        """Of a plan that cannot be: limit, whose it is, what is missing, its unit, and what would free it."""
        return [
            (c["constraint"], c["entity"], f"{c['missing']:,.4g}", c["unit"], c["remedy"])
            for c in self.causes
        ]

    @property
    def over(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ("done", "stopped", "failed")

    @property
    def has_page(self) -> bool:
        """Whether there is something to look at."""
        return (self.folder / PAGE).is_file()


class Runs:
    """The line of runs of one data folder. Its thread starts with the first run; `stop` ends all at once."""

    def __init__(self, folder: Path, bounds: Bounds | None = None) -> None:
        self._asked, self._results = folder / "runs", folder / "runs" / "results"
        self.bounds = bounds or Bounds()
        self._runs: dict[str, Run] = {}
        self._line: deque[Run] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._now: Run | None = None
        self._over = False

    def keep(self, job: Job, fields: Mapping[str, str] | None = None) -> str:
        """Keep what is asked, with the form's fields it was written from, under its address."""
        self._asked.mkdir(parents=True, exist_ok=True)
        record = {"job": job.model_dump(mode="json"), "fields": dict(fields) if fields else None}
        write_whole(self._asked / f"{job.id}.json", json.dumps(record, indent=1, ensure_ascii=False))
        known = sorted(self._asked.glob("*.json"), key=lambda p: p.stat().st_mtime)
        for old in known[: -self.bounds.asked]:
            old.unlink(missing_ok=True)
        return job.id

    def asked(self, identity: str) -> tuple[Job, dict[str, str] | None] | None:
        """What was asked under an address, and the fields it was written from; None where it is not known."""
        if len(identity) != 64 or not set(identity) <= set("0123456789abcdef"):
            return None
        try:
            record = json.loads((self._asked / f"{identity}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError("what is kept under this address is no run") from error
        return job_named(json.dumps(record["job"]), identity), record["fields"]

    def start(self, job: Job, owner: str, files: Mapping[str, Path]) -> Run:
        """The run of a job: the one that waits, runs or is done, else a new one. Raises BusyError."""
        with self._changed:
            known = self._runs.get(job.id)
            if known is not None and known.state in ("waiting", "running", "done"):
                return known
            if self._over or len(self._line) >= self.bounds.waiting:
                raise BusyError(f"busy: {len(self._line)} runs wait already, come back in a minute")
            run = Run(job.id, job, owner, self._results / job.id, dict(files))
            self._runs.pop(job.id, None)
            self._runs[job.id] = run
            self._line.append(run)
            if self._thread is None:
                # Results of an earlier service: nobody knows their runs any more.
                shutil.rmtree(self._results, ignore_errors=True)
                self._thread = threading.Thread(target=self._work, name="runs", daemon=True)
                self._thread.start()
            self._forget()
            self._changed.notify_all()
            return run

    def get(self, identity: str) -> Run | None:
        """A run of this session; None where there is none."""
        with self._changed:
            return self._runs.get(identity)

    def place(self, run: Run) -> int:
        """How many runs come before this one does."""
        with self._changed:
            return self._line.index(run) + (self._now is not None) if run in self._line else 0

    def newest(self, verb: str) -> list[Run]:
        """Runs of a verb in this session, newest first."""
        with self._changed:
            return [run for run in reversed(self._runs.values()) if run.job.verb == verb]

    def cancel(self, run: Run) -> None:
        """Stop a run: one that waits is forgotten, a plan keeps the best it has."""
        with self._changed:
            if run in self._line:
                self._line.remove(run)
                self._end(run, "stopped", "stopped before it began")
            elif self._now is run:
                run.problem = "stopped by hand"
                if self._process is not None:
                    self._ask_to_stop(self._process)

    def wait(self, run: Run, timeout_s: float) -> bool:
        """Whether the run is over, at the latest after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: run.over, timeout_s)

    def stop(self) -> None:
        """End everything, now."""
        with self._changed:
            self._over = True
            for run in self._line:
                self._end(run, "stopped", "the service stopped")
            self._line.clear()
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self._results, ignore_errors=True)

    # -- the one thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._over)
                if self._over:
                    return
                run = self._now = self._line.popleft()
                run.state, run.began_s = "running", time.time()
            try:
                state, problem = self._one(run)
            except Exception as error:
                # Whatever it is (no memory for a process, a full disk), the next run must find this thread alive.
                log.exception("a run failed")
                state, problem = "failed", f"this went wrong here: {type(error).__name__}"
            with self._changed:
                self._now = None
                self._end(run, state, problem)

    def _one(self, run: Run) -> tuple[State, str]:
        """Run it in a process; how it ended and what is to be said of it."""
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        with (run.folder / "stderr").open("wb") as errors:
            process = subprocess.Popen(
                # -P: nothing is imported from the folder the service happens to run in.
                [sys.executable, "-P", "-m", "pertoken.web._worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "PYTHONUNBUFFERED": "1",
                },
            )
        assert process.stdin is not None
        assert process.stdout is not None
        with self._changed:
            self._process = process
            if self._over or run.problem:
                process.kill()
        # Two clocks: the first asks it to stop and keep what it has, the second does not ask.
        clocks = [
            threading.Timer(self.bounds.wall_s, self._out_of_time, (run, process)),
            threading.Timer(self.bounds.wall_s + 30.0, process.kill),
        ]
        try:
            self._send(process, self._told(run))
            for clock in clocks:
                clock.daemon = True
                clock.start()
            while line := process.stdout.readline(_LINE_BYTES):
                self._take(run, line)
            code = process.wait()
        finally:
            for clock in clocks:
                clock.cancel()
            process.kill()
            process.wait()
            with self._changed:
                self._process = None
            process.stdin.close()
            process.stdout.close()
        return self._outcome(run, code)

    def _told(self, run: Run) -> bytes:
        told = {
            "job": run.job.model_dump(mode="json"),
            "files": {name: str(path) for name, path in run.files.items()},
            "folder": str(run.folder),
            "memory_bytes": self.bounds.memory_bytes,
            "cpu_s": int(self.bounds.wall_s * (os.cpu_count() or 1)) + 30,
        }
        return json.dumps(told).encode() + b"\n"

    def _take(self, run: Run, line: bytes) -> None:
        try:
            told = json.loads(line)
        except ValueError:
            return  # cut off where it was killed
        with self._changed:
            if "problem" in told:
                run.problem, run.causes, run.refused = told["problem"], told.get("causes", []), True
            elif len(run.steps) < _STEPS:
                run.steps.append(told)

    def _outcome(self, run: Run, code: int) -> tuple[State, str]:
        if self._over:
            return "stopped", "the service stopped"
        if code == 0:
            return ("stopped", run.problem) if run.problem else ("done", "")
        if run.has_page:
            return "stopped", run.problem or "ended early: it came to its limit of memory or time"
        if run.problem:
            return ("failed" if run.refused else "stopped"), run.problem
        log.warning("a run ended with code %d: %r", code, _tail(run.folder / "stderr"))
        if code < 0:
            return "failed", "it came to its limit of memory or time: ask for fewer days, pools or workloads"
        return "failed", "this went wrong here, not at your end: the service's log has more"

    def _out_of_time(self, run: Run, process: subprocess.Popen[bytes]) -> None:
        with self._changed:
            run.problem = f"stopped after {self.bounds.wall_s:g} s, as long as a run may take here"
            self._ask_to_stop(process)

    def _ask_to_stop(self, process: subprocess.Popen[bytes]) -> None:
        self._send(process, b"stop\n")

    def _send(self, process: subprocess.Popen[bytes], line: bytes) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return  # it has ended

    def _end(self, run: Run, state: State, problem: str) -> None:
        run.state, run.problem, run.ended_s = state, problem, time.time()
        self._changed.notify_all()

    def _forget(self) -> None:
        """The oldest results go, never a run that waits or runs."""
        over = [run for run in self._runs.values() if run.over]
        for run in over[: max(0, len(self._runs) - self.bounds.kept)]:
            del self._runs[run.id]
            shutil.rmtree(run.folder, ignore_errors=True)


def _tail(path: Path) -> str:
    try:
        return path.read_bytes()[-2000:].decode("utf-8", "replace")
    except OSError:
        return ""
