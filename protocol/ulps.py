"""Bit patterns of floats as integers that can be subtracted: the arithmetic under weight deltas.

`ord(u) = u if u < s else -(u - s) - 1`, with s the sign bit, maps the bit patterns of a w-bit float one to one onto consecutive integers in the
order of the floats they stand for, NaNs at the ends. Differences are taken modulo 2**w and kept as signed w-bit integers, so they form a
group: they add exactly over versions, negation undoes them, and every difference is valid on every pattern. -0, infinities and NaN payloads
are ordinary elements.

The loops are compiled by numba and release the interpreter lock. Indices are within a chunk, uint32; differences are int64 for every width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
Bits = NDArray[Any]
"""Bit patterns: uint16 or uint32, flat."""
Word = Any
"""An integer in a compiled loop, of the width that numba infers."""


def compiled(function: F) -> F:
    """`function`, compiled when it is first called, and cached on disk."""
    return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(function))


class Changes(NamedTuple):
    """The elements of a chunk that change: `positions` ascending (uint32) and `differences` in ULPs (int64, modulo the width)."""

    positions: NDArray[np.uint32]
    differences: NDArray[np.int64]

    @property
    def size(self) -> int:
        """How many elements change."""
        return int(self.positions.size)


def find_changes(old: Bits, new: Bits) -> Changes:
    """What turns `old` into `new`; both are flat, of the same unsigned type and size."""
    old, new = _aligned(old), _aligned(new)
    positions, differences = _scratch.room(old.size)
    count = _find(old, new, positions, differences, _sign(old.dtype))
    return Changes(positions[:count].copy(), differences[:count].copy())


def add_changes(bits: Bits, changes: Changes) -> None:
    """Move the elements of `bits` in place. Raises IndexError, before anything is written, for a position beyond its end."""
    if changes.size and int(changes.positions[-1]) >= bits.size:
        raise IndexError(f"position {changes.positions[-1]} of {bits.size} elements")
    _add(bits, changes.positions, changes.differences, _sign(bits.dtype))


def sum_changes(first: Changes, second: Changes, width: int) -> Changes:
    """The changes of `first` followed by those of `second`, for elements of `width` bits; what cancels is left out."""
    size = first.size + second.size
    positions, differences = np.empty(size, np.uint32), np.empty(size, np.int64)
    count = _merge(*first, *second, positions, differences, np.int64(1) << (width - 1))
    return Changes(positions[:count], differences[:count])


def negated(changes: Changes, width: int) -> Changes:
    """The changes that undo `changes`."""
    half = np.int64(1) << (width - 1)
    return Changes(changes.positions, ((-changes.differences + half) & (2 * half - 1)) - half)


class _Scratch(threading.local):
    """Room for the changes of one chunk, kept by each thread: fresh memory costs a tenth of the time of finding them."""

    def __init__(self) -> None:
        self._positions, self._differences = np.empty(0, np.uint32), np.empty(0, np.int64)

    def room(self, size: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        if self._positions.size < size:
            self._positions, self._differences = np.empty(size, np.uint32), np.empty(size, np.int64)
        return self._positions, self._differences


_scratch = _Scratch()


def _sign(dtype: np.dtype[Any]) -> np.int64:
    return np.int64(1) << (dtype.itemsize * 8 - 1)


def _aligned(bits: Bits) -> Bits:
    """Contiguous, and at an address that whole words can be read from."""
    bits = np.ascontiguousarray(bits)
    return bits if bits.ctypes.data % 8 == 0 else bits.copy()


@compiled
def _ordinal(pattern: Word, sign: Word) -> Word:
    return pattern if pattern < sign else sign - pattern - 1


@compiled
def _pattern(ordinal: Word, sign: Word) -> Word:
    return ordinal if ordinal >= 0 else sign - ordinal - 1


@compiled
def _wrapped(value: Word, sign: Word) -> Word:
    """`value` as a signed integer of the width that `sign` is the top bit of."""
    return ((value + sign) & (2 * sign - 1)) - sign


@compiled
def _find(old: Bits, new: Bits, positions: NDArray[np.uint32], differences: NDArray[np.int64], sign: Word) -> Word:
    """Whole words are compared first: most are equal."""
    count: Word = 0
    per_word = 8 // old.itemsize
    num_words = old.size // per_word
    old_words = old[: num_words * per_word].view(np.uint64)
    new_words = new[: num_words * per_word].view(np.uint64)
    for word in range(num_words):
        if old_words[word] != new_words[word]:
            for index in range(word * per_word, (word + 1) * per_word):
                if old[index] != new[index]:
                    positions[count] = index
                    difference = _ordinal(np.int64(new[index]), sign) - _ordinal(np.int64(old[index]), sign)
                    differences[count] = _wrapped(difference, sign)
                    count += 1
    for index in range(num_words * per_word, old.size):
        if old[index] != new[index]:
            positions[count] = index
            differences[count] = _wrapped(_ordinal(np.int64(new[index]), sign) - _ordinal(np.int64(old[index]), sign), sign)
            count += 1
    return count


@compiled
def _add(bits: Bits, positions: NDArray[np.uint32], differences: NDArray[np.int64], sign: Word) -> None:
    for index in range(positions.size):
        place = positions[index]
        bits[place] = _pattern(_wrapped(_ordinal(np.int64(bits[place]), sign) + differences[index], sign), sign)


@compiled
def _merge(
    first_positions: NDArray[np.uint32],
    first_differences: NDArray[np.int64],
    second_positions: NDArray[np.uint32],
    second_differences: NDArray[np.int64],
    positions: NDArray[np.uint32],
    differences: NDArray[np.int64],
    sign: Word,
) -> Word:
    first: Word = 0
    second: Word = 0
    count: Word = 0
    while first < first_positions.size or second < second_positions.size:
        if second == second_positions.size or (first < first_positions.size and first_positions[first] < second_positions[second]):
            positions[count], difference = first_positions[first], first_differences[first]
            first += 1
        elif first == first_positions.size or second_positions[second] < first_positions[first]:
            positions[count], difference = second_positions[second], second_differences[second]
            second += 1
        else:
            positions[count] = first_positions[first]
            difference = _wrapped(first_differences[first] + second_differences[second], sign)
            first += 1
            second += 1
        differences[count] = difference
        count += difference != 0
    return count
