"""Requests in chunks: what the simulator reads, from a trace or from the seeded generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pertoken.errors import InputError
from pertoken.units import HOURS_PER_DAY, SECONDS_PER_HOUR

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.int64]

CHUNK = 1 << 16
"""Requests per chunk: a few megabytes, whatever the length of the trace."""
_CHUNK_HASHES = 1 << 19
"""Block hashes per chunk of generated traffic, on average: what fits a processor's cache."""
MOST_TOKENS = 1 << 24
"""A longer prompt or output is taken for a mistake in the trace."""
_NO_HASHES: Hashes = np.zeros(0, np.int64)
_DAYS_PER_WEEK = 7


@dataclass(frozen=True)
class Requests:
    """A chunk of requests in order of arrival; all arrays of shape (n,) but `hashes`.

    arrival_s [s from the start of the trace]; input_tokens, output_tokens ≥ 1; cached_tokens: prompt tokens sure to
    be in the prefix cache; priority: 0 first. Prompt block hashes of request i are hashes[at[i] : at[i] + blocks[i]],
    of whole blocks only. `read_fraction`: share of the source behind us after this chunk.
    """

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    cached_tokens: Ints | None = None
    priority: Ints | None = None
    at: Hashes | None = None
    blocks: Ints | None = None
    hashes: Hashes = field(default_factory=lambda: _NO_HASHES)
    read_fraction: float = 0.0

    def __len__(self) -> int:
        return len(self.input_tokens)


class Source(Protocol):
    """What can be simulated: chunks of requests, the same each time they are asked for."""

    @property
    def block_tokens(self) -> int:
        """Tokens per hashed prompt block; 0: no hashes."""

    @property
    def classes(self) -> int:
        """Priority classes."""

    def chunks(self) -> Iterator[Requests]:
        """The requests, in order of arrival."""


@dataclass(frozen=True)
class Given:
    """Requests already in memory, as a source."""

    requests: Requests
    block_tokens: int = 0
    classes: int = 1

    def chunks(self) -> Iterator[Requests]:
        """The requests, CHUNK at a time."""
        r = self.requests
        for begin in range(0, len(r), CHUNK):
            cut = slice(begin, begin + CHUNK)
            at, blocks, hashes = r.at, r.blocks, r.hashes
            if at is not None and blocks is not None:
                at, blocks = at[cut], blocks[cut]
                first = int(at.min())
                hashes = hashes[first : int((at + blocks).max())]
                at = at - first
            yield Requests(
                r.arrival_s[cut],
                r.input_tokens[cut],
                r.output_tokens[cut],
                None if r.cached_tokens is None else r.cached_tokens[cut],
                None if r.priority is None else r.priority[cut],
                at,
                blocks,
                hashes,
                min(1.0, (begin + CHUNK) / len(r)),
            )


@dataclass(frozen=True)
class Traffic:
    """Seeded traffic: a daily and weekly shape, gamma-distributed gaps, log-normal lengths.

    requests_per_day on average over the week; hourly (24,) and weekly (7, Monday first) weights of any scale, or
    per_hour: weights of each hour from the first, which replace both;
    burstiness: squared coefficient of variation of the gaps (1: Poisson); mean and log standard deviation of the
    lengths, cut at the most. `shared_fraction` of requests begin with one of `prefixes` shared prompts of
    prefix_tokens (rank k with weight 1/k), hashed in blocks of block_tokens. class_fractions: share of each
    priority class, first class first.
    """

    requests_per_day: float
    duration_s: float
    input_mean_tokens: float
    output_mean_tokens: float
    input_log_sigma: float = 1.0
    output_log_sigma: float = 0.9
    input_most_tokens: int = 131_072
    output_most_tokens: int = 32_768
    hourly: tuple[float, ...] = (1.0,) * HOURS_PER_DAY
    weekly: tuple[float, ...] = (1.0,) * _DAYS_PER_WEEK
    burstiness: float = 1.0
    class_fractions: tuple[float, ...] = (1.0,)
    cached_fraction: float = 0.0
    block_tokens: int = 0
    prefixes: int = 0
    prefix_tokens: int = 0
    shared_fraction: float = 1.0
    per_hour: tuple[float, ...] = ()
    seed: int = 0

    @property
    def classes(self) -> int:
        return len(self.class_fractions)

    def __post_init__(self) -> None:
        positive = ("requests_per_day", "duration_s", "input_mean_tokens", "output_mean_tokens", "burstiness")
        for name in positive:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise InputError(f"traffic: {name} is {value}, must be positive and finite")
        for name, size in (("hourly", HOURS_PER_DAY), ("weekly", _DAYS_PER_WEEK)):
            weights = getattr(self, name)
            if len(weights) != size or min(weights) < 0 or sum(weights) <= 0:
                raise InputError(f"traffic: {name} must be {size} weights, none negative, not all zero")
        if self.per_hour and not (min(self.per_hour) >= 0 and 0 < sum(self.per_hour) < float("inf")):
            raise InputError("traffic: per_hour must be weights, none negative, not all zero")
        if not self.class_fractions or min(self.class_fractions) < 0 or sum(self.class_fractions) <= 0:
            raise InputError("traffic: class_fractions must be shares, none negative, not all zero")
        for name in ("cached_fraction", "shared_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"traffic: {name} is {getattr(self, name)}, must lie in 0..1")
        if self.prefixes and not 0 < self.block_tokens <= self.prefix_tokens:
            raise InputError(
                "traffic: shared prefixes need block_tokens, and prefix_tokens of a block or more"
            )

    def chunks(self) -> Iterator[Requests]:
        """The requests, a chunk at a time; the same for the same seed."""
        size = self._chunk_size()
        gaps, lengths, marks = (np.random.default_rng([self.seed, k]) for k in range(3))
        clock = _Clock.of(self)
        done_units, fresh_hash = 0.0, self.prefixes * (self.prefix_tokens // max(self.block_tokens, 1)) + 1
        while True:
            units = done_units + np.cumsum(gaps.gamma(1.0 / self.burstiness, self.burstiness, size))
            done_units = float(units[-1])
            arrival_s = clock.seconds(units)
            inside = int(np.searchsorted(arrival_s, self.duration_s))
            input_tokens = _lengths(
                lengths, size, self.input_mean_tokens, self.input_log_sigma, self.input_most_tokens
            )
            output_tokens = _lengths(
                lengths, size, self.output_mean_tokens, self.output_log_sigma, self.output_most_tokens
            )
            cached = priority = at = blocks = None
            hashes = _NO_HASHES
            if self.cached_fraction > 0:
                cached = (input_tokens * self.cached_fraction).astype(np.int32)
            if self.classes > 1:
                edges = np.cumsum(self.class_fractions) / sum(self.class_fractions)
                priority = np.searchsorted(edges[:-1], marks.random(size), side="right").astype(np.int32)
            if self.prefixes:
                input_tokens, at, blocks, hashes, fresh_hash = self._hashed(marks, input_tokens, fresh_hash)
            last = inside < size
            read = 1.0 if last else float(arrival_s[-1]) / self.duration_s
            if inside:
                yield Requests(
                    arrival_s[:inside],
                    input_tokens[:inside],
                    output_tokens[:inside],
                    None if cached is None else cached[:inside],
                    None if priority is None else priority[:inside],
                    None if at is None else at[:inside],
                    None if blocks is None else blocks[:inside],
                    hashes,
                    read,
                )
            if last:
                return

    def _chunk_size(self) -> int:
        if not self.prefixes:
            return CHUNK
        blocks = (self.input_mean_tokens + self.prefix_tokens) / self.block_tokens
        return min(CHUNK, max(256, int(_CHUNK_HASHES / max(blocks, 1.0))))

    def _hashed(
        self, marks: np.random.Generator, own_tokens: Ints, fresh: int
    ) -> tuple[Ints, Hashes, Ints, Hashes, int]:
        """Prompts with a shared beginning before their own part: lengths and block hashes."""
        weights = 1.0 / np.arange(1, self.prefixes + 1)
        edges = np.cumsum(weights) / weights.sum()
        which = np.minimum(np.searchsorted(edges, marks.random(len(own_tokens))), self.prefixes - 1)
        shared = marks.random(len(own_tokens)) < self.shared_fraction
        prefix_blocks = self.prefix_tokens // self.block_tokens
        input_tokens = own_tokens + np.where(shared, self.prefix_tokens, 0).astype(np.int32)
        blocks = (input_tokens // self.block_tokens).astype(np.int32)
        end = np.cumsum(blocks.astype(np.int64))
        at = end - blocks
        hashes = np.arange(fresh, fresh + int(end[-1]))
        rows = np.flatnonzero(shared)
        index = at[rows, None] + np.arange(prefix_blocks)
        hashes[index] = which[rows, None] * prefix_blocks + np.arange(prefix_blocks) + 1
        return input_tokens, at, blocks, hashes, fresh + int(end[-1])


@dataclass(frozen=True)
class _Clock:
    """Time in expected arrivals to time in seconds: the inverse of the cumulated weekly rate."""

    units: Floats
    hours: Floats

    @classmethod
    def of(cls, traffic: Traffic) -> _Clock:
        daily = np.asarray(traffic.hourly) / sum(traffic.hourly) * HOURS_PER_DAY
        weekly = np.asarray(traffic.weekly) / sum(traffic.weekly) * _DAYS_PER_WEEK
        shape = np.outer(weekly, daily).ravel()
        if traffic.per_hour:
            shape = np.asarray(traffic.per_hour) / sum(traffic.per_hour) * len(traffic.per_hour)
        per_hour = shape * traffic.requests_per_day / HOURS_PER_DAY
        return cls(np.concatenate([[0.0], np.cumsum(per_hour)]), np.arange(len(per_hour) + 1.0))

    def seconds(self, units: Floats) -> Floats:
        weeks, rest = np.divmod(units, self.units[-1])
        hours = np.interp(rest, self.units, self.hours) + weeks * self.hours[-1]
        return np.asarray(hours * SECONDS_PER_HOUR, np.float64)


def _lengths(rng: np.random.Generator, count: int, mean: float, sigma: float, most: int) -> Ints:
    """Whole log-normal lengths [token] of the mean before the cut, from 1 to `most`."""
    values = rng.standard_normal(count, dtype=np.float32)
    values *= np.float32(sigma)
    values += np.float32(np.log(mean) - 0.5 * sigma * sigma)
    return np.clip(np.rint(np.exp(values)), 1, most).astype(np.int32)
