"""What a simulation is told about replicas, engine and scaling, and the checks that keep nonsense out of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pertoken.errors import CannotServeError, InputError, nearest
from pertoken.perf.point import StepTimes
from pertoken.perf.simulate import _state as s
from pertoken.perf.simulate._requests import MOST_TOKENS, Requests
from pertoken.units import SECONDS_PER_HOUR

Role = Literal["both", "prefill", "decode"]
Router = Literal["least-loaded", "round-robin", "prefix-affine"]
ROLES: dict[str, int] = {"both": s.BOTH, "prefill": s.ONLY_PREFILL, "decode": s.ONLY_DECODE}
ROUTERS: dict[str, int] = {
    "least-loaded": s.LEAST_LOADED, "round-robin": s.ROUND_ROBIN, "prefix-affine": s.PREFIX_AFFINE,
}  # fmt: skip
_TYPICAL_CONTEXT_TOKENS = 2048
"""Context at which the decode speeds of different GPUs are compared to share requests out."""


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


def check(
    groups: Sequence[ReplicaGroup], engine: Engine, router: str, bin_s: float, concurrency: int
) -> None:
    if not groups or any(g.replicas < 1 for g in groups):
        raise InputError("simulate: every group needs one replica or more, and there must be a group")
    for g in groups:
        if g.role not in ROLES:
            raise InputError(f"simulate: role {g.role!r} of {g.pool}: one of {', '.join(ROLES)}")
    roles = {g.role for g in groups}
    if ("both" in roles and len(roles) > 1) or roles in ({"prefill"}, {"decode"}):
        raise InputError("simulate: disaggregated serving needs prefill and decode groups and no other")
    if router not in ROUTERS:
        near = nearest(router, ROUTERS) or list(ROUTERS)
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


def group_records(
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
        steps_s = np.asarray(times.decode_s[1:])
        if max_batch < 1 or not (np.isfinite(steps_s).all() and (steps_s + times.context_s > 0).all()):
            raise InputError(f"{g.pool}: step times need a positive decode time for a batch of 1 and more")
        if min(steps_s.min(), times.context_s, times.prefill_s, times.prefill_context_s, times.step_s) < 0:
            raise InputError(f"{g.pool}: step times must not be negative")
        if not np.isfinite([times.context_s, times.prefill_s, times.prefill_context_s, times.step_s]).all():
            raise InputError(f"{g.pool}: step times must be finite")
        if times.prefill_s + times.prefill_context_s + times.step_s <= 0:
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
        full_s = float(times.decode_s[max_batch]) + times.context_s * max_batch * _TYPICAL_CONTEXT_TOKENS
        row["weight"] = g.weight or max_batch / full_s
    group["weight"] /= group["weight"].max()
    return group, decode_s


def check_chunk(chunk: Requests, after_s: float, classes: int, block: int) -> float:
    """Raise on a chunk that cannot be simulated; the time of its last arrival [s].

    The kernel works on addresses: what passes here cannot make it leave its memory.
    """
    count = len(chunk)
    columns: dict[str, npt.NDArray[Any] | None] = {
        "arrival_s": chunk.arrival_s, "output_tokens": chunk.output_tokens, "cached_tokens": chunk.cached_tokens,
        "priority": chunk.priority, "at": chunk.at, "blocks": chunk.blocks,
    }  # fmt: skip
    for name, column in columns.items():
        if column is not None and len(column) != count:
            raise InputError(f"requests: {len(column)} {name} for {count} input_tokens")
    if not count:
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
    if chunk.cached_tokens is not None and not (
        chunk.cached_tokens.min() >= 0 and chunk.cached_tokens.max() <= MOST_TOKENS
    ):
        raise InputError(f"cached_tokens must lie in 0..{MOST_TOKENS}")
    if block and chunk.at is not None and chunk.blocks is not None:
        inside = chunk.at.min() >= 0 and (chunk.at + chunk.blocks).max() <= len(chunk.hashes)
        if not inside or chunk.blocks.min() < 0 or (chunk.blocks > chunk.input_tokens // block).any():
            raise InputError("block hashes must be those of whole blocks of the prompt, and lie in `hashes`")
        if len(chunk.hashes) and chunk.hashes.min() < 0:
            raise InputError("block hashes must not be negative")
    return float(arrival_s[-1])
