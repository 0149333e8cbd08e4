"""What happened: sources read records, the journal keeps them, `attribute` turns an hour into usage rows.

A source is a function that returns an Arrow table of `records.RECORDS`: `prometheus.read`,
`prometheus.read_remote_write`, `otlp.read`, `events.read`, `files.read`, `nvml.read`, `training.read`.
"""

from pertoken.meter.attribute import Attribution, Finding, attribute
from pertoken.meter.journal import Journal, JournalBrokenError, JournalFullError, open_journal
from pertoken.meter.records import RECORDS, TOTALS, concat, records, totals

__all__ = [
    "RECORDS",
    "TOTALS",
    "Attribution",
    "Finding",
    "Journal",
    "JournalBrokenError",
    "JournalFullError",
    "attribute",
    "concat",
    "open_journal",
    "records",
    "totals",
]
