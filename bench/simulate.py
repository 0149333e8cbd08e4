"""How fast the request simulation is, on one core: python bench/simulate.py [millions of requests, default 100].

Lengths and arrivals like the Azure conversation trace of 2023 (mean prompt 1,155, mean output 211 tokens, Poisson-like
gaps). Peers named in the issue, on the same kind of machine: Vidur 600–850 requests per second, BLIS (Go) about 550,
Dynamo's mocker (Rust) 6,000. The naive kernel here steps every engine iteration and knows neither prefix cache nor
preemption; it runs on the same requests in the same process.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from pertoken.perf.point import StepTimes
from pertoken.perf.simulate import ReplicaGroup, Requests, Slo, Traffic, simulate
from pertoken.units import HOURS_PER_DAY, SECONDS_PER_HOUR

DAY_S = HOURS_PER_DAY * SECONDS_PER_HOUR
RATE = 8.0
BATCH = np.arange(257)
TIMES = StepTimes(
    decode_s=np.where(BATCH > 0, 0.006 + 4e-5 * BATCH, 0.0), context_s=6e-9, prefill_s=3e-5, prefill_context_s=1e-10,
    step_s=0.006, kv_capacity_tokens=600_000, idle_power_w=100.0, decode_power_w=450.0, prefill_power_w=600.0, gpus=1,
    basis="assumed",
)  # fmt: skip
SLO = Slo(ttft_s=1.0, tpot_s=0.03)


class Held:
    """Requests generated beforehand, so that only the simulation is timed."""

    def __init__(self, source: Traffic) -> None:
        self.block_tokens, self.classes, self.parts = (
            source.block_tokens,
            source.classes,
            list(source.chunks()),
        )

    def chunks(self) -> Iterator[Requests]:
        return iter(self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))


def like_azure(requests: float, **more: Any) -> Traffic:
    return Traffic(
        RATE * DAY_S, requests / RATE, 1155.0, 211.0, 0.985, 0.858, input_most_tokens=14_050, output_most_tokens=1000,
        **more,
    )  # fmt: skip


@numba.njit(cache=True)
def every_step(
    arrival: Any, prompt: Any, output: Any, base: float, each: float, context_s: float, prefill_s: float,
    max_batch: int, capacity: int, chunk: int,
) -> Any:  # fmt: skip
    """Continuous batching, one iteration of the loop per engine step and one of the inner loop per sequence."""
    n = arrival.size
    end = np.empty(n)
    who, left = np.empty(max_batch, np.int64), np.empty(max_batch, np.int64)
    todo, held = np.empty(max_batch, np.int64), np.empty(max_batch, np.int64)
    batch, taken, used, t = 0, 0, 0, 0.0
    while taken < n or batch > 0:
        if batch == 0 and arrival[taken] > t:
            t = arrival[taken]
        while taken < n and arrival[taken] <= t and batch < max_batch:
            if used + prompt[taken] + output[taken] > capacity:
                break
            who[batch], left[batch], todo[batch], held[batch] = taken, output[taken], prompt[taken], 0
            used += prompt[taken] + output[taken]
            batch += 1
            taken += 1
        budget, decoding, context, computed = chunk, 0, 0, 0
        for i in range(batch):
            if todo[i] > 0:
                x = min(todo[i], budget)
                todo[i] -= x
                held[i] += x
                budget -= x
                computed += x
                if x > 0 and todo[i] == 0:
                    left[i] -= 1
            else:
                left[i] -= 1
                held[i] += 1
                decoding += 1
                context += held[i]
        t += base + each * decoding + context_s * context + prefill_s * computed
        i = 0
        while i < batch:
            if todo[i] == 0 and left[i] <= 0:
                end[who[i]] = t
                used -= prompt[who[i]] + output[who[i]]
                batch -= 1
                who[i], left[i], todo[i], held[i] = who[batch], left[batch], todo[batch], held[batch]
            else:
                i += 1
    return end


def timed(work: Callable[[], Any], repeats: int = 3) -> tuple[float, float, Any]:
    """Least wall and processor seconds of some runs, and the last answer."""
    wall, cpu, answer = float("inf"), float("inf"), None
    for _ in range(repeats):
        w, c = time.perf_counter(), time.thread_time()
        answer = work()
        wall, cpu = min(wall, time.perf_counter() - w), min(cpu, time.thread_time() - c)
    return wall, cpu, answer


def line(name: str, requests: int, wall: float, cpu: float, more: str = "") -> None:
    print(
        f"{name:<44}{requests / wall / 1e6:>8.2f} M/s wall{requests / cpu / 1e6:>8.2f} M/s core  {more}",
        flush=True,
    )


def peer() -> float:
    held = Held(like_azure(200_000))
    columns = [
        np.concatenate([getattr(c, n) for c in held.parts])
        for n in ("arrival_s", "input_tokens", "output_tokens")
    ]
    arrival, prompt, output = columns[0], columns[1].astype(np.int64), columns[2].astype(np.int64)
    settings = (0.006, 4e-5, 6e-9, 3e-5, 256, 600_000, 8192)
    every_step(arrival[:10], prompt[:10], output[:10], *settings)
    wall, cpu, _ = timed(lambda: every_step(arrival, prompt, output, *settings))
    line("naive kernel, steps every iteration", len(held), wall, cpu)
    return len(held) / cpu


def single(name: str, held: Held, groups: list[ReplicaGroup], naive: float, **more: Any) -> None:
    wall, cpu, found = timed(lambda: simulate(held, groups, slo=SLO, **more))
    facts = f"util {found.utilisation:.2f} TTFT p99 {found.latency_s('ttft', 0.99)[0]:.2f} s"
    if held.block_tokens:
        facts += f" hits {found.cache_hit_fraction:.0%}"
    line(name, len(held), wall, cpu, f"{facts}  {len(held) / cpu / naive:.1f}× naive")


def month(millions: float) -> None:
    """All of it: arrivals drawn, simulated, counted; peak memory of the process."""
    watch = {"now": 0.0}
    stop = threading.Event()

    def report() -> None:
        while not stop.wait(20.0):
            print(f"  … {watch['now']:.0%}", flush=True)

    threading.Thread(target=report, daemon=True).start()
    source = like_azure(millions * 1e6)
    wall, cpu, found = timed(
        lambda: simulate(source, [ReplicaGroup("p", TIMES)], slo=SLO, progress=lambda f: watch.update(now=f)),
        1,
    )
    stop.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    requests = found.count("requests")
    line(
        f"{requests:,} requests, drawn and simulated",
        requests,
        wall,
        cpu,
        f"{wall:.1f} s, peak memory {peak:.2f} GiB",
    )


def main() -> None:
    millions = float(sys.argv[1]) if len(sys.argv) > 1 else 100.0
    begun = time.perf_counter()
    simulate(like_azure(1000), [ReplicaGroup("p", TIMES)])
    print(f"compile or load the kernel: {time.perf_counter() - begun:.2f} s")
    month(millions)  # first, so that the peak is its own
    naive = peer()
    one = [ReplicaGroup("p", TIMES)]
    plain = Held(like_azure(2e6))
    single("one replica, no prefix cache", plain, one, naive)
    single("one replica, closed loop of 64", plain, one, naive, concurrency=64)
    single("four replicas, least loaded", plain, [ReplicaGroup("p", TIMES, 4)], naive)
    apart = [ReplicaGroup("p", TIMES, 1, "prefill"), ReplicaGroup("d", TIMES, 1, "decode")]
    single("prefill and decode apart", plain, apart, naive)
    for block, tokens in ((512, 1024), (16, 1024)):
        hashed = Held(like_azure(3e5, block_tokens=block, prefixes=200, prefix_tokens=tokens))
        single(f"one replica, prefix cache, blocks of {block}", hashed, one, naive)
        if block == 16:
            group = [ReplicaGroup("p", TIMES, 4)]
            single(f"four, prefix-affine, blocks of {block}", hashed, group, naive, router="prefix-affine")


if __name__ == "__main__":
    main()
