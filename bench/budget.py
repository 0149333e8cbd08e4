"""How long a gateway waits for `GET /v1/budget/TENANT`, measured here.

``python bench/budget.py``: a service of its own with 500 budgets of 250 tenants, tokens required, one connection kept
open; then while another client sends events. Beside it `/healthz`, which does nothing, in the same run.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TENANTS, ASKED = 250, 2_000
PACE_S = 1 / 400
"""Between two requests: the service takes 500 a second from one caller."""
FLEET = """
pools:
  api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}
budgets:
"""


def main() -> None:
    """Measure and print."""
    fleet = FLEET + "".join(
        f"  - {{name: usd-{n}, tenant: t{n}, usd: 1000, hard: true}}\n"
        f"  - {{name: tok-{n}, tenant: t{n}, tokens: 1000000000, counts: output, period: day, hard: true}}\n"
        for n in range(TENANTS)
    )
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), fleet) as (port, token):
        for path in ("/healthz", "/v1/budget/t7?tokens=2000&usd=0.02&model=m"):
            measure(f"{path.partition('?')[0]}, nothing else going on", port, token, path)
        stop = threading.Event()
        sender = threading.Thread(target=send, args=(port, token, stop))
        sender.start()
        measure(
            "/v1/budget/t7, while 20,000 events a second come in", port, token, "/v1/budget/t7?tokens=2000"
        )
        stop.set()
        sender.join()


def measure(what: str, port: int, token: str, path: str) -> None:
    """Print percentiles of the time from sending to the whole answer [ms]."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Authorization": f"Bearer {token}"}
    times = []
    for number in range(ASKED + 100):
        began = time.perf_counter()
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        took = time.perf_counter() - began
        assert answer.status == 200, body
        if number >= 100:
            times.append(took * 1e3)
        time.sleep(max(0.0, PACE_S - took))
    cuts = statistics.quantiles(times, n=100)
    print(
        f"{what}: median {cuts[49]:.2f} ms, 90 % {cuts[89]:.2f} ms, 99 % {cuts[98]:.2f} ms, most {max(times):.1f} ms"
    )


def send(port: int, token: str, stop: threading.Event) -> None:
    """Ten batches of 2,000 events a second."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    number = 0
    while not stop.is_set():
        began = time.perf_counter()
        batch = [
            {"key": f"{number}-{n}", "pool": "api", "model": "m", "tenant": f"t{n % TENANTS}", "meter": "output_tokens",
             "quantity": 100}
            for n in range(2_000)
        ]  # fmt: skip
        connection.request("POST", "/v1/events", json.dumps(batch), headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        number += 1
        stop.wait(max(0.0, 0.1 - (time.perf_counter() - began)))


@contextmanager
def serving(folder: Path, fleet: str) -> Iterator[tuple[int, str]]:
    """A service that has read its budgets; its port and a token."""
    (folder / "fleet.yaml").write_text(fleet)
    data = folder / "data"
    pertoken = str(Path(sys.executable).with_name("pertoken"))
    command = [
        pertoken,
        "token",
        "add",
        "gateway",
        "--scope",
        "read",
        "--scope",
        "write",
        "--data",
        str(data),
    ]
    token = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [pertoken, "serve", "--fleet", str(folder / "fleet.yaml"), "--data", str(data), "--port", "0",
             "--require-tokens"], stdout=log, stderr=log,
        )  # fmt: skip
    try:
        note = data / "service.json"
        until = time.monotonic() + 120
        while not note.exists():
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.1)
        port = int(json.loads(note.read_bytes())["url"].rpartition(":")[2])
        while not ready(port, token):
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield port, token
    finally:
        process.terminate()
        process.wait(60)


def ready(port: int, token: str) -> bool:
    """Whether the budgets were read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/v1/budget/t7", headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    main()
