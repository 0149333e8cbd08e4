"""Writers that the crash test kills: each appends batches, and says on a pipe which are acknowledged.

Reads ``folder run pipe`` lines; forks a writer for each, so that fifty start in the time of one, and prints
its pid.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from pertoken.errors import InputError
from pertoken.meter import Journal, open_journal, records

ROWS = 40


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        folder, run, pipe = line.split()
        pid = os.fork()
        if not pid:
            write_until_killed(folder, run, pipe)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def opened(folder: str) -> Journal:
    for _ in range(100):
        try:
            return open_journal(folder, segment_bytes=60_000, window_rows=2_000)
        except InputError:
            time.sleep(0.05)  # the kernel is still taking the killed writer's lock away
    raise SystemExit("the journal stays locked")


def write_until_killed(folder: str, run: str, pipe: str) -> None:
    out = os.open(pipe, os.O_WRONLY)
    journal = opened(folder)
    speaking = threading.Lock()

    def write(thread: int) -> None:
        for number in range(10_000):
            name = f"{run}-{thread}-{number}"
            rows = records(
                {
                    "ts": [1_700_000_000.0 + number] * ROWS,
                    "source": f"usage/{thread}",
                    "key": [f"{name}-{i}" for i in range(ROWS)],
                    "meter": "requests",
                    "quantity": [1.0] * ROWS,
                },
                ROWS,
            )
            again = journal.append(rows, marks={f"{run}-{thread}": str(number).encode()})
            if number % 3 == 0:
                again = journal.append(rows)  # a sender that did not hear us sends again
                assert again.rows == 0
            with speaking:
                os.write(out, f"{name}\n".encode())

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
