"""Files into the journal: rows refused are counted and said, the same file counts once."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pertoken.errors import InputError
from pertoken.report.imports import FileOf
from pertoken.web.serve import diagnose, import_file

FLEET = """
pools:
  gemini: {price: {term: api, provider: google, model: gemini-2.5-pro}}
  other: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    return path


def test_a_file_is_taken_once_and_its_bad_rows_are_said(fleet: Path, tmp_path: Path) -> None:
    moment = datetime(2026, 11, 23, 7, tzinfo=UTC).timestamp()
    good = {"key": "a", "ts": moment, "model": "m", "input_tokens": 10, "output_tokens": 5}
    file = tmp_path / "usage.jsonl"
    file.write_text("\n".join([json.dumps(good), "{", json.dumps({**good, "key": ""})]) + "\n")
    shares: list[float] = []
    what = FileOf("pertoken", pool="other")
    found = import_file(tmp_path / "data", fleet, file, what, shares.append)
    assert (found["records"], found["duplicates"], found["refused"]) == (3, 0, 2)
    assert [why.partition(":")[0] for why in found["why"]] == ["row 2", "row 3"]
    assert shares == [1.0]
    again = import_file(tmp_path / "data", fleet, file, what)
    assert (again["records"], again["duplicates"]) == (0, 3)


def test_a_file_of_yesterday_owes_nothing_today(fleet: Path, tmp_path: Path) -> None:
    """A gateway that fell silent is told of; a file has said all it had to."""
    moment = datetime.now(UTC) - timedelta(hours=5)
    file = tmp_path / "usage.jsonl"
    file.write_text(
        json.dumps({"key": "a", "ts": moment.timestamp(), "input_tokens": 10, "output_tokens": 5})
    )
    import_file(tmp_path / "data", fleet, file, FileOf("pertoken", pool="other", name="november"))
    found = diagnose(tmp_path / "data", fleet)["complaints"]
    assert not [c["text"] for c in found if c["kind"] == "silent"]


def test_a_pool_the_fleet_does_not_have_is_said(fleet: Path, tmp_path: Path) -> None:
    moment = datetime(2026, 11, 23, 7, tzinfo=UTC).timestamp()
    row = {"key": "a", "ts": moment, "model": "m", "pool": "othr", "input_tokens": 10, "output_tokens": 5}
    file = tmp_path / "usage.jsonl"
    file.write_text(json.dumps(row) + "\n")
    found = import_file(tmp_path / "data", fleet, file, FileOf("pertoken"))
    assert (found["records"], found["unknown_pools"]) == (3, {"othr": 3})
    assert found["why"][0].startswith("3 records name the pool 'othr'")
    assert found["why"][0].endswith("did you mean other?")


def test_calls_that_fit_no_pool_are_said_and_wrong(fleet: Path, tmp_path: Path) -> None:
    """They are taken and in no figure; `doctor` finds them however old they are."""
    for days in (0.2, 40):
        moment = (datetime.now(UTC) - timedelta(days=days)).timestamp()
        answer = {"created": moment, "usage": {"prompt_tokens": 10, "completion_tokens": 5}}
        lines = [
            {**answer, "id": "a", "provider": "google", "model": "gemini-2.5-pro"},
            {**answer, "id": "b", "provider": "openai", "model": "gpt-4.1-mini"},
        ]
        file, data = tmp_path / "answers.jsonl", tmp_path / f"data{days}"
        file.write_text("\n".join(map(json.dumps, lines)))
        found = import_file(data, fleet, file, FileOf("openai"))
        assert (found["records"], found["unplaced_models"]) == (6, {"gpt-4.1-mini": 3})
        assert found["why"] == [
            "3 records (gpt-4.1-mini) fit no pool: in no figure until the event names a pool"
        ]
        (told,) = [c for c in diagnose(data, fleet)["complaints"] if c["kind"] == "unmatched"]
        assert (told["severity"], told["text"][:35]) == ("wrong", "usage events of gpt-4.1-mini fit no")


def test_a_file_without_token_counts_is_refused(fleet: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("a,b\n1,2\n")
    found = import_file(tmp_path / "data", fleet, file, FileOf("openai"))
    assert (found["records"], found["refused"]) == (0, 1)
    assert found["why"][0].startswith("row 1: no token counts found; columns are a, b")


def test_a_training_log_and_what_is_refused(fleet: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    log.write_text('{"ts": 1795503600, "step": 1, "tokens": 100, "seconds": 36, "gpus": 10}\n')
    found = import_file(tmp_path / "data", fleet, log, FileOf("training", pool="other"))
    assert found["records"] == 2
    with pytest.raises(InputError, match="--pool"):
        import_file(tmp_path / "data", fleet, log, FileOf("training"))
    with pytest.raises(InputError, match=r"unknown file format 'csvv': one of .*litellm.* training"):
        import_file(tmp_path / "data", fleet, log, FileOf("csvv"))
    with pytest.raises(InputError, match="no file"):
        import_file(tmp_path / "data", fleet, tmp_path / "none", FileOf("litellm"))
    with pytest.raises(InputError, match="give its fleet file"):
        import_file(tmp_path / "data", None, log, FileOf("litellm"))
