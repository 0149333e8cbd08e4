"""`GET /metrics`: what it says by hand-made sums, in both formats, bounded, and to each its own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from pertoken.report import doctor
from pertoken.report.books import open_books
from pertoken.tables import usage_rows
from pertoken.web import exporter
from pertoken.web.exporter import FAMILIES, Exporter
from pertoken.web.service import Service
from pertoken.web.tokens import Tokens
from tests.web.conftest import NOW_S, Client, Clock
from tests.web.test_ingest import event
from tests.web.test_who import bearer

ROOT = Path(__file__).parents[2]
HOUR_S = 3600
UNTIL_S = NOW_S - HOUR_S
"""The service's clock stands at 09:00 and it gives an hour's grace: what is before 08:00 is closed."""
LAST_S = UNTIL_S - 60
CLOSE = {"start": "2026-11-24T06:00Z", "end": "2026-11-24T08:00Z"}
WRITE = {"content-type": "application/x-protobuf", "content-encoding": "snappy"}
WANTS = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    """By name and labels; a series that stands twice fails."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"pertoken_{name}", frozenset(labels.items())]


def total(found: Samples, name: str, **labels: str) -> float:
    wanted = frozenset(labels.items())
    return sum(v for (n, have), v in found.items() if n == f"pertoken_{name}" and wanted <= have)


def scrape(client: Client, **headers: str) -> str:
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.text


def send(client: Client, *events: dict[str, Any], **headers: str) -> None:
    taken = client.post("/v1/events", json=list(events), headers=headers)
    assert taken.status_code == 200, taken.text


def close(client: Client, **headers: str) -> None:
    books = client.app.state.service.books  # type: ignore[attr-defined]
    until = time.monotonic() + 20
    while books.closed_until is None:  # its own first close, in a thread of its own
        assert time.monotonic() < until
        time.sleep(0.01)
    answer = client.post("/v1/close", json=CLOSE, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.fixture
def filled(client: Client) -> Client:
    """Two hours: tenant a has 3 M output tokens at 07, b 1 M at 06, of an API at 15 USD per M."""
    send(
        client,
        event("1", 3_000_000, ts=LAST_S),
        event("2", 1_000_000, ts=LAST_S - HOUR_S, tenant="b"),
    )
    close(client)
    return client


def test_figures_are_what_the_ledger_says(filled: Client) -> None:
    found = samples(scrape(filled))
    # 8 H100 at 35,040 USD over 4 years of 8,760 h: 8 USD an hour, held and idle.
    assert value(found, "pool_spend_usd", window="1h", pool="h100", category="compute") == pytest.approx(8)
    assert value(found, "pool_spend_usd", window="1h", pool="api", category="compute") == pytest.approx(45)
    assert value(found, "tokens", window="1h", meter="output_tokens") == 3_000_000
    assert value(found, "tokens", window="24h", meter="output_tokens") == 4_000_000
    assert value(found, "tenant_tokens", window="24h", tenant="b", meter="output_tokens") == 1_000_000
    assert value(found, "gpu_held_seconds", window="24h", phase="idle") == 2 * 8 * HOUR_S
    assert value(found, "utilisation_ratio", window="1h") == 0
    assert value(
        found, "pool_cost_per_mtok_usd", window="24h", pool="api", metric="usd_per_mtok_output"
    ) == pytest.approx(15)
    assert value(found, "cost_per_mtok_usd", window="24h", metric="usd_per_mtok_total") == pytest.approx(
        76 / 4
    )
    assert value(found, "closed_until_timestamp_seconds") == UNTIL_S
    for scope in ("pool_", "model_", "tenant_"):
        for window in ("1h", "24h", "30d"):
            whole = total(found, "spend_usd", window=window)
            assert total(found, f"{scope}spend_usd", window=window) == pytest.approx(whole)
    metric = filled.get("/v1/metric", params={"name": "usd_per_mtok_total", "by": "tenant"}).json()
    for row in metric["rows"]:
        if row["usd_per_mtok_total"] is not None:
            got = value(
                found,
                "tenant_cost_per_mtok_usd",
                window="30d",
                tenant=row["tenant"],
                metric="usd_per_mtok_total",
            )
            assert got == row["usd_per_mtok_total"]


def test_joule_per_token_is_of_what_was_measured(filled: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An API's tokens, whose energy nobody measures, stand in no J per token: not in all's, not in a model's."""
    ledger = filled.app.state.service.books.ledger  # type: ignore[attr-defined]
    hour = np.array(["2026-11-24T07"], "datetime64[h]")
    for model, tokens in (("m", 2e6), ("other", 1e6)):
        amounts = {("output", "energy_kwh"): np.array([1.0]), ("output", "output_tokens"): np.array([tokens])}
        named = {"pool": "h100", "model": model, "tenant": "a", "basis": "measured"}
        ledger.add_usage(usage_rows(hour, amounts, book="actual", **named))
    joule = 2 * 3_600_000 / 3e6
    for most in (20, 2):  # past the names of their own, the rest is a ratio of sums as well
        monkeypatch.setattr(exporter, "MOST_NAMES", most)
        found = samples(Exporter(filled.app.state.service).page("").text(False))  # type: ignore[attr-defined]
        asked = {"window": "24h", "metric": "joule_per_token_total"}
        assert value(found, "energy_per_token_joules", **asked) == pytest.approx(joule)
        assert total(found, "model_energy_per_token_joules", **asked, model="m") == pytest.approx(
            3_600_000 / 2e6
        )
        other = "other" if most > 2 else "(other)"
        assert value(found, "model_energy_per_token_joules", **asked, model=other) == pytest.approx(3.6)
        assert not total(found, "pool_energy_per_token_joules", **asked, pool="api")
        assert not total(found, "tenant_energy_per_token_joules", **asked, tenant="b"), "an API's alone"
    own = samples(Exporter(filled.app.state.service).page("a").text(False))  # type: ignore[attr-defined]
    assert value(own, "tenant_energy_per_token_joules", **asked, tenant="a") == pytest.approx(joule)


def test_both_formats_are_what_their_readers_take(filled: Client) -> None:
    plain, strict = filled.get("/metrics"), filled.get("/metrics", headers=WANTS)
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert strict.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = list(openmetrics.text_string_to_metric_families(strict.text))  # type: ignore[no-untyped-call]
    assert {f.name for f in families} <= {*FAMILIES}
    for family in families:
        assert family.documentation == FAMILIES[family.name].about
        assert family.unit == FAMILIES[family.name].unit
    told = {(s.name, frozenset(s.labels.items())) for f in families for s in f.samples}
    assert told == set(samples(plain.text))
    assert {f.type for f in families if f.name == "pertoken_unknown_samples"} == {"counter"}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_named_as_prometheus_has_it(name: str) -> None:
    family = FAMILIES[name]
    assert re.fullmatch(r"pertoken_[a-z0-9_]+", name)
    assert not name.endswith(("_total", "_count", "_sum", "_bucket"))
    if family.unit:
        assert name.endswith(f"_{family.unit}")


def test_promtool_finds_nothing_to_say(filled: Client) -> None:
    import shutil
    import subprocess

    promtool = shutil.which("promtool")
    assert promtool, "the Debian package prometheus is missing: python tests/system_packages.py"
    done = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(filled), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_names_past_the_costliest_are_one_and_the_sums_stay(client: Client) -> None:
    named = [
        event(str(n), 1_000_000 * (n + 1), ts=LAST_S, tenant=f"t{n:03}", model=f"m{n % 40:02}")
        for n in range(200)
    ]
    send(client, *named)
    close(client)
    text = scrape(client)
    found = samples(text)
    tenants = {dict(labels)["tenant"] for name, labels in found if name == "pertoken_tenant_spend_usd"}
    assert tenants == {f"t{n:03}" for n in range(181, 200)} | {"(idle)", "(other)"}
    assert len(tenants) == exporter.MOST_NAMES + 1
    rest = sum(range(1, 182)) * 15
    assert value(
        found, "tenant_spend_usd", window="1h", tenant="(other)", category="compute"
    ) == pytest.approx(rest)
    assert value(
        found, "tenant_cost_per_mtok_usd", window="1h", tenant="(other)", metric="usd_per_mtok_output"
    ) == pytest.approx(15)
    for scope in ("pool_", "model_", "tenant_"):
        assert total(found, f"{scope}tokens", window="30d") == sum(range(1, 201)) * 1_000_000
    assert len(found) < 6_500


def test_names_are_escaped(client: Client) -> None:
    name = 'a"b\\c\u20ac {x="y"} 1'
    send(client, event("1", 5, ts=LAST_S, tenant=name))
    close(client)
    assert (
        value(samples(scrape(client)), "tenant_tokens", window="1h", tenant=name, meter="output_tokens") == 5
    )
    told = openmetrics.text_string_to_metric_families(scrape(client, **WANTS))  # type: ignore[no-untyped-call]
    for family in told:
        if family.name == "pertoken_tenant_tokens":
            assert name in {s.labels["tenant"] for s in family.samples}


def test_a_name_that_is_one_of_ours_adds_no_ratio_up(client: Client) -> None:
    named = [event(str(n), 1_000_000, ts=LAST_S, tenant=t) for n, t in enumerate(("", "(none)", "(other)"))]
    send(client, *named)
    close(client)
    found = samples(scrape(client))
    for tenant, tokens in (("(none)", 1_000_000), ("(other)", 2_000_000)):
        labels = {"window": "1h", "tenant": tenant}
        assert value(found, "tenant_tokens", **labels, meter="output_tokens") == tokens
        assert value(
            found, "tenant_cost_per_mtok_usd", **labels, metric="usd_per_mtok_output"
        ) == pytest.approx(15)


def test_a_tenant_sees_its_own_rows_and_nothing_of_the_house(
    client_of: Callable[..., Client], tmp_path: Path
) -> None:
    tokens = Tokens(tmp_path / "data")
    whole = bearer(tokens.add("all", ("admin",)))
    own, writer = bearer(tokens.add("b", ("read",), "b")), bearer(tokens.add("w", ("write",)))
    client = client_of(require_tokens=True)
    send(client, event("1", 3e6, ts=LAST_S), event("2", 1e6, ts=LAST_S, tenant="b"), **writer)
    close(client, **whole)
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers=writer).status_code == 403
    mine, everything = samples(scrape(client, **own)), samples(scrape(client, **whole))
    assert {dict(labels).get("tenant", "b") for _, labels in mine} == {"b"}
    assert total(mine, "tokens", window="1h") == 1_000_000
    assert total(mine, "spend_usd", window="1h") == pytest.approx(15)
    assert total(everything, "tokens", window="1h") == 4_000_000
    house = ("pertoken_source", "pertoken_journal", "pertoken_plan", "pertoken_closing", "pertoken_unpriced")
    assert not [name for name, _ in mine if name.startswith(house)]
    assert [name for name, _ in everything if name.startswith("pertoken_journal")]


def test_how_the_service_fares(client: Client, clock: Clock) -> None:
    found = samples(scrape(client))
    silent = {"kind": "written", "source": "vllm:8000"}
    assert value(found, "source_silent", **silent) == 1
    assert value(found, "sources", state="silent") == 1
    assert value(found, "journal_writable") == 1
    assert value(found, "closing_failed") == 0
    from tests.web.test_ingest import write_request

    body = write_request(
        {"vllm:generation_tokens_total": 1}, int(NOW_S * 1000), instance="vllm:8000", model_name="m"
    )
    assert client.post("/api/v1/write", content=body, headers=WRITE).status_code == 200
    clock.at_s += 120
    found = samples(scrape(client))
    assert value(found, "source_silent", **silent) == 0
    assert value(found, "source_age_seconds", **silent) == 120
    assert exporter.SILENT_S == doctor._SILENT_S


def test_figures_are_read_once_for_all_who_scrape(
    client: Client, filled: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    read = Exporter._read

    def counting(self: Exporter, tenant: str) -> Any:
        made.append(tenant)
        return read(self, tenant)

    monkeypatch.setattr(Exporter, "_read", counting)
    first, second = scrape(client), scrape(client)
    assert made == [""]

    def figures(text: str) -> Samples:
        return {k: v for k, v in samples(text).items() if k[0].endswith("_usd")}

    assert figures(first) == figures(second)


@pytest.fixture
def unpriced(fleet: Any, tmp_path: Path, clock: Clock) -> Iterator[Service]:
    """An API without a price of cached input: an hour with some stays open."""
    made = Service(open_books(fleet, tmp_path / "data"), tmp_path, clock=clock, grace_s=3600.0)
    yield made
    made.stop()


def test_no_usd_per_token_where_hours_lack_a_price(unpriced: Service, clock: Clock) -> None:
    from datetime import timedelta

    from pertoken.tables import usage_rows

    hour = datetime.fromtimestamp(NOW_S - HOUR_S, UTC)
    import numpy as np

    hours = np.array([np.datetime64(hour.replace(tzinfo=None), "us")])
    ledger = unpriced.books.ledger
    fine = {("output", "output_tokens"): 1e6}
    for quantities in (fine, {**fine, ("output", "gpu_hours"): 1.0}):
        rows = usage_rows(
            hours, quantities, book="actual", pool="nowhere", model="m", tenant="a", basis="measured"
        )
        ledger.replace_usage("actual", [hour], rows)
        found = samples(Exporter(unpriced).page("").text(False))
        assert total(found, "tokens", window="1h") == 1e6
    assert value(found, "unpriced_seconds", pool="nowhere", meter="gpu_hours") == HOUR_S
    assert not [name for name, _ in found if name.endswith("cost_per_mtok_usd")]
    assert hour + timedelta(hours=1) == unpriced.now()


def test_the_document_names_every_family() -> None:
    text = (ROOT / "docs" / "grafana.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in text] == []
