"""The hour that is not over: attributed and priced as far as it has gone, beside the ledger and never in it.

Attribution knows whole hours. An hour of which a part has gone is told to it as the whole hour would be told: pools
with a fixed count hold their GPUs for the elapsed part alone, and seconds that are compared with an hour's are
stretched to one. Tokens, GPU-hours and kWh stay what they are.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pertoken.errors import InputError, MissingRateError
from pertoken.fleet import RunningFleet
from pertoken.ledger import Ledger, open_ledger
from pertoken.meter import Attribution, Journal, attribute
from pertoken.meter._claims import HELD_BY_COUNT
from pertoken.meter._running import Running
from pertoken.meter._split import MICRO
from pertoken.meter.attribute import BOOK, Finding, Predictor
from pertoken.meter.records import TOTALS
from pertoken.plan._pricing import pays_for_energy
from pertoken.report._billing import restate
from pertoken.report._terms import month_tariff, months_of, rates_of
from pertoken.scenario import Fleet
from pertoken.tables import QUANTITY, USAGE, concat
from pertoken.units import METERS, SECONDS_PER_HOUR, base_meter, site_pool

_HOUR = timedelta(hours=1)
FRESH_S = 5.0
"""How old an answer may be before it is computed anew."""
_SPARED = 20.0
"""An answer is kept for at least this many times as long as it took: looking costs at most 5 % of a core."""
_LONGEST_KEPT_S = 60.0
_LEAST_WINDOW_S = 60
_OF_AN_HOUR = ("seen_seconds", "running_seconds", "prefill_seconds", "decode_seconds")
"""An engine's seconds that attribution holds against an hour, or against one another."""


@dataclass(frozen=True)
class SoFar:
    """What the hour [`hour`, `until`) adds to the books; `until` is when it was asked, at most a few seconds ago.

    `ledger`: in memory, book ``actual``: usage and costs of the hour so far; and, at the first hour of a site's
    billing month, by how much this hour raises the month's peak and its demand charge (a peak is the mean of an hour:
    this one counts with the energy it has drawn so far, over the whole hour, and so never for more than it will).
    The books' own hours before `hour` and this ledger add up to the books as they would be closed now.
    """

    hour: datetime
    until: datetime
    ledger: Ledger
    findings: tuple[Finding, ...] = ()
    unpriced: str = ""
    """Usage that no rate prices: then nothing here has a cost, as the hour will stay open."""

    @property
    def elapsed_fraction(self) -> float:
        """The share of the hour that has gone."""
        return _fraction(self.hour, self.until)


@dataclass(frozen=True)
class Lately:
    """Usage (`tables.USAGE`) of the last `seconds` before `until`, and what it costs at the rates of its hour.

    Without demand charges, which belong to a month. `costs` are rows of ``pool, model, tenant, phase, category,
    component, cost_usd`` [USD, a float: nothing is booked from it].
    """

    until: datetime
    seconds: int
    usage: pa.Table
    costs: tuple[dict[str, Any], ...] = ()
    unpriced: str = ""
    """A meter of these that no rate prices."""
    heard: bool = True
    """Whether any source told anything."""


@dataclass
class _Kept:
    """What changes with the hour or with a close alone."""

    hour: datetime
    closings: int
    rates: pa.Table
    month: Ledger | None
    """Energy of the hours before it in the billing months of sites with a demand charge or tiers; None: no such."""


Once = Callable[[pa.Table], tuple[pa.Table, tuple[Finding, ...]]]
"""Records with each engine counted from one source alone, and what was found on the way."""
PaidByTheHour = Callable[[datetime, pa.Table, pa.Table, int], list[pa.Table]]
"""Usage paid by the hour: of an hour's usage and rates, the millionths of the hour that have gone."""


class Growing:
    """The hour so far of one journal, for any number of threads. `Books` has one."""

    def __init__(
        self,
        journal: Journal,
        ledger: Ledger,
        fleet: RunningFleet,
        predictor: Predictor | None,
        reading: threading.Lock,
        once: Once,
        paid: PaidByTheHour,
    ) -> None:
        self._ledger, self._fleet, self._predictor = ledger, fleet, predictor
        self._once, self._paid = once, paid
        self._reading, self._running = reading, Running(journal, window_s(fleet))
        self._computing = threading.Lock()
        self._answer: tuple[SoFar, float] | None = None
        self._kept: _Kept | None = None
        self._tiers: dict[str, str] = {}
        self.closings = 0
        """Raised by the owner with every close: what the ledger holds of the month may have changed."""

    def so_far(self, now: datetime, fresh_s: float = FRESH_S) -> SoFar:
        """The hour of `now` up to now, at most `fresh_s` old; older where computing it takes long.

        While one thread computes, others get the answer before, if it is of the same hour.
        Raises InputError on a time without a zone.
        """
        if now.tzinfo is None:
            raise InputError(f"{now.isoformat()} has no time zone: give one, such as {now.isoformat()}+00:00")
        now = now.astimezone(UTC)
        last = self._last(now)
        if last is not None and self._is_fresh(last, now, fresh_s):
            return last
        if not self._computing.acquire(blocking=last is None):
            assert last is not None
            return last
        try:
            last = self._last(now)
            if last is None or not self._is_fresh(last, now, fresh_s):
                self.follow(now)
                begun_s = time.thread_time()
                last = self._compute(now)
                self._answer = last, min(_LONGEST_KEPT_S, (time.thread_time() - begun_s) * _SPARED)
            return last
        finally:
            self._computing.release()

    def lately(self, now: datetime) -> Lately:
        """The last seconds before `now`, as many as `window_s` says."""
        now = now.astimezone(UTC)
        hour = _hour(now)
        with self._computing:
            kept = self._keep(hour)
            with self._reading:
                records, seconds = self._running.recent(now)
                whole = self._running.totals(now)
            micro = round(MICRO * seconds / SECONDS_PER_HOUR)
            # Who repeats whom is seen in an hour's counts, not in a minute's.
            dropped = {*_texts(whole, "source")} - {*_texts(self._once(whole)[0], "source")}
            records = records.filter(
                pa.array([s not in dropped for s in _texts(records, "source")], pa.bool_())
            )
            usage = self._attributed(hour, records, micro).usage
            table = concat([usage, *self._paid(hour, usage, kept.rates, micro)], USAGE)
        costs, unpriced = _priced(table, kept.rates, hour, self._tiers)
        return Lately(now, seconds, table, costs, unpriced, records.num_rows > 0)

    def follow(self, now: datetime) -> None:
        """Read what came since the last look, so that the next answer has little to read."""
        with self._reading:
            self._running.follow(now.astimezone(UTC))

    def records(self, hour: datetime) -> pa.Table | None:
        """Records (`records.TOTALS`) of an hour, where it is the one that is being read."""
        with self._reading:
            return self._running.records(hour)

    @property
    def last_words(self) -> dict[str, datetime]:
        """When each source last told something, of those that were heard in the hours read."""
        with self._reading:
            words = dict(self._running.last_words)
        return {source: datetime.fromtimestamp(second, UTC) for source, second in words.items()}

    def shut(self) -> None:
        """Let go of the last answer; who still reads one keeps it."""
        with self._computing:
            self._answer = self._kept = None

    def _last(self, now: datetime) -> SoFar | None:
        last = self._answer[0] if self._answer else None
        return last if last is not None and last.hour == _hour(now) and last.until <= now else None

    def _is_fresh(self, last: SoFar, now: datetime, fresh_s: float) -> bool:
        assert self._answer is not None
        return (now - last.until).total_seconds() < max(fresh_s, self._answer[1])

    def _keep(self, hour: datetime) -> _Kept:
        closings = self.closings
        kept = self._kept
        if kept is None or (kept.hour, kept.closings) != (hour, closings):
            base = self._base(hour)
            month = open_ledger() if base is not None else None
            if month is not None and base is not None:
                month.add_usage(base)
            kept = self._kept = _Kept(hour, closings, rates_of(self._fleet, hour, hour + _HOUR), month)
        return kept

    def _attributed(self, hour: datetime, records: pa.Table, micro: int) -> Attribution:
        fleet = self._fleet.at(hour)
        return attribute(as_whole_hour(records, fleet, hour, micro), fleet, [hour], self._predictor)

    def _compute(self, now: datetime) -> SoFar:
        hour = _hour(now)
        kept = self._keep(hour)
        micro = round(MICRO * _fraction(hour, now))
        ledger = open_ledger()
        if not micro:
            return SoFar(hour, now, ledger)
        with self._reading:
            records = self._running.totals(now)
        records, twins = self._once(records)
        found = self._attributed(hour, records, micro)
        usage = concat([found.usage, *self._paid(hour, found.usage, kept.rates, micro)], USAGE)
        if kept.month is not None:
            usage = self._restated(kept.month, hour, usage)
        self._tiers = {
            pool: meter
            for pool, meter in sorted(zip(_texts(usage, "pool"), _texts(usage, "meter"), strict=True))
            if base_meter(meter) == "energy_kwh"
        }
        ledger.add_usage(usage)
        ledger.add_rates(kept.rates)
        unpriced = ""
        try:
            ledger.close(BOOK)
        except MissingRateError as error:
            unpriced = str(error)
        return SoFar(hour, now, ledger, (*twins, *found.findings), unpriced)

    # -- what belongs to the month

    def _base(self, hour: datetime) -> pa.Table | None:
        """Energy of the earlier hours that the peak and the tiers of its billing months hang on; None: nothing does."""
        parts = []
        for name, site in self._fleet.sites.items():
            pools = [n for n, p in self._fleet.pools.items() if p.site == name and pays_for_energy(p)]
            tariff = month_tariff(self._fleet, name, (hour, hour + _HOUR)) if pools else None
            if tariff is None or (not tariff.tariff.demand and tariff.tariff.tiers == 1):
                continue
            ratchets = any(d.demand.ratchet is not None for d in tariff.demand)
            start = None if ratchets else months_of(site, hour, hour + _HOUR)[0][0]
            where = {"book": BOOK, "pool": pools, "meter": "energy_kwh"}
            rows = self._ledger.usage("hour", "phase", where=where, start=start, end=hour)
            named = {"book": BOOK, "pool": pools[0], "model": "", "tenant": "", "meter": "energy_kwh"}
            columns: dict[str, Any] = {k: pa.repeat(v, rows.num_rows) for k, v in named.items()}
            columns |= {k: rows[k] for k in ("hour", "phase", "quantity")}
            columns["basis"] = pa.repeat("measured", rows.num_rows)
            parts.append(pa.table([columns[n] for n in USAGE.names], names=USAGE.names).cast(USAGE))
        return concat(parts, USAGE) if parts else None

    def _restated(self, month: Ledger, hour: datetime, usage: pa.Table) -> pa.Table:
        """The hour's usage with its energy in tiers, and with what it adds to the peaks of its billing months.

        `month` holds the hours before. Where tiers are per kW of the peak, those hours keep the tiers of their close.
        """
        month.replace_usage(BOOK, [hour], usage)
        spans = restate(month, self._fleet, BOOK, hour, hour + _HOUR, hour + _HOUR)
        firsts = {first for first, last in spans if last - first == _HOUR and first != hour}
        higher = [self._higher(month, site_pool(n), f) for f in sorted(firsts) for n in self._fleet.sites]
        return concat([month.usage_rows({"book": BOOK}, hour, hour + _HOUR), *higher], USAGE)

    def _higher(self, month: Ledger, pool: str, first: datetime) -> pa.Table:
        """A billing month's restated peak less the one that is in the books."""
        where = {"book": BOOK, "pool": pool, "meter": "peak_kw"}
        now, booked = (of.usage_rows(where, first, first + _HOUR) for of in (month, self._ledger))
        at = USAGE.get_field_index("quantity")
        booked = booked.set_column(at, "quantity", pc.negate(booked["quantity"])).cast(USAGE)
        keys = [name for name in USAGE.names if name != "quantity"]
        left = concat([now, booked], USAGE).group_by(keys).aggregate([("quantity", "sum")])
        left = left.rename_columns([*keys, "quantity"]).select(USAGE.names).cast(USAGE)
        return left.filter(pc.not_equal(left["quantity"], pa.scalar(Decimal(0), QUANTITY)))


def window_s(fleet: RunningFleet) -> int:
    """The seconds a live figure is of: at least a minute, and whole intervals of the slowest scrape.

    A window that held a scrape more at one look than at the next would jump by it.
    """
    intervals = [t.interval_s for t in fleet.sources.scrape] + [t.interval_s for t in fleet.sources.files]
    slowest = max(intervals, default=1.0)
    return round(math.ceil(_LEAST_WINDOW_S / slowest) * slowest)


def as_whole_hour(records: pa.Table, fleet: Fleet, hour: datetime, micro: int) -> pa.Table:
    """Records (`records.TOTALS`) of a part of an hour, told as those of the whole hour would be.

    Parameters: micro, millionths of the hour that have gone. An engine's own seconds are stretched to an hour's; a
    pool with a fixed count gets what it held as a bill would tell it: count × the part that has gone. So the rows
    that attribution makes of them are of that part, and add up to it.
    """
    sources, meters = _texts(records, "source"), _texts(records, "meter")
    quantities = records["quantity"].to_numpy().tolist()
    stretched = [
        quantity * MICRO / micro if meter in _OF_AN_HOUR and source.startswith("engine/") else quantity
        for source, meter, quantity in zip(sources, meters, quantities, strict=True)
    ]
    told = records.set_column(
        records.column_names.index("quantity"), "quantity", pa.array(stretched, pa.float64())
    )
    billed = {
        pool
        for pool, source, meter, quantity in zip(
            _texts(records, "pool"), sources, meters, stretched, strict=True
        )
        if source.startswith("bill/") and base_meter(meter) == "gpu_hours" and quantity
    }
    held = [
        (name, pool.count * micro / MICRO)
        for name, pool in fleet.pools.items()
        if isinstance(pool.count, int) and pool.price.term in HELD_BY_COUNT and name not in billed
    ]
    fixed = {
        "source": "bill/count",
        "model": "",
        "tenant": "",
        "phase": "idle",
        "meter": "gpu_hours",
        "basis": "measured",
    }
    rows = [{"hour": hour, "pool": name, "quantity": quantity, **fixed} for name, quantity in held]
    return pa.concat_tables([told.cast(TOTALS), pa.Table.from_pylist(rows, TOTALS)])


def _priced(
    usage: pa.Table, rates: pa.Table, hour: datetime, tiers: Mapping[str, str]
) -> tuple[tuple[dict[str, Any], ...], str]:
    """Costs [USD] of the rows at the rates of the hour, energy in the tier that its pool has reached; and a meter that
    has no rate, by the same test as the close's."""
    prices: dict[tuple[str, str], list[tuple[str, str, float]]] = defaultdict(list)
    for rate in rates.to_pylist():
        if rate["hour"] == hour and base_meter(rate["meter"]) != "peak_kw":
            price = rate["category"], rate["component"], float(rate["usd_per_unit"])
            prices[rate["pool"], rate["meter"]].append(price)
    rows = usage.to_pylist()
    held = {row["pool"] for row in rows if METERS[base_meter(row["meter"])].priced}
    sells = {pool for pool, meter in prices if meter.partition(":")[0].endswith("_tokens")}
    found: list[dict[str, Any]] = []
    unpriced = ""
    for row in rows:
        names = {key: row[key] for key in ("pool", "model", "tenant", "phase")}
        meter = tiers.get(row["pool"], row["meter"]) if row["meter"] == "energy_kwh" else row["meter"]
        for category, component, usd in prices.get((row["pool"], meter), ()):
            cost_usd = float(row["quantity"]) * usd
            found.append({**names, "category": category, "component": component, "cost_usd": cost_usd})
        token = base_meter(meter).endswith("_tokens") and (row["pool"] not in held or row["pool"] in sells)
        if (row["pool"], meter) not in prices and (token or METERS[base_meter(meter)].priced):
            unpriced = f"no rate for {meter} in pool {row['pool']!r}"
    return tuple(found), unpriced


def _texts(table: pa.Table, column: str) -> list[str]:
    return [str(text) for text in table.column(column).to_pylist()]


def _hour(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def _fraction(hour: datetime, until: datetime) -> float:
    return min(1.0, (until - hour) / _HOUR)
