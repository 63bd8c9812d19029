"""The inner loops of a merge, compiled by numba to run at the speed of memory. Plain numpy arrays in and out.

bfloat16 is shown to numba, which knows no 16-bit floats, as uint16, and float16 as int16: the type tells them apart.
"""

# numba finds the types, and compares signatures to the letter.
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
import pickle

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

__all__ = ["add", "has_bad", "keep", "narrow", "subtract", "sum16", "sum16_kept", "widen"]

#: Elements between two checks: their inputs and outputs stay in the first-level cache.
BLOCK = 4096


def _compiled(function):
    """Compile at the first call, and keep the result beside this file or in the user's cache."""
    options = {"nogil": True, "error_model": "numpy"}
    plain = njit(**options)(function)
    try:
        kept = njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep it: compiled anew in every process, which takes seconds
        return plain

    @functools.wraps(function)
    def call(*arguments):
        try:
            return kept(*arguments)
        # What was kept is damaged, or there is no room to keep it. The loops themselves raise nothing.
        except (OSError, EOFError, pickle.PickleError, ValueError, LookupError, RuntimeError):
            return plain(*arguments)

    return call


@intrinsic
def _bits_to_float(typing, value):
    return types.float32(types.uint32), lambda _, builder, __, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
def _float_to_bits(typing, value):
    return types.uint32(types.float32), lambda _, builder, __, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@intrinsic
def _half_to_float(typing, value):
    def generate(_, builder, __, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _float_to_half(typing, value):
    def generate(_, builder, __, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


@intrinsic
def _fused_multiply_add(typing, a, b, c):
    """a·b + c, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda _, builder, __, arguments: builder.fma(*arguments)


def _to_float(value):
    raise NotImplementedError("for compiled code only")


def _from_float(value, like):
    raise NotImplementedError("for compiled code only")


@overload(_to_float)
def _to_float_for(value):
    """A stored number as float32, or as float64 if it has more digits."""
    if value == types.uint16:
        return lambda value: _bits_to_float(np.uint32(value) << np.uint32(16))
    if value == types.int16:
        return lambda value: _half_to_float(value)
    return lambda value: value


@overload(_from_float)
def _from_float_for(value, like):
    """A float as a stored number of the type of `like`, to the nearest, ties to even. By way of float32, as torch."""
    if like == types.uint16:

        def round_to_bfloat16(value, like):
            bits = _float_to_bits(np.float32(value))
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            # The sum would carry the digits of some NaNs away, so that they became zeros.
            is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40) if is_nan else rounded)

        return round_to_bfloat16
    if like == types.int16:
        return lambda value, like: _float_to_half(np.float32(value))
    return (lambda value, like: np.float32(value)) if like == types.float32 else (lambda value, like: np.float64(value))


def _sum(target, difference, weight):
    raise NotImplementedError("for compiled code only")


@overload(_sum)
def _sum_for(target, difference, weight):
    """Sum target + weight·difference, rounded as in float64 if the difference has more digits than float32."""
    if difference == types.float32:
        return lambda target, difference, weight: _fused_multiply_add(weight, difference, target)
    return lambda target, difference, weight: np.float64(target) + np.float64(weight) * difference


@_compiled
def sum16(target, minuend, subtrahend, weight, out):
    """Sum target + weight·(minuend − subtrahend), all of 16 bits.

    In float32 the fused multiply-add rounds once, and a difference that is exact makes the sum exact too. A difference
    d of x and y is exact if and only if d + y = x and x − d = y. A block in which one is not is done again in float64.
    """
    for start in range(0, target.size, BLOCK):
        stop = min(start + BLOCK, target.size)
        t, a, b, o = target[start:stop], minuend[start:stop], subtrahend[start:stop], out[start:stop]
        error = np.uint32(0)
        for i in range(stop - start):
            x, y = _to_float(a[i]), _to_float(b[i])
            d = x - y
            error |= _float_to_bits((d + y) - x) | _float_to_bits((x - d) - y)
            o[i] = _from_float(_fused_multiply_add(weight, d, _to_float(t[i])), o[i])
        if error << np.uint32(1):  # any bit but that of the sign
            w = np.float64(weight)
            for i in range(stop - start):
                difference = np.float64(_to_float(a[i])) - np.float64(_to_float(b[i]))
                o[i] = _from_float(np.float64(_to_float(t[i])) + w * difference, o[i])


@_compiled
def sum16_kept(target, kept, weight, out, index, values, offset):
    """Sum target + weight·kept, all of 16 bits, where `index`, of the whole tensor, lists the elements that differ."""
    at = np.searchsorted(index, offset)
    for start in range(0, target.size, BLOCK):
        stop = min(start + BLOCK, target.size)
        t, d, o = target[start:stop], kept[start:stop], out[start:stop]
        for i in range(stop - start):
            o[i] = _from_float(_fused_multiply_add(weight, _to_float(d[i]), _to_float(t[i])), o[i])
        while at < index.size and index[at] - offset < stop:
            place = np.uint64(index[at] - offset)  # unsigned: no look for negative indices
            out[place] = _from_float(_sum(_to_float(target[place]), values[at], weight), out[place])
            at += 1


@_compiled
def widen(source, out):
    """Copy stored numbers into an array of float64."""
    for i in range(source.size):
        out[i] = _to_float(source[i])


@_compiled
def subtract(total, source):
    """Subtract stored numbers from an array of float64."""
    for i in range(source.size):
        total[i] -= np.float64(_to_float(source[i]))


@_compiled
def add(total, difference, weight, index, values, offset):
    """Add weight·difference, all float64, where `index`, of the whole tensor, lists the elements that differ."""
    at = np.searchsorted(index, offset)
    while at < index.size and index[at] - offset < difference.size:
        difference[index[at] - offset] = values[at]
        at += 1
    for i in range(total.size):
        total[i] += weight * difference[i]


@_compiled
def narrow(source, out):
    """Round an array of float64 into stored numbers."""
    for i in range(source.size):
        out[i] = _from_float(source[i], out[i])


@_compiled
def keep(difference, kept, index, values, offset):
    """Round differences into `kept` and list those that were changed by it; returns how many."""
    n = 0
    for i in range(difference.size):
        kept[i] = _from_float(difference[i], kept[i])
        if np.float64(_to_float(kept[i])) != difference[i]:
            index[n] = offset + i
            values[n] = difference[i]
            n += 1
    return n


@_compiled
def has_bad(source):
    """Whether a stored number is NaN or infinite."""
    found = 0
    for i in range(source.size):
        found += not np.isfinite(_to_float(source[i]))
    return found > 0
