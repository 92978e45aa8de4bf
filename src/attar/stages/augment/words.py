"""What numba has no word for: loads from an address, and 32-bit arithmetic that stays 32 bits wide, so that loops over it are vectorised.

Compiled functions that use these are cached by their own file alone: after a change here, delete the caches (`__pycache__/*.nb*`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WORD, _FLOAT = ir.IntType(32), ir.FloatType()


@intrinsic
def load64(typing: Any, address: Any, offset: Any) -> Any:
    """The 8 bytes at address + offset, aligned or not, as int64 of this machine's byte order (little-endian is assumed by the callers)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        place = builder.bitcast(builder.gep(start, [arguments[1]]), ir.IntType(64).as_pointer())
        return builder.load(place, align=1)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def load32(typing: Any, address: Any, offset: Any) -> Any:
    """The 4 bytes at address + offset, as int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        place = builder.bitcast(builder.gep(start, [arguments[1]]), ir.IntType(32).as_pointer())
        return builder.load(place, align=1)

    return types.int32(types.int64, types.int64), generate


@intrinsic
def load8(typing: Any, address: Any, offset: Any) -> Any:
    """The byte at address + offset, as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        return builder.zext(builder.load(builder.gep(start, [arguments[1]]), align=1), ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def load_level(typing: Any, address: Any, offset: Any) -> Any:
    """The byte at address + offset, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        found = builder.load(builder.gep(start, [arguments[1]]), align=1)
        return builder.sitofp(builder.zext(found, _WORD), _FLOAT)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def prefetch(typing: Any, address: Any, offset: Any) -> Any:
    """Asks for the cache line at address + offset, which may be any."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(builder.add(*arguments), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _WORD, _WORD, _WORD])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(ask, [place, *(ir.Constant(_WORD, number) for number in (0, 3, 1))])  # to read, into the nearest cache, data
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def byte(typing: Any, word: Any, shift: Any) -> Any:
    """(word >> shift) & 255 as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(builder.and_(builder.lshr(arguments[0], arguments[1]), ir.Constant(_WORD, 255)), _FLOAT)

    return types.float32(types.int32, types.int32), generate


@intrinsic
def half_bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 rounded to float16 (to nearest, ties to even)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def brain_bits(typing: Any, value: Any) -> Any:
    """The bits of a finite float32 rounded to bfloat16 (to nearest, ties to even)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _WORD)
        even = builder.and_(builder.lshr(bits, ir.Constant(_WORD, 16)), ir.Constant(_WORD, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(_WORD, 0x7FFF)), even)
        return builder.trunc(builder.lshr(rounded, ir.Constant(_WORD, 16)), ir.IntType(16))

    return types.uint16(types.float32), generate


def _hashed(builder: Any, word: Any) -> Any:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = builder.mul(builder.xor(word, builder.lshr(word, ir.Constant(_WORD, shift))), ir.Constant(_WORD, factor))
    return builder.xor(word, builder.lshr(word, ir.Constant(_WORD, 16)))


@intrinsic
def scramble(typing: Any, word: Any) -> Any:
    """lowbias32: reference.scramble on int32."""
    return types.int32(types.int32), lambda context, builder, signature, arguments: _hashed(builder, arguments[0])


@intrinsic
def add32(typing: Any, left: Any, right: Any) -> Any:
    """The sum of two int32, wrapping."""
    return types.int32(types.int32, types.int32), lambda context, builder, signature, arguments: builder.add(*arguments)


@intrinsic
def xor32(typing: Any, left: Any, right: Any) -> Any:
    return types.int32(types.int32, types.int32), lambda context, builder, signature, arguments: builder.xor(*arguments)


@intrinsic
def upper24(typing: Any, word: Any) -> Any:
    """The upper 24 of 32 bits, as a float32 that holds them exactly."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(builder.lshr(arguments[0], ir.Constant(_WORD, 8)), _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def exponent(typing: Any, value: Any) -> Any:
    """e of value = m 2^e, 1 <= m < 2, of a positive normal float32, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.lshr(builder.bitcast(arguments[0], _WORD), ir.Constant(_WORD, 23))
        return builder.sitofp(builder.sub(bits, ir.Constant(_WORD, 127)), _FLOAT)

    return types.float32(types.float32), generate


@intrinsic
def mantissa(typing: Any, value: Any) -> Any:
    """m of value = m 2^e, 1 <= m < 2, of a positive normal float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.and_(builder.bitcast(arguments[0], _WORD), ir.Constant(_WORD, 0x007FFFFF))
        return builder.bitcast(builder.or_(bits, ir.Constant(_WORD, 0x3F800000)), _FLOAT)

    return types.float32(types.float32), generate
