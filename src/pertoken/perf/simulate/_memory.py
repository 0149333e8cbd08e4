"""Typed access to memory by address for compiled code, and how functions are compiled.

An array handed from one compiled function to the next is counted as a reference, atomically; that alone costs ten
times what a request's arithmetic does. Addresses are not counted. Whoever allocates keeps the arrays alive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import CellType, FunctionType
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])
_FILES = ("_memory", "_state", "_accounts", "_cache", "_handoffs", "_kernel", "_events")


def jit(function: F) -> F:
    """Compiled for other compiled code, and inlined into it by LLVM."""
    return cast(F, numba.njit(nogil=True, forceinline=True, error_model="numpy")(function))


def jit_call(function: F) -> F:
    """Compiled like `jit`, but kept a function of its own: for what runs seldom or is called from many places."""
    return cast(F, numba.njit(nogil=True, error_model="numpy")(function))


def entry(function: F) -> F:
    """Compiled for Python to call, free of the interpreter lock, and cached on disk with all it calls.

    The cache looks for changes in the function's own file alone, and would serve old code after one in another. But
    it also looks at what a function closes over, so the digest of all files is put there; and nothing else is cached.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in _FILES)).hexdigest()
    code = function.__code__.replace(co_freevars=("digest",))
    closed = FunctionType(code, function.__globals__, function.__name__, None, (CellType(digest),))
    closed.__doc__ = function.__doc__
    try:
        return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(closed))
    except RuntimeError:  # nowhere to write a cache: compiled afresh in each process
        return cast(F, jit_call(closed))


def record_at(dtype: np.dtype[np.void]) -> Any:
    """Compiled function (address, index) → the record of that dtype there."""
    record = numba.from_dtype(dtype)
    size = dtype.itemsize

    def at(typingctx: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            offset = builder.mul(args[1], context.get_constant(types.int64, size))
            return builder.inttoptr(builder.add(args[0], offset), context.get_value_type(record))

        return record(types.int64, types.int64), codegen

    return intrinsic(at)


def _load(kind: Any, size: int) -> Any:
    def load(typingctx: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            place = _place(context, builder, args, kind, size)
            value = builder.load(place)
            return context.cast(builder, value, kind, signature.return_type)

        return (types.float64 if kind is types.float64 else types.int64)(types.int64, types.int64), codegen

    return intrinsic(load)


def _store(kind: Any, size: int) -> Any:
    wide = types.float64 if kind is types.float64 else types.int64

    def store(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(
                context.cast(builder, args[2], wide, kind), _place(context, builder, args, kind, size)
            )
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, wide), codegen

    return intrinsic(store)


def _place(context: Any, builder: Any, args: Any, kind: Any, size: int) -> Any:
    offset = builder.mul(args[1], context.get_constant(types.int64, size))
    return builder.inttoptr(builder.add(args[0], offset), context.get_value_type(kind).as_pointer())


i32, put_i32 = _load(types.int32, 4), _store(types.int32, 4)
i64, put_i64 = _load(types.int64, 8), _store(types.int64, 8)
f64, put_f64 = _load(types.float64, 8), _store(types.float64, 8)


@jit
def add(address: int, index: int, value: float) -> None:
    """memory[index] += value, doubles."""
    put_f64(address, index, f64(address, index) + value)


def _trailing_zeros(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], context.get_constant(types.boolean, 0))

    return types.int64(types.int64), codegen


def _float_bits(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int64))

    return types.int64(types.float64), codegen


trailing_zeros: Any = intrinsic(_trailing_zeros)
"""Index of the lowest set bit of a 64-bit word."""
float_bits: Any = intrinsic(_float_bits)
"""The 64 bits of a double as an integer."""


def address(array: npt.NDArray[Any]) -> int:
    """Where the array begins; it must be contiguous and outlive every use of the address."""
    return int(array.ctypes.data)
