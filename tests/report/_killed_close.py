"""Closes a folder's hours again and is killed at a statement of its ledger: what the test of kills runs.

Reads ``folder fleet statement`` lines; forks one process for each, and prints whether it was killed or had done.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pertoken.fleet import load_fleet
from pertoken.report.books import hours_in, open_books

START, END = datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 11, 26, tzinfo=UTC)


def main() -> None:
    for line in sys.stdin:
        folder, fleet, statement = line.split()
        pid = os.fork()
        if not pid:
            close_again(Path(folder), Path(fleet), int(statement))
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(
            "killed\n" if os.WIFSIGNALED(status) else f"done {os.waitstatus_to_exitcode(status)}\n"
        )
        sys.stdout.flush()


def close_again(folder: Path, fleet: Path, statement: int) -> None:
    """Never returns: it is killed before that statement, or exits."""
    books = open_books(load_fleet(fleet), folder)
    engine: Any = books.ledger._engine
    left = statement

    def counted(run: Any) -> Any:
        def instead(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return run(*arguments)

        return instead

    engine.execute, engine.load = counted(engine.execute), counted(engine.load)
    books.close(hours_in(START, END))
    books.shut()
    os._exit(0)


if __name__ == "__main__":
    main()
