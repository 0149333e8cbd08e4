"""Long answers in pages: a cursor says after which row the next page begins, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, Query

from pertoken.errors import InputError
from pertoken.ledger import Ledger
from pertoken.web._question import MOST_ROWS, Question, plain_rows

_LONGEST = 32_768
_BAD = "this cursor is none of ours: send `next` of an answer as it came, with the question it answered"


@dataclass(frozen=True)
class Paging:
    """How many rows an answer has at most, and after which it begins."""

    limit: int | None
    cursor: str

    def answer(self, ledger: Ledger, names: Sequence[str], question: Question) -> dict[str, Any]:
        """`rows` of a question, and `next`: the cursor of the page after them, None where they are the last.

        Parameters: names as `Ledger.page` takes them. Raises InputError on a cursor of another question, and without a
        limit on more rows than an answer may hold.
        """
        limit = self.limit or MOST_ROWS
        mark = _mark(names, question)
        after = _after(self.cursor, mark, question.by) if self.cursor else None
        # One more than asked for tells whether there is a next page.
        found = ledger.page(*names, by=question.by, **question.asked, after=after, limit=limit + 1)
        more = found.num_rows > limit
        if more and self.limit is None and not self.cursor:
            raise InputError(
                f"more than {MOST_ROWS} rows: ask by fewer dimensions or hours, or in pages: add limit=10000, then "
                "cursor= with the answer's `next`"
            )
        shown = found.slice(0, limit)
        following = _cursor(mark, question.by, shown.slice(limit - 1).to_pylist()[0]) if more else None
        return {"rows": plain_rows(shown), "next": following}


def _paging(
    limit: Annotated[
        int | None,
        Query(ge=1, le=MOST_ROWS, description="rows of a page at most; without it, the answer comes whole"),
    ] = None,
    cursor: Annotated[
        str,
        Query(
            max_length=_LONGEST, description="`next` of the page before; the rest of the question as it was"
        ),
    ] = "",
) -> Paging:
    return Paging(limit, cursor)


Pages = Annotated[Paging, Depends(_paging)]


def _mark(names: Sequence[str], question: Question) -> str:
    """What the question is, its caller's scope included: a cursor of another is a mistake."""
    window = [
        moment.astimezone(UTC).isoformat() if moment else None for moment in (question.start, question.end)
    ]
    where = {key: sorted(values) for key, values in question.where.items()}
    text = json.dumps([list(names), question.by, where, window], sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _cursor(mark: str, by: Sequence[str], row: dict[str, Any]) -> str:
    values = [v.isoformat() if isinstance(v := row[key], datetime) else v for key in by]
    return base64.urlsafe_b64encode(json.dumps([mark, *values]).encode()).decode().rstrip("=")


def _after(cursor: str, mark: str, by: Sequence[str]) -> list[object]:
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        read = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if not isinstance(read, list) or len(read) != len(by) + 1 or read[0] != mark:
            raise InputError(_BAD)
        return [_value(key, value) for key, value in zip(by, read[1:], strict=True)]
    except (ValueError, OverflowError, RecursionError) as error:  # of base64, JSON, text, or time
        raise InputError(_BAD) from error


def _value(key: str, value: Any) -> object:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(_BAD)
    if key == "hour":
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise InputError(_BAD)
        return moment.astimezone(UTC)
    value.encode()  # half a surrogate pair is no text a ledger holds
    return value
