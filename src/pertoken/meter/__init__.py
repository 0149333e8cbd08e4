"""What happened: sources read records, the journal keeps them, `attribute` turns an hour into usage rows.

A source is a function that returns an Arrow table of `records.RECORDS`: `prometheus.read` and
`prometheus.read_remote_write`, `otlp.read_spans` and `otlp.read_metrics`, `events.read`, `files.read`, `nvml.read`,
`training.read`. Those that read counters also return a `State`, journaled as a mark with the records.
"""

from pertoken.meter._counters import State
from pertoken.meter._work import predicted_work
from pertoken.meter.attribute import Attribution, Finding, attribute
from pertoken.meter.journal import Journal, JournalBrokenError, JournalFullError, open_journal
from pertoken.meter.prometheus import Target
from pertoken.meter.records import RECORDS, TOTALS, concat, records, totals

__all__ = [
    "RECORDS",
    "TOTALS",
    "Attribution",
    "Finding",
    "Journal",
    "JournalBrokenError",
    "JournalFullError",
    "State",
    "Target",
    "attribute",
    "concat",
    "open_journal",
    "predicted_work",
    "records",
    "totals",
]
