"""A run in a process of its own: bounded in memory and time, last in line for the CPU, gone when the service is.

It reads one line of JSON from its standard input (the job, the files it may name, the folder for its results, its
bounds), tells how it fares in lines of JSON on its standard output, and stops, keeping what it has, on another line.
When its input ends, whoever started it has gone, and so does it.
"""

from __future__ import annotations

import _thread
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATIENCE_S = 20.0
"""From being asked to stop to being gone."""


def main() -> int:
    """Do the job on standard input."""
    # What a library prints must not get between the lines we tell.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.readline())
    _bound(asked["memory_bytes"], asked["cpu_s"])
    lock = threading.Lock()

    def tell(what: Mapping[str, Any]) -> None:
        with lock:
            out.write(json.dumps(what) + "\n")
            out.flush()

    threading.Thread(target=_listen, daemon=True).start()
    return _run(asked, tell)


def _run(asked: Mapping[str, Any], tell: Any) -> int:
    """The exit code: 0 done, 1 there is no result and why was told, 2 stopped."""
    try:
        from pertoken.report.job import Job, run

        files = {name: Path(path) for name, path in asked["files"].items()}
        run(Job.model_validate(asked["job"]), files, Path(asked["folder"]), tell)
    except KeyboardInterrupt:
        tell({"step": "stopped"})
        return 2
    except Exception as error:
        from pertoken.errors import PerTokenError
        from pertoken.report.job import why

        # The ledger's engine has a name of its own for it.
        full = "OutOfMemory" in type(error).__name__
        if not full and not isinstance(error, PerTokenError | MemoryError):
            raise
        tell(why(MemoryError() if full else error))
        return 1
    return 0


def _bound(memory_bytes: int, cpu_s: int) -> None:
    """Limits that the system keeps, where it keeps any."""
    if sys.platform == "win32":
        return
    import resource

    os.nice(10)
    for kind, most in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(kind, (most, most))


def _listen() -> None:
    line = sys.stdin.readline()
    if line:
        _thread.interrupt_main()
        patience = threading.Timer(_PATIENCE_S, os._exit, (2,))
        patience.daemon = True
        patience.start()
        line = sys.stdin.readline()
    if not line:
        os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
