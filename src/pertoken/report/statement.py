"""Chargeback: a month's statement per tenant, and all of them with what is nobody's: together the ledger, to the digit.

    own line    Σ cost of the tenant's rows, by pool, model, phase and component, as the ledger has it
    idle line   the tenant's part of what idles in a pool (`_spread`), where the fleet's `chargeback` spreads it
    Σ statements + nobody's = Σ ledger of the month                                 [USD, nine digits]

Nothing is rounded but for reading: amounts to the cent are made by largest remainder, first of the ledger's total over
tenants and nobody, then of each tenant's over its lines, so that what is read adds up as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from pertoken.errors import InputError
from pertoken.fleet import RunningFleet
from pertoken.ledger import Ledger
from pertoken.ledger._driven import driven
from pertoken.meter.attribute import BOOK
from pertoken.report._month import Month, energy_missing
from pertoken.report._page import Block, Table, Text, html_page, write_whole
from pertoken.report._spread import apportioned, rounded, weights_of
from pertoken.report._written import COUNTED_UNITS, counted, csv_text
from pertoken.units import IDLE, METERS, TOKEN_METERS, base_meter

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
LEFT_OUT = "Idle GPUs and what the site costs are left with nobody here; the fleet's policy spreads them."
HEAD = ("Pool", "Model", "Phase", "Component", "Quantity", "USD", "Basis")
TOKENS_HEAD = ("Model", "Meter", "Tokens")
CAPTION = "Cost [USD] by pool, model, phase and component, to the cent; the CSV has all digits"
SHARES_HEAD = ("Tenant", "Own", "Part of idle", "Statement")
SHARES_CAPTION = "USD; the last column to the cent, so that it adds up to the ledger's total"
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
class Statement:
    """What a tenant is charged for a month."""

    tenant: str
    month: Month
    lines: tuple[Line, ...]
    tokens: tuple[tuple[str, str, Decimal], ...]
    """Model, meter, amount."""
    policy: str
    missing: tuple[str, ...] = ()
    """Pools of its lines whose energy nobody metered."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Why its sums may still change, and what is missing in them."""
        return (*self.month.notes, *self.missing)

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
        month = Month.from_dict(told)
        lines = [
            Line(
                one["what"], one["pool"], one["model"], one["phase"], one["category"], one["component"],
                tuple((meter, Decimal(amount)) for meter, amount in one["quantities"].items()),
                Decimal(one["usd"]), Decimal(one["usd_to_the_cent"]), one["basis"],
            )
            for one in told["lines"]
        ]  # fmt: skip
        tokens = tuple((one["model"], one["meter"], Decimal(one["quantity"])) for one in told["tokens"])
        return cls(told["tenant"], month, tuple(lines), tokens, told["policy"], _missing_told(told, month))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: amounts as text, exact."""
        return {
            "tenant": self.tenant, **self.month.to_dict(),
            "usd": _text(self.usd), "usd_to_the_cent": _text(self.shown_usd), "policy": self.policy,
            "notes": list(self.notes),
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
        rows = [(_place(line), line.quantity, f"{line.shown_usd:,.2f} USD") for line in self.lines]
        rows.append(("total", "", f"{self.shown_usd:,.2f} USD"))
        head = [f"Statement of {self.tenant}, {self.month.name} ({self.month.timezone})", ""]
        return "\n".join([*head, *_columns(rows), "", self.policy, *self.notes])

    def _blocks(self) -> list[Block]:
        return [
            Text("", [self.month.span, self.policy, *self.notes]),
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
    missing: tuple[str, ...] = ()
    """Pools whose energy nobody metered."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Why its sums may still change, and what is missing in them."""
        return (*self.month.notes, *self.missing)

    @property
    def shown_usd(self) -> Decimal:
        """The ledger's total to the cent, and the sum of all that is shown."""
        return sum((share.shown_usd for share in (*self.tenants, *self.nobodys)), Decimal("0.00"))

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A row per tenant under `SHARES_HEAD`, then what is nobody's, for people."""
        return [
            (s.tenant or f"({s.what})", f"{s.own_usd:,.2f}", f"{s.idle_usd:,.2f}", f"{s.shown_usd:,.2f}")
            for s in (*self.tenants, *self.nobodys)
        ]

    @property
    def sum_row(self) -> tuple[str, ...]:
        """What the rows add up to, under `SHARES_HEAD`."""
        return ("Ledger", "", "", f"{self.shown_usd:,.2f}")

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Chargeback:
        """The statements that `to_dict` gave."""
        month = Month.from_dict(told)
        tenants, nobodys = (
            tuple(
                Share(
                    one["tenant"], Decimal(one["own_usd"]), Decimal(one["idle_usd"]),
                    Decimal(one["usd_to_the_cent"]), one["what"],
                )
                for one in told[which]
            )
            for which in ("tenants", "nobodys")
        )  # fmt: skip
        missing = _missing_told(told, month)
        return cls(month, tenants, nobodys, Decimal(told["ledger_usd"]), told["policy"], missing)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: amounts as text, exact."""

        def told(share: Share) -> dict[str, str]:
            return {
                "tenant": share.tenant, "what": share.what, "own_usd": _text(share.own_usd),
                "idle_usd": _text(share.idle_usd), "usd": _text(share.usd), "usd_to_the_cent": _text(share.shown_usd),
            }  # fmt: skip

        return {
            **self.month.to_dict(), "policy": self.policy, "notes": list(self.notes),
            "ledger_usd": _text(self.ledger_usd), "usd_to_the_cent": _text(self.shown_usd),
            "tenants": [told(s) for s in self.tenants], "nobodys": [told(s) for s in self.nobodys],
        }  # fmt: skip

    def csv(self) -> str:
        """A row per tenant, then what is nobody's."""
        rows = [
            [s.tenant, s.what, *(_text(v) for v in (s.own_usd, s.idle_usd, s.usd, s.shown_usd))]
            for s in (*self.tenants, *self.nobodys)
        ]
        return csv_text(["tenant", "what", "own_usd", "idle_usd", "usd", "usd_to_the_cent"], rows)

    def to_csv(self, path: Path) -> None:
        """Write the CSV."""
        write_whole(path, self.csv())

    def to_html(self, path: Path) -> None:
        """Write one page that needs nothing else."""
        blocks: list[Block] = [
            Text("", [self.month.span, self.policy, *self.notes]),
            Table(SHARES_CAPTION, SHARES_HEAD, [*self.rows, self.sum_row], (1, 2, 3)),
        ]
        write_whole(path, html_page("Statements of all tenants", self.month.name, blocks))

    def __str__(self) -> str:
        head = [
            f"Statements of all tenants, {self.month.name} ({self.month.timezone})",
            f"{SHARES_CAPTION}.",
            "",
        ]
        lines = _columns([SHARES_HEAD, *self.rows, self.sum_row]) if self.rows else ["Nothing was metered."]
        return "\n".join([*head, *lines, "", self.policy, *self.notes])


def chargeback(ledger: Ledger, fleet: RunningFleet, month: Month, spread: bool | None = None) -> Chargeback:
    """What each tenant is charged for a month, and what is nobody's. `spread`: as `statement` has it.

    Raises InputError where idle is asked for and the policy spreads none.
    """
    spreads, policy = _spreading(fleet, spread, LEFT_OUT)
    return _Sums(ledger, fleet, month, spread=spreads).chargeback(policy)


def statement(
    ledger: Ledger, fleet: RunningFleet, month: Month, tenant: str, spread: bool | None = None
) -> Statement:
    """A tenant's statement. `spread`: with its part of idle (None: as the fleet's policy says).

    Raises InputError where idle is asked for and the policy spreads none, or the tenant has no rows.
    """
    spreads, policy = _spreading(fleet, spread, NOT_SPREAD)
    sums = _Sums(ledger, fleet, month, spread=spreads)
    if tenant in ("", IDLE) or tenant not in sums.own:
        # No names of others: whoever asks may be a tenant.
        raise InputError(
            f"nothing was charged to {tenant[:100]!r} in {month.name}: see that its usage names it so"
        )
    return sums.statement(tenant, policy)


def _spreading(fleet: RunningFleet, asked: bool | None, left_out: str) -> tuple[bool, str]:
    """Whether idle is spread, and what a statement says of it; `left_out`: where it is to be left out."""
    policy = fleet.chargeback.spread_idle
    if asked and policy == "no":
        raise InputError("the fleet's policy spreads no idle: set chargeback.spread_idle in the fleet file")
    if policy != "no" and asked is False:
        return False, left_out
    return policy != "no", POLICIES[policy]


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

    def chargeback(self, policy: str) -> Chargeback:
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
            policy,
            energy_missing(self._ledger, self._fleet, self._month),
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
        pools = {line.pool for line in lines}
        missing = energy_missing(self._ledger, self._fleet, self._month, pools)
        return Statement(tenant, self._month, tuple(lines), told, policy, missing)

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


def _missing_told(told: Mapping[str, Any], month: Month) -> tuple[str, ...]:
    return tuple(note for note in told["notes"] if note not in month.notes)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under one another: names to the left, amounts to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


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
