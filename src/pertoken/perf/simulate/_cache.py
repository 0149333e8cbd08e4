"""Prefix cache of one replica: blocks by hash, reference counts, least recently used out first.

Blocks in use are pinned and count as memory once, however many requests share them. Blocks nobody uses stay until
the memory is wanted. A request's block hashes are swapped in place for block numbers while it runs.
"""

from __future__ import annotations

from typing import Any

from pertoken.perf.simulate._memory import (
    i32,
    i64,
    jit,
    jit_call,
    put_i32,
    put_i64,
)
from pertoken.perf.simulate._state import (
    group_at,
)


@jit
def _home(w: Any, key: int) -> int:
    mixed = key * -7046029254386353131  # 2**64 / golden ratio, as Fibonacci hashing has it
    return (mixed ^ (mixed >> 29)) & w.bucket_mask


@jit
def _find(w: Any, rep: Any, key: int) -> int:
    """The block with this hash, or −1."""
    mask = w.bucket_mask
    place = _home(w, key)
    while True:
        block = i32(rep.bucket_p, place)
        if block < 0 or i64(rep.block_key_p, block) == key:
            return block
        place = (place + 1) & mask


@jit_call
def _forget(w: Any, rep: Any, block: int) -> None:
    """Take a block out of the hash table (closing the gap) and give it to the free list."""
    mask = w.bucket_mask
    hole = _home(w, i64(rep.block_key_p, block))
    while i32(rep.bucket_p, hole) != block:
        hole = (hole + 1) & mask
    place = (hole + 1) & mask
    while i32(rep.bucket_p, place) >= 0:
        home = _home(w, i64(rep.block_key_p, i32(rep.bucket_p, place)))
        if ((place - home) & mask) >= ((place - hole) & mask):
            put_i32(rep.bucket_p, hole, i32(rep.bucket_p, place))
            hole = place
        place = (place + 1) & mask
    put_i32(rep.bucket_p, hole, -1)
    put_i32(rep.block_links_p, 2 * block + 1, rep.free_block)
    rep.free_block = block


@jit
def _unlink(w: Any, rep: Any, block: int) -> None:
    before, after = i32(rep.block_links_p, 2 * block), i32(rep.block_links_p, 2 * block + 1)
    if before >= 0:
        put_i32(rep.block_links_p, 2 * before + 1, after)
    else:
        rep.lru_first = after
    if after >= 0:
        put_i32(rep.block_links_p, 2 * after, before)
    else:
        rep.lru_last = before
    rep.unreferenced -= 1


@jit_call
def evict(w: Any, rep: Any, room: int) -> None:
    """Drop the least recently used blocks until `room` tokens [token] beside what is in use are free."""
    capacity = group_at(rep.group_p, 0).capacity
    while rep.lru_first >= 0 and rep.kv + room + rep.unreferenced * w.block > capacity:
        block = rep.lru_first
        _unlink(w, rep, block)
        _forget(w, rep, block)


@jit_call
def match(w: Any, rep: Any, at: int, most: int) -> int:
    """How many of the first `most` hashes from `at` on are in replica r's cache, without a gap."""
    hits = 0
    while hits < most and _find(w, rep, i64(w.hashes_p, at + hits)) >= 0:
        hits += 1
    return hits


@jit_call
def wake(w: Any, rep: Any, at: int, hits: int) -> int:
    """Of the first `hits` blocks, those that nobody uses now: pinning them takes memory."""
    count = 0
    for i in range(hits):
        if i32(rep.block_uses_p, _find(w, rep, i64(w.hashes_p, at + i))) == 0:
            count += 1
    return count


@jit_call
def pin(w: Any, rep: Any, at: int, blocks: int) -> None:
    """Use the blocks with these hashes, adding those not yet cached; hashes become block numbers."""
    size = w.block
    mask = w.bucket_mask
    for i in range(blocks):  # those already there first: adding one must not evict another of the same prompt
        block = _find(w, rep, i64(w.hashes_p, at + i))
        if block >= 0:
            if i32(rep.block_uses_p, block) == 0:
                _unlink(w, rep, block)
                rep.kv += size
            put_i32(rep.block_uses_p, block, i32(rep.block_uses_p, block) + 1)
            put_i64(w.hashes_p, at + i, -1 - block)
    for i in range(blocks):
        key = i64(w.hashes_p, at + i)
        if key < 0:
            put_i64(w.hashes_p, at + i, -1 - key)
            continue
        evict(w, rep, size)
        block = rep.free_block
        rep.free_block = i32(rep.block_links_p, 2 * block + 1)
        rep.kv += size
        put_i64(rep.block_key_p, block, key)
        put_i32(rep.block_uses_p, block, 1)
        place = _home(w, key)
        while i32(rep.bucket_p, place) >= 0:
            place = (place + 1) & mask
        put_i32(rep.bucket_p, place, block)
        put_i64(w.hashes_p, at + i, block)


@jit_call
def release(w: Any, rep: Any, at: int, blocks: int, computed: int) -> None:
    """Stop using the blocks; the last of a prompt is the first to be evicted, those never computed go at once."""
    size = w.block
    for i in range(blocks - 1, -1, -1):
        block = i64(w.hashes_p, at + i)
        put_i64(w.hashes_p, at + i, i64(rep.block_key_p, block))
        put_i32(rep.block_uses_p, block, i32(rep.block_uses_p, block) - 1)
        if i32(rep.block_uses_p, block) > 0:
            continue
        rep.kv -= size
        if i >= computed:
            _forget(w, rep, block)
            continue
        put_i32(rep.block_links_p, 2 * block, rep.lru_last)
        put_i32(rep.block_links_p, 2 * block + 1, -1)
        if rep.lru_last >= 0:
            put_i32(rep.block_links_p, 2 * rep.lru_last + 1, block)
        else:
            rep.lru_first = block
        rep.lru_last = block
        rep.unreferenced += 1
