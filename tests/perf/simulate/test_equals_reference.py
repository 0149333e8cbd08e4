"""The event-jump kernel against a simulator that takes one engine step at a time, in plain Python.

Times are multiples of a power of two, so both compute without rounding and must agree to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.perf.point import StepTimes
from pertoken.perf.simulate import Engine, Given, ReplicaGroup, Requests, Simulation, simulate

INF = float("inf")
Ints = npt.NDArray[np.int32]
Role = Literal["both", "prefill", "decode"]
Router = Literal["least-loaded", "round-robin", "prefix-affine"]


@dataclass
class Job:
    seq: int
    arrival: float
    input: int
    output: int
    cached: int
    priority: int
    hashes: list[int]
    generated: int = 0
    reach: int = 0
    admitted: int = 0
    done: int = 0
    ready: bool = False
    first: float = float("nan")
    end: float = float("nan")

    @property
    def total(self) -> int:
        return self.input if self.ready else self.input + self.generated


@dataclass
class Counts:
    preemptions: int = 0
    recomputed: int = 0
    rejected: int = 0
    cached: int = 0
    input: int = 0


class Replica:
    """One replica, a step at a time; memory is counted from scratch whenever it is asked for."""

    def __init__(self, group: ReplicaGroup, engine: Engine, block: int, counts: Counts) -> None:
        self.times, self.role, self.engine, self.block, self.counts = (
            group.times,
            group.role,
            engine,
            block,
            counts,
        )
        known = len(group.times.decode_s) - 1
        self.max_batch = min(engine.max_batch or known, known)
        self.capacity = group.times.kv_capacity_tokens
        self.limit = int(self.capacity * (1 - engine.watermark_fraction))
        self.weight = group.weight
        self.t, self.ends, self.busy = 0.0, INF, False
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.fresh: list[Job] = []
        self.partial: Job | None = None
        self.ready_now: list[Job] = []
        self.uses: dict[int, int] = {}
        self.unused: OrderedDict[int, None] = OrderedDict()
        self.admitted = 0

    def outstanding(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.fresh) + (self.partial is not None)

    def hashed(self, job: Job) -> bool:
        return self.block > 0 and bool(job.hashes) and not job.ready

    def used(self) -> int:
        tokens = self.block * sum(1 for n in self.uses.values() if n > 0)
        held = [(j, j.input + j.generated - 1) for j in self.running]
        held += [(j, j.input + j.generated) for j in [*self.fresh, *([self.partial] if self.partial else [])]]
        for job, size in held:
            tokens += size - (len(job.hashes) * self.block if self.hashed(job) else 0)
        return tokens

    def evict(self, room: int = 0) -> None:
        while self.unused and self.used() + room + len(self.unused) * self.block > self.capacity:
            gone, _ = self.unused.popitem(last=False)
            del self.uses[gone]

    def release(self, job: Job, computed: int) -> None:
        if not self.hashed(job):
            return
        for i in reversed(range(len(job.hashes))):
            h = job.hashes[i]
            self.uses[h] -= 1
            if self.uses[h] == 0:
                if i >= computed // self.block:
                    del self.uses[h]
                else:
                    self.unused[h] = None

    def match(self, hashes: list[int]) -> int:
        hits = 0
        while hits < len(hashes) and hashes[hits] in self.uses:
            hits += 1
        return hits

    def admit(self) -> Job | None:
        job = min(self.waiting, key=lambda j: j.priority)  # the first of the best class
        alone = not self.running and not self.fresh and self.partial is None
        limit = self.capacity if alone else self.limit
        hits = 0
        if self.hashed(job):
            hits = self.match(job.hashes[: (job.total - 1) // self.block])
            woken = sum(1 for h in job.hashes[:hits] if self.uses[h] == 0)
            need = job.total - hits * self.block + woken * self.block
        else:
            need = job.total + job.ready
        if self.used() + len(self.running) + need > limit:
            return None
        self.waiting.remove(job)
        if self.hashed(job):
            missing = [h for h in job.hashes if h not in self.uses]
            for h in job.hashes:
                if h in self.uses:
                    self.unused.pop(h, None)
                    self.uses[h] += 1
            for h in missing:
                self.evict(self.block)
                self.uses[h] = 1
            job.done = hits * self.block
        else:
            job.done = min(job.cached, job.total - 1)
        if job.reach == 0:
            job.cached = job.done
        self.admitted += 1
        job.admitted = self.admitted
        if job.ready:
            self.running.append(job)
        else:
            self.partial = job
        self.evict()
        return job

    def preempt(self) -> bool:
        any_ = False
        while self.running and self.used() + len(self.running) > self.capacity:
            held = [*self.running, *([self.partial] if self.partial else [])]
            victim = max(held, key=lambda j: (j.priority, j.admitted))
            if victim is self.partial:
                computed = victim.done
                self.partial = None
            else:
                computed = victim.input + victim.generated - 1
                self.running.remove(victim)
            self.release(victim, computed)
            victim.reach = max(victim.reach, computed)
            victim.ready = False
            self.waiting.insert(0, victim)
            self.counts.preemptions += 1
            any_ = True
        return any_

    def prompt(self, job: Job, tokens: int) -> float:
        t = self.times
        seconds = tokens * (t.prefill_s + t.prefill_context_s * (job.done + 0.5 * tokens))
        self.counts.recomputed += min(tokens, max(0, job.reach - job.done))
        job.done += tokens
        if job.done == job.total:
            self.fresh.append(job)
            self.partial = None
        else:
            self.partial = job
        return seconds

    def begin(self) -> None:
        t = self.times
        preempted = self.preempt()
        budget = self.engine.chunk_tokens - len(self.running)
        seconds, worked = 0.0, False
        if self.partial:
            tokens = min(budget, self.partial.total - self.partial.done)
            seconds += self.prompt(self.partial, tokens)
            budget -= tokens
            worked = True
        while (
            not preempted and budget > 0 and self.waiting and self.partial is None
            and len(self.running) + len(self.fresh) < self.max_batch
        ):  # fmt: skip
            job = self.admit()
            if job is None:
                break
            if job.ready:
                budget -= 1
                continue
            tokens = min(budget, job.total - job.done)
            seconds += self.prompt(job, tokens)
            budget -= tokens
            worked = True
        if self.running:
            context = sum(j.input + j.generated for j in self.running)
            seconds += float(t.decode_s[len(self.running)]) + t.context_s * context
        else:
            assert worked
            seconds += t.step_s
        self.ends, self.busy = self.t + seconds, True

    def end(self) -> tuple[list[Job], list[Job]]:
        """Finished jobs, and those handed over."""
        self.t, self.busy, self.ends = self.ends, False, INF
        finished: list[Job] = []
        handed: list[Job] = []
        for job in self.running:
            job.generated += 1
        self.evict()
        for job in [j for j in reversed(self.running) if j.generated == j.output]:
            self.running.remove(job)
            self.release(job, job.input + job.output - 1)
            finished.append(job)
        fresh, self.fresh = self.fresh, []
        late: list[Job] = []
        for job in fresh:
            if job.generated == 0:
                job.first = self.t
                self.counts.cached += job.cached
                self.counts.input += job.input - job.cached
            tokens = job.input + job.generated
            job.generated += 1
            if job.generated < job.output and self.role != "prefill":
                late.append(job)
                continue
            self.release(job, tokens)
            (finished if job.generated == job.output else handed).append(job)
        self.running += late
        for job in finished:
            job.end = self.t
        return finished, handed

    def works(self) -> bool:
        return bool(self.running or self.waiting or self.partial)


@dataclass
class Case:
    groups: list[ReplicaGroup]
    engine: Engine
    requests: Requests
    block: int
    classes: int
    router: Router
    concurrency: int = 0
    counts: Counts = field(default_factory=Counts)


def jobs_of(case: Case) -> list[Job]:
    r, jobs = case.requests, []
    for i in range(len(r)):
        hashes = (
            [] if r.at is None or r.blocks is None else r.hashes[r.at[i] : r.at[i] + r.blocks[i]].tolist()
        )
        jobs.append(
            Job(
                i, float(r.arrival_s[i]), int(r.input_tokens[i]), int(r.output_tokens[i]),
                int(r.cached_tokens[i]) if r.cached_tokens is not None else 0,
                int(r.priority[i]) if r.priority is not None else 0, hashes,
            )
        )  # fmt: skip
    return jobs


def choose(case: Case, replicas: list[Replica], job: Job, role: str, turn: list[int]) -> Replica:
    able = [r for r in replicas if r.role == role]
    if case.router == "round-robin" and role != "decode":
        while True:
            r = replicas[turn[0] % len(replicas)]
            turn[0] += 1
            if r.role == role:
                return r
    load = {id(r): r.outstanding() / r.weight for r in able}
    least = min(able, key=lambda r: load[id(r)])
    if case.router == "prefix-affine" and job.hashes and role != "decode":
        hits = {id(r): r.match(job.hashes) for r in able}
        best = min(able, key=lambda r: (-hits[id(r)], load[id(r)]))
        if hits[id(best)] and load[id(best)] <= 1.5 * load[id(least)] + 4 / best.weight:
            return best
    return least


def reference(case: Case) -> list[Job]:
    """Every step of every replica, in the order of time; at one time ends, then arrivals, then beginnings."""
    replicas = [
        Replica(g, case.engine, case.block, case.counts) for g in case.groups for _ in range(g.replicas)
    ]
    jobs, position, turn = jobs_of(case), 0, [0]
    handing: list[tuple[float, int, Job]] = []
    split = any(g.role != "both" for g in case.groups)
    clients, now = case.concurrency, 0.0
    while True:
        ends = min(r.ends for r in replicas)
        begins = min((r.t for r in replicas if not r.busy and r.works()), default=INF)
        arrives = INF
        if position < len(jobs):
            arrives = jobs[position].arrival if not case.concurrency else (now if clients else INF)
        hands = min(handing)[0] if handing else INF
        t = min(ends, begins, arrives, hands)
        if t == INF:
            return jobs
        if ends == t:
            r = next(r for r in replicas if r.ends == t)
            finished, handed = r.end()
            clients, now = clients + len(finished), (t if finished else now)
            for job in handed:
                e = case.engine
                handing.append((t + e.transfer_s + e.transfer_token_s * job.input, job.seq, job))
        elif hands == t or arrives == t:
            if hands == t:
                job = min(handing)[2]
                handing.remove(min(handing))
                job.ready, role = True, "decode"
            else:
                job = jobs[position]
                job.arrival = t
                position += 1
                clients -= 1
                role = "prefill" if split else "both"
            r = choose(case, replicas, job, role, turn)
            if len(r.waiting) >= case.engine.max_queue or job.input + job.output - 1 > r.capacity:
                case.counts.rejected += 1
                clients, now = clients + 1, t
            else:
                r.waiting.append(job)
                if not r.busy:
                    r.t = max(r.t, t)
        else:
            next(r for r in replicas if not r.busy and r.works() and r.t == t).begin()


TICK = 2.0**-14


@st.composite
def step_times(draw: st.DrawFn, max_batch: int) -> StepTimes:
    base, each = draw(st.integers(1, 64)), draw(st.integers(0, 16))
    decode = [0.0, *(TICK * (base + each * b) for b in range(1, max_batch + 1))]
    return StepTimes(
        decode_s=np.array(decode), context_s=draw(st.integers(0, 8)) * TICK / 16,
        prefill_s=draw(st.integers(1, 16)) * TICK / 4, prefill_context_s=draw(st.integers(0, 8)) * TICK / 64,
        step_s=draw(st.integers(0, 64)) * TICK, kv_capacity_tokens=draw(st.integers(24, 220)),
        idle_power_w=50.0, decode_power_w=300.0, prefill_power_w=400.0, gpus=1, basis="assumed",
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    max_batch = draw(st.integers(1, 6))
    split = draw(st.booleans()) and draw(st.booleans())
    roles: list[Role] = ["prefill", "decode"] if split else ["both"]
    if not split and draw(st.booleans()):
        roles.append("both")
    counts, weights = st.integers(1, 2), st.sampled_from([1.0, 0.5])
    groups = [
        ReplicaGroup("p", draw(step_times(max_batch)), draw(counts), role, draw(weights)) for role in roles
    ]
    groups[0] = ReplicaGroup("p", groups[0].times, groups[0].replicas, groups[0].role, 1.0)
    engine = Engine(
        chunk_tokens=max_batch + draw(st.integers(1, 40)), watermark_fraction=draw(st.sampled_from([0.0, 0.125, 0.25])),
        max_queue=draw(st.sampled_from([1000, 3])), transfer_s=draw(st.integers(0, 40)) * TICK,
        transfer_token_s=draw(st.integers(0, 2)) * TICK,
    )  # fmt: skip
    n = draw(st.integers(1, 30))

    def ints(low: int, high: int) -> Ints:
        return np.array(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)), np.int32)

    spread = draw(st.sampled_from([3, 60, 2000]))
    arrival = np.cumsum(ints(0, spread)) * TICK * 8
    input_, output = ints(1, draw(st.sampled_from([20, 70]))), ints(1, draw(st.sampled_from([6, 40])))
    classes = draw(st.integers(1, 3))
    priority = ints(0, classes - 1)
    mode = draw(st.sampled_from(["plain", "given", "hashed"]))
    block, cached, at, blocks, hashes = 0, None, None, None, np.zeros(0, np.int64)
    if mode == "given":
        cached = np.minimum(ints(0, 30), input_)
    if mode == "hashed":
        block = draw(st.sampled_from([2, 4, 7]))
        blocks = (input_ // block).astype(np.int32)
        at = (np.cumsum(blocks) - blocks).astype(np.int64)
        family, own = ints(0, 3), ints(0, 40)
        rows = [
            [1000 * family[i] + k if k < own[i] else 10_000 + 100 * i + k for k in range(blocks[i])]
            for i in range(n)
        ]
        hashes = np.array([h for row in rows for h in row], np.int64)
    requests = Requests(arrival.astype(np.float64), input_, output, cached, priority, at, blocks, hashes)
    routers: list[Router] = ["least-loaded", "round-robin", "prefix-affine"]
    router = draw(st.sampled_from(routers))
    concurrency = draw(st.sampled_from([0, 0, 1, 5]))
    return Case(groups, engine, requests, block, classes, router, concurrency)


def run(case: Case) -> Simulation:
    return simulate(
        Given(case.requests, case.block, case.classes),
        case.groups,
        engine=case.engine,
        router=case.router,
        concurrency=case.concurrency,
        record=len(case.requests),
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases())
def test_same_times_as_step_by_step(case: Case) -> None:
    jobs = reference(case)
    found = run(case)
    np.testing.assert_array_equal(found.finish_s, [j.end for j in jobs])
    np.testing.assert_array_equal(found.first_s, [j.first if j.end == j.end else np.nan for j in jobs])
    counted = {"preemptions", "rejected", "input_tokens", "cached_input_tokens", "recomputed_tokens"}
    assert {n: found.count(n) for n in counted} == {
        "preemptions": case.counts.preemptions, "rejected": case.counts.rejected, "input_tokens": case.counts.input,
        "cached_input_tokens": case.counts.cached, "recomputed_tokens": case.counts.recomputed,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_same_times_with_ordinary_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, block = 600, (0, 16)[seed % 2]
    batch = np.arange(17)
    times = StepTimes(
        decode_s=np.where(batch > 0, 0.0061 + 4.1e-5 * batch, 0.0), context_s=6.3e-9, prefill_s=3.1e-5,
        prefill_context_s=1.3e-9, step_s=0.0057, kv_capacity_tokens=9_000, idle_power_w=1.0, decode_power_w=1.0,
        prefill_power_w=1.0, gpus=1, basis="assumed",
    )  # fmt: skip
    input_ = np.clip(rng.lognormal(6, 0.9, n), 1, 6000).astype(np.int32)
    output = np.clip(rng.lognormal(4.5, 0.9, n), 1, 2500).astype(np.int32)
    blocks = (input_ // 16).astype(np.int32) if block else None
    at = np.cumsum(blocks) - blocks if blocks is not None else None
    hashes = np.zeros(0, np.int64)
    if blocks is not None:
        family = rng.integers(0, 5, n)
        hashes = np.concatenate(
            [
                np.arange(b) + 100_000 * f + (0 if i % 3 else 1_000_000 * i)
                for i, (b, f) in enumerate(zip(blocks, family, strict=True))
            ]
        )
    requests = Requests(np.cumsum(rng.gamma(0.5, 0.06, n)), input_, output, None, None, at, blocks, hashes)
    case = Case(
        [ReplicaGroup("p", times, 2, weight=1.0)],
        Engine(chunk_tokens=512),
        requests,
        block,
        1,
        "prefix-affine",
    )
    jobs = reference(case)
    found = run(case)
    np.testing.assert_allclose(found.finish_s, [j.end for j in jobs], rtol=1e-9)
    np.testing.assert_allclose(found.first_s, [j.first for j in jobs], rtol=1e-9)
    assert found.count("preemptions") == case.counts.preemptions > 0
