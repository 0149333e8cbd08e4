"""Chargeback: a month's statement per tenant, and all of them with what is nobody's: together the ledger, to the digit.

    own line    Σ cost of the tenant's rows, by pool, model, phase and component, as the ledger has it
    idle line   the tenant's part of what idles in a pool (`_spread`), where the fleet's `chargeback` spreads it
    Σ statements + nobody's = Σ ledger of the month                                 [USD, nine digits]

Nothing is rounded but for reading: amounts to the cent are made by largest remainder, first of the ledger's total over
tenants and nobody, then of each tenant's over its lines, so that what is read adds up as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from pertoken.errors import InputError
from pertoken.fleet import RunningFleet
from pertoken.ledger import Ledger
from pertoken.ledger._driven import driven
from pertoken.meter.attribute import BOOK
from pertoken.report._page import Block, Table, Text, html_page, write_whole
from pertoken.report._spread import apportioned, rounded, weights_of
from pertoken.report._written import COUNTED_UNITS, counted, csv_text, utc_text, utc_told
from pertoken.report.books import HOUR
from pertoken.units import IDLE, METERS, MONTHS_PER_YEAR, TOKEN_METERS, base_meter

_NANO = 10**9
_CENTS = 100
POLICIES = {
    "no": "Idle GPUs and what the site costs are nobody's: they are on no statement.",
    "by_gpu_hours": "Idle GPUs and what the site costs are spread over who used the pool (else the site), by the GPU "
    "hours each held in the month.",
    "by_cost": "Idle GPUs and what the site costs are spread over who used the pool (else the site), by what each "
    "one's use cost in the month.",
}
"""What a statement says of idle, by the fleet's policy."""
_SPREAD = {"by_gpu_hours": "spread by GPU hours", "by_cost": "spread by cost"}
NOT_SPREAD = (
    "Idle GPUs and what the site costs are left out of this statement; the fleet's policy spreads them."
)
HEAD = ("Pool", "Model", "Phase", "Component", "Quantity", "USD", "Basis")
TOKENS_HEAD = ("Model", "Meter", "Tokens")
CAPTION = "Cost [USD] by pool, model, phase and component, to the cent; the CSV has all digits"
Key = tuple[str, str, str, str, str]
"""Pool, model, phase, category, component."""


@dataclass(frozen=True)
class Line:
    """One line: `usd` exact, `shown_usd` to the cent, so that the lines shown add up to the total shown."""

    what: str
    """``own``, or ``idle``: a part of what nobody used."""
    pool: str
    model: str
    phase: str
    category: str
    component: str
    quantities: tuple[tuple[str, Decimal], ...]
    usd: Decimal
    shown_usd: Decimal
    basis: str

    @property
    def told_phase(self) -> str:
        """The phase, and whether it is of what nobody used: a site's demand charge has the phases that drew it."""
        return self.phase if self.what == "own" or self.phase == "idle" else f"idle, {self.phase}"

    @property
    def quantity(self) -> str:
        """Quantities with their units, for people."""
        return ", ".join(_told(meter, amount) for meter, amount in self.quantities)


@dataclass(frozen=True)
class Month:
    """A month: its name, its hours (UTC), and how far they are closed."""

    name: str
    start: datetime
    end: datetime
    timezone: str
    closed_until: datetime
    unpriced_hours: int

    @property
    def span(self) -> str:
        """Its hours, for people."""
        return f"{utc_told(self.start)} to {utc_told(self.end)} ({self.timezone})"

    @property
    def notes(self) -> tuple[str, ...]:
        """Why its sums may still change."""
        found = []
        if self.closed_until < self.end:
            found.append(f"Provisional: the month is closed up to {utc_told(self.closed_until)}.")
        if self.unpriced_hours:
            found.append(
                f"{counted(self.unpriced_hours, 'hour')} with usage that no rate prices yet: its cost is missing."
            )
        return tuple(found)


@dataclass(frozen=True)
class Statement:
    """What a tenant is charged for a month."""

    tenant: str
    month: Month
    lines: tuple[Line, ...]
    tokens: tuple[tuple[str, str, Decimal], ...]
    """Model, meter, amount."""
    policy: str

    @property
    def usd(self) -> Decimal:
        """All lines, exact."""
        return sum((line.usd for line in self.lines), Decimal(0))

    @property
    def shown_usd(self) -> Decimal:
        """All lines, to the cent."""
        return sum((line.shown_usd for line in self.lines), Decimal("0.00"))

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The lines under `HEAD`, for people."""
        return [
            (o.pool, o.model or "–", o.told_phase, o.component, o.quantity, f"{o.shown_usd:,.2f}", o.basis)
            for o in self.lines
        ]

    @property
    def sum_row(self) -> tuple[str, ...]:
        """What the lines add up to, under `HEAD`."""
        return ("Total", "", "", "", "", f"{self.shown_usd:,.2f}", "")

    @property
    def token_rows(self) -> list[tuple[str, ...]]:
        """Tokens under `TOKENS_HEAD`, for people."""
        return [(model or "–", meter, f"{amount:,.0f}") for model, meter, amount in self.tokens]

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Statement:
        """The statement that `to_dict` gave."""
        month = Month(
            told["month"], datetime.fromisoformat(told["start"]), datetime.fromisoformat(told["end"]),
            told["timezone"], datetime.fromisoformat(told["closed_until"]), told["unpriced_hours"],
        )  # fmt: skip
        lines = [
            Line(
                one["what"], one["pool"], one["model"], one["phase"], one["category"], one["component"],
                tuple((meter, Decimal(amount)) for meter, amount in one["quantities"].items()),
                Decimal(one["usd"]), Decimal(one["usd_to_the_cent"]), one["basis"],
            )
            for one in told["lines"]
        ]  # fmt: skip
        tokens = tuple((one["model"], one["meter"], Decimal(one["quantity"])) for one in told["tokens"])
        return cls(told["tenant"], month, tuple(lines), tokens, told["policy"])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: amounts as text, exact."""
        return {
            "tenant": self.tenant, "month": self.month.name, "timezone": self.month.timezone,
            "closed_until": utc_text(self.month.closed_until),
            "unpriced_hours": self.month.unpriced_hours,
            "start": utc_text(self.month.start), "end": utc_text(self.month.end),
            "usd": _text(self.usd), "usd_to_the_cent": _text(self.shown_usd), "policy": self.policy,
            "notes": list(self.month.notes),
            "lines": [
                {
                    "what": one.what, "pool": one.pool, "model": one.model, "phase": one.phase,
                    "category": one.category, "component": one.component,
                    "quantities": {meter: _text(amount) for meter, amount in one.quantities},
                    "usd": _text(one.usd), "usd_to_the_cent": _text(one.shown_usd), "basis": one.basis,
                }
                for one in self.lines
            ],
            "tokens": [{"model": m, "meter": meter, "quantity": _text(q)} for m, meter, q in self.tokens],
        }  # fmt: skip

    def csv(self) -> str:
        """The lines as CSV, a column per meter; `usd` exact, `usd_to_the_cent` adding up to the total's."""
        meters = [m for m in METERS if any(m == name for line in self.lines for name, _ in line.quantities)]
        keys = ("what", "pool", "model", "phase", "category", "component")
        head = ["tenant", "month", *keys, *meters, "usd", "usd_to_the_cent", "basis"]
        rows = []
        for line in self.lines:
            amounts = {meter: _text(amount) for meter, amount in line.quantities}
            names = [self.tenant, self.month.name, *(getattr(line, k) for k in keys)]
            told = [amounts.get(meter, "") for meter in meters]
            rows.append([*names, *told, _text(line.usd), _text(line.shown_usd), line.basis])
        return csv_text(head, rows)

    def to_csv(self, path: Path) -> None:
        """Write the CSV."""
        write_whole(path, self.csv())

    def to_html(self, path: Path) -> None:
        """Write one page that needs nothing else."""
        write_whole(path, html_page(f"Statement of {self.tenant}", self.month.name, self._blocks()))

    def __str__(self) -> str:
        rows = [(_place(line), line.quantity, f"{line.shown_usd:,.2f}") for line in self.lines]
        rows.append(("total", "", f"{self.shown_usd:,.2f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}} USD" for a, b, c in rows]
        head = [f"Statement of {self.tenant}, {self.month.name} ({self.month.timezone})", ""]
        return "\n".join([*head, *lines, "", self.policy, *self.month.notes])

    def _blocks(self) -> list[Block]:
        return [
            Text("", [self.month.span, self.policy, *self.month.notes]),
            Table(CAPTION, HEAD, [*self.rows, self.sum_row], (4, 5)),
            Table("Tokens", TOKENS_HEAD, self.token_rows, (2,)),
        ]


@dataclass(frozen=True)
class Share:
    """One tenant of a month, or what is nobody's (tenant empty)."""

    tenant: str
    own_usd: Decimal
    idle_usd: Decimal
    shown_usd: Decimal
    what: str = ""
    """Of what is nobody's: what it is."""

    @property
    def usd(self) -> Decimal:
        """Exact."""
        return self.own_usd + self.idle_usd


@dataclass(frozen=True)
class Chargeback:
    """All statements of a month and what is nobody's: together the ledger."""

    month: Month
    tenants: tuple[Share, ...]
    nobodys: tuple[Share, ...]
    ledger_usd: Decimal
    policy: str

    @property
    def shown_usd(self) -> Decimal:
        """The ledger's total to the cent, and the sum of all that is shown."""
        return sum((share.shown_usd for share in (*self.tenants, *self.nobodys)), Decimal("0.00"))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: amounts as text, exact."""

        def told(share: Share) -> dict[str, str]:
            return {
                "tenant": share.tenant, "what": share.what, "own_usd": _text(share.own_usd),
                "idle_usd": _text(share.idle_usd), "usd": _text(share.usd), "usd_to_the_cent": _text(share.shown_usd),
            }  # fmt: skip

        return {
            "month": self.month.name, "timezone": self.month.timezone, "policy": self.policy,
            "notes": list(self.month.notes), "ledger_usd": _text(self.ledger_usd),
            "tenants": [told(s) for s in self.tenants], "nobodys": [told(s) for s in self.nobodys],
        }  # fmt: skip

    def csv(self) -> str:
        """A row per tenant, then what is nobody's."""
        rows = [
            [s.tenant, s.what, *(_text(v) for v in (s.own_usd, s.idle_usd, s.usd, s.shown_usd))]
            for s in (*self.tenants, *self.nobodys)
        ]
        return csv_text(["tenant", "what", "own_usd", "idle_usd", "usd", "usd_to_the_cent"], rows)


def month_named(text: str, fleet: RunningFleet, ledger: Ledger, closed_until: datetime | None) -> Month:
    """A month by its name, such as 2026-11, in the time zone of the fleet's chargeback. Raises InputError."""
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", text, re.ASCII) or not 1970 <= int(text[:4]) <= 2200:
        raise InputError(f"{text[:20]!r} is no month: write 2026-11")
    zone = ZoneInfo(fleet.chargeback.timezone)
    number = int(text[:4]) * MONTHS_PER_YEAR + int(text[5:]) - 1
    start, end = (_border(number + n, zone) for n in (0, 1))
    open_hours = max((int(str(r["hours"])) for r in ledger.unpriced(BOOK, start, end)), default=0)
    return Month(
        text, start, end, fleet.chargeback.timezone, max(start, min(closed_until or end, end)), open_hours
    )


def chargeback(ledger: Ledger, fleet: RunningFleet, month: Month) -> Chargeback:
    """What each tenant is charged for a month, and what is nobody's."""
    return _Sums(ledger, fleet, month, spread=fleet.chargeback.spread_idle != "no").chargeback()


def statement(
    ledger: Ledger, fleet: RunningFleet, month: Month, tenant: str, spread: bool | None = None
) -> Statement:
    """A tenant's statement. `spread`: with its part of idle (None: as the fleet's policy says).

    Raises InputError where idle is asked for and the policy spreads none, or the tenant has no rows.
    """
    policy = fleet.chargeback.spread_idle
    if spread and policy == "no":
        raise InputError("the fleet's policy spreads no idle: set chargeback.spread_idle in the fleet file")
    sums = _Sums(ledger, fleet, month, spread=policy != "no" and spread is not False)
    if tenant in ("", IDLE) or tenant not in sums.own:
        # No names of others: whoever asks may be a tenant.
        raise InputError(
            f"nothing was charged to {tenant[:100]!r} in {month.name}: see that its usage names it so"
        )
    return sums.statement(tenant, NOT_SPREAD if spread is False and policy != "no" else POLICIES[policy])


class _Sums:
    """A month's costs, own and idle, in whole nano-USD."""

    def __init__(self, ledger: Ledger, fleet: RunningFleet, month: Month, *, spread: bool) -> None:
        self._ledger, self._fleet, self._month = ledger, fleet, month
        self._window = {"start": month.start, "end": month.end}
        rows = ledger.cost("tenant", where={"book": BOOK}, **self._window).to_pylist()
        self.own = {row["tenant"]: _nano(row["cost_usd"]) for row in rows}
        self.idle: dict[str, dict[Key, int]] = defaultdict(dict)
        """By tenant (empty: nobody's), its part of each idle line."""
        weights = weights_of(ledger, fleet, month.start, month.end) if spread else {}
        keys = ("pool", "phase", "category", "component")
        for row in ledger.cost(*keys, where={"book": BOOK, "tenant": IDLE}, **self._window).to_pylist():
            key = (row["pool"], "", row["phase"], row["category"], row["component"])
            used = weights.get(row["pool"]) or {"": Fraction(1)}
            for tenant, part in apportioned(_nano(row["cost_usd"]), used).items():
                self.idle[tenant][key] = part
        for tenant in self.idle:
            self.own.setdefault(tenant, 0)  # its own usage has no price yet

    def chargeback(self) -> Chargeback:
        """All tenants and nobody, to the cent adding up."""
        cents = self._cents()
        named = [t for t in self.own if t not in ("", IDLE)]
        tenants = [
            Share(t, _usd(self.own[t]), _usd(sum(self.idle.get(t, {}).values())), _cent(cents[t]))
            for t in named
        ]
        nobodys = []
        if "" in self.own:
            nobodys.append(
                Share("", _usd(self.own[""]), Decimal(0), _cent(cents["", "own"]), "no tenant named")
            )
        left = sum(self.idle.get("", {}).values())
        if left or IDLE in self.own:
            nobodys.append(
                Share("", Decimal(0), _usd(left), _cent(cents["", "idle"]), "idle and sites, not spread")
            )
        return Chargeback(
            self._month,
            tuple(sorted(tenants, key=lambda s: (-s.usd, s.tenant))),
            tuple(nobodys),
            _usd(sum(self.own.values())),
            POLICIES[self._fleet.chargeback.spread_idle],
        )

    def statement(self, tenant: str, policy: str) -> Statement:
        """The lines of one tenant."""
        where = {"book": BOOK, "tenant": tenant}
        keys = ("pool", "model", "phase", "category", "component")
        own: dict[Key, int] = {
            (row["pool"], row["model"], row["phase"], row["category"], row["component"]): _nano(
                row["cost_usd"]
            )
            for row in self._ledger.cost(*keys, where=where, **self._window).to_pylist()
        }
        amounts, bases = self._driven(where)
        idle = self.idle.get(tenant, {})
        exact = {("own", key): value for key, value in own.items()} | {
            ("idle", key): v for key, v in idle.items() if v
        }
        total = self._cents()[tenant]
        shown = rounded(total, {key: Fraction(value * _CENTS, _NANO) for key, value in exact.items()})
        spread = _SPREAD.get(self._fleet.chargeback.spread_idle, "")
        lines = []
        for (what, key), value in exact.items():
            mine = what == "own"
            quantities = tuple(sorted(amounts.get(key, {}).items())) if mine else ()
            basis = bases.get(key, "") if mine else spread
            lines.append(Line(what, *key, quantities, _usd(value), _cent(shown[what, key]), basis))
        lines.sort(key=lambda o: (o.what == "idle", o.pool, o.model, o.phase, o.category, o.component))
        used = self._ledger.usage("model", "meter", where=where | {"meter": TOKEN_METERS}, **self._window)
        tokens: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
        for row in used.to_pylist():
            tokens[row["model"], base_meter(row["meter"])] += row["quantity"]
        told = tuple((model, meter, amount) for (model, meter), amount in sorted(tokens.items()))
        return Statement(tenant, self._month, tuple(lines), told, policy)

    def _cents(self) -> dict[Any, int]:
        """Cents by tenant, and of what is nobody's: together the ledger's total, rounded."""
        exact: dict[Any, Fraction] = {
            tenant: Fraction((nano + sum(self.idle.get(tenant, {}).values())) * _CENTS, _NANO)
            for tenant, nano in self.own.items()
            if tenant not in ("", IDLE)
        }
        exact["", "own"] = Fraction(self.own.get("", 0) * _CENTS, _NANO)
        exact["", "idle"] = Fraction(sum(self.idle.get("", {}).values()) * _CENTS, _NANO)
        return rounded(round(sum(exact.values(), Fraction(0))), exact)

    def _driven(self, where: Mapping[str, str]) -> tuple[dict[Key, dict[str, Decimal]], dict[Key, str]]:
        """By line, the quantities it is the price of, by meter, and how both are known."""
        amounts: dict[Key, dict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
        used: dict[Key, set[str]] = defaultdict(set)
        priced: dict[Key, set[str]] = defaultdict(set)
        for row in driven(self._ledger, where, self._month.start, self._month.end).to_pylist():
            key = (row["pool"], row["model"], row["phase"], row["category"], row["component"])
            amounts[key][base_meter(row["meter"])] += row["quantity"]
            used[key].add(row["quantity_basis"].partition(":")[0])
            priced[key] |= {row["basis_first"].partition(":")[0], row["basis_last"].partition(":")[0]}
        bases = {
            key: f"quantity {' and '.join(sorted(used[key]))}, rate {' and '.join(sorted(priced[key]))}"
            for key in used
        }
        return {key: dict(found) for key, found in amounts.items()}, bases


def _border(number: int, zone: ZoneInfo) -> datetime:
    year, index = divmod(number, MONTHS_PER_YEAR)
    moment = datetime.combine(date(year, index + 1, 1), time(), zone).astimezone(UTC)
    full = moment.replace(minute=0, second=0, microsecond=0)
    return full if full == moment else full + HOUR


def _told(meter: str, amount: Decimal) -> str:
    """A quantity with its unit; tokens and requests whole."""
    unit = METERS[meter].unit
    return counted(round(amount), unit) if unit in COUNTED_UNITS else f"{amount:,.3f} {unit}"


def _nano(usd: Decimal) -> int:
    """The ledger's digits as a whole number, exact."""
    return int(usd.scaleb(9))


def _usd(nano: int) -> Decimal:
    return Decimal(nano).scaleb(-9)


def _cent(cents: int) -> Decimal:
    return Decimal(cents).scaleb(-2)


def _text(value: Decimal) -> str:
    return format(value, "f")


def _place(line: Line) -> str:
    parts = (line.pool, line.model, line.told_phase, line.component)
    return " · ".join(part for part in parts if part)
