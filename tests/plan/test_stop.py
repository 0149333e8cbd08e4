"""Ctrl-C, as a person presses it: a signal to the command while it solves. It ends with a plan and its gap."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

# A parent that ignores SIGINT (a job in the background) hands that on; a terminal does not.
CODE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from pertoken.cli import main; sys.argv = ['pertoken', 'plan', *sys.argv[1:]]; main()"
)
DAILY, DAYS = 5_000_000, 24
CLOUD = {"timezone": "UTC", "pue": 1.2, "tariff": {"usd_per_kwh": 0.12, "demand_usd_per_kw": 15}}


def scenario(path: Path, days: int) -> Path:
    """Rented pools and an API for workloads of many request sizes: over a month too many to plan as one program."""
    prices = {"L40S": 0.9, "H100-SXM": 2.95, "H200": 3.6, "A100-80GB-SXM": 1.6, "B200": 5.2, "L4": 0.5}
    pools: dict[str, Any] = {
        gpu.lower(): {
            "gpu": gpu,
            "site": "cloud",
            "gpus_per_machine": 4,
            "startup_usd": 0.5,
            "price": {"term": "on_demand", "usd_per_gpu_hour": usd},
        }
        for gpu, usd in prices.items()
    }
    pools["api"] = {"price": {"term": "api", "input_usd_per_mtok": 0.3, "output_usd_per_mtok": 1.2}}
    chat = {
        "kind": "serving",
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "requests_per_day": DAILY,
        "input_tokens": {"mean": 800, "cv": 1},
        "output_tokens": {"mean": 200, "cv": 1},
        "profile": "office",
    }
    night = chat | {"kind": "batch", "deadline_hours": 12, "profile": "evening"}
    path.write_text(
        yaml.safe_dump(
            {
                "name": "stopped",
                "horizon": {"start": "2027-03-01", "days": days, "timezone": "UTC"},
                "sites": {"cloud": CLOUD},
                "pools": pools,
                "workloads": {"chat": chat, "night": night, "evening": chat | {"profile": "evening"}},
            }
        )
    )
    return path


def stopped_at(sign: str, folder: Path, *arguments: str, presses: int = 1) -> tuple[int, str, str]:
    """The command, interrupted as soon as its progress shows `sign`: exit status, output, progress."""
    main, side = pty.openpty()
    command = [sys.executable, "-c", CODE, *arguments]
    out = folder / "out.txt"
    with out.open("w") as file, subprocess.Popen(command, stdout=file, stderr=side) as running:
        os.close(side)
        seen, pressed, end = "", 0, time.monotonic() + 300
        while time.monotonic() < end:
            if not select.select([main], [], [], 1.0)[0]:
                continue
            try:
                seen += os.read(main, 65536).decode(errors="replace")
            except OSError:  # the other side is closed: the command has ended
                break
            while sign in seen and pressed < presses:
                os.kill(running.pid, signal.SIGINT)
                pressed += 1
                time.sleep(0.2)
        if running.poll() is None and time.monotonic() >= end:
            running.kill()
        os.close(main)
    assert pressed, seen
    return running.returncode, out.read_text(), seen


@pytest.mark.parametrize("sign", ["linear relaxation", "best "])
def test_a_week_stopped_is_a_plan_with_its_gap(tmp_path: Path, sign: str) -> None:
    path = scenario(tmp_path / "week.yaml", 7)
    code, out, seen = stopped_at(sign, tmp_path, str(path), "--gap", "0", "--json")
    assert code == 0, seen
    told = json.loads(out)
    assert told["status"] == "stopped"
    assert 0 < told["gap_fraction"] < 0.9
    assert told["bound"] <= told["objective_value"]
    assert told["cost_usd"] == pytest.approx(told["objective_value"], rel=1e-6)
    assert told["alternatives"] == []
    assert any("stopped by hand" in note for note in told["notes"])


@pytest.mark.parametrize("sign", ["what is held", "day 7 of"])
def test_a_month_stopped_while_it_rolls_is_a_whole_plan_with_its_gap(tmp_path: Path, sign: str) -> None:
    path = scenario(tmp_path / "month.yaml", DAYS)
    code, out, seen = stopped_at(
        sign, tmp_path, str(path), "--gap", "0", "--json", "--csv", str(tmp_path / "s.csv")
    )
    assert code == 0, seen
    told = json.loads(out)
    assert told["status"] == "stopped"
    assert "rolling window" in told["method"]
    assert "cut short" in told["method"]
    assert 0 < told["gap_fraction"] < 0.9
    assert told["cost_usd"] == pytest.approx(told["objective_value"], rel=1e-6)
    requests = DAYS * DAILY * 3
    assert told["tokens"]["output_tokens"] == pytest.approx(requests * 200, rel=1e-6)
    hours = {line.split(",")[0] for line in (tmp_path / "s.csv").read_text().splitlines()[1:]}
    assert len(hours) == DAYS * 24


def test_pressed_twice_it_ends_without_a_plan(tmp_path: Path) -> None:
    path = scenario(tmp_path / "month.yaml", DAYS)
    code, out, _ = stopped_at("what is held", tmp_path, str(path), "--gap", "0", presses=2)
    assert code != 0
    assert "cost" not in out
