"""`pertoken compare examples/shop.yaml` as a whole process, against the interpreter's own start as the unit.

Run: python bench/compare.py [runs]. Prints medians; the machine is shared, so the ratio is what to quote.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = "import sys; from pertoken.cli import main; sys.argv = ['pertoken', *sys.argv[1:]]; main()"


def seconds(*arguments: str) -> float:
    """Wall seconds of one run of the command."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - begun


def main() -> None:
    """Alternate the runs, so that a drift of the machine meets all alike."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    cases = {
        "python -c pass": ("-c", "pass"),
        "import pertoken": ("-c", "import pertoken"),
        "pertoken --help": ("-c", COMMAND, "--help"),
        "pertoken quick": (
            "-c",
            COMMAND,
            "quick",
            "--usd-per-gpu-hour",
            "2.65",
            "--tokens-per-second-per-gpu",
            "6000",
        ),
        "compare shop.yaml": ("-c", COMMAND, "compare", "examples/shop.yaml"),
        "compare shop.yaml --sensitivity": ("-c", COMMAND, "compare", "examples/shop.yaml", "--sensitivity"),
    }
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, arguments in cases.items():
            taken[name].append(seconds(*arguments))
    unit = statistics.median(taken["python -c pass"])
    print(f"{'whole process':34}{'median s':>10}{'min s':>8}{'max s':>8}{'× python':>10}")
    for name, values in taken.items():
        middle = statistics.median(values)
        print(f"{name:34}{middle:10.3f}{min(values):8.3f}{max(values):8.3f}{middle / unit:10.1f}")


if __name__ == "__main__":
    main()
