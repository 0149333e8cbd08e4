"""State of the kernel: record layouts, allocation, growth.

A replica is one record, a request in flight is one node of a pool that grows between chunks, so memory follows
the backlog and never the length of the trace. Records hold the addresses of the arrays that belong to them (names
ending in _p), see `_memory`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pertoken.errors import CannotServeError, InputError
from pertoken.perf.simulate._memory import address, record_at

WHEEL = 4096
"""Buckets of the wheel of finishing steps; an output longer than this is looked at once per turn."""
WHEEL_MASK = WHEEL - 1
WORDS = WHEEL // 64

# What an accumulator counts, per replica now and per group and time bin later.
(
    IN_S, OUT_S, WASTE_S, IDLE_S, BATCH_S, QUEUE_S, KV_S, ARRIVALS, REQUESTS, IN_SLO, OUT_TOKENS,
    OUT_TOKENS_IN_SLO, IN_TOKENS, CACHED_TOKENS, RECOMPUTED, PREEMPTED, REJECTED, TTFT_OK, TPOT_OK, E2E_OK,
) = range(20)  # fmt: skip
FIELDS = 20

# What a replica is doing.
BOUNDARY, DECODE, PREFILL, IDLE = 0, 1, 2, 3
# Whether the router may use it.
OFF, ON, DRAINING = 0, 1, 2
# What it does with a request: both phases, only the prompt, only the output.
BOTH, ONLY_PREFILL, ONLY_DECODE = 0, 1, 2
# How the router chooses.
ROUND_ROBIN, LEAST_LOADED, PREFIX_AFFINE = 0, 1, 2

HISTOGRAM_SHIFT = 45
"""Bits of a double dropped for its bin: 128 bins per power of two, so a bin's middle is within 0.39 %."""
HISTOGRAM_FIRST = (1023 - 24) << 7
"""Bin of 2**-24 s, 60 ns; shorter times count as that."""
HISTOGRAM_BINS = 128 * 50
"""Up to 2**26 s, two years."""
_MOST_BLOCKS = 1 << 26
_MOST_BINS = 2_500_000

REPLICA = np.dtype(
    [
        ("t", "f8"), ("t_end", "f8"), ("in_s", "f8"), ("waste_s", "f8"), ("out_s", "f8"), ("late_s", "f8"),
        ("bin_end", "f8"), ("step", "i8"), ("next_finish", "i8"), ("k", "i8"), ("context", "i8"), ("kv", "i8"),
        ("batch", "i8"), ("partial", "i8"), ("partial_done", "i8"), ("fresh", "i8"), ("waiting", "i8"),
        ("waiting_then", "i8"), ("late", "i8"), ("kind", "i8"), ("outstanding", "i8"), ("admitted", "i8"),
        ("key_p", "i8"), ("group_p", "i8"), ("sums_p", "i8"), ("wheel_p", "i8"), ("bits_p", "i8"),
        ("fresh_p", "i8"), ("queue_p", "i8"), ("status", "i8"), ("role", "i8"), ("group", "i8"), ("bin", "i8"),
        ("ready_s", "f8"), ("unreferenced", "i8"), ("lru_first", "i8"), ("lru_last", "i8"), ("free_block", "i8"),
        ("chunk_tokens", "i8"), ("chunk_done", "i8"), ("block_p", "i8"), ("bucket_p", "i8"),
    ],
    align=True,
)  # fmt: skip
"""t: the last step boundary; t_end: end of the planned segment of k steps, in_s of it prefill (waste_s of that
recomputed), out_s decode; chunk_tokens of the partial prompt in each of several steps, from chunk_done on; late,
late_s: arrivals within it and the sum of their times from t; step: decode steps taken so far; context, kv: tokens
attended to, tokens in memory; queue_p: first and last waiting node of each class; key_p: the time of its next event,
in an array of all."""

NODE = np.dtype(
    [
        ("arrival", "f8"), ("first", "f8"), ("finish", "i8"), ("admitted", "i8"), ("seq", "i8"), ("hashes", "i8"),
        ("input", "i4"), ("output", "i4"), ("cached", "i4"), ("generated", "i4"), ("reach", "i4"),
        ("next", "i4"), ("priority", "i4"), ("blocks", "i4"), ("prefilled", "i4"), ("spare", "i4"),
    ],
    align=True,
)  # fmt: skip
"""seq: the request's number, −1 where the node is free; reach: cache positions computed before (what is computed
again below it is waste); prefilled: its cache came from a prefill replica."""

GROUP = np.dtype(
    [
        ("context_s", "f8"), ("prefill_s", "f8"), ("prefill_context_s", "f8"), ("step_s", "f8"),
        ("capacity", "i8"), ("limit", "i8"), ("max_batch", "i8"), ("chunk", "i8"), ("weight", "f8"),
        ("decode_p", "i8"), ("sums_p", "i8"),
    ],
    align=True,
)  # fmt: skip

BLOCK = np.dtype(
    [("key", "i8"), ("before", "i4"), ("after", "i4"), ("chain", "i4"), ("uses", "i4")], align=True
)  # fmt: skip
"""A prefix-cache block: before, after in the order of use (after also links the free ones); chain: the next of its
hash bucket; uses: requests that need it now."""

WORLD = np.dtype(
    [
        ("gone", "i8"), ("free", "i8"), ("seq", "i8"), ("turn", "i8"), ("handoffs", "i8"), ("clients", "i8"),
        ("now", "f8"),
        ("closed", "i8"), ("disaggregated", "i8"), ("router", "i8"), ("priorities", "i8"), ("block", "i8"),
        ("max_queue", "i8"), ("bin_s", "f8"), ("ttft_s", "f8"), ("tpot_s", "f8"), ("e2e_s", "f8"),
        ("transfer_s", "f8"), ("transfer_token_s", "f8"), ("record", "i8"), ("bucket_mask", "i8"),
        ("replicas", "i8"), ("replica_p", "i8"), ("node_p", "i8"), ("key_p", "i8"), ("histogram_p", "i8"),
        ("handoff_s_p", "i8"), ("handoff_p", "i8"), ("hashes_p", "i8"), ("first_p", "i8"), ("finish_p", "i8"),
        ("arrival_p", "i8"), ("input_p", "i8"), ("output_p", "i8"), ("cached_p", "i8"), ("priority_p", "i8"),
        ("at_p", "i8"), ("blocks_p", "i8"), ("count", "i8"),
    ],
    align=True,
)  # fmt: skip
"""What all replicas share; seq, gone: requests taken in, finished or turned away; the last line is the chunk being
read (0: column absent)."""

replica_at, node_at, group_at = record_at(REPLICA), record_at(NODE), record_at(GROUP)
block_at = record_at(BLOCK)


class State:
    """All arrays of a running simulation; R replicas, G groups, P priority classes."""

    def __init__(
        self,
        group: npt.NDArray[np.void],
        decode_s: npt.NDArray[np.float64],
        group_of: npt.NDArray[np.int64],
        role_of: npt.NDArray[np.int64],
        priorities: int,
        block: int,
        record: int,
    ) -> None:
        """Every replica off. `block` [tokens] is 0 without a prefix cache; `record`: requests to keep times of."""
        replicas, groups = len(group_of), len(group)
        self.group, self.decode_s = group, decode_s
        self.replica = np.zeros(replicas, REPLICA)
        self.node = np.zeros(0, NODE)
        self.world = np.zeros(1, WORLD)
        self.key = np.full(replicas, np.inf)
        self.queue = np.full((replicas, priorities, 2), -1, np.int32)
        self.wheel = np.full((replicas, WHEEL), -1, np.int32)
        self.bits = np.zeros((replicas, WORDS), np.int64)
        self.fresh = np.full((replicas, decode_s.shape[1]), -1, np.int32)
        self.now_sums = np.zeros((replicas, FIELDS))
        self.sums = np.zeros((groups, 1, FIELDS))
        self.histogram = np.zeros((priorities, 3, HISTOGRAM_BINS), np.int64)
        self.handoff_s, self.handoff = np.zeros(0), np.zeros(0, np.int32)
        self.hashes = np.zeros(0, np.int64)
        self.first, self.finish = np.full(record, np.nan), np.full(record, np.nan)
        self._blocks(replicas, block)
        self.replica["group"], self.replica["role"], self.replica["kind"] = group_of, role_of, IDLE
        for name in ("partial", "lru_first", "lru_last"):
            self.replica[name] = -1
        self.world["free"], self.world["priorities"], self.world["block"] = -1, priorities, block
        self.world["record"], self.world["replicas"] = record, replicas
        self._addresses()
        self._moved()

    def _blocks(self, replicas: int, block: int) -> None:
        """Tables of the prefix cache: as many blocks as fit the memory."""
        blocks = int(self.group["capacity"].max()) // block + 2 if block else 1
        if blocks * replicas > _MOST_BLOCKS:
            raise CannotServeError(
                f"a prefix cache of {blocks:,} blocks in each of {replicas} replicas is too large to simulate: "
                "take larger blocks, or simulate without it"
            )
        buckets = 1 << (2 * blocks - 1).bit_length() if block else 1
        self.block = np.zeros((replicas, blocks), BLOCK)
        self.block["after"] = np.arange(1, blocks + 1)
        self.block["after"][:, -1] = -1
        self.bucket = np.full((replicas, buckets), -1, np.int32)
        self.world["bucket_mask"] = buckets - 1

    def _addresses(self) -> None:
        """Addresses of arrays that never move."""
        rows: tuple[tuple[str, npt.NDArray[Any]], ...] = (
            ("key_p", self.key), ("sums_p", self.now_sums), ("wheel_p", self.wheel), ("bits_p", self.bits),
            ("fresh_p", self.fresh), ("queue_p", self.queue), ("block_p", self.block), ("bucket_p", self.bucket),
        )  # fmt: skip
        order = np.arange(len(self.replica))
        for name, array in rows:
            self.replica[name] = address(array) + order * array.strides[0]
        self.replica["group_p"] = address(self.group) + self.replica["group"] * self.group.strides[0]
        self.group["decode_p"] = (
            address(self.decode_s) + np.arange(len(self.group)) * self.decode_s.strides[0]
        )
        shared: tuple[tuple[str, npt.NDArray[Any]], ...] = (
            ("replica_p", self.replica), ("key_p", self.key), ("histogram_p", self.histogram),
            ("first_p", self.first), ("finish_p", self.finish),
        )  # fmt: skip
        for name, array in shared:
            self.world[name] = address(array)

    def _moved(self) -> None:
        """Addresses of arrays that grow."""
        self.group["sums_p"] = address(self.sums) + np.arange(len(self.group)) * self.sums.strides[0]
        for name, array in (
            ("node_p", self.node), ("handoff_s_p", self.handoff_s), ("handoff_p", self.handoff),
            ("hashes_p", self.hashes),
        ):  # fmt: skip
            self.world[name] = address(array)

    def make_room(self, requests: int, until_s: float) -> None:
        """Free nodes for `requests` more and time bins up to `until_s` [s]."""
        needed = requests + int(self.world["seq"][0] - self.world["gone"][0])
        if needed > len(self.node):
            old, size = len(self.node), max(needed, len(self.node) * 3 // 2)
            node = np.zeros(size, NODE)
            node[:old] = self.node
            node["seq"][old:] = -1
            node["next"][old:] = np.arange(old + 1, size + 1)
            node["next"][-1] = self.world["free"][0]
            self.world["free"] = old
            self.node = node
            self.handoff_s = np.concatenate([self.handoff_s, np.zeros(size - old)])
            self.handoff = np.concatenate([self.handoff, np.zeros(size - old, np.int32)])
        bins = int(until_s / self.world["bin_s"][0]) + 2
        if bins * len(self.group) > _MOST_BINS:
            raise InputError(
                f"{until_s:,.0f} s are {bins:,} bins of {self.world['bin_s'][0]:g} s: take a larger bin_s, "
                "or check the times of the trace"
            )
        if bins > self.sums.shape[1]:
            sums = np.zeros((self.sums.shape[0], max(bins, self.sums.shape[1] * 5 // 4), FIELDS))
            sums[:, : self.sums.shape[1]] = self.sums
            self.sums = sums
        self._moved()

    def take_hashes(self, more: npt.NDArray[np.int64]) -> int:
        """Put `more` block hashes behind those still in use; returns where they begin."""
        live = np.flatnonzero((self.node["seq"] >= 0) & (self.node["blocks"] > 0))
        counts = self.node["blocks"][live].astype(np.int64)
        begin = np.cumsum(counts) - counts
        index = np.repeat(self.node["hashes"][live] - begin, counts) + np.arange(counts.sum())
        kept = self.hashes[index]
        self.node["hashes"][live] = begin
        self.hashes = np.concatenate([kept, more])
        self._moved()
        return len(kept)

    def set_chunk(self, columns: dict[str, npt.NDArray[Any]], count: int) -> None:
        """Let the kernel read these columns (contiguous, kept alive by the caller); absent ones are 0."""
        for name in ("arrival", "input", "output", "cached", "priority", "at", "blocks"):
            self.world[f"{name}_p"] = address(columns[name]) if name in columns else 0
        self.world["count"] = count
