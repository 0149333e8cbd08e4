"""Speed of prediction and search on one core, against what aiconfigurator publishes of itself.

Run: python bench/search.py. `search` tries all layouts and concurrencies of one model on up to 8 GPUs; points
per second is what the same loop does on a fine grid of concurrencies, and what `predict` does on arrays.
Elementwise numpy runs on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from pertoken.catalog.gpus import gpu
from pertoken.catalog.models import model
from pertoken.perf import Layout, Point, predict, search

CASES = (
    ("meta-llama/Llama-3.3-70B-Instruct", "H100-SXM", "fp8"),
    ("openai/gpt-oss-120b", "B200", "fp4"),
    ("deepseek-ai/DeepSeek-V3", "H200-SXM", "fp8"),
)
PEER = "aiconfigurator: one model in 3-30 s dense, 60-220 s MoE; 1.1 estimates/s by command, 10,000/s in a session"


def seconds(work: Callable[[], object], runs: int = 7) -> float:
    """Median wall time of a call, the first one (tables, caches) left out."""
    work()
    taken = []
    for _ in range(runs):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main() -> None:
    """Print the table."""
    print(f"{'one core':40}{'points':>10}{'median ms':>12}{'points/s':>14}")
    fine = np.unique(np.round(np.geomspace(1, 4096, 2000), 2))
    for name, card, precision in CASES:
        m, g, workload = model(name), gpu(card), Point(1200, 250, 1, 480, precision=precision)
        for label, batches in (("search", None), ("search, fine grid", fine)):
            tried = search(m, g, workload, batches=batches).tried
            taken = seconds(lambda m=m, g=g, w=workload, b=batches: search(m, g, w, batches=b))  # type: ignore[misc]
            print(
                f"{label + ' ' + m.name.split('/')[-1]:40}{tried:10,}{1000 * taken:12.1f}{tried / taken:14,.0f}"
            )
    lengths = np.random.default_rng(0).uniform(100, 4000, 1_000_000)
    at = Point(lengths, 250, 16, precision="fp8", layout=Layout(4))
    taken = seconds(lambda: predict(model(CASES[0][0]), gpu("H100-SXM"), at), runs=3)
    print(
        f"{'predict, arrays, power included':40}{lengths.size:10,}{1000 * taken:12.1f}{lengths.size / taken:14,.0f}"
    )
    print(f"peer: {PEER}")


if __name__ == "__main__":
    main()
