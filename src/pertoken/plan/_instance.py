"""What the planner is given: pools, units, flows, demand and rates as numpy arrays.

The words, from the machine up:

- **pool**: identical machines at one site. Some are *held* (owned, colocated or committed: paid for every
  hour of the horizon, used or not), others may be *rented* by the hour. An API is a pool without machines.
- **unit**: what runs on a pool for one serving model or one training job; takes `unit_gpus` GPUs. A *whole*
  unit exists or does not (a replica); other units may take any share of a machine.
- **flow**: one kind of load on a unit: a size bucket of a workload (a *class*) or a training *job*, at an
  operating point that meets the SLO. A fully loaded unit does `flow_per_hour` requests (jobs: tokens) of it
  in an hour.
- **class**: one workload's size bucket: requests by hour, tokens per request, and how many hours it may wait.

Cost coefficients are never held: they are `rates`, the very rows the ledger prices usage with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt

from pertoken.errors import InputError
from pertoken.units import site_pool

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Hours = npt.NDArray[np.datetime64]


@dataclass(frozen=True)
class Rate:
    """USD per unit of one meter in one pool, shape (T,): a row of the rates table for each hour."""

    pool: str
    meter: str
    component: str
    usd_per_unit: Floats
    basis: str = "quoted"
    source: str = ""


@dataclass(frozen=True)
class Fixed:
    """Usage by the hour of what must be there: a site's staff and fixed charge, an API's network.

    quantity [meter's unit, (T,)]; only_with: pools, of which one must be used for this to be paid
    [(P,)]; None: paid in any case.
    """

    pool: str
    meter: str
    quantity: Floats
    only_with: Bools | None = None
    basis: str = "assumed"


@dataclass(frozen=True)
class Peak:
    """A demand charge: one band of one site in one billing period.

    meters and upper_kw: its tiers, each with the upper end of its kW (inf: none); hours: where the band
    applies, shape (T,); at: the hour its usage row is posted; already_kw: what is billed whatever the plan
    does (the peak set so far this period, a minimum, a ratchet). Its rates are the site pool's, at hour `at`.
    """

    site: int
    meters: tuple[str, ...]
    hours: Bools
    at: int
    already_kw: float = 0.0
    upper_kw: tuple[float, ...] = (np.inf,)
    so_far_kw: float = 0.0
    """Of that, what this period's meter has already shown."""
    ratchets: tuple[tuple[int, float], ...] = ()
    """Earlier peaks of the instance this month looks back on, by number, and the fraction of each that is due."""
    ratchet_billed: bool = False
    """Whether a ratchet looks back on what was billed rather than on what was metered."""
    usd_per_kw: tuple[float, ...] | None = None
    """Set in a window whose hours do not hold `at`; None: looked up in the rates."""

    def tiers(self, kw: float) -> Floats:
        """kW of each tier; they sum to `kw`."""
        edges = np.concatenate([[0.0], np.asarray(self.upper_kw)])
        return np.clip(kw - edges[:-1], 0.0, np.diff(edges))


@dataclass(frozen=True)
class Curve:
    """What a replica of `gpus` GPUs shows of itself at a share `load` of its capacity (0 to 1): the requests it holds
    on average, prefill's share of its busy time, its power beyond idle at the plug (`kw`) and of the GPU boards in that
    [kW]; shapes (N,).

    It is busy for 1 − e^−C of the time, C the requests held, as a queue with room for all is: what an engine's counters
    show, and `compare` says. Its flows' `flow_kw` is a line under `kw`, which the program sees; what is billed is the
    curve.
    """

    gpus: float
    load: Floats
    in_flight: Floats
    prefill_fraction: Floats
    kw: Floats
    gpu_kw: Floats


@dataclass(frozen=True)
class Limit:
    """At most `fraction` of the tokens served by `of` flows (hour by hour) may be served by `flows`; shapes
    (F,).

    With `most_per_hour` [tokens, (T,)] instead, an absolute limit. `name` is what it protects: ``spot``,
    ``vendor``.
    """

    name: str
    entity: str
    flows: Bools
    of: Bools
    fraction: float = 1.0
    most_per_hour: Floats | None = None


@dataclass(frozen=True)
class Instance:
    """One planning problem. P pools, K units, F flows, D classes, J jobs, S sites, T hours."""

    hours: Hours
    """UTC, shape (T,)."""
    previous: Ints
    """Shape (T,): the hour before each hour, −1 where nothing is known (first hour, or start of a chain)."""
    weight: Floats
    """Shape (T,): how many hours of the horizon each stands for (1, or more with representative days)."""

    pool_names: tuple[str, ...]
    """Ledger name of rented machines, of APIs, and of held ones unless `held_names` says otherwise."""
    held_names: tuple[str, ...]
    pool_site: Ints
    """Index of the site; −1 where no site's energy is paid (APIs, rented clouds)."""
    machine_gpus: Ints
    held_least: Ints
    held_most: Ints
    """Machines held over the whole horizon: equal bounds are owned ones; a range is for the planner to
    choose."""
    rented_most: Floats
    """Machines that may be rented, shape (P, T); 0 where only held ones exist."""
    machines_most: Floats
    """Machines that may be on, held and rented together, shape (P, T)."""
    machine_kw: Floats
    """Power of one machine that is on and idle, at the plug [kW, (P,)]."""
    machine_gpu_kw: Floats
    """Of that, the GPU boards."""
    off_kw: Floats
    """Power of one held machine that is off [kW, (P,)]."""
    pue: Floats
    """Utility meter over plug, shape (P, T)."""
    start_hours: Floats
    """Hours of a machine lost when it starts, 0 to 1 [(P,)]; for units that are not whole."""
    start_kwh: Floats
    """Energy of a start beyond idle, at the plug [kWh, (P,)]."""
    min_run: Ints
    """Fewest hours a machine stays on once started [(P,)]."""

    unit_pool: Ints
    unit_names: tuple[str, ...]
    unit_gpus: Floats
    unit_whole: Bools
    unit_most: Floats
    """Most units at once [(K,)]; inf where only the pool limits."""
    unit_start_hours: Floats
    """Hours a whole unit needs to load before it serves, 0 to 1 [(K,)]."""
    unit_min_run: Ints
    unit_single: Ints
    """Units of one number run one at a time: sizes of one job on one pool; −1: no such rule [(K,)]."""

    flow_unit: Ints
    """Unit of each flow, −1 for an API's."""
    flow_pool: Ints
    flow_class: Ints
    """Class served, −1 for a job's flow."""
    flow_job: Ints
    """Job advanced, −1 for a class's flow."""
    flow_per_hour: Floats
    """Requests (jobs: tokens) an hour of one fully loaded unit, useful work and loss together [(F,)]."""
    flow_kw: Floats
    """Power of a fully loaded unit beyond idle, at the plug [kW, (F,)]."""
    flow_gpu_kw: Floats
    """Of that, the GPU boards."""
    flow_reserve: Floats
    """Capacity one unit of load takes: 1 / (1 − headroom) [(F,)]."""
    flow_loss: Floats
    """Fraction of the work that is lost and done again (spot interruptions, restarts) [(F,)]."""
    flow_prefill: Floats
    """Fraction of busy time that is prefill [(F,)]."""

    class_names: tuple[str, ...]
    class_model: tuple[str, ...]
    class_tenant: tuple[str, ...]
    class_workload: tuple[str, ...]
    requests: Floats
    """Shape (D, T)."""
    input_tokens: Floats
    """Computed prompt tokens per request [(D,)]."""
    cached_input_tokens: Floats
    output_tokens: Floats
    egress_gb: Floats
    """Data sent out per request [GB, (D,)]."""
    slack_hours: Ints
    """Hours a request may wait; 0: served in its hour [(D,)]."""

    job_names: tuple[str, ...]
    job_model: tuple[str, ...]
    job_tenant: tuple[str, ...]
    job_tokens: Floats
    """Retained training tokens to reach [(J,)]."""
    job_release: Ints
    job_deadline: Ints
    """First hour too late: work counts in hours [release, deadline) [(J,)]."""
    job_one_pool: Bools
    """The job stays on one pool (no silent mix of GPU types)."""

    site_names: tuple[str, ...]
    site_base_kw: Floats
    """What else the meter sees [kW, (S, T)]; counts for the peak and the cap."""
    site_cap_kw: Floats
    """Power the site may draw, inf where nothing limits [(S, T)]."""
    carbon_g_per_kwh: Floats
    """Grid intensity at each pool, NaN where unknown [(P, T)]."""

    rates: tuple[Rate, ...] = ()
    fixed: tuple[Fixed, ...] = ()
    peaks: tuple[Peak, ...] = ()
    limits: tuple[Limit, ...] = ()
    unit_curve: tuple[Curve | None, ...] = ()
    """How each unit's time is told in phases; empty or None: by the share of its capacity in use [(K,)]."""
    flow_step: tuple[str, ...] = ()
    """Qualifier of the token meters each flow is paid on: an API's price step; empty: none [(F,)]."""
    minimum: Mapping[str, int] = field(default_factory=dict)
    """By workload: fewest replicas in an hour in which replicas answer it."""
    on_prem: Bools | None = None
    """Pools that are filled before anything runs elsewhere [(P,)]; None: no such policy."""
    tier_shares: Mapping[int, Floats] = field(default_factory=dict)
    """By site with energy tiers: share of each hour's energy in each tier, shape (tiers, T)."""
    flow_hour_kw: Floats | None = None
    """`flow_kw` by hour, where the load a replica can have bounds it differently (F, T); None: the same in all."""
    part_load: Floats | None = None
    """Load of each unit at which the program has the tangent over its power curve (K, T); None: the line below it."""
    name: str = "plan"
    basis: str = "roofline"
    initial_on: Floats | None = None
    """Machines on in the hour before the first [(P,)]; None: nobody knows, and the first hour's starts are
    free."""
    initial_units: Floats | None = None
    initial_backlog: Floats | None = None
    """Requests waiting at the start [(D,)]."""
    backlog_most: Floats | None = None
    """Most requests that may wait at the end of each hour, shape (D, T); None: what arrived within the slack,
    and nothing at the end of the horizon."""

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of pools P, units K, flows F, classes D, jobs J, sites S, hours T."""
        return {
            "P": len(self.pool_names), "K": len(self.unit_pool), "F": len(self.flow_unit),
            "D": len(self.class_names), "J": len(self.job_names), "S": len(self.site_names), "T": len(self.hours),
        }  # fmt: skip

    def price(self, pool: str, meter: str) -> Floats:
        """USD per unit of a meter in a pool, all components together, shape (T,); zero where no rate names
        it."""
        total = np.zeros(len(self.hours))
        for rate in self.rates:
            if rate.pool == pool and rate.meter == meter:
                total = total + rate.usd_per_unit
        return total

    def prices(self, pools: tuple[str, ...], meter: str) -> Floats:
        """`price` of several pools, shape (P, T)."""
        index = {name: i for i, name in enumerate(pools)}
        total = np.zeros((len(pools), len(self.hours)))
        shared = len(index) != len(pools)
        for rate in self.rates:
            if rate.meter == meter and rate.pool in index:
                if shared:
                    total[[i for i, name in enumerate(pools) if name == rate.pool]] += rate.usd_per_unit
                else:
                    total[index[rate.pool]] += rate.usd_per_unit
        return total

    def peak_prices(self, peak: Peak) -> tuple[float, ...]:
        """USD per kW of each tier of a demand charge over its billing period, all components together."""
        if peak.usd_per_kw is not None:
            return peak.usd_per_kw
        pool = site_pool(self.site_names[peak.site])
        return tuple(float(self.price(pool, meter)[peak.at]) for meter in peak.meters)

    def energy_prices(self, pools: tuple[str, ...]) -> Floats:
        """USD per kWh at the utility meter of each pool, tiers in their shares, shape (P, T)."""
        total = self.prices(pools, "energy_kwh")
        for site, shares in self.tier_shares.items():
            mine = self.pool_site == site
            tiers = [self.prices(pools, f"energy_kwh:tier{k + 1}") for k in range(1, len(shares))]
            mixed = shares[0] * total + sum(share * p for share, p in zip(shares[1:], tiers, strict=True))
            total = np.where(mine[:, None], mixed, total)
        return total

    def tokens_per_request(self) -> Floats:
        """All tokens of a request of each class, shape (D,)."""
        return self.input_tokens + self.cached_input_tokens + self.output_tokens

    def waiting_most(self) -> Floats:
        """Most requests that may wait at the end of each hour, shape (D, T): what arrived within the slack.

        That bound is the deadline: whatever arrived earlier has been served. Nothing waits past the last hour
        of a chain of hours that ends, nor where the slack is 0.
        """
        if self.backlog_most is not None:
            return self.backlog_most
        most, at = np.zeros_like(self.requests), np.arange(len(self.hours))
        for step in range(int(self.slack_hours.max(initial=0))):
            waits = (self.slack_hours > step)[:, None] & (at >= 0)[None, :]
            most += np.where(waits, self.requests[:, np.maximum(at, 0)], 0.0)
            at = np.where(at >= 0, self.previous[np.maximum(at, 0)], -1)
        ends = np.ones(len(self.hours), dtype=np.bool_)
        ends[self.previous[self.previous >= 0]] = False
        most[:, ends] = 0.0
        return most

    def line_kw(self) -> Floats:
        """Power per unit of load beyond idle, at the plug, as the program has it [kW, (F, T)]."""
        if self.flow_hour_kw is not None:
            return self.flow_hour_kw
        return np.broadcast_to(self.flow_kw[:, None], (len(self.flow_kw), len(self.hours)))

    def useful(self) -> Floats:
        """Requests (jobs: tokens) an hour of a fully loaded unit, net of what is lost, shape (F,)."""
        return self.flow_per_hour * (1 - self.flow_loss)

    def __post_init__(self) -> None:
        _check(self)


_SHAPES = {
    "T": "previous weight",
    "P": "held_names pool_site machine_gpus held_least held_most machine_kw machine_gpu_kw off_kw start_hours "
    "start_kwh min_run",
    "PT": "rented_most machines_most pue carbon_g_per_kwh",
    "K": "unit_names unit_gpus unit_whole unit_most unit_start_hours unit_min_run unit_single",
    "F": "flow_pool flow_class flow_job flow_per_hour flow_kw flow_gpu_kw flow_reserve flow_loss flow_prefill",
    "D": "class_model class_tenant class_workload input_tokens cached_input_tokens output_tokens egress_gb "
    "slack_hours",
    "DT": "requests",
    "J": "job_model job_tenant job_tokens job_release job_deadline job_one_pool",
    "ST": "site_base_kw site_cap_kw",
}
"""Fields by their axes."""


def _check(instance: Instance) -> None:
    """Raises InputError where shapes disagree or a number cannot be meant; one line, naming the field."""
    s = instance.sizes
    for axes, names in _SHAPES.items():
        wanted = tuple(s[axis] for axis in axes)
        for name in names.split():
            value = getattr(instance, name)
            found = value.shape if isinstance(value, np.ndarray) else (len(value),)
            if found != wanted:
                axis_names = " × ".join(axes)
                raise InputError(f"plan instance: {name} has shape {found}, expected {wanted} ({axis_names})")
    may_be_infinite = ("machines_most", "rented_most", "unit_most", "site_cap_kw", "carbon_g_per_kwh")
    for item in fields(instance):
        value = getattr(instance, item.name)
        if isinstance(value, np.ndarray) and value.dtype == np.float64 and item.name not in may_be_infinite:
            if not np.isfinite(value).all():
                raise InputError(f"plan instance: {item.name} is not finite everywhere")
            if (value < 0).any():
                raise InputError(f"plan instance: {item.name} is negative somewhere")
    for rate in instance.rates:
        if rate.usd_per_unit.shape != (s["T"],) or not np.isfinite(rate.usd_per_unit).all():
            raise InputError(
                f"rate of {rate.meter} ({rate.component}) in pool {rate.pool!r} is not finite for each hour"
            )
    if (instance.flow_loss >= 1).any():
        raise InputError("plan instance: flow_loss of 1 or more leaves no useful work")
    for held, rented in zip(instance.held_names, instance.pool_names, strict=True):
        for meter, what in (("energy_kwh", "energy"), ("starts", "start")):
            if held != rented and not np.allclose(instance.price(held, meter), instance.price(rented, meter)):
                raise InputError(
                    f"held machines {held!r} and rented ones {rented!r} pay different {what} prices"
                )
    if instance.flow_step and len(instance.flow_step) != s["F"]:
        raise InputError(f"plan instance: flow_step has {len(instance.flow_step)} entries, expected {s['F']}")
    if instance.unit_curve and len(instance.unit_curve) != s["K"]:
        raise InputError(
            f"plan instance: unit_curve has {len(instance.unit_curve)} entries, expected {s['K']}"
        )
    for name, axis in (("flow_hour_kw", "F"), ("part_load", "K")):
        value = getattr(instance, name)
        if value is not None and value.shape != (s[axis], s["T"]):
            raise InputError(f"plan instance: {name} has shape {value.shape}, expected {(s[axis], s['T'])}")
    if instance.on_prem is not None and instance.on_prem.shape != (s["P"],):
        raise InputError(f"plan instance: on_prem has shape {instance.on_prem.shape}, expected ({s['P']},)")
    if (instance.held_least > instance.held_most).any():
        raise InputError("plan instance: held_least exceeds held_most")


def chosen(instance: Instance, hours: Ints, previous: Ints, weight: Floats) -> Instance:
    """The problem of some hours alone, each standing for `weight` hours; jobs and initial state are the
    caller's."""
    i = instance
    return replace(
        i,
        hours=i.hours[hours],
        previous=previous,
        weight=weight,
        rented_most=i.rented_most[:, hours],
        machines_most=i.machines_most[:, hours],
        pue=i.pue[:, hours],
        requests=i.requests[:, hours],
        backlog_most=None if i.backlog_most is None else i.backlog_most[:, hours],
        flow_hour_kw=None if i.flow_hour_kw is None else i.flow_hour_kw[:, hours],
        part_load=None if i.part_load is None else i.part_load[:, hours],
        site_base_kw=i.site_base_kw[:, hours],
        site_cap_kw=i.site_cap_kw[:, hours],
        carbon_g_per_kwh=i.carbon_g_per_kwh[:, hours],
        rates=tuple(replace(r, usd_per_unit=r.usd_per_unit[hours]) for r in i.rates),
        fixed=tuple(replace(f, quantity=f.quantity[hours]) for f in i.fixed),
        tier_shares={site: shares[:, hours] for site, shares in i.tier_shares.items()},
        peaks=_peaks_of(i, hours),
        limits=tuple(
            replace(m, most_per_hour=None if m.most_per_hour is None else m.most_per_hour[hours])
            for m in i.limits
        ),
    )


def _peaks_of(i: Instance, hours: Ints) -> tuple[Peak, ...]:
    """Peaks with hours among those chosen, their ratchets on one another renumbered."""
    kept = {n: m for m, n in enumerate(n for n, k in enumerate(i.peaks) if k.hours[hours].any())}
    return tuple(
        replace(
            i.peaks[n],
            hours=i.peaks[n].hours[hours],
            at=0,
            usd_per_kw=i.peak_prices(i.peaks[n]),
            ratchets=tuple((kept[q], f) for q, f in i.peaks[n].ratchets if q in kept),
        )
        for n in kept
    )


def window(instance: Instance, first: int, last: int) -> Instance:
    """The problem of hours [first, last) alone, deadlines of waiting work kept; initial state is the
    caller's."""
    i = replace(instance, backlog_most=instance.waiting_most())
    length = last - first
    part = chosen(i, np.arange(first, last), np.arange(length, dtype=np.int64) - 1, i.weight[first:last])
    return replace(
        part,
        job_release=np.clip(i.job_release - first, 0, length),
        job_deadline=np.clip(i.job_deadline - first, 0, length),
    )
