"""Budgets as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from pertoken.report._written import counted, percent

_WIDTH = 40


def told(budgets: Sequence[Mapping[str, Any]], tenant: str = "") -> str:
    """Budgets as `Standing.to_dict` gives them: figures, and a bar of ``#`` spent, ``-`` expected, ``|`` the budget.

    `tenant`: whose alone were asked for.

    >>> told([], "blu")
    "no budget of tenant 'blu' has begun: without --tenant all are shown"
    """
    if not budgets and tenant:
        return f"no budget of tenant {tenant!r} has begun: without --tenant all are shown"
    if not budgets:
        return "no budget has begun: write some under `budgets` in the fleet file (docs/budgets.md)"
    return "\n\n".join(_one(budget) for budget in budgets)


def _one(budget: Mapping[str, Any]) -> str:
    amount, spent, forecast = Decimal(budget["amount"]), Decimal(budget["spent"]), budget["forecast"]

    def shown(value: str | Decimal) -> str:
        return f"{Decimal(value):,.{2 if budget['unit'] == 'USD' else 0}f}"

    scope = [f"tenant {budget['tenant']}"] if budget["tenant"] else []
    scope += [f"models {', '.join(budget['models'])}"] if budget["models"] else []
    scope += [f"pools {', '.join(budget['pools'])}"] if budget["pools"] else []
    about = [", ".join(scope) or "everything", "hard" if budget["hard"] else "soft", budget["period"]]
    lines = [
        f"{budget['name']} ({'; '.join(about)}, to {_when(budget['period_end'])})",
        f"  {_bar(amount, spent, Decimal(forecast['expected']) if forecast else spent)}",
        f"  spent     {shown(spent)} of {shown(amount)} {budget['unit']} ({percent(budget['spent_fraction'])}), "
        f"{shown(budget['remaining'])} left",
    ]
    if forecast:
        expected, low, high = (shown(forecast[k]) for k in ("expected", "low", "high"))
        lines.append(f"  forecast  {expected} (80 %: {low} to {high}; {forecast['method']})")
    else:
        lines.append(f"  forecast  none: {budget['forecast_missing']}")
    rates = [f"{shown(v)} per h over {k}" for k, v in budget["burn_per_hour"].items() if v is not None]
    lines.append(f"  burn      {', '.join(rates) or 'not known yet'}")
    lines.append(f"  runs out  {_when(budget['runs_out']) if budget['runs_out'] else 'it lasts'}")
    if budget["unpriced_hours"]:
        lines.append(
            f"  {counted(budget['unpriced_hours'], 'hour')} with usage without a price: what it costs is missing"
        )
    if budget["note"]:
        lines.append(f"  {budget['note']}")
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def _bar(amount: Decimal, spent: Decimal, expected: Decimal) -> str:
    """The budget's end stands inside the bar where more is spent or expected."""
    most = max(amount, spent, expected)
    cells = ["."] * _WIDTH
    for upto, sign in ((expected, "-"), (spent, "#")):
        filled = min(_WIDTH, max(0, round(upto / most * _WIDTH)))
        cells[:filled] = sign * filled
    cells.insert(min(_WIDTH, round(amount / most * _WIDTH)), "|")
    return "".join(cells)


def _when(text: str) -> str:
    return f"{text[:10]} {text[11:16]} UTC"
