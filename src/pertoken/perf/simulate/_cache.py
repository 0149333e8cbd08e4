"""Prefix cache of one replica: blocks by hash, reference counts, least recently used out first.

Blocks in use are pinned and count as memory once, however many requests share them. Blocks nobody uses stay until
the memory is wanted. A request's block hashes are swapped in place for block numbers while it runs.
"""

from __future__ import annotations

from typing import Any

from pertoken.perf.simulate._memory import i32, i64, jit, jit_call, put_i32, put_i64
from pertoken.perf.simulate._state import block_at, group_at


@jit
def _home(w: Any, key: int) -> Any:
    """Bucket of a hash. Neighbours stay neighbours: traces number the blocks of a prompt in a row."""
    return (key + (key >> 12) * -7046029254386353131) & w.bucket_mask  # 2**64 / golden ratio


@jit
def _find(w: Any, rep: Any, key: int) -> Any:
    """The block with this hash, or −1."""
    block = i32(rep.bucket_p, _home(w, key))
    while block >= 0 and block_at(rep.block_p, block).key != key:
        block = block_at(rep.block_p, block).chain
    return block


@jit
def _forget(w: Any, rep: Any, block: int) -> None:
    """Take a block out of the hash table and give it to the free list."""
    b = block_at(rep.block_p, block)
    home = _home(w, b.key)
    at = i32(rep.bucket_p, home)
    if at == block:
        put_i32(rep.bucket_p, home, b.chain)
    else:
        while block_at(rep.block_p, at).chain != block:
            at = block_at(rep.block_p, at).chain
        block_at(rep.block_p, at).chain = b.chain
    b.after = rep.free_block
    rep.free_block = block


@jit
def _unlink(rep: Any, block: int) -> None:
    """Take a block out of the order of use."""
    b = block_at(rep.block_p, block)
    if b.before >= 0:
        block_at(rep.block_p, b.before).after = b.after
    else:
        rep.lru_first = b.after
    if b.after >= 0:
        block_at(rep.block_p, b.after).before = b.before
    else:
        rep.lru_last = b.before
    rep.unreferenced -= 1


@jit_call
def evict(w: Any, rep: Any, room: int) -> None:
    """Drop the least recently used blocks until `room` tokens [token] beside what is in use are free."""
    capacity = group_at(rep.group_p, 0).capacity
    while rep.lru_first >= 0 and rep.kv + room + rep.unreferenced * w.block > capacity:
        block = rep.lru_first
        _unlink(rep, block)
        _forget(w, rep, block)


@jit_call
def match(w: Any, rep: Any, at: int, most: int) -> Any:
    """How many of the first `most` hashes from `at` on are in the replica's cache, without a gap."""
    hits = 0
    while hits < most and _find(w, rep, i64(w.hashes_p, at + hits)) >= 0:
        hits += 1
    return hits


@jit
def _use(w: Any, rep: Any, block: int) -> None:
    """One more request uses the block."""
    b = block_at(rep.block_p, block)
    if b.uses == 0:
        _unlink(rep, block)
        rep.kv += w.block
    b.uses += 1


@jit_call
def pin(w: Any, rep: Any, at: int, blocks: int, most: int, tokens: int, limit: int) -> Any:
    """Use the blocks with these hashes, adding those not yet cached; hashes become block numbers.

    Returns how many of the first `most` were there without a gap, or −1, with nothing changed, if the request's
    `tokens` less those hits, plus hit blocks that nobody uses now, do not fit below `limit`.
    """
    hits, woken = 0, 0
    while hits < most:
        block = _find(w, rep, i64(w.hashes_p, at + hits))
        if block < 0:
            break
        if block_at(rep.block_p, block).uses == 0:
            woken += 1
        put_i64(w.hashes_p, at + hits, -1 - block)
        hits += 1
    if rep.kv + tokens - (hits - woken) * w.block > limit:
        for i in range(hits):
            put_i64(w.hashes_p, at + i, block_at(rep.block_p, -1 - i64(w.hashes_p, at + i)).key)
        return -1
    for i in range(hits):
        block = -1 - i64(w.hashes_p, at + i)
        _use(w, rep, block)
        put_i64(w.hashes_p, at + i, block)
    for i in range(hits, blocks):  # what is there first: adding one must not evict another of the same prompt
        block = _find(w, rep, i64(w.hashes_p, at + i))
        if block >= 0:
            _use(w, rep, block)
            put_i64(w.hashes_p, at + i, -1 - block)
    capacity = group_at(rep.group_p, 0).capacity
    for i in range(hits, blocks):
        key = i64(w.hashes_p, at + i)
        if key < 0:
            put_i64(w.hashes_p, at + i, -1 - key)
            continue
        if rep.kv + (rep.unreferenced + 1) * w.block > capacity:
            evict(w, rep, w.block)
        block = rep.free_block
        b = block_at(rep.block_p, block)
        rep.free_block = b.after
        rep.kv += w.block
        home = _home(w, key)
        b.key = key
        b.uses = 1
        b.chain = i32(rep.bucket_p, home)
        put_i32(rep.bucket_p, home, block)
        put_i64(w.hashes_p, at + i, block)
    return hits


@jit_call
def release(w: Any, rep: Any, at: int, blocks: int, computed: int) -> None:
    """Stop using the blocks.

    The last of a prompt is the first to be evicted, those never computed go at once.
    """
    for i in range(blocks - 1, -1, -1):
        block = i64(w.hashes_p, at + i)
        b = block_at(rep.block_p, block)
        put_i64(w.hashes_p, at + i, b.key)
        b.uses -= 1
        if b.uses > 0:
            continue
        rep.kv -= w.block
        if i >= computed:
            _forget(w, rep, block)
            continue
        b.before = rep.lru_last
        b.after = -1
        if rep.lru_last >= 0:
            block_at(rep.block_p, rep.lru_last).after = block
        else:
            rep.lru_first = block
        rep.lru_last = block
        rep.unreferenced += 1
