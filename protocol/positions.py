"""Four ways to write down which elements of a chunk change. The encoder measures and takes the smallest.

    gaps      differences of sorted positions in base-255 bytes, for the general-purpose compressor behind: adapts to clusters
    rice      the same differences in Golomb-Rice bits: within a few per cent of the entropy of evenly scattered positions, at any density
    bitmap    one bit per element, for the compressor behind
    classes   Rice bits for each class of the old value's exponent apart: the chance that a bf16 weight changes halves with every exponent,
              and both sides know the old value. Needs the old bits to be read.

Every reader checks what it reads: a damaged stream raises ValueError and is never read or written past its end.
Golomb-Rice codes: R. F. Rice, "Some practical universal noiseless coding techniques", JPL 79-22, 1979.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocol.ulps import Bits, Word, compiled

ESCAPE: Final = 255
MAX_PARAMETER: Final = 24
NUM_CLASSES: Final = 16
_EXPONENTS: Final = {"BF16": (7, 0xFF, 127), "F16": (10, 0x1F, 15), "F32": (23, 0xFF, 127)}
"""By dtype: shift and mask that leave the exponent of a pattern, and the exponent of 1.0."""

Positions = NDArray[np.uint32]
Bytes = NDArray[np.uint8]


# --- gaps


def encode_gaps(positions: Positions) -> Bytes:
    """A gap g is g // 255 bytes of 255 and the byte g % 255."""
    last = int(positions[-1]) if positions.size else 0
    out = np.empty(positions.size + (last + 1) // ESCAPE + 1, np.uint8)
    return out[: _write_gaps(positions, out)]


def decode_gaps(data: Bytes, count: int) -> Positions:
    """`count` positions. Raises ValueError if the bytes do not hold exactly that many."""
    positions = np.empty(count, np.uint32)
    if _read_gaps(data, positions) != count:
        raise ValueError(f"{data.size} bytes of gaps do not hold {count} positions")
    return positions


@compiled
def _write_gaps(positions: Positions, out: Bytes) -> Word:
    size = 0
    before: Word = -1
    for position in positions:
        gap = np.int64(position) - before - 1
        before = np.int64(position)
        while gap >= 255:
            out[size] = 255
            size += 1
            gap -= 255
        out[size] = gap
        size += 1
    return size


@compiled
def _read_gaps(data: Bytes, positions: Positions) -> Word:
    count = 0
    position = np.int64(-1)
    for symbol in data:
        position += np.int64(symbol)
        if symbol != 255:
            position += 1
            if count == positions.size or position > 0xFFFFFFFF:
                return -1
            positions[count] = position
            count += 1
    if data.size and data[-1] == 255:
        return -1
    return count


# --- rice


def rice_parameter(num_elements: int, num_changed: int) -> int:
    """The number of low bits that suits gaps of this density: about log2(ln 2 * mean gap)."""
    mean = (num_elements - num_changed) / max(num_changed, 1)
    return max(0, min(MAX_PARAMETER, round(math.log2(max(mean * math.log(2), 1.0)))))


def measure_gaps(positions: Positions, num_elements: int) -> tuple[float, int, int]:
    """About the bits of the gap code after compression; the bits of the best Rice code, and its parameter."""
    guess = rice_parameter(num_elements, positions.size)
    counts = np.zeros(ESCAPE + 1, np.int64)
    low, middle, high = _measure(positions, guess, counts)
    bits, parameter = min((low, max(guess - 1, 0)), (middle, guess), (high, guess + 1))
    return entropy_bits(counts), int(bits), parameter


def encode_rice(positions: Positions, parameter: int, num_bits: int) -> Bytes:
    """A gap g is g >> parameter one-bits, a zero-bit and the low bits of g, least significant bit first; `num_bits` as measured."""
    out = np.empty((num_bits + 7) // 8, np.uint8)
    _write_rice(positions, parameter, out)
    return out


def decode_rice(data: Bytes, parameter: int, count: int) -> Positions:
    """`count` positions. Raises ValueError if the bits do not hold them, or more than the padding is left."""
    positions = np.empty(count, np.uint32)
    if not 0 <= parameter <= MAX_PARAMETER or _read_rice(data, parameter, positions) != data.size:
        raise ValueError(f"{data.size} bytes of Rice code do not hold {count} positions")
    return positions


@compiled
def _measure(positions: Positions, parameter: Word, counts: NDArray[np.int64]) -> tuple[Word, Word, Word]:
    """The bits of the Rice code at `parameter` - 1, `parameter` and `parameter` + 1; and counts the bytes of the gap code."""
    lower = max(parameter - 1, 0)
    low = middle = high = np.int64(0)
    before: Word = -1
    for position in positions:
        gap = np.int64(position) - before - 1
        before = np.int64(position)
        low += (gap >> lower) + 1 + lower
        middle += (gap >> parameter) + 1 + parameter
        high += (gap >> (parameter + 1)) + 2 + parameter
        counts[255] += gap // 255
        counts[gap % 255] += 1
    return low, middle, high


@compiled
def _put_gap(out: Bytes, bit: Word, gap: Word, parameter: Word) -> Word:
    """Write one gap at `bit`; the bit behind it. The buffer is zero beforehand."""
    for _ in range(gap >> parameter):
        out[bit >> 3] |= np.uint8(1 << (bit & 7))
        bit += 1
    bit += 1
    low = gap & ((np.int64(1) << parameter) - 1)
    left = parameter
    while left > 0:
        room = 8 - (bit & 7)
        taken: Word = min(room, left)
        out[bit >> 3] |= np.uint8((low & ((1 << taken) - 1)) << (bit & 7))
        low >>= taken
        left -= taken
        bit += taken
    return bit


@compiled
def _get_gap(data: Bytes, bit: Word, parameter: Word) -> tuple[Word, Word]:
    """The gap at `bit` and the bit behind it; bit -1 when the data end inside it."""
    num_bits = np.int64(data.size) * 8
    high = np.int64(0)
    while bit < num_bits and (data[bit >> 3] >> (bit & 7)) & 1:
        high += 1
        bit += 1
    if bit + 1 + parameter > num_bits:
        return 0, -1
    bit += 1
    low = np.int64(0)
    done = 0
    while done < parameter:
        room = 8 - (bit & 7)
        taken = min(room, parameter - done)
        low |= np.int64((data[bit >> 3] >> (bit & 7)) & ((1 << taken) - 1)) << done
        done += taken
        bit += taken
    return (high << parameter) | low, bit


@compiled
def _write_rice(positions: Positions, parameter: Word, out: Bytes) -> None:
    """As `_put_gap` for every position, with the bits gathered in a word."""
    low_mask = (np.int64(1) << parameter) - 1
    word = np.int64(0)
    num_bits = 0
    size = 0
    before: Word = -1
    for position in positions:
        gap = np.int64(position) - before - 1
        before = np.int64(position)
        high = gap >> parameter
        while high > 0:
            taken: Word = min(high, 8)
            word |= ((np.int64(1) << taken) - 1) << num_bits
            num_bits += taken
            high -= taken
            while num_bits >= 8:
                out[size] = word & 255
                size += 1
                word >>= 8
                num_bits -= 8
        word |= (gap & low_mask) << (num_bits + 1)
        num_bits += 1 + parameter
        while num_bits >= 8:
            out[size] = word & 255
            size += 1
            word >>= 8
            num_bits -= 8
    if num_bits > 0:
        out[size] = word & 255


@compiled
def _read_rice(data: Bytes, parameter: Word, positions: Positions) -> Word:
    """How many bytes were read; -1 if they do not hold the positions."""
    bit: Word = np.int64(0)
    position = np.int64(-1)
    for index in range(positions.size):
        gap, bit = _get_gap(data, bit, parameter)
        if bit < 0:
            return -1
        position += gap + 1
        if position > 0xFFFFFFFF:
            return -1
        positions[index] = position
    return (bit + 7) >> 3


# --- bitmap


def encode_bitmap(positions: Positions, num_elements: int) -> Bytes:
    """One bit per element."""
    flags = np.zeros(num_elements, np.uint8)
    flags[positions] = 1
    return np.packbits(flags)


def decode_bitmap(data: Bytes, num_elements: int, count: int) -> Positions:
    """The positions whose bit is set. Raises ValueError if they are not `count`."""
    if data.size != (num_elements + 7) // 8:
        raise ValueError(f"a bitmap of {data.size} bytes for {num_elements} elements")
    positions = np.flatnonzero(np.unpackbits(data, count=num_elements)).astype(np.uint32)
    if positions.size != count:
        raise ValueError(f"a bitmap with {positions.size} positions, {count} announced")
    return positions


# --- classes


def classes_of(bits: Bits, dtype: str) -> Bytes:
    """The class of each element: 0 from 1.0 up, then one for each halving, the last for all that is smaller."""
    shift, mask, one = _EXPONENTS[dtype]
    table = np.clip(one - np.arange(mask + 1), 0, NUM_CLASSES - 1).astype(np.uint8)
    out = np.empty(bits.size, np.uint8)
    _classify(bits, shift, mask, table, out)
    return out


def encode_classes(classes: Bytes, positions: Positions) -> tuple[list[Bytes], list[int], list[int], NDArray[np.int64]]:
    """For each class its Rice code, its parameter and its number of changes; and the order of the changes, class after class.

    A parameter p >= 0 codes the elements that change, ~p the elements that do not (where they are fewer). An element's place is counted within
    its class. The code of a class without a change is empty.
    """
    totals, changing = _census(classes), _census(classes[positions])
    parameters = np.zeros(NUM_CLASSES, np.int64)
    sizes = np.zeros(NUM_CLASSES, np.int64)
    for number, (total, count) in enumerate(zip(totals.tolist(), changing.tolist(), strict=True)):
        if count:
            coded = min(count, total - count)
            parameter = rice_parameter(total, coded)
            parameters[number] = parameter if coded == count else ~parameter
            sizes[number] = (coded * (1 + parameter) + (total >> parameter)) // 8 + 9
    begins = np.concatenate([[0], np.cumsum(sizes)])
    out = np.zeros(int(begins[-1]), np.uint8)
    bits = np.zeros(NUM_CLASSES, np.int64)
    _write_classes(classes, positions, parameters, changing, begins, out, bits)
    codes = [out[begins[c] : begins[c] + (bits[c] + 7) // 8] for c in range(NUM_CLASSES)]
    order = _grouped(classes[positions], changing)
    return codes, parameters.tolist(), changing.tolist(), order


def decode_classes(classes: Bytes, codes: list[Bytes], parameters: list[int], counts: list[int]) -> tuple[Positions, NDArray[np.int64]]:
    """Positions, ascending, and their order class after class. Raises ValueError for codes that do not fit `classes` and `counts`."""
    totals = _census(classes)
    begins = np.concatenate([[0], np.cumsum(totals)])
    members = np.zeros(classes.size, np.uint8)
    """Class after class, whether each element changes."""
    for number, (code, parameter, count) in enumerate(zip(codes, parameters, counts, strict=True)):
        total = int(totals[number])
        if not 0 <= count <= total:
            raise ValueError(f"class {number} of {total} elements is said to have {count} changes")
        if count == 0:
            continue
        coded = decode_rice(code, parameter if parameter >= 0 else ~parameter, count if parameter >= 0 else total - count)
        if coded.size and int(coded[-1]) >= total:
            raise ValueError(f"class {number} has no element {coded[-1]}")
        part = members[begins[number] : begins[number + 1]]
        part[:] = parameter < 0
        part[coded] = parameter >= 0
    flags = np.empty(classes.size, np.uint8)
    _place_members(classes, members, begins[:-1].astype(np.int64), flags)
    positions = np.flatnonzero(flags).astype(np.uint32)
    of_changes = classes[positions]
    return positions, _grouped(of_changes, _census(of_changes))


def _census(classes: Bytes) -> NDArray[np.int64]:
    """How many elements each class has."""
    totals = np.zeros(NUM_CLASSES, np.int64)
    _count(classes, totals)
    return totals


def _grouped(classes: Bytes, totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices of `classes`, class after class, ascending within each."""
    order = np.empty(classes.size, np.int64)
    _group(classes, np.cumsum(totals) - totals, order)
    return order


@compiled
def _count(classes: Bytes, totals: NDArray[np.int64]) -> None:
    for number in classes:
        totals[number] += 1


@compiled
def _group(classes: Bytes, places: NDArray[np.int64], order: NDArray[np.int64]) -> None:
    for index in range(classes.size):
        number = classes[index]
        order[places[number]] = index
        places[number] += 1


@compiled
def _classify(bits: Bits, shift: Word, mask: Word, table: Bytes, out: Bytes) -> None:
    for index in range(bits.size):
        out[index] = table[(np.int64(bits[index]) >> shift) & mask]


@compiled
def _write_classes(
    classes: Bytes,
    positions: Positions,
    parameters: NDArray[np.int64],
    changing: NDArray[np.int64],
    begins: NDArray[np.int64],
    out: Bytes,
    bits: NDArray[np.int64],
) -> None:
    place = np.zeros(parameters.size, np.int64)
    before = np.full(parameters.size, -1, np.int64)
    following = 0
    for index in range(classes.size):
        number = classes[index]
        changes = following < positions.size and positions[following] == index
        following += changes
        parameter = parameters[number]
        if changing[number] > 0 and changes == (parameter >= 0):
            gap = place[number] - before[number] - 1
            before[number] = place[number]
            low_bits = parameter if parameter >= 0 else ~parameter
            bits[number] = _put_gap(out[begins[number] : begins[number + 1]], bits[number], gap, low_bits)
        place[number] += 1


@compiled
def _place_members(classes: Bytes, members: Bytes, places: NDArray[np.int64], flags: Bytes) -> None:
    for index in range(classes.size):
        number = classes[index]
        flags[index] = members[places[number]]
        places[number] += 1


# --- estimates


def entropy_bits(counts: NDArray[Any]) -> float:
    """The order-0 entropy, in bits, of symbols with these counts."""
    counts = counts[counts > 0].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum()) if counts.size > 1 else 0.0
