"""Budgets and statements for the command line: through the service that holds a data folder, else from the folder."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from pertoken.report._month import month_named
from pertoken.report.budgets import standings
from pertoken.report.statement import Chargeback, Statement, chargeback
from pertoken.report.statement import statement as made
from pertoken.web.serve import _books, ask


def budgets(folder: Path, fleet_file: Path | None, tenant: str = "") -> list[dict[str, Any]]:
    """How the budgets that have begun stand; `tenant`: those of that tenant alone.

    Raises InputError where no service runs and no fleet file is given.
    """
    found = ask(folder, "GET", "/v1/budgets")
    if found is None:
        with _books(folder, fleet_file) as books:
            found = [standing.to_dict() for standing in standings(books, datetime.now(UTC))]
    return [one for one in found if not tenant or one["tenant"] == tenant]


def statement(
    folder: Path, fleet_file: Path | None, tenant: str, month: str, spread: bool | None = None
) -> Statement | Chargeback:
    """A tenant's statement of a month (2026-11); all tenants' with what is nobody's where none is named.

    `spread`: with its part of idle (None: as the fleet's policy says). Raises InputError on a month or tenant there is
    not, or where idle is asked for and the policy spreads none.
    """
    asked = urlencode({"month": month} | ({} if spread is None else {"spread": str(spread).lower()}))
    whose = f"/{quote(tenant, safe='')}.json" if tenant else ".json"
    found = ask(folder, "GET", f"/statement{whose}?{asked}")
    if found is not None:
        return Statement.from_dict(found) if tenant else Chargeback.from_dict(found)
    with _books(folder, fleet_file) as books:
        span = month_named(month, books.fleet, books.ledger, books.reached)
        if not tenant:
            return chargeback(books.ledger, books.fleet, span, spread)
        return made(books.ledger, books.fleet, span, tenant, spread)
