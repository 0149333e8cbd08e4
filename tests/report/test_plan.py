"""`plan` as table, page, rows and calendar: the same sums as the ledger, and files other programs can read."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pertoken.plan._against import Alternative
from pertoken.report._compare_table import usd
from pertoken.report._plan_calendar import cron_rows, icalendar, runs
from pertoken.report.plan import Planned, run, schedule_rows

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def planned() -> Planned:
    """The start-up example and a rented pool: small, with something that starts and stops."""
    from pertoken.scenario import Scenario

    return run(
        Scenario.model_validate(
            {
                "name": "night and day",
                "horizon": {"start": "2027-03-01", "days": 3, "timezone": "Europe/Berlin"},
                "sites": {"cloud": {"timezone": "Europe/Berlin", "pue": 1.2, "carbon_g_per_kwh": 300}},
                "pools": {
                    "rented": {
                        "gpu": "L40S",
                        "gpus_per_machine": 1,
                        "site": "cloud",
                        "price": {"term": "on_demand", "usd_per_gpu_hour": 0.9},
                    },
                    "api": {"price": {"term": "api", "input_usd_per_mtok": 0.2, "output_usd_per_mtok": 0.8}},
                },
                "workloads": {
                    "chat": {
                        "kind": "serving",
                        "model": "meta-llama/Llama-3.1-8B-Instruct",
                        "requests_per_day": 60000,
                        "input_tokens": 500,
                        "output_tokens": 200,
                        "profile": "office",
                    }
                },
            }
        ),
        gap=0.02,
        time_limit_s=60,
        under=("expected",),
    )


def test_parts_sum_to_the_whole(planned: Planned) -> None:
    assert sum(planned.by_component.values()) == pytest.approx(planned.cost_usd, rel=1e-9)
    assert sum(planned.by_phase.values()) == pytest.approx(planned.cost_usd, rel=1e-9)
    assert sum(w.with_idle_usd for w in planned.workloads) == pytest.approx(planned.cost_usd, rel=1e-9)
    assert planned.cost_usd == pytest.approx(planned.found.objective, rel=1e-6)


def test_text_fits_100_columns(planned: Planned) -> None:
    text = planned.as_text()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "night and day" in text
    assert "best single option" in text
    assert "proven within" in text


def test_a_difference_smaller_than_the_gap_is_said_to_be_one(planned: Planned, tmp_path: Path) -> None:
    cost = planned.cost_usd
    found = replace(planned.found, bound=planned.found.objective * 0.99)  # a gap of 1 %
    rivals = [
        Alternative("ignoring the tariff", cost - 0.005 * cost),
        Alternative("always cloud", cost + 0.005 * cost),
        Alternative("twice as dear", 2 * cost),
        Alternative("the same", cost),
        Alternative("too slow", None, "no plan found within 1 s", cut=True),
        Alternative("elsewhere", None, "chat cannot run there"),
    ]
    told = replace(planned, found=found, alternatives=rivals)
    text = told.as_text()
    told.write_html(tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    for shown in (text, page):
        assert f"within the gap ({usd(-0.005 * cost)})" in shown
        assert f"within the gap ({usd(0.005 * cost)})" in shown
        assert shown.count("within the gap") == 2
        assert "not found in time" in shown
        assert "cannot be done" in shown
    assert f"{usd(cost)} (50.0%)" in text
    assert re.search(r"the same +\S+ +nothing *\n", text)
    assert [a["cost_usd"] for a in told.to_dict()["alternatives"]] == [a.cost_usd for a in rivals]
    unknown = replace(told, found=replace(found, bound=float("nan")))
    assert "within the gap" not in unknown.as_text()
    assert "within the gap" not in replace(told, found=replace(found, objective_name="carbon")).as_text()


def test_files(planned: Planned, tmp_path: Path) -> None:
    planned.write_html(tmp_path / "p.html")
    planned.write_json(tmp_path / "p.json")
    planned.write_csv(tmp_path / "p.csv")
    planned.write_calendar(tmp_path / "cron.csv")
    planned.write_calendar(tmp_path / "p.ics")
    page = (tmp_path / "p.html").read_text()
    assert "What runs when" in page
    assert not re.search(r"src=.?https?://|@import|url\(http", page)
    plain = json.loads((tmp_path / "p.json").read_text())
    assert plain["cost_usd"] == pytest.approx(planned.cost_usd)
    assert plain["regret_usd"]["choice"] == "expected"
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert len(rows) == len(schedule_rows(planned.found))
    assert {r["pool"] for r in rows} <= {"rented", "api"}
    assert all(re.fullmatch(r"2027-03-0\dT\d\d:00Z|2027-02-28T23:00Z", r["hour_utc"]) for r in rows)
    assert not any(value.startswith("-") for r in rows for value in r.values())


def test_calendar_covers_the_schedule(planned: Planned) -> None:
    found = planned.found
    hours = sum((r.end - r.start).total_seconds() / 3600 * r.count for r in runs(found) if r.kind == "units")
    assert hours == pytest.approx(float(found.schedule.units.sum()))
    text = icalendar(found)
    assert text.startswith("BEGIN:VCALENDAR\r\n")
    assert text.count("BEGIN:VEVENT") == len(runs(found))
    assert all(len(line.encode()) <= 75 for line in text.split("\r\n"))


def test_cron_rows_replay_to_the_counts(planned: Planned) -> None:
    state: dict[str, int] = {}
    for row in cron_rows(planned.found):
        was, now = state.get(row["target"], 0), int(row["replicas"])
        expected = "resume" if was == 0 else "suspend" if now == 0 else "scale"
        assert row["action"] == expected
        minute, hour, day, month, weekday = row["schedule"].split()
        assert (minute, weekday) == ("0", "*")
        assert f"-{int(month):02d}-{int(day):02d}T{int(hour):02d}:00Z" in row["date"]
        state[row["target"]] = now
    assert set(state.values()) <= {0}


def test_a_plan_written_twice_to_a_ledger_is_there_once(tmp_path: Path) -> None:
    from pertoken.ledger import open_ledger
    from pertoken.report.plan import run

    planned = run(EXAMPLES / "midday.yaml", with_savings=False)
    path = tmp_path / "books.duckdb"
    for _ in range(2):
        planned.write_ledger(path)
    ledger = open_ledger(path)
    costs = ledger.cost("book").to_pylist()
    ledger.shut()
    assert [row["book"] for row in costs] == ["plan:midday"]
    assert float(costs[0]["cost_usd"]) == pytest.approx(planned.found.objective, rel=1e-6)


def test_training_goes_to_the_cheap_hours_and_serving_to_the_api_by_night() -> None:
    from zoneinfo import ZoneInfo

    from pertoken.report.plan import run

    planned = run(EXAMPLES / "midday.yaml", with_savings=False)
    zone = ZoneInfo("America/Los_Angeles")
    trained: dict[int, float] = {}
    served: dict[tuple[str, int], float] = {}
    for row in planned.found.usage_rows("plan:midday").to_pylist():
        hour = row["hour"].astimezone(zone).hour
        if row["phase"] == "training" and row["meter"] == "gpu_hours":
            trained[hour] = trained.get(hour, 0.0) + float(row["quantity"])
        if row["meter"] == "requests":
            served[row["pool"], hour] = served.get((row["pool"], hour), 0.0) + float(row["quantity"])
    cheap = sum(v for hour, v in trained.items() if 9 <= hour < 16)
    assert cheap / sum(trained.values()) > 0.99
    for hour in (1, 2, 3, 4):
        assert served.get(("h100-rented", hour), 0.0) == 0
        assert served["groq-api", hour] > 0
    for hour in (10, 11, 13, 14):
        assert served["h100-rented", hour] > served.get(("groq-api", hour), 0.0)


def test_idle_and_overheads_are_borne_by_who_uses_the_pool_or_site() -> None:
    planned = run(EXAMPLES / "midday.yaml", with_savings=False)
    mine = {w.name: w for w in planned.workloads}
    # The assistant runs in the cloud and on an API, where nothing idles but rented GPUs; all else is the warehouse's.
    assert mine["assistant"].with_idle_usd < 1.05 * mine["assistant"].own_usd
    assert mine["recommender"].with_idle_usd > planned.by_component["staff"] + planned.by_component["capital"]
    assert sum(w.with_idle_usd for w in planned.workloads) == pytest.approx(planned.cost_usd, rel=1e-9)


def test_prices_frontier_and_regret_are_told() -> None:
    from pertoken.errors import InputError
    from pertoken.report.plan import frontier_of

    planned = run(
        EXAMPLES / "midday.yaml",
        with_savings=False,
        with_prices=True,
        against="tokens",
        values=[1.0, 1.5],
        under=["low", "expected"],
    )
    text = planned.as_text()
    assert "At the margin: one unit more" in text
    assert "Least cost against tokens" in text
    assert "Regret in USD" in text
    (_, once), (_, more) = planned.frontier
    assert once is not None
    assert more is not None
    assert more > once == pytest.approx(planned.cost_usd, rel=0.01)
    told = json.loads(json.dumps(planned.to_dict(), allow_nan=False))
    assert len(told["shadow_prices"]["usd_per_mtok"]["assistant"]) == 14 * 24
    assert told["frontier"][1]["value"] == 1.5
    assert max(len(line) for line in text.splitlines()) <= 100
    for wrong in ("foo=1", "tokens=x", "tokens="):
        with pytest.raises(InputError, match="--frontier"):
            frontier_of(wrong)
