"""What is asked of the ledger: dimensions, filters and hours, read from a query string and scoped to its caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any
from urllib.parse import urlencode

import pyarrow as pa
from fastapi import Depends, Query

from pertoken.client import quoted
from pertoken.errors import InputError
from pertoken.meter.attribute import BOOK
from pertoken.report._written import utc_text
from pertoken.web._doors import Moment, Reader

FILTERS = ("book", "pool", "model", "tenant")
COST_FILTERS = ("phase", "category", "component")
"""Further ones of a cost, whose rows have them; of a usage, the phase."""
MOST_ROWS = 100_000
Names = Annotated[list[str], Query(max_length=16)]


@dataclass(frozen=True)
class Question:
    """Dimensions to group by, a filter per dimension, and the hours from `start` up to, not with, `end` (UTC)."""

    by: list[str] = field(default_factory=list)
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    start: datetime | None = None
    end: datetime | None = None

    def query(
        self, start: str = "from", end: str = "to", **changes: str | Sequence[str] | datetime | None
    ) -> str:
        """The query string that asks the same, but for the `changes` (``by``, a filter, ``start``, ``end``)."""
        parts: dict[str, Any] = {"by": self.by, **self.where, "start": self.start, "end": self.end, **changes}
        pairs: list[tuple[str, str]] = []
        for key, value in parts.items():
            name = {"start": start, "end": end}.get(key, key)
            if isinstance(value, datetime):
                pairs.append((name, value.isoformat()))
            elif value is not None:
                pairs += [(name, quoted(one)) for one in ([value] if isinstance(value, str) else value)]
        return urlencode(pairs)

    def within(self, row: Mapping[str, Any]) -> Question | None:
        """The question of one row of the answer alone; None where no filter can name it."""
        if not self.by or any(row[k] is None or k not in (*FILTERS, *COST_FILTERS, "hour") for k in self.by):
            return None
        narrow = {k: [str(row[k])] for k in self.by if k != "hour"}
        found = replace(self, by=[], where={**self.where, **narrow})
        if "hour" in self.by:
            hour = row["hour"] if isinstance(row["hour"], datetime) else datetime.fromisoformat(row["hour"])
            found = replace(found, start=hour, end=hour + timedelta(hours=1))
        return found

    def without(self, *filters: str) -> Question:
        """The question without these filters."""
        return replace(self, where={key: value for key, value in self.where.items() if key not in filters})

    @property
    def kept(self) -> list[tuple[str, str]]:
        """Its filters as fields of a form: names and values as `query` writes them."""
        return [(key, quoted(value)) for key, values in self.where.items() for value in values]

    @property
    def asked(self) -> dict[str, Any]:
        """As keyword arguments of the ledger's questions, without `by`."""
        return {"where": self.where, "start": self.start, "end": self.end}


def _question_with(start: str, end: str) -> Callable[..., Question]:
    def read(
        caller: Reader,
        by: Names = [],  # noqa: B006 (FastAPI copies it)
        book: Names = [BOOK],  # noqa: B006
        first: Moment | None = Query(None, alias=start),  # noqa: B008 (its alias is not known before)
        last: Moment | None = Query(None, alias=end),  # noqa: B008
        pool: Names = [],  # noqa: B006
        model: Names = [],  # noqa: B006
        tenant: Names = [],  # noqa: B006
        phase: Names = [],  # noqa: B006
        category: Names = [],  # noqa: B006
        component: Names = [],  # noqa: B006
    ) -> Question:
        """A tenant's token sees that tenant's rows alone, whatever it asks for."""
        given = {
            "book": book, "pool": pool, "model": model, "tenant": tenant,
            "phase": phase, "category": category, "component": component,
        }  # fmt: skip
        where = {key: split_names(values) for key, values in given.items() if values}
        if caller.tenant:
            where["tenant"] = [caller.tenant]
        return Question(split_names(by), where, first, last)

    return read


Asking = Annotated[Question, Depends(_question_with("start", "end"))]
"""Of the API: hours are ``start`` and ``end``."""
Looking = Annotated[Question, Depends(_question_with("from", "to"))]
"""Of pages and figures: hours are ``from`` and ``to``."""


def split_names(values: Sequence[str]) -> list[str]:
    """``?by=pool,model`` and ``?by=pool&by=model`` are the same.

    A value in quotes is one name: ``"a,b"`` has a comma in it, ``""`` is the name of what has none (two quotes inside
    of them stand for one).
    """
    names: list[str] = []
    for value in values:
        if len(value) > 1 and value[0] == value[-1] == '"':
            names.append(value[1:-1].replace('""', '"'))
        else:
            names += [part for part in value.split(",") if part]
    return list(dict.fromkeys(names))


def plain_rows(table: pa.Table) -> list[dict[str, Any]]:
    """An answer's rows for JSON: decimals as text, exact; times as text in UTC. Raises InputError on too many."""
    if table.num_rows > MOST_ROWS:
        raise InputError(f"{table.num_rows} rows: ask for at most {MOST_ROWS}, by fewer dimensions or hours")
    return [{key: _plain(value) for key, value in row.items()} for row in table.to_pylist()]


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime):
        return utc_text(value)
    return value
