"""Replicas behind a router: set up the kernel, feed it chunks, scale, drain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pertoken.perf.simulate import _state as s
from pertoken.perf.simulate._events import rest_all, run, switch_off, switch_on
from pertoken.perf.simulate._requests import Requests, Source
from pertoken.perf.simulate._result import Simulation, Slo
from pertoken.perf.simulate._settings import (
    ROLES,
    ROUTERS,
    Autoscale,
    Engine,
    ReplicaGroup,
    Router,
    check,
    check_chunk,
    group_records,
)
from pertoken.units import SECONDS_PER_HOUR


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
    sim = Run(source, groups, slo or Slo(), engine or Engine(), router, autoscale, concurrency, bin_s, record)
    sim.feed(progress, most_misses=float("inf"))
    return sim.result(duration_s)


class Run:
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
        check(groups, engine, router, bin_s, concurrency)
        self.source, self.groups, self.slo, self.autoscale = source, tuple(groups), slo, autoscale
        self.closed = concurrency > 0
        block = source.block_tokens if engine.prefix_cache else 0
        group_of = np.repeat(np.arange(len(groups), dtype=np.int64), [g.replicas for g in groups])
        role_of = np.asarray([ROLES[g.role] for g in groups], np.int64)[group_of]
        group, decode_s = group_records(groups, engine)
        self.state = s.State(group, decode_s, group_of, role_of, source.classes, block, record)
        world = self.state.world
        world["clients"], world["closed"] = concurrency, self.closed
        world["disaggregated"] = any(g.role != "both" for g in groups)
        world["router"], world["max_queue"], world["bin_s"] = ROUTERS[router], engine.max_queue, bin_s
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
            self.last_s = check_chunk(
                chunk, self.last_s, self.source.classes, int(self.state.world["block"][0])
            )
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
