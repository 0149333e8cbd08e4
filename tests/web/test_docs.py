"""The page on the service says what is: its addresses, its complaints, its limits; its examples work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import yaml

from pertoken.fleet import Sources, load_fleet
from pertoken.meter.files import NAME_MAP
from pertoken.meter.journal import WINDOW_ROWS
from pertoken.report.books import CATCH_UP_HOURS, open_books
from pertoken.report.doctor import KINDS
from pertoken.web.app import Limits
from tests.web.conftest import Client
from tests.web.test_ingest import WINDOW

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def test_every_address_is_on_the_page(client: Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for method in methods:
            assert re.search(rf"`{method.upper()} {path}[`?]", PAGE), f"{method} {path}"


def test_every_complaint_is_on_the_page() -> None:
    for kind, what in KINDS.items():
        assert f"| `{kind}` | {what} |" in PAGE


def test_every_part_of_sources_is_on_the_page() -> None:
    for name in Sources.model_fields:
        assert f"`{name}`" in PAGE


def test_limits_are_as_written() -> None:
    limits = Limits()
    assert f"may ask {limits.requests_per_s:.0f} times a second" in " ".join(PAGE.split())
    assert (limits.body_bytes, limits.in_flight_bytes) == (32 << 20, 128 << 20)
    assert "at most 32 MiB" in PAGE
    assert "128 MiB may be on their way" in PAGE
    assert WINDOW_ROWS == 4_000_000
    assert f"at most {CATCH_UP_HOURS} (four weeks) each minute" in PAGE


def test_every_field_that_an_import_reads_is_on_the_page() -> None:
    for name, fields in NAME_MAP.items():
        told = "; ".join(
            f"{ours}: {', '.join(f'`{f}`' for f in theirs)}" if (ours,) != theirs else f"`{ours}`"
            for ours, theirs in fields.items()
        )
        assert f"| `{name}` | {told} |" in PAGE, f"| `{name}` | {told} |"


def test_the_event_on_the_page_is_taken(client_of: Callable[..., Client]) -> None:
    client = client_of()
    (text,) = re.findall(r"-d '(\[.*?\])'", PAGE, re.DOTALL)
    (event,) = json.loads(text)
    assert client.post("/v1/events", json=[{**event, "pool": "api"}]).json() == {
        "records": 3,
        "duplicates": 0,
    }
    assert client.post("/v1/close", json=WINDOW).status_code == 200


def test_the_prometheus_settings_are_yaml() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert yaml.safe_load(text)["remote_write"][0]["url"].endswith("/api/v1/write")


def test_the_example_fleet_runs_and_closes(tmp_path: Path) -> None:
    fleet = load_fleet(ROOT / "examples" / "serve" / "fleet.yaml")
    hour = datetime(2026, 11, 24, 20, tzinfo=UTC)
    with open_books(fleet, tmp_path) as books:
        assert not books.close([hour]).unpriced
        pools = {r["pool"] for r in books.ledger.cost("pool").to_pylist()}
    assert pools == {"h100-owned", "(site:warehouse)"}
