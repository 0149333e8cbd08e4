"""A disk that is full under the ledger: nothing is half written, reading goes on, and room heals it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_RUN = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
from pertoken.ledger import LedgerBrokenError, open_ledger
from tests.ledger.test_ledger import book_of, costs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1]) / "ledger.duckdb"
ledger = open_ledger(path)
ledger.put_book("plan:shop", *book_of(1.0))
written = sum(file.stat().st_size for file in path.parent.iterdir())
many = np.arange("2000-01-01T00", "2036-01-01T00", dtype="datetime64[h]")
told = []
resource.setrlimit(resource.RLIMIT_FSIZE, (written + 20_000, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        ledger.put_book("plan:shop", *book_of(2.0, many))
    except LedgerBrokenError as error:
        told.append(str(error))
before = costs(ledger)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.put_book("plan:shop", *book_of(3.0))
after = costs(ledger)
ledger.shut()
again = open_ledger(path)
print(json.dumps([told, *({b: str(usd) for b, usd in c.items()} for c in (before, after, costs(again)))]))
"""


def test_nothing_is_half_written_and_room_heals_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told, before, after, again = json.loads(done.stdout)
    assert len(told) == 2
    assert all(text.startswith("the ledger cannot be written: ") and "\n" not in text for text in told)
    assert before == {"plan:shop": "24.000000000"}
    assert after == again == {"plan:shop": "72.000000000"}
