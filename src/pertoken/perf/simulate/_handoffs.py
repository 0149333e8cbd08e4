"""Requests between a prefill and a decode replica: a heap by the time they arrive, then by their number."""

from __future__ import annotations

from typing import Any

from pertoken.perf.simulate._memory import (
    f64,
    i32,
    jit,
    jit_call,
    put_f64,
    put_i32,
)
from pertoken.perf.simulate._state import (
    node_at,
)


@jit_call
def push(w: Any, t: float, i: int) -> None:
    """Into the heap of hand-overs, earliest first, the request's number breaking ties."""
    place = w.handoffs
    w.handoffs += 1
    while place > 0:
        up = (place - 1) >> 1
        s, j = f64(w.handoff_s_p, up), i32(w.handoff_p, up)
        if s < t or (s == t and node_at(w.node_p, j).seq < node_at(w.node_p, i).seq):
            break
        put_f64(w.handoff_s_p, place, s)
        put_i32(w.handoff_p, place, j)
        place = up
    put_f64(w.handoff_s_p, place, t)
    put_i32(w.handoff_p, place, i)


@jit
def _before(w: Any, a: int, b: int) -> Any:
    return node_at(w.node_p, i32(w.handoff_p, a)).seq < node_at(w.node_p, i32(w.handoff_p, b)).seq


@jit_call
def pop(w: Any) -> Any:
    """The earliest hand-over's node, taken out."""
    taken = i32(w.handoff_p, 0)
    w.handoffs -= 1
    size = w.handoffs
    t, i = f64(w.handoff_s_p, size), i32(w.handoff_p, size)
    place = 0
    while True:
        down = 2 * place + 1
        if down >= size:
            break
        if down + 1 < size:
            a, b = f64(w.handoff_s_p, down), f64(w.handoff_s_p, down + 1)
            if b < a or (b == a and _before(w, down + 1, down)):
                down += 1
        s, j = f64(w.handoff_s_p, down), i32(w.handoff_p, down)
        if t < s or (t == s and node_at(w.node_p, i).seq < node_at(w.node_p, j).seq):
            break
        put_f64(w.handoff_s_p, place, s)
        put_i32(w.handoff_p, place, j)
        place = down
    put_f64(w.handoff_s_p, place, t)
    put_i32(w.handoff_p, place, i)
    return taken
