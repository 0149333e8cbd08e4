"""The vendor's equation: price of a GPU hour over the tokens it makes, and what that leaves out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pertoken.errors import InputError
from pertoken.units import SECONDS_PER_HOUR, usd_per_mtok

LEFT_OUT = (
    "idle hours: it holds at 100 % use; at half use the figure doubles",
    "input tokens: it charges all cost to output tokens",
    "energy at the utility meter (GPU, host, cooling) and the demand charge, unless the price includes them",
    "staff, network, storage, software licences, egress",
    "whether the throughput meets a latency target, and its uncertainty",
    "lost work: preemptions, retries, spot interruptions, restarts",
)


@dataclass(frozen=True)
class Quick:
    """The equation's answer [USD per M output tokens] and its inputs."""

    usd_per_gpu_hour: float
    tokens_per_second_per_gpu: float
    usd_per_mtok_output: float
    left_out: tuple[str, ...] = LEFT_OUT

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "left_out": list(self.left_out)}

    def __str__(self) -> str:
        lines = [
            f"{self.usd_per_mtok_output:.4f} USD per M output tokens at 100 % use",
            f"  = {self.usd_per_gpu_hour:g} USD/h ÷ ({self.tokens_per_second_per_gpu:g} tokens/s × "
            f"{SECONDS_PER_HOUR:,} s/h) × 1 M",
            "It leaves out:",
            *(f"  - {line}" for line in self.left_out),
            "With them: pertoken compare SCENARIO",
        ]
        return "\n".join(lines)


def quick(usd_per_gpu_hour: float, tokens_per_second_per_gpu: float) -> Quick:
    """USD per M output tokens at full use = USD per GPU hour ÷ tokens per GPU hour × 1 M.

    Raises InputError on a negative or non-finite price, or a throughput that is not above 0.
    Source: NVIDIA's cost-per-token equation, April 2026 (GB300: 2.65 USD/h at 6,000 tokens/s is 0.1227).

    >>> round(quick(2.65, 6000).usd_per_mtok_output, 4)
    0.1227
    """
    if not 0 <= usd_per_gpu_hour < math.inf:
        raise InputError(f"--usd-per-gpu-hour {usd_per_gpu_hour:g} must be a number of 0 or more")
    if not 0 < tokens_per_second_per_gpu < math.inf:
        raise InputError(f"--tokens-per-second-per-gpu {tokens_per_second_per_gpu:g} must be above 0")
    value = usd_per_mtok(usd_per_gpu_hour, tokens_per_second_per_gpu * SECONDS_PER_HOUR)
    return Quick(usd_per_gpu_hour, tokens_per_second_per_gpu, value)
