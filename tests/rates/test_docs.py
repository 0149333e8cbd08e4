"""The pages on rates and tariffs: their examples run, and every shipped tariff and module is named."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import yaml

from pertoken.catalog._tariff_rows import tariffs_from_text
from pertoken.catalog.tariffs import tariffs

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["rates.md", "tariffs.md"])
def test_examples_run(page: str) -> None:
    result = doctest.testfile(str(DOCS / page), module_relative=False)
    assert result.failed == 0
    assert result.attempted > 0


def test_every_shipped_tariff_is_on_the_page_with_its_date() -> None:
    lines = (DOCS / "tariffs.md").read_text(encoding="utf-8").splitlines()
    for row in tariffs().values():
        line = next((line for line in lines if line.startswith(f"| `{row.name}` |")), "")
        assert row.effective in line, row.name


def test_the_example_row_is_a_tariff() -> None:
    text = (DOCS / "tariffs.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(text)
    row = tariffs_from_text(text, "docs/tariffs.md")["Example"]
    assert row.tiers == 2
    assert row.demand[1].ratchet is not None
