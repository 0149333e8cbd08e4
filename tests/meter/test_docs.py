"""docs/meter.md names everything a reader can meet, and its example is true."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pertoken.meter import RECORDS, events
from pertoken.meter.attribute import FINDINGS
from pertoken.meter.files import FORMATS
from pertoken.meter.records import EVIDENCE, KINDS

TEXT = (Path(__file__).parents[2] / "docs" / "meter.md").read_text()


def test_every_kind_finding_format_and_column_is_documented() -> None:
    for name in (*KINDS, *FINDINGS, *FORMATS, *EVIDENCE, *RECORDS.names):
        assert f"`{name}`" in TEXT, name


def test_the_example_event_gives_what_the_text_says() -> None:
    found = re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)
    assert found
    json.loads(found[1])
    table = events.read(found[1].encode(), "application/json", source="usage/docs", now_s=0.0)
    told = {r["meter"]: r["quantity"] for r in table.to_pylist()}
    assert told == {"input_tokens": 300, "cached_input_tokens": 512, "output_tokens": 90, "requests": 1}
