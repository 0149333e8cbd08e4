"""The Python client against the real service behind a real socket."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

import pertoken
from pertoken import client as module
from pertoken.client import Client, quoted
from pertoken.errors import InputError, PerTokenError
from pertoken.fleet import load_fleet
from pertoken.ledger import Ledger
from pertoken.report.books import open_books
from pertoken.web._question import split_names
from pertoken.web.app import Limits, create_app
from pertoken.web.service import Service
from pertoken.web.tokens import Tokens
from tests.web.conftest import FLEET, Clock, serving
from tests.web.test_ingest import event

START, END = datetime(2026, 11, 24, 8, tzinfo=UTC), datetime(2026, 11, 24, 10, tzinfo=UTC)
PAGE = Path(__file__).parents[1] / "docs" / "client.md"
NAMES = ("a", "b", "", "a,b", '"', '"x"', "é/ü", "<b>&?=")


class Served:
    """A service of this test, its address and its parts."""

    def __init__(self, folder: Path) -> None:
        path = folder / "fleet.yaml"
        path.write_text(FLEET)
        self.service = Service(
            open_books(load_fleet(path), folder / "data"), folder, clock=Clock(), grace_s=3600.0
        )
        self.tokens = Tokens(folder / "data")
        limits = Limits(requests_per_s=1e6, burst=1e6)
        self.app = create_app(self.service, self.tokens, require_tokens=True, limits=limits)
        self.url = ""

    @property
    def ledger(self) -> Ledger:
        return self.service.books.ledger

    def client(self, scope: str = "admin", tenant: str = "") -> Client:
        return Client(self.url, self.tokens.add(f"{scope} {tenant}", (scope,), tenant=tenant))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    with TestClient(made.app) as running, serving(running) as made.url:
        yield made


def sent(client: Client) -> None:
    events = [
        event(f"{t} {h}", 1_000_000 + h, tenant=t, ts=START + timedelta(hours=h, minutes=1))
        for t in NAMES
        for h in (0, 1)
    ]
    assert client.send_events(events) == {"records": 2 * len(NAMES), "duplicates": 0}
    assert client.send_events(events) == {"records": 0, "duplicates": 2 * len(NAMES)}
    assert client.close(START, END)["hours"] == 2


@pytest.mark.parametrize("size", [3, 10_000])
def test_rows_are_the_ledgers_whatever_the_pages(
    served: Served, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAGE_ROWS", size)
    actual = {"book": "actual"}
    with served.client() as client:
        sent(client)
        cost = client.cost("hour", "tenant", "phase")
        assert (
            list(cost)
            == list(cost)
            == served.ledger.cost("hour", "tenant", "phase", where=actual).to_pylist()
        )
        assert cost.units == {"cost_usd": "USD"}
        usage = client.usage("tenant", start=START, end=END.isoformat())
        assert list(usage) == served.ledger.usage("tenant", "meter", where=actual).to_pylist()
        names = ("usd_per_mtok_output", "utilisation")
        metric = client.metric(*names, by=["tenant", "pool"])
        assert list(metric) == served.ledger.metric(*names, by=("tenant", "pool"), where=actual).to_pylist()
        table = cost.to_arrow()
        assert table.to_pylist() == list(cost)
        assert table.schema.field("hour").type == pa.timestamp("us", tz="UTC")
        assert metric.to_arrow().to_pylist() == list(metric)
        nothing = client.cost("pool", where={"book": "plan:none"})
        assert (list(nothing), nothing.to_arrow().num_rows) == ([], 0)


def test_any_name_can_be_asked_for(served: Served) -> None:
    with served.client() as client:
        sent(client)
        for name in NAMES:
            assert split_names([quoted(name)]) == [name]
            (row,) = client.cost("tenant", where={"tenant": name, "pool": "api"})
            assert row == {"tenant": name, "cost_usd": Decimal("30.000015")}
        both = client.cost("tenant", where={"tenant": NAMES[:4], "pool": ["api"], "phase": "output"})
        assert {row["tenant"] for row in both} == set(NAMES[:4])


def test_books_report_doctor_and_figures(served: Served) -> None:
    with served.client() as client:
        sent(client)
        assert client.books() == {"actual": (START, END)}
        usage = served.ledger.usage_rows({"pool": "api"})
        served.ledger.put_book(
            "plan:x", usage.set_column(0, "book", pa.array(["plan:x"] * len(usage))), served.ledger.rates()
        )
        told = client.report("actual", "plan:x", by=["pool"], start=START, end=END)
        assert told["total"]["actual_usd"] == format(next(iter(client.cost()))["cost_usd"], "f")
        assert client.doctor(48)["facts"]
        by = ["component"]
        assert {r["component"] for r in client.figure("cost_usd", by=by)["rows"]} >= {"api", "capital"}
        assert client.figure("cost_usd", "csv", by=by, start=START).startswith("component,cost_usd\r\n")
        query = client.figure("cost_usd", "sql")
        assert query.startswith("-- ")
        assert "\nSELECT " in query
        assert client.figure("cost_usd", "vl.json", where={"pool": "api"})["mark"]["type"] == "bar"
        assert client.figure("cost_usd", "png")[:4] == b"\x89PNG"


def test_budgets_are_asked(served: Served) -> None:
    with served.client() as client:
        sent(client)
        fits = client.budget("é/ü", tokens=100, usd=0.5, model="m")
        assert (fits["tenant"], fits["allowed"]) == ("é/ü", True)


def test_the_services_own_line_is_raised(served: Served) -> None:
    with served.client() as client:
        for wrong, line in (
            (lambda: client.metric("usd_per_mtok_outputs"), "did you mean usd_per_mtok_output"),
            (lambda: client.cost("rate"), "cannot group or filter by 'rate'"),
            (lambda: client.figure("nothing"), "there is no figure 'nothing'"),
            (lambda: client.report("actual", "plan:none"), "unknown book"),
            (lambda: client.close(END, START), "not after"),
            (lambda: client.send_events([{"key": ""}]), "key"),
            (lambda: client.doctor(0), "hours"),
            (lambda: client.ask("GET", "/v1/nothing"), "there is nothing at '/v1/nothing'"),
            (lambda: client.cost(start=datetime(2026, 11, 24)), "has no time zone"),  # noqa: DTZ001
            (lambda: client.send_events([{"key": "a", "quantity": object()}]), "cannot be sent"),
        ):
            with pytest.raises(InputError, match=re.escape(line)):
                wrong()
    with served.client("read", tenant="shop") as mine:
        with pytest.raises(InputError, match="a tenant's token may not"):
            mine.books()
        with pytest.raises(InputError, match="has no write scope"):
            mine.send_events([event("a")])
    for token, line in (("", "send a token"), ("pt_0_0", "is not known")):
        with Client(served.url, token) as stranger, pytest.raises(InputError, match=line):
            stranger.books()


def test_a_tenants_token_sees_its_rows(served: Served) -> None:
    with served.client() as boss:
        sent(boss)
    with served.client("read", tenant="b") as mine:
        assert {row["tenant"] for row in mine.cost("tenant", where={"tenant": "a"})} == {"b"}


def test_what_is_to_be_tried_again_says_when(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from pertoken.meter.journal import JournalFullError

    def full(*_: Any) -> None:
        raise JournalFullError("full")

    monkeypatch.setattr(served.service, "take_events", full)
    with (
        served.client() as client,
        pytest.raises(PerTokenError, match=r"disk is full.*\(again after 30 s\)") as found,
    ):
        client.send_events([event("a")])
    assert not isinstance(found.value, InputError)


def test_a_pool_the_fleet_does_not_have_is_told(served: Served) -> None:
    with served.client() as client:
        done = client.send_events([event("a", pool="h100-ownd"), event("b")])
    assert done["unknown_pools"] == {"h100-ownd": done["records"] // 2}


def test_large_batches_are_taken_apart(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_EVENTS", 7)
    monkeypatch.setattr(module, "_BATCH_BYTES", 500)
    with served.client() as client:
        assert client.send_events(event(str(n)) for n in range(40)) == {"records": 40, "duplicates": 0}
        assert client.send_events([]) == {"records": 0, "duplicates": 0}
        bodies = list(module._batches(event(str(n)) for n in range(40)))
        assert max(len(body) for body in bodies) <= 500
        assert sum(body.count(b"\n") + 1 for body in bodies) == 40


def test_threads_may_share_a_client(served: Served) -> None:
    with served.client() as client:
        sent(client)
        want = list(client.cost("tenant"))
        got: list[list[dict[str, Any]]] = []
        threads = [threading.Thread(target=lambda: got.append(list(client.cost("tenant")))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [want] * 8


def test_an_idle_connection_is_opened_again(served: Served) -> None:
    with served.client() as client:
        client.books()
        kept = client._connection
        assert kept is not None
        kept.sock.shutdown(socket.SHUT_RDWR)  # as a service does with what is idle
        assert client.books() == {}
        client.shut()
        assert client.books() == {}


def test_nobody_there_and_somebody_else() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=r"does not answer: .*refused") as found:
        Client(f"http://127.0.0.1:{port}").books()
    assert isinstance(found.value.__cause__, ConnectionRefusedError)
    for url in ("127.0.0.1:8700", "ftp://a", "http://", "http://me:word@host"):
        with pytest.raises(InputError, match="is no address of a service"):
            Client(url)
    with pytest.raises(InputError, match="one word"):
        Client("http://a", "pt_1\r\nX: y")
    assert pertoken.Client is Client


def test_the_page_runs(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    token = served.tokens.add("page", ("admin",))
    exec(code.replace('"http://127.0.0.1:8700"', f"{served.url!r}, {token!r}"), {})
    shown = capsys.readouterr().out
    assert "records are on the disk" in shown
    assert "blue output 0.001350000" in shown  # 90 tokens at 15 USD per M
    assert "USD per M output tokens" in shown
    assert "api,0.003786000" in shown  # and 812 at 3


def test_every_call_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    calls = [name for name in vars(Client) if not name.startswith("_") and name not in ("shut", "bytes_of")]
    assert [name for name in calls if f"`{name}(" not in page] == []
