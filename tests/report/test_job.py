"""A run leaves its figures as files: those of the verb itself, whole at each step."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pertoken.errors import InfeasibleError, InputError, ScenarioError
from pertoken.ledger import open_ledger
from pertoken.report import job as jobs
from pertoken.report import plan_book
from pertoken.report.compare import compare
from pertoken.report.form import defaults, scenario_text
from pertoken.report.job import BOOK, PAGE, Job, job_named, run, why
from pertoken.report.plan import run as plan
from pertoken.scenario import parse

TEXT = scenario_text({**defaults("serving", date(2027, 2, 1), 2)})


def done(job: Job, folder: Path) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    steps: list[Mapping[str, Any]] = []
    run(job, {}, folder, steps.append)
    page: dict[str, Any] = json.loads((folder / PAGE).read_text())
    return steps, page


def test_the_same_question_has_the_same_address() -> None:
    job = Job(verb="plan", scenario=TEXT)
    assert re.fullmatch("[0-9a-f]{64}", job.id)
    assert Job(verb="plan", scenario=TEXT).id == job.id
    others = [Job(verb="compare", scenario=TEXT), Job(verb="plan", scenario=TEXT, gap_percent=2)]
    assert len({job.id, *(o.id for o in others)}) == 3
    assert job_named(job.model_dump_json(), job.id) == job
    assert Job(verb="plan", scenario=TEXT, keep=True).id not in {job.id, *(o.id for o in others)}
    with pytest.raises(InputError, match="another run"):
        job_named(others[0].model_dump_json(), job.id)
    with pytest.raises(InputError, match="no run"):
        job_named("{}", job.id)


@pytest.mark.parametrize(
    "options",
    [{"verb": "delete"}, {"time_limit_s": 1e9}, {"gap_percent": -1}, {"against": "luck"}, {"scenario": ""}],
)
def test_what_no_run_may_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Job.model_validate({"verb": "plan", "scenario": TEXT, **options})


def test_the_command_line_is_the_same_run() -> None:
    job = Job(verb="plan", scenario=TEXT, against="tokens", values=(0.5, 1))
    assert job.command == (
        "pertoken plan scenario.yaml --objective cost --gap 0.01 --time-limit 30 --frontier tokens=0.5,1"
    )
    assert Job(verb="plan", scenario=TEXT, keep=True, prices=True).command.endswith("--keep --prices")
    assert Job(verb="compare", scenario=TEXT, sensitivity=True).command.endswith(
        "scenario.yaml --sensitivity"
    )


def test_compare_is_compare(tmp_path: Path) -> None:
    steps, page = done(Job(verb="compare", scenario=TEXT), tmp_path)
    found = compare(parse(TEXT))
    assert json.loads((tmp_path / "result.json").read_text()) == found.to_dict()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [r["pool"] for r in rows] == [str(o.facts["pool"]) for o in found.workloads[0].options]
    assert next(t[3] for t in page["tiles"]) == "cheapest alone"
    assert {b["kind"] for b in page["blocks"]} == {"text", "table", "figure"}
    assert steps[-1]["share"] == 1.0


def test_a_plan_is_the_plan_and_its_book_closes_to_the_same_cent(tmp_path: Path) -> None:
    job = Job(verb="plan", scenario=TEXT, against="tokens", values=(0.5, 1))
    steps, page = done(job, tmp_path)
    told = [s["step"] for s in steps]
    assert told[-3:] == ["a plan is there", "what it saves", "least cost against tokens"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["cost_usd"] == pytest.approx(plan(parse(TEXT), with_savings=False).cost_usd, rel=0.02)
    assert [p["value"] for p in result["frontier"]] == [0.5, 1]
    assert result["alternatives"]
    usage, rates = plan_book.from_body(
        (tmp_path / BOOK).read_bytes(), "application/vnd.apache.arrow.stream", "plan:serving"
    )
    ledger = open_ledger()
    ledger.put_book("plan:serving", usage, rates)
    assert float(ledger.cost()["cost_usd"][0].as_py()) == pytest.approx(result["cost_usd"], abs=0.005)
    ledger.shut()
    assert (tmp_path / "calendar.ics").read_text().startswith("BEGIN:VCALENDAR")
    figures = [b for b in page["blocks"] if b["kind"] == "figure"]
    assert any(f["spec"]["encoding"]["x"]["title"].startswith("local time (") for f in figures)


def test_addresses_given_out_stay() -> None:
    """That of this job before `keep` and `prices` were options."""
    job = Job(verb="plan", scenario="name: x\n", values=(0.5,), against="tokens")
    assert job.id == "46e1e11a73d209eeb45b7e2f19ac6c86607d3c893b9a5198416152595128a0be"


def test_shadow_prices_are_those_of_the_command_line(tmp_path: Path) -> None:
    steps, page = done(Job(verb="plan", scenario=TEXT, prices=True, keep=True, gap_percent=2), tmp_path)
    told = json.loads((tmp_path / "result.json").read_text())["shadow_prices"]
    planned = plan(parse(TEXT, {}), gap=0.02, with_prices=True, keep=True, with_savings=False)
    assert planned.prices is not None
    assert told == planned.prices.to_dict()
    assert any("at the margin" in str(block.get("caption", "")) for block in page["blocks"])
    assert "what one more of each would save" in {str(s.get("step")) for s in steps}


def test_what_is_too_much_to_draw_is_named_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_DRAWN_BYTES", 10)
    _, page = done(Job(verb="compare", scenario=TEXT), tmp_path)
    assert {b["kind"] for b in page["blocks"]} == {"text", "table"}
    assert any(
        "take the CSV" in line for b in page["blocks"] if b["kind"] == "text" for line in b["paragraphs"]
    )


def test_a_plan_that_cannot_be_says_what_would_free_it(tmp_path: Path) -> None:
    fields = defaults("training", date(2027, 2, 1), 2)
    text = scenario_text(
        {**fields, "train_tokens_b": "5000", "train_deadline_days": "1", "gpu-2": "", "usd-2": ""}
    )
    with pytest.raises(InfeasibleError) as caught:
        run(Job(verb="plan", scenario=text), {}, tmp_path, lambda step: None)
    told = why(caught.value)
    assert "To fix" in told["problem"]
    assert told["causes"]
    assert all(c["remedy"] for c in told["causes"])
    assert "more memory" in why(MemoryError())["problem"]


def test_no_file_is_opened_for_it(tmp_path: Path) -> None:
    text = re.sub("tariff: [^}]*", "tariff: {csv: /etc/passwd}", TEXT)
    with pytest.raises(ScenarioError, match="no file of this machine"):
        run(Job(verb="compare", scenario=text), {}, tmp_path, lambda step: None)
