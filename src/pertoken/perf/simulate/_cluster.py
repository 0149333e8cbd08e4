"""Replicas behind a router: set up the kernel, feed it chunks, scale, drain; find the fewest replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pertoken.errors import CannotServeError, InfeasibleError, InputError, nearest
from pertoken.perf.point import StepTimes
from pertoken.perf.simulate import _state as s
from pertoken.perf.simulate._events import rest_all, run, switch_off, switch_on
from pertoken.perf.simulate._requests import MOST_TOKENS, Requests, Source
from pertoken.perf.simulate._result import Simulation, Slo
from pertoken.units import SECONDS_PER_HOUR

Role = Literal["both", "prefill", "decode"]
Router = Literal["least-loaded", "round-robin", "prefix-affine"]
_ROLES: dict[str, int] = {"both": s.BOTH, "prefill": s.ONLY_PREFILL, "decode": s.ONLY_DECODE}
_ROUTERS: dict[str, int] = {
    "least-loaded": s.LEAST_LOADED, "round-robin": s.ROUND_ROBIN, "prefix-affine": s.PREFIX_AFFINE,
}  # fmt: skip
_MOST_REPLICAS = 4096


@dataclass(frozen=True)
class ReplicaGroup:
    """Identical replicas of one pool: their step times, their number (with autoscaling: the most there can be).

    role: ``both``, or ``prefill`` and ``decode`` for disaggregated serving. `weight`: requests it should carry
    relative to other groups' replicas (0: in proportion to its decode speed).
    """

    pool: str
    times: StepTimes
    replicas: int = 1
    role: Role = "both"
    weight: float = 0.0


@dataclass(frozen=True)
class Engine:
    """How a replica schedules: what vLLM calls max_num_batched_tokens, max_num_seqs, watermark, block size.

    chunk_tokens: tokens of one step, decoding ones included; max_batch: requests in flight (0: as many as the step
    times know); watermark_fraction of the KV cache is kept free when a request is admitted; prefix_cache: reuse
    hashed prompt blocks; max_queue: waiting requests per replica beyond which one is turned away; transfer_s +
    transfer_token_s × prompt tokens: moving a KV cache from a prefill to a decode replica.
    """

    chunk_tokens: int = 8192
    max_batch: int = 0
    watermark_fraction: float = 0.01
    prefix_cache: bool = True
    max_queue: int = 1_000_000
    transfer_s: float = 0.0
    transfer_token_s: float = 0.0


@dataclass(frozen=True)
class Autoscale:
    """Replicas follow the load: wanted = requests in flight or waiting / target, looked at every interval_s.

    A replica takes requests startup_s after it was asked for and is paid from then on it was asked for. One leaves
    when for cooldown_s fewer were wanted; it finishes what it has. Groups start and leave in the order given.
    """

    target_per_replica: float
    min_replicas: int = 1
    interval_s: float = 15.0
    startup_s: float = 120.0
    cooldown_s: float = 300.0

    def __post_init__(self) -> None:
        if self.target_per_replica <= 0 or self.interval_s <= 0 or self.min_replicas < 1:
            raise InputError(
                "autoscale: target_per_replica and interval_s must be positive, min_replicas 1 or more"
            )
        if self.startup_s < 0 or self.cooldown_s < 0:
            raise InputError("autoscale: startup_s and cooldown_s must not be negative")


@dataclass(frozen=True)
class Found:
    """The fewest replicas that meet the SLO, their simulation, and each number tried with its attainment.

    Assumes that more replicas never attain less. `tried` shows it: the number below fails, this one meets.
    A run that could no longer meet the SLO was stopped, its attainment is an upper bound.
    """

    replicas: int
    simulation: Simulation
    tried: tuple[tuple[int, float], ...]


def simulate(
    source: Source,
    groups: Sequence[ReplicaGroup],
    *,
    slo: Slo | None = None,
    engine: Engine | None = None,
    router: Router = "least-loaded",
    autoscale: Autoscale | None = None,
    concurrency: int = 0,
    duration_s: float = 0.0,
    bin_s: float = 60.0,
    record: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Simulation:
    """Serve every request of the source and say what came of it.

    Parameters: concurrency: clients that each send their next request when one is answered (closed loop; arrival
    times are then ignored; 0: open loop); duration_s [s]: the replicas are held at least that long; bin_s [s]:
    width of the time series, must divide an hour; record: keep first-token and finish times of the first so many
    requests; progress: called with the share of the source that was read. Raises InputError on a source or
    setting that makes no sense, CannotServeError where a replica cannot hold a single token.
    """
    sim = _Run(
        source, groups, slo or Slo(), engine or Engine(), router, autoscale, concurrency, bin_s, record
    )
    if not sim.feed(progress, most_misses=float("inf")):
        raise AssertionError("a run without a limit on misses ran into it")
    return sim.result(duration_s)


class _Run:
    """One simulation on its way: the kernel's state and the autoscaler's."""

    def __init__(
        self,
        source: Source,
        groups: Sequence[ReplicaGroup],
        slo: Slo,
        engine: Engine,
        router: str,
        autoscale: Autoscale | None,
        concurrency: int,
        bin_s: float,
        record: int,
    ) -> None:
        _check(groups, engine, router, bin_s, concurrency)
        self.source, self.groups, self.slo, self.autoscale = source, tuple(groups), slo, autoscale
        self.closed = concurrency > 0
        block = source.block_tokens if engine.prefix_cache else 0
        group_of = np.repeat(np.arange(len(groups), dtype=np.int64), [g.replicas for g in groups])
        role_of = np.asarray([_ROLES[g.role] for g in groups], np.int64)[group_of]
        group, decode_s = _group_records(groups, engine)
        self.state = s.State(group, decode_s, group_of, role_of, source.classes, block, record)
        world = self.state.world
        world["clients"], world["closed"] = concurrency, self.closed
        world["disaggregated"] = any(g.role != "both" for g in groups)
        world["router"], world["max_queue"], world["bin_s"] = _ROUTERS[router], engine.max_queue, bin_s
        world["ttft_s"], world["tpot_s"], world["e2e_s"] = slo.ttft_s, slo.tpot_s, slo.e2e_s
        world["transfer_s"], world["transfer_token_s"] = engine.transfer_s, engine.transfer_token_s
        self.state.replica["bin_end"] = bin_s
        self.now_s, self.last_s = 0.0, 0.0
        self.scale_s = autoscale.interval_s if autoscale else float("inf")
        self.enough_since_s: dict[int, float] = {}
        for role in set(role_of.tolist()):
            mine = np.flatnonzero(role_of == role)
            on = mine[: min(autoscale.min_replicas, len(mine))] if autoscale else mine
            self.state.replica["status"][on] = s.ON

    # --- feeding ---------------------------------------------------------------------------------------------

    def feed(self, progress: Callable[[float], None] | None, most_misses: float) -> bool:
        """Run through the source; False as soon as more than `most_misses` requests missed the SLO."""
        for chunk in self.source.chunks():
            self.last_s = _check_chunk(chunk, self.last_s, self.source.classes)
            self._take(chunk)
            if progress:
                progress(chunk.read_fraction)
            if self.missed(most_misses):
                return False
        self._drain(most_misses)
        return not self.missed(most_misses)

    def _take(self, chunk: Requests) -> None:
        count = len(chunk)
        columns: dict[str, npt.NDArray[Any]] = {
            "arrival": np.ascontiguousarray(chunk.arrival_s, np.float64),
            "input": np.ascontiguousarray(chunk.input_tokens, np.int32),
            "output": np.ascontiguousarray(chunk.output_tokens, np.int32),
        }
        if chunk.cached_tokens is not None:
            columns["cached"] = np.ascontiguousarray(chunk.cached_tokens, np.int32)
        if chunk.priority is not None:
            columns["priority"] = np.ascontiguousarray(chunk.priority, np.int32)
        if self.state.world["block"][0] and chunk.at is not None and chunk.blocks is not None:
            columns["at"] = np.ascontiguousarray(chunk.at, np.int64) + self.state.take_hashes(chunk.hashes)
            columns["blocks"] = np.ascontiguousarray(chunk.blocks, np.int32)
        self.state.set_chunk(columns, count)
        self.state.make_room(count, self.now_s)
        last_s = float(chunk.arrival_s[-1]) if count else 0.0
        position = 0
        while position < count:
            until = min(self.scale_s, self.now_s + SECONDS_PER_HOUR if self.closed else last_s)
            self.state.make_room(0, until)
            position = run(self.state.world, position, until)
            if position < count or not self.closed:
                self._reached(until)
        self.state.set_chunk({}, 0)

    def _drain(self, most_misses: float) -> None:
        """No more requests come: advance until none is left."""
        self.state.world["clients"] = 0
        while self.in_flight() and not self.missed(most_misses):
            until = min(self.scale_s, self.now_s + SECONDS_PER_HOUR)
            self.state.make_room(0, until)
            run(self.state.world, 0, until)
            self._reached(until)

    def _reached(self, t: float) -> None:
        self.now_s = t
        if self.autoscale and t >= self.scale_s:
            self._scale(self.autoscale, t)
            self.scale_s += self.autoscale.interval_s

    def in_flight(self) -> int:
        return int(self.state.replica["outstanding"].sum() + self.state.world["handoffs"][0])

    def missed(self, most_misses: float) -> bool:
        return most_misses < float("inf") and self.misses() > most_misses

    def misses(self) -> int:
        """Requests so far that missed the SLO, those turned away included."""
        sums = self.state.sums.sum(axis=(0, 1)) + self.state.now_sums.sum(axis=0)
        return int(sums[s.REJECTED] + sums[s.REQUESTS] - sums[s.IN_SLO])

    # --- scaling ---------------------------------------------------------------------------------------------

    def _scale(self, rule: Autoscale, t: float) -> None:
        replica = self.state.replica
        for role in np.unique(replica["role"]).tolist():
            mine = np.flatnonzero(replica["role"] == role)
            on = mine[replica["status"][mine] == s.ON]
            load = int(replica["outstanding"][mine].sum())
            wanted = min(max(int(np.ceil(load / rule.target_per_replica)), rule.min_replicas), len(mine))
            if wanted >= len(on):
                self.enough_since_s[role] = t
                draining = mine[replica["status"][mine] == s.DRAINING]
                off = mine[replica["status"][mine] == s.OFF]
                missing = wanted - len(on)
                for r in draining[:missing]:
                    replica["status"][r] = s.ON  # still warm
                for r in off[: max(0, missing - len(draining))]:
                    self.state.make_room(0, t)
                    switch_on(self.state.world, int(r), t, t + rule.startup_s)
            elif t - self.enough_since_s.setdefault(role, 0.0) >= rule.cooldown_s:
                for r in on[wanted:]:
                    switch_off(self.state.world, int(r), t)

    # --- the answer ------------------------------------------------------------------------------------------

    def result(self, duration_s: float) -> Simulation:
        replica = self.state.replica
        end_s = max(duration_s, float(replica["t"].max()), 0.0 if self.closed else self.last_s)
        self.state.make_room(0, end_s)
        rest_all(self.state.world, end_s)
        bin_s = float(self.state.world["bin_s"][0])
        bins = max(1, int(np.ceil(end_s / bin_s)))
        sums = self.state.sums[:, : bins + 1]
        if sums.shape[1] > bins and not sums[:, bins:].any():
            sums = sums[:, :bins]
        return Simulation(
            pools=tuple(g.pool for g in self.groups),
            times=tuple(g.times for g in self.groups),
            bin_s=bin_s,
            end_s=end_s,
            slo=self.slo,
            sums=sums.copy(),
            histogram=self.state.histogram,
            first_s=self.state.first,
            finish_s=self.state.finish,
        )


def find_replicas(
    source: Source,
    group: ReplicaGroup,
    *,
    slo: Slo,
    others: Sequence[ReplicaGroup] = (),
    engine: Engine | None = None,
    router: Router = "least-loaded",
    most: int = _MOST_REPLICAS,
    duration_s: float = 0.0,
    bin_s: float = 60.0,
    progress: Callable[[float], None] | None = None,
) -> Found:
    """The fewest replicas of the group with which the share of requests in SLO reaches slo.met_fraction.

    Doubles until the SLO is met, then bisects; a run that can no longer meet it is stopped. `others` are groups that
    stay as they are. Raises InfeasibleError if a request alone on a replica already misses too often, or if `most`
    replicas are not enough, naming the bound in the way.
    """
    engine = engine or Engine()
    total = _count_and_check_alone(source, group, slo, engine, alone=not others and group.role == "both")
    allowed = total * (1.0 - slo.met_fraction) + 1e-9 * total
    tried: list[tuple[int, float]] = []
    runs: dict[int, _Run] = {}

    def meets(count: int) -> bool:
        sim = _Run(source, [replace(group, replicas=count), *others], slo, engine, router, None, 0, bin_s, 0)
        met = sim.feed(None, allowed)
        tried.append((count, 1.0 - sim.misses() / total))
        if met:
            runs.clear()
            runs[count] = sim
        if progress:
            progress(1.0 - 0.5 ** len(tried))
        return met

    low, high = 0, 1
    while not meets(high):
        if high >= most:
            raise _infeasible(group, slo, most, tried[-1][1])
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle
    return Found(high, runs[high].result(duration_s), tuple(sorted(tried)))


def _infeasible(group: ReplicaGroup, slo: Slo, most: int, attained: float) -> InfeasibleError:
    return InfeasibleError(
        f"{most} replicas of {group.pool} are not enough: at most {attained:.2%} of requests meet {slo.text()}, "
        f"{slo.met_fraction:.2%} must; allow more replicas or a looser bound"
    )


def _count_and_check_alone(
    source: Source, group: ReplicaGroup, slo: Slo, engine: Engine, *, alone: bool
) -> int:
    """Requests of the source; raises if too many miss the SLO even with a replica to themselves.

    Alone: ttft = Σ over chunks of (step + prefill), tpot = decode_s[1] + context_s × mean context.
    """
    times, count, misses = group.times, 0, 0
    for chunk in source.chunks():
        count += len(chunk)
        if not alone or source.block_tokens:
            continue
        p, o = chunk.input_tokens.astype(np.float64), chunk.output_tokens.astype(np.float64)
        cached = 0.0 if chunk.cached_tokens is None else np.minimum(chunk.cached_tokens, p - 1)
        rest = p - cached
        ttft_s = rest * (times.prefill_s + times.prefill_context_s * (cached + 0.5 * rest))
        ttft_s += np.ceil(rest / engine.chunk_tokens) * times.step_s
        tpot_s = np.where(o > 1, times.decode_s[1] + times.context_s * (p + 0.5 * o), 0.0)
        e2e_s = ttft_s + (o - 1) * tpot_s
        ok = (ttft_s <= slo.ttft_s) & (tpot_s <= slo.tpot_s) & (e2e_s <= slo.e2e_s)
        ok &= p + o - 1 <= times.kv_capacity_tokens
        misses += int((~ok).sum())
    if count == 0:
        raise InputError("no requests: the source is empty")
    if misses > count * (1.0 - slo.met_fraction) + 1e-9 * count:
        raise InfeasibleError(
            f"no number of {group.pool} replicas meets {slo.text()}: with a replica to itself only "
            f"{1 - misses / count:.2%} of requests do, {slo.met_fraction:.2%} must; "
            "loosen the bound or take a faster GPU"
        )
    return count


# --- checks ---------------------------------------------------------------------------------------------------


def _check(
    groups: Sequence[ReplicaGroup], engine: Engine, router: str, bin_s: float, concurrency: int
) -> None:
    if not groups or any(g.replicas < 1 for g in groups):
        raise InputError("simulate: every group needs one replica or more, and there must be a group")
    for g in groups:
        if g.role not in _ROLES:
            raise InputError(f"simulate: role {g.role!r} of {g.pool}: one of {', '.join(_ROLES)}")
    roles = {g.role for g in groups}
    if ("both" in roles and len(roles) > 1) or roles in ({"prefill"}, {"decode"}):
        raise InputError("simulate: disaggregated serving needs prefill and decode groups and no other")
    if router not in _ROUTERS:
        near = nearest(router, _ROUTERS) or list(_ROUTERS)
        raise InputError(f"simulate: unknown router {router!r}: did you mean {', '.join(near)}?")
    if bin_s <= 0 or SECONDS_PER_HOUR % bin_s != 0:
        raise InputError(f"simulate: bin_s is {bin_s}, must divide an hour")
    if concurrency < 0:
        raise InputError(f"simulate: concurrency is {concurrency}, must not be negative")
    if not 0 <= engine.watermark_fraction < 1 or engine.max_queue < 1 or engine.max_batch < 0:
        raise InputError(
            "simulate: watermark_fraction must lie in 0..1, max_queue be 1 or more, max_batch 0 or more"
        )
    if min(engine.transfer_s, engine.transfer_token_s) < 0:
        raise InputError("simulate: transfer times must not be negative")


def _group_records(
    groups: Sequence[ReplicaGroup], engine: Engine
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.float64]]:
    """The kernel's view of the groups, checked."""
    group = np.zeros(len(groups), s.GROUP)
    most = max(len(g.times.decode_s) for g in groups)
    decode_s = np.full((len(groups), most), np.inf)
    for k, g in enumerate(groups):
        times = g.times
        known = len(times.decode_s) - 1
        max_batch = min(engine.max_batch or known, known)
        if max_batch < 1 or not (np.asarray(times.decode_s[1:]) > 0).all():
            raise InputError(f"{g.pool}: step times need a positive decode time for a batch of 1 and more")
        if min(times.context_s, times.prefill_s, times.prefill_context_s, times.step_s) < 0:
            raise InputError(f"{g.pool}: step times must not be negative")
        if times.prefill_s + times.step_s <= 0:
            raise InputError(f"{g.pool}: prefill must take time")
        if times.kv_capacity_tokens < 1:
            raise CannotServeError(f"{g.pool}: no memory left for a KV cache")
        if engine.chunk_tokens <= max_batch:
            raise InputError(
                f"{g.pool}: chunk_tokens ({engine.chunk_tokens}) must exceed the largest batch ({max_batch})"
            )
        capacity = int(times.kv_capacity_tokens)
        decode_s[k, : known + 1] = times.decode_s
        row = group[k]
        row["context_s"], row["prefill_s"] = times.context_s, times.prefill_s
        row["prefill_context_s"], row["step_s"] = times.prefill_context_s, times.step_s
        row["capacity"], row["limit"] = capacity, int(capacity * (1.0 - engine.watermark_fraction))
        row["max_batch"], row["chunk"] = max_batch, engine.chunk_tokens
        row["weight"] = g.weight or max_batch / float(times.decode_s[max_batch])
    group["weight"] /= group["weight"].max()
    return group, decode_s


def _check_chunk(chunk: Requests, after_s: float, classes: int) -> float:
    """Raise on a chunk that cannot be simulated; the time of its last arrival [s]."""
    if not len(chunk):
        return after_s
    arrival_s = chunk.arrival_s
    if not np.isfinite(arrival_s).all() or arrival_s[0] < after_s or (np.diff(arrival_s) < 0).any():
        raise InputError(
            "requests are not in order of arrival, or an arrival time is not a finite number ≥ 0"
        )
    for name in ("input_tokens", "output_tokens"):
        tokens = getattr(chunk, name)
        if tokens.min() < 1 or tokens.max() > MOST_TOKENS:
            raise InputError(f"{name} must lie in 1..{MOST_TOKENS}, found {tokens.min()}..{tokens.max()}")
    if chunk.priority is not None and not (chunk.priority.min() >= 0 and chunk.priority.max() < classes):
        raise InputError(f"priority must lie in 0..{classes - 1}")
    return float(arrival_s[-1])
