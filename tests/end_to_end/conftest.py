"""Real parts for the end-to-end tests: the service as users start it, and programs beside it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(what: str, check: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Return once `check` holds; fail saying what was waited for."""
    until = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.1)


@dataclass
class Service:
    """A `pertoken serve` of our own."""

    fleet: Path
    data: Path
    log: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    here: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Start it and wait until it is ready."""
        note = self.data / "service.json"
        note.unlink(missing_ok=True)
        command = [
            str(Path(sys.executable).with_name("pertoken")), "serve", "--fleet", str(self.fleet),
            "--data", str(self.data), "--port", str(self.port), *self.options,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "NO_COLOR": "1", **self.environment}
            )

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            if not note.exists():
                return False
            self.here = json.loads(note.read_bytes())
            try:
                return self.ask("GET", "/readyz")[0] == 200
            except OSError:
                return False

        wait_until("the service is ready", ready, 60)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(30)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        url = urlsplit(self.here["url"])
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
        try:
            given = {"Content-Type": "application/json", **(headers or {})}
            content = body if isinstance(body, bytes | None) else json.dumps(body)
            connection.request(method, path, content, given)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def get(self, path: str, **query: str) -> Any:
        """JSON of a good answer."""
        status, found = self.ask("GET", f"{path}?{urlencode(query)}" if query else path)
        assert status == 200, found
        return found


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Makes services; whatever still runs at the end is ended."""
    made: list[Service] = []

    def make(fleet: str, name: str = "data", *options: str) -> Service:
        path = tmp_path / f"{name}.yaml"
        path.write_text(fleet)
        made.append(Service(path, tmp_path / name, tmp_path / f"{name}.log", options))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.stop(signal.SIGKILL)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts programs, their output in a file; whatever still runs at the end is ended."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / f"program{len(started)}.log", "wb") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
