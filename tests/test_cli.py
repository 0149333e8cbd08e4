"""The command as a user meets it: exit codes, one-line errors, start-up time spent on nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PREDICT = ("predict", "--model", "Llama-3.1-8B", "--input-tokens", "1", "--output-tokens", "1")
FLEET = Path(__file__).parents[1] / "examples" / "serve" / "fleet.yaml"
SHOP = Path(__file__).parents[1] / "examples" / "shop.yaml"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from pertoken.cli import main; sys.argv = ['pertoken', *sys.argv[1:]]; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    ("price", "speed", "usd"),
    [
        # NVIDIA, cost-per-token equation, April 2026: GB300 at 2.65 USD/h and 6,000 tokens/s per GPU: 0.1227.
        ("2.65", "6000", "0.1227"),
        # The same page, H200 at 1.41 USD/h and 90 tokens/s: the equation gives 4.352; 4.20 is printed there.
        ("1.41", "90", "4.3519"),
    ],
)
def test_quick_is_the_vendors_equation(price: str, speed: str, usd: str) -> None:
    found = run("quick", "--usd-per-gpu-hour", price, "--tokens-per-second-per-gpu", speed)
    assert found.returncode == 0
    assert found.stdout.startswith(f"{usd} USD per M output tokens")
    assert "idle hours" in found.stdout
    as_json = run("quick", "--usd-per-gpu-hour", price, "--tokens-per-second-per-gpu", speed, "--json")
    assert json.loads(as_json.stdout)["usd_per_mtok_output"] == pytest.approx(float(usd), abs=5e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        ("token", "add", "a", "--scope", "read"),
        ("serve", "--fleet", str(FLEET), "--port", "0"),
        ("close", "--fleet", str(FLEET), "--from", "2026-11-24T00:00Z", "--to", "2026-11-24T01:00Z"),
    ],
    ids=["token", "serve", "close"],
)
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    found = run(*arguments, "--data", str(tmp_path / "file" / "books"))
    assert found.returncode == 2
    assert found.stderr.startswith("pertoken: ")
    assert found.stderr.count("\n") == 1, found.stderr
    assert "file" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("quick", "--usd-per-gpu-hour", "nan", "--tokens-per-second-per-gpu", "1"), "must be a number of 0 or more"),
        (("quick", "--usd-per-gpu-hour", "1", "--tokens-per-second-per-gpu", "0"), "must be above 0"),
        (("compare", "nowhere.yaml"), "no file at nowhere.yaml"),
        (("compare", str(SHOP), "--tokens", "lots"), "--tokens 'lots' is no share"),
        (("compare", str(SHOP), "--nonsense"), "No such option: --nonsense"),
        (("compare",), "Missing argument 'scenario'"),
        (("comparé", str(SHOP)), "No such command"),
        ((*PREDICT, "--gpu", "H1000"), "unknown GPU 'H1000'"),
        (("catalog", "gpuz"), "unknown catalogue 'gpuz'"),
        (("validate", "nowhere.csv"), "nowhere.csv"),
        (("compare", str(SHOP), "--tokens", "50"), "--tokens '50' would be +5,000%: write +50% or +5000%"),
        (("compare", str(SHOP), "--png", "x.pdf"), "--png x.pdf writes a PNG: name it x.png"),
        (("doctor", "--data", str(SHOP)), "shop.yaml is a file: give the folder"),
        (("close", "--data", "nowhere", "--from", "2026-11-24", "--to", "x"), "write 2026-11-24T00:00Z for UTC"),
        ((*PREDICT, "--gpu", "A100"), "did you mean A100-40GB-SXM, A100-80GB-SXM, A100-40GB-PCIe?"),
        (("simulate", str(SHOP), "--pool", "h100-ownd"), "h100-owned"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], expected: str) -> None:
    found = run(*arguments)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    assert expected in found.stderr
    assert "Traceback" not in found.stderr


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("here already")
    found = run("compare", str(SHOP), "--html", str(blocked / "shop.html"))
    assert found.returncode == 2
    assert "cannot write" in found.stderr
    assert blocked.read_text() == "here already"


def test_compare_prints_a_table_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "out" / "shop.html"
    found = run("compare", str(SHOP), "--html", str(page))
    assert found.returncode == 0, found.stderr
    assert "USD per M tokens, idle included" in found.stdout
    assert page.stat().st_size > 100_000


def test_json_is_json(tmp_path: Path) -> None:
    found = run("compare", str(SHOP), "--json")
    assert json.loads(found.stdout)["scenario"] == "shop"


def test_schema_is_a_json_schema() -> None:
    found = json.loads(run("schema").stdout)
    assert found["$schema"].startswith("https://json-schema.org/")


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys, pertoken, pertoken.cli; "
        "heavy = {'numpy', 'pyarrow', 'duckdb', 'pydantic', 'numba', 'highspy', 'vl_convert', 'yaml'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_version() -> None:
    from pertoken import __version__

    assert run("--version").stdout.strip() == f"pertoken {__version__}"
