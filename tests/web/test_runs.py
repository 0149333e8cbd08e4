"""Runs in a process of their own: one at a time, bounded, stoppable, and gone with the service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from pertoken.errors import InputError
from pertoken.report.form import defaults, scenario_text
from pertoken.report.job import BOOK, PAGE, Job
from pertoken.web.runs import Bounds, BusyError, Run, Runs

DAY = date(2027, 2, 1)
TEXT = scenario_text(defaults("serving", DAY, 1))
LONG = scenario_text(defaults("both", DAY, 20))
PATIENCE_S = 120.0


def endless(seconds: float = 300.0) -> Job:
    """A plan that no solver proves to the last digit soon."""
    return Job(verb="plan", scenario=LONG, gap_percent=0, time_limit_s=seconds)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    made = Runs(tmp_path)
    yield made
    made.stop()


def until(run: Run, what: str) -> None:
    """Wait until the run tells that."""
    end = time.monotonic() + PATIENCE_S
    while not any(what in step for step in run.steps):
        assert time.monotonic() < end, run
        assert not run.over, run
        time.sleep(0.05)


def test_a_run_is_answered_once_and_forgotten_last(tmp_path: Path) -> None:
    runs = Runs(tmp_path, Bounds(kept=2))
    try:
        jobs = [Job(verb="compare", scenario=TEXT.replace("pue: 1.3", f"pue: 1.{n}")) for n in range(3)]
        first = runs.start(jobs[0], "a", {})
        assert runs.wait(first, PATIENCE_S)
        assert (first.state, first.problem, first.has_page) == ("done", "", True)
        assert runs.start(jobs[0], "b", {}) is first
        for job in jobs[1:]:
            assert runs.wait(runs.start(job, "a", {}), PATIENCE_S)
        assert [run.job for run in runs.newest("compare")] == [jobs[2], jobs[1]]
        assert runs.newest("plan") == []
        assert not first.has_page
        assert runs.get(first.id) is None
    finally:
        runs.stop()
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_line_is_short(tmp_path: Path) -> None:
    runs = Runs(tmp_path, Bounds(waiting=1))
    try:
        now = runs.start(endless(), "a", {})
        while now.state == "waiting":
            time.sleep(0.01)
        waits = runs.start(endless(299), "a", {})
        assert (runs.place(now), runs.place(waits)) == (0, 1)
        with pytest.raises(BusyError, match="come back"):
            runs.start(endless(298), "a", {})
        # Who asks what waits already takes no place.
        assert runs.start(endless(299), "b", {}) is waits
        runs.cancel(waits)
        assert (waits.state, waits.problem) == ("stopped", "stopped before it began")
    finally:
        runs.stop()


def test_a_stopped_plan_keeps_the_best_it_has(runs: Runs) -> None:
    run = runs.start(endless(), "a", {})
    until(run, "best")
    while not any(step.get("best") for step in run.steps):
        time.sleep(0.05)
    runs.cancel(run)
    assert runs.wait(run, PATIENCE_S)
    assert (run.state, run.problem) == ("stopped", "stopped by hand")
    assert run.has_page
    assert (run.folder / BOOK).is_file()
    result = json.loads((run.folder / "result.json").read_text())
    assert result["status"] == "stopped"
    assert result["cost_usd"] > 0
    # It can be asked again.
    again = runs.start(endless(), "a", {})
    assert again is not run
    assert runs.newest("plan") == [again]


def test_a_run_has_so_long_and_no_longer(tmp_path: Path) -> None:
    runs = Runs(tmp_path, Bounds(wall_s=0.2))
    try:
        run = runs.start(endless(), "a", {})
        assert runs.wait(run, PATIENCE_S)
        assert run.state == "stopped"
        assert "as long as a run may take" in run.problem
    finally:
        runs.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded by Linux's RLIMIT_DATA")
def test_a_run_has_so_much_memory_and_no_more(tmp_path: Path) -> None:
    runs = Runs(tmp_path, Bounds(memory_bytes=200 << 20))
    try:
        run = runs.start(Job(verb="compare", scenario=TEXT), "a", {})
        assert runs.wait(run, PATIENCE_S)
        assert run.state == "failed"
        assert "memory" in run.problem
        assert "fewer days" in run.problem
    finally:
        runs.stop()


def test_what_cannot_be_run_says_why(runs: Runs) -> None:
    bad = runs.start(Job(verb="compare", scenario=TEXT.replace("H100-SXM", "H1OO")), "a", {})
    none = runs.start(Job(verb="plan", scenario=TEXT + "budget: {usd: 0.001}\n"), "a", {})
    assert runs.wait(none, PATIENCE_S)
    assert bad.state == none.state == "failed"
    assert "unknown GPU" in bad.problem
    assert "To fix" in none.problem
    assert none.ways_out
    assert none.ways_out[0][4]


def test_the_service_takes_its_runs_with_it(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    run, waits = runs.start(endless(), "a", {}), runs.start(endless(299), "a", {})
    until(run, "best")
    process = runs._process
    assert process is not None
    began = time.monotonic()
    runs.stop()
    assert time.monotonic() - began < 5
    assert process.returncode is not None
    assert {run.state, waits.state} == {"stopped"}
    with pytest.raises(BusyError):
        runs.start(endless(298), "a", {})


def test_a_worker_whose_service_is_gone_goes_too(tmp_path: Path) -> None:
    told = {
        "job": endless().model_dump(mode="json"), "files": {}, "folder": str(tmp_path), "memory_bytes": 4 << 30,
        "cpu_s": 600,
    }  # fmt: skip
    command = [sys.executable, "-P", "-m", "pertoken.web._worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(told).encode() + b"\n")
        worker.stdin.flush()
        assert worker.stdout.readline()
        worker.stdin.close()
        assert worker.wait(PATIENCE_S) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="niceness is of Unix")
def test_a_worker_is_last_in_line_for_the_cpu() -> None:
    code = "import os; from pertoken.web._worker import _bound; _bound(1 << 32, 60); print(os.nice(0))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(found.stdout) == min(19, os.nice(0) + 10)


def test_what_is_asked_outlives_the_service_and_cannot_be_changed_unseen(tmp_path: Path) -> None:
    job, fields = Job(verb="plan", scenario=TEXT), {"name": "x"}
    assert Runs(tmp_path).keep(job, fields) == job.id
    later = Runs(tmp_path)
    assert later.asked(job.id) == (job, fields)
    assert later.asked("0" * 64) is None
    for hostile in ("../tokens", job.id[:-1], job.id.upper(), "%2e%2e", "\x00" * 64, "é" * 64):
        assert later.asked(hostile) is None
    path = tmp_path / "runs" / f"{job.id}.json"
    path.write_text(path.read_text().replace("150000", "150001"))
    with pytest.raises(InputError, match="another run"):
        later.asked(job.id)
    path.write_text("{")
    with pytest.raises(InputError, match="no run"):
        later.asked(job.id)


def test_only_so_many_questions_are_kept(tmp_path: Path) -> None:
    runs = Runs(tmp_path, Bounds(asked=3))
    jobs = [Job(verb="plan", scenario=TEXT, gap_percent=n) for n in range(1, 6)]
    for n, job in enumerate(jobs):
        runs.keep(job)
        os.utime(tmp_path / "runs" / f"{job.id}.json", (n, n))
    assert [runs.asked(job.id) is not None for job in jobs] == [False, False, True, True, True]


def test_what_a_library_prints_is_no_progress(tmp_path: Path) -> None:
    told = {"job": {}, "files": {}, "folder": str(tmp_path), "memory_bytes": 4 << 30, "cpu_s": 60}
    code = (
        "import os, sys, pertoken.report.job as j\n"
        "j.Job.model_validate = lambda job: job\n"
        "j.run = lambda job, files, folder, tell: (print('noise'), os.write(1, b'noise'), tell({'step': 'x'}))\n"
        "from pertoken.web._worker import main\n"
        "sys.exit(main())"
    )
    line = json.dumps(told).encode() + b"\n"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(line)
        worker.stdin.flush()
        assert worker.stdout.read() == b'{"step": "x"}\n'
        assert worker.wait(PATIENCE_S) == 0
    assert not (tmp_path / PAGE).exists()
