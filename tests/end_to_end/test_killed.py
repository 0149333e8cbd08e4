"""Killed at random under load: what was acknowledged is there once, and the ledger closes to the same cents."""

from __future__ import annotations

import http.client
import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from tests.end_to_end.conftest import Service

KILLS = int(os.environ.get("PERTOKEN_KILLS", "5"))
"""The journal alone is killed fifty times in `tests/meter`; with PERTOKEN_KILLS=50 the whole service is."""
USD_PER_TOKEN = {"input_tokens": Decimal("0.000003"), "output_tokens": Decimal("0.000015")}
FLEET = """
pools:
  api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}
"""


class Sender(threading.Thread):
    """Sends batches one after the other; a batch is sent again, unchanged, until it is acknowledged."""

    def __init__(self, service: Service, name: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.service, self.sender = service, name
        self.random = random.Random(seed)
        self.acknowledged: list[dict[str, Any]] = []
        self.unanswered = 0
        self.stop = threading.Event()

    def run(self) -> None:
        batch: list[dict[str, Any]] = []
        number = 0
        while not self.stop.is_set() or batch:
            if not batch:
                batch = [self._event(number + i) for i in range(self.random.randint(1, 400))]
                number += len(batch)
            try:
                status, _ = self.service.ask("POST", "/v1/events", batch)
            except (OSError, http.client.HTTPException, ValueError):
                self.unanswered += 1
                time.sleep(0.05)
                continue
            if status == 200:
                self.acknowledged += batch
                batch = []

    def _event(self, number: int) -> dict[str, Any]:
        moment = datetime.now(UTC) - timedelta(minutes=self.random.choice([0, 0, 0, 90]))
        return {
            "key": f"{self.sender}-{number}",
            "ts": moment.timestamp(),
            "pool": "api",
            "model": self.random.choice(["large", "small"]),
            "tenant": self.sender,
            "meter": self.random.choice(list(USD_PER_TOKEN)),
            "quantity": self.random.randint(0, 5000),
        }


def test_nothing_acknowledged_is_lost_or_counted_twice(service: Callable[..., Service]) -> None:
    ours = service(FLEET)
    ours.start()
    first = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
    senders = [Sender(ours, f"tenant{n}", seed=n) for n in range(3)]
    for sender in senders:
        sender.start()
    moments = random.Random(11)
    for _ in range(KILLS):
        time.sleep(moments.uniform(0.2, 1.0))
        ours.stop(signal.SIGKILL)
        ours.start()
    time.sleep(0.3)
    for sender in senders:
        sender.stop.set()
    for sender in senders:
        sender.join(60)
        assert not sender.is_alive()
    assert sum(s.unanswered for s in senders) >= KILLS

    window = {
        "start": first.isoformat(),
        "end": (datetime.now(UTC) + timedelta(hours=1))
        .replace(minute=0, second=0, microsecond=0)
        .isoformat(),
    }
    expected: dict[tuple[str, str, str], Decimal] = defaultdict(Decimal)
    for sender in senders:
        for event in sender.acknowledged:
            expected[event["tenant"], event["model"], event["meter"]] += event["quantity"]
    assert sum(expected.values()) > 0
    for _ in range(2):  # and closing once more changes nothing
        status, closed = ours.ask("POST", "/v1/close", window)
        assert status == 200
        assert not closed["unpriced"]
        rows = ours.get("/v1/usage", by="tenant,model")["rows"]
        assert {(r["tenant"], r["model"], r["meter"]): Decimal(r["quantity"]) for r in rows} == expected
        (cost,) = ours.get("/v1/cost")["rows"]
        assert Decimal(cost["cost_usd"]) == sum(
            n * USD_PER_TOKEN[meter] for (*_, meter), n in expected.items()
        )

    # A delivery that comes again, whole, adds nothing.
    again = senders[0].acknowledged[-50:]
    status, taken = ours.ask("POST", "/v1/events", again)
    assert status == 200
    assert taken == {"records": 0, "duplicates": len(again)}
