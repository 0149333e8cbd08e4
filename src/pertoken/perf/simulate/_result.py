"""What a simulation found: counts that add up, latency percentiles, and the usage rows the ledger prices."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pertoken import tables
from pertoken.errors import InputError
from pertoken.perf.point import StepTimes
from pertoken.perf.simulate import _state as s
from pertoken.units import IDLE, JOULES_PER_KWH, MILLISECONDS_PER_SECOND, SECONDS_PER_HOUR, WATTS_PER_KILOWATT

Floats = npt.NDArray[np.float64]
_MICRO = 6
"""Decimals of a quantity in the ledger."""
_LATENCIES = {"ttft": 0, "tpot": 1, "e2e": 2}
_COUNTS = {
    "arrivals": s.ARRIVALS, "requests": s.REQUESTS, "requests_in_slo": s.IN_SLO, "output_tokens": s.OUT_TOKENS,
    "output_tokens_in_slo": s.OUT_TOKENS_IN_SLO, "input_tokens": s.IN_TOKENS,
    "cached_input_tokens": s.CACHED_TOKENS, "recomputed_tokens": s.RECOMPUTED, "preemptions": s.PREEMPTED,
    "rejected": s.REJECTED,
}  # fmt: skip
_METERS = (
    ("input", "input_tokens"), ("input", "cached_input_tokens"), ("output", "output_tokens"),
    ("output", "output_tokens_in_slo"), ("output", "requests"), ("output", "requests_in_slo"),
    ("waste", "recomputed_tokens"),
)  # fmt: skip
_PHASES = {"input": s.IN_S, "output": s.OUT_S, "waste": s.WASTE_S, "idle": s.IDLE_S}


@dataclass(frozen=True)
class Slo:
    """What a request may take; `met_fraction` of all requests must keep every bound.

    ttft_s: to the first token; tpot_s: mean per further token; e2e_s: to the last token [s].
    """

    ttft_s: float = float("inf")
    tpot_s: float = float("inf")
    e2e_s: float = float("inf")
    met_fraction: float = 0.99

    def __post_init__(self) -> None:
        if not min(self.ttft_s, self.tpot_s, self.e2e_s) > 0:
            raise InputError("slo: bounds must be positive")
        if not 0 < self.met_fraction <= 1:
            raise InputError(f"slo: met_fraction is {self.met_fraction}, must lie in 0..1")

    def text(self) -> str:
        """The bounds in words.

        >>> Slo(ttft_s=0.5, tpot_s=0.04).text()
        'TTFT ≤ 500 ms, TPOT ≤ 40 ms'
        """
        bounds = (("TTFT", self.ttft_s), ("TPOT", self.tpot_s), ("end to end", self.e2e_s))
        said = [f"{n} ≤ {b * MILLISECONDS_PER_SECOND:,.4g} ms" for n, b in bounds if b < float("inf")]
        return ", ".join(said) or "no bound"


@dataclass(frozen=True)
class Series:
    """Means over each time bin of width bin_s: shape (bins,).

    arrivals_per_s; batch: requests in the engines; queue: waiting ones; kv_tokens: in cache memory; busy_fraction
    of held replicas; replicas held; in_slo_fraction of those finished (NaN where none did).
    """

    start_s: Floats
    arrivals_per_s: Floats
    batch: Floats
    queue: Floats
    kv_tokens: Floats
    busy_fraction: Floats
    replicas: Floats
    in_slo_fraction: Floats


@dataclass(frozen=True)
class Simulation:
    """The outcome of one simulation. Groups G in the order given; time bins of bin_s from 0 to end_s [s]."""

    pools: tuple[str, ...]
    times: tuple[StepTimes, ...]
    bin_s: float
    end_s: float
    slo: Slo
    sums: Floats
    """(G, bins, fields) of the kernel; read it through `count`, `seconds` and `series`."""
    histogram: npt.NDArray[np.int64]
    """(priority class, latency, bin); read it through `latency_s`."""
    first_s: Floats
    """First-token time of recorded requests [s], NaN where rejected; shape (record,)."""
    finish_s: Floats

    def count(self, what: str) -> int:
        """How many: ``requests``, ``output_tokens``, ``recomputed_tokens``, ``preemptions``, ``rejected``, …"""
        if what not in _COUNTS:
            raise InputError(f"unknown count {what!r}: one of {', '.join(_COUNTS)}")
        return round(float(self.sums[:, :, _COUNTS[what]].sum()))

    def seconds(self, phase: str) -> float:
        """Replica-seconds spent on a phase: ``input``, ``output``, ``waste`` or ``idle`` [s]."""
        if phase not in _PHASES:
            raise InputError(f"unknown phase {phase!r}: one of {', '.join(_PHASES)}")
        return float(self.sums[:, :, _PHASES[phase]].sum())

    def phase_seconds(self) -> dict[str, Floats]:
        """Replica-seconds by phase in each time bin, all groups together; arrays of shape (bins,)."""
        return {phase: self.sums[:, :, field].sum(axis=0) for phase, field in _PHASES.items()}

    @property
    def attainment(self) -> float:
        """Requests in SLO over requests, those turned away included; NaN without requests."""
        return _ratio(self.count("requests_in_slo"), self.count("requests") + self.count("rejected"))

    def met_fraction(self, latency: str) -> float:
        """Share of finished requests within one bound: ``ttft``, ``tpot`` or ``e2e``; exact, not from bins."""
        field = (s.TTFT_OK, s.TPOT_OK, s.E2E_OK)[_latency(latency)]
        return _ratio(float(self.sums[:, :, field].sum()), self.count("requests"))

    @property
    def utilisation(self) -> float:
        """Busy replica time over held replica time."""
        busy_s = sum(self.seconds(p) for p in ("input", "output", "waste"))
        return _ratio(busy_s, busy_s + self.seconds("idle"))

    @property
    def cache_hit_fraction(self) -> float:
        """Prompt tokens served from the prefix cache over all prompt tokens."""
        cached = self.count("cached_input_tokens")
        return _ratio(cached, cached + self.count("input_tokens"))

    @property
    def goodput_tokens_per_s(self) -> float:
        """Output tokens of requests in SLO per second of the whole run."""
        return _ratio(self.count("output_tokens_in_slo"), self.end_s)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of the whole run, all replicas together."""
        return _ratio(self.count("output_tokens"), self.end_s)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours held, idle included."""
        by_group = self.sums[:, :, list(_PHASES.values())].sum(axis=(1, 2))
        return float(by_group @ [t.gpus for t in self.times]) / SECONDS_PER_HOUR

    @property
    def gpu_energy_kwh(self) -> float:
        """Energy at the GPU boards, idle included."""
        return sum(float(self._gpu_kwh(g, p).sum()) for g in range(len(self.pools)) for p in _PHASES)

    def latency_s(self, latency: str, quantiles: npt.ArrayLike, priority: int | None = None) -> Floats:
        """Quantiles of ``ttft``, ``tpot`` or ``e2e`` [s], from a histogram of 128 bins per octave.

        The middle of the bin is returned: at most 0.4 % from the exact quantile, between 60 ns and 2 years. Without
        a `priority` class all are taken together. NaN where no request finished.
        """
        counts = self._histogram(latency, priority)
        total = int(counts.sum())
        wanted = np.atleast_1d(np.asarray(quantiles, np.float64))
        if not total:
            return np.full(wanted.shape, np.nan)
        rank = np.clip(np.ceil(wanted * total), 1, total)
        return _middles()[np.searchsorted(np.cumsum(counts), rank)]

    def mean_s(self, latency: str, priority: int | None = None) -> float:
        """Mean of a latency [s], from the same histogram."""
        counts = self._histogram(latency, priority)
        return _ratio(float(counts @ _middles()), float(counts.sum()))

    def cdf(self, latency: str) -> tuple[Floats, Floats]:
        """Cumulated distribution: latency [s] and the share of requests at or below it."""
        counts = self._histogram(latency, None)
        used = np.flatnonzero(counts)
        share = np.cumsum(counts[used]) / max(int(counts.sum()), 1)
        return _middles()[used], share

    def _histogram(self, latency: str, priority: int | None) -> npt.NDArray[np.int64]:
        rows = self.histogram[:, _latency(latency)]
        return np.asarray(rows.sum(axis=0) if priority is None else rows[priority])

    def series(self, group: int | None = None) -> Series:
        """Load over time: of one group, or of all."""
        sums = self.sums.sum(axis=0) if group is None else self.sums[group]
        start_s = np.arange(len(sums), dtype=np.float64) * self.bin_s
        width_s = np.maximum(np.minimum(self.end_s - start_s, self.bin_s), 1e-9)
        held_s = sums[:, list(_PHASES.values())].sum(axis=1)
        busy_s = held_s - sums[:, s.IDLE_S]
        with np.errstate(invalid="ignore", divide="ignore"):
            return Series(
                start_s,
                sums[:, s.ARRIVALS] / width_s,
                sums[:, s.BATCH_S] / width_s,
                sums[:, s.QUEUE_S] / width_s,
                sums[:, s.KV_S] / width_s,
                np.where(held_s > 0, busy_s / held_s, 0.0),
                held_s / width_s,
                sums[:, s.IN_SLO] / sums[:, s.REQUESTS],
            )

    def _gpu_kwh(self, group: int, phase: str) -> Floats:
        """GPU energy by time bin: replica-seconds × GPUs × the phase's power. Recomputing a prompt is prefill."""
        t = self.times[group]
        watts = {"input": t.prefill_power_w, "waste": t.prefill_power_w, "output": t.decode_power_w}
        return np.asarray(
            self.sums[group, :, _PHASES[phase]] * t.gpus * watts.get(phase, t.idle_power_w) / JOULES_PER_KWH
        )

    def usage_rows(
        self,
        *,
        start: datetime,
        book: str,
        model: str,
        tenant: str,
        host_power_w: float,
        pue: float,
        basis: str = "",
    ) -> pa.Table:
        """The run as usage rows by hour, one set per pool.

        Parameters: start [UTC, on the hour] is time 0; host_power_w [W per GPU] and pue lift GPU energy to the
        utility meter: energy = (GPU + host) × pue; basis: by default that of the step times. Counts of a request
        fall into the hour it finishes in (prompt tokens: of its first token). Time and energy are rounded to the
        ledger's six decimals so that phases sum to what was held: gpu-hours × replicas to the digit. Raises
        InputError on a start that is naive or not on the hour.
        """
        if (
            start.tzinfo is None
            or start.utcoffset() != timedelta(0)
            or start.replace(minute=0, second=0, microsecond=0) != start
        ):
            raise InputError(f"simulation start {start} must be UTC and on the hour")
        if host_power_w < 0 or pue < 1:
            raise InputError(
                f"host_power_w is {host_power_w}, must not be negative; pue is {pue}, must be 1 or more"
            )
        per_hour = round(SECONDS_PER_HOUR / self.bin_s)
        hours = -(-self.sums.shape[1] // per_hour)
        first = np.datetime64(start.replace(tzinfo=None), "us")
        hour = first + np.arange(hours) * np.timedelta64(1, "h")
        parts: list[pa.Table] = []
        for name in dict.fromkeys(self.pools):
            mine = [g for g, pool in enumerate(self.pools) if pool == name]
            counts = {
                key: sum(_by_hour(self.sums[g, :, _COUNTS[key[1]]], per_hour) for g in mine)
                for key in _METERS
            }
            physical = self._physical(mine, per_hour, host_power_w, pue)
            said = basis or self.times[mine[0]].basis
            for who, wanted in ((tenant, False), (IDLE, True)):
                rows = {k: v for k, v in (counts | physical).items() if (k[0] == "idle") == wanted}
                parts.append(
                    tables.usage_rows(hour, rows, book=book, pool=name, model=model, tenant=who, basis=said)
                )
        return tables.concat(parts, tables.USAGE)

    def _physical(
        self, groups: list[int], per_hour: int, host_power_w: float, pue: float
    ) -> dict[tuple[str, str], Floats]:
        """gpu-hours and energy by phase and hour; phases sum to what was held, to the digit."""
        hours: dict[str, Floats] = {}
        gpu_kwh: dict[str, Floats] = {}
        for phase, field in _PHASES.items():
            hours[phase] = (
                np.sum(
                    [_by_hour(self.sums[g, :, field], per_hour) * self.times[g].gpus for g in groups], axis=0
                )
                / SECONDS_PER_HOUR
            )
            gpu_kwh[phase] = np.sum([_by_hour(self._gpu_kwh(g, phase), per_hour) for g in groups], axis=0)
        rows: dict[tuple[str, str], Floats] = {}
        it_kwh = {p: gpu_kwh[p] + hours[p] * host_power_w / WATTS_PER_KILOWATT for p in _PHASES}
        meter_kwh = {p: it_kwh[p] * pue for p in _PHASES}
        quantities = (
            ("gpu_hours", hours), ("gpu_energy_kwh", gpu_kwh), ("it_energy_kwh", it_kwh), ("energy_kwh", meter_kwh),
        )  # fmt: skip
        for meter, by_phase in quantities:
            rows |= {(phase, meter): v for phase, v in _rounded(by_phase).items()}
        return rows


def _rounded(by_phase: dict[str, Floats]) -> dict[str, Floats]:
    """Phases rounded so that each hour's sum is the rounded sum; the largest phase of the hour takes the difference."""
    names = list(by_phase)
    exact = np.stack([by_phase[n] for n in names])
    total = np.round(exact.sum(axis=0), _MICRO)
    each = np.round(exact, _MICRO)
    largest = np.argmax(each, axis=0)
    column = np.arange(each.shape[1])
    each[largest, column] += total - each.sum(axis=0)
    return {n: np.maximum(np.round(each[k], _MICRO), 0.0) for k, n in enumerate(names)}


def _by_hour(values: Floats, per_hour: int) -> Floats:
    padded = np.zeros(-(-len(values) // per_hour) * per_hour)
    padded[: len(values)] = values
    return np.asarray(padded.reshape(-1, per_hour).sum(axis=1))


def _middles() -> Floats:
    """The middle of each histogram bin [s]."""
    edges = (np.arange(s.HISTOGRAM_BINS + 1, dtype=np.int64) + s.HISTOGRAM_FIRST) << s.HISTOGRAM_SHIFT
    seconds = edges.view(np.float64)
    return np.asarray(0.5 * (seconds[1:] + seconds[:-1]))


def _latency(name: str) -> int:
    if name not in _LATENCIES:
        raise InputError(f"unknown latency {name!r}: one of {', '.join(_LATENCIES)}")
    return _LATENCIES[name]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
