"""One chunk of a tensor, coded: which elements change, and by how many ULPs.

The encoder measures what each way of writing costs on this chunk and takes the smallest:

    same      nothing changes
    gaps, rice, bitmap, classes    positions as protocol.positions says, and the difference of each changed element
    dense     the difference of every element, zeros included
    planes    as dense, but the whole difference, low bytes of all elements first, then the next bytes

A difference is one byte, its zigzag; 255 sends the reader to the escapes, which hold whole zigzag values.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol import positions as pos
from protocol.positions import ESCAPE, NUM_CLASSES
from protocol.ulps import Bits, Changes, Word, compiled

CHUNK_ELEMENTS: Final = 1 << 22
"""8 MiB of bf16: what is coded at once, and the unit in which codings are chosen."""
STREAMS: Final = ("positions", "packed", "ulps", "escapes", "planes")
"""The byte streams of a chunk. All but `packed` (Rice bits) are worth compressing."""
COMPRESSOR_LOSS: Final = 1.01
"""What the compressor behind typically adds to its symbols' entropy; Rice bits are exact."""
Codec = Literal["same", "gaps", "rice", "bitmap", "classes", "dense", "planes"]


class ChunkEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the manifest says of a chunk. `lengths` follow STREAMS, in bytes; `parameters` belong to the codec:
    rice: one; classes: for each class its parameter, its number of changes and the bytes of its code."""

    codec: Codec
    num_changed: int
    lengths: tuple[int, int, int, int, int]
    parameters: list[int] = []


class Coded(NamedTuple):
    """A coded chunk: its entry, its streams, and how often each difference occurs (for the entropy bound)."""

    entry: ChunkEntry
    streams: tuple[bytes, bytes, bytes, bytes, bytes]


def encode_chunk(changes: Changes, num_elements: int, width: int, old: tuple[Bits, str] | None = None) -> Coded:
    """Code the changes of a chunk of `num_elements` of `width` bits. With the old bits and their dtype, positions by class are tried too."""
    if changes.size == 0:
        return Coded(ChunkEntry("same", 0, (0, 0, 0, 0, 0)), (b"", b"", b"", b"", b""))
    symbols, escapes = _split(changes.differences, width)
    codec, size, rice_bits, rice_parameter = _choose(changes, symbols, escapes, num_elements, width)
    if old is not None:
        by_class = _encode_classes(changes, symbols, width, *old)
        values = pos.entropy_bits(np.bincount(symbols, minlength=ESCAPE + 1)) + 8 * escapes.nbytes
        if values + 8 * len(by_class.streams[1]) < size:
            return by_class
    parameters: list[int] = []
    positions = packed = planes = np.empty(0, np.uint8)
    match codec:
        case "gaps":
            positions = pos.encode_gaps(changes.positions)
        case "rice":
            parameters = [rice_parameter]
            packed = pos.encode_rice(changes.positions, rice_parameter, rice_bits)
        case "bitmap":
            positions = pos.encode_bitmap(changes.positions, num_elements)
        case "dense":
            every = np.zeros(num_elements, np.uint8)
            every[changes.positions] = symbols
            symbols = every
        case "planes":
            planes = _planes(changes, num_elements, width)
            symbols, escapes = np.empty(0, np.uint8), escapes[:0]
    return _coded(codec, changes.size, (positions, packed, symbols, escapes, planes), parameters)


def decode_chunk(
    entry: ChunkEntry, streams: tuple[Bits, Bits, Bits, Bits, Bits], num_elements: int, width: int, old: tuple[Bits, str] | None = None
) -> Changes:
    """The changes of a chunk. Raises ValueError for streams that contradict the entry, or if classes come without the old bits."""
    positions, packed, symbols, escapes, planes = streams
    if not 0 <= entry.num_changed <= num_elements:
        raise ValueError(f"{entry.num_changed} of {num_elements} elements are said to change")
    count = entry.num_changed
    order: NDArray[np.int64] | None = None
    match entry.codec:
        case "same":
            where = np.empty(0, np.uint32)
            if count or any(stream.size for stream in streams):
                raise ValueError("an unchanged chunk has changes")
            return Changes(where, np.empty(0, np.int64))
        case "gaps":
            where = pos.decode_gaps(positions, count)
        case "rice":
            where = pos.decode_rice(packed, entry.parameters[0] if len(entry.parameters) == 1 else -1, count)
        case "bitmap":
            where = pos.decode_bitmap(positions, num_elements, count)
        case "classes":
            where, order = _decode_classes(entry, packed, num_elements, old)
        case "dense":
            where = np.arange(num_elements, dtype=np.uint32)
        case "planes":
            return _from_planes(planes, num_elements, width, count)
    differences = _join(symbols, escapes, where.size, width)
    if where.size and int(where[-1]) >= num_elements:
        raise ValueError(f"position {where[-1]} of {num_elements} elements")
    if order is not None:
        sorted_differences = np.empty_like(differences)
        sorted_differences[order] = differences
        differences = sorted_differences
    if entry.codec == "dense":
        where = np.flatnonzero(differences).astype(np.uint32)
        differences = differences[where]
    if where.size != count:
        raise ValueError(f"{where.size} elements change, {count} announced")
    return Changes(where, differences)


# --- choosing


def _choose(
    changes: Changes, symbols: NDArray[np.uint8], escapes: NDArray[Any], num_elements: int, width: int
) -> tuple[Codec, float, int, int]:
    """The codec with the smallest size after compression, as estimated, and that in bits; bits and parameter of the best Rice code."""
    count = changes.size
    counts = np.bincount(symbols, minlength=ESCAPE + 1)
    values = pos.entropy_bits(counts) + 8 * escapes.nbytes
    sizes: dict[Codec, float] = {"planes": float(num_elements * width)}
    gap_bits, rice_bits, parameter = pos.measure_gaps(changes.positions, num_elements)
    sizes["gaps"] = values + gap_bits * COMPRESSOR_LOSS
    sizes["rice"] = values + rice_bits
    if count * 8 > num_elements:
        counts[0] += num_elements - count
        sizes["dense"] = pos.entropy_bits(counts) + 8 * escapes.nbytes
        sizes["bitmap"] = values + _bitmap_bits(num_elements, count) * COMPRESSOR_LOSS
    best = min(sizes, key=lambda codec: sizes[codec])
    return best, sizes[best], rice_bits, parameter


def _bitmap_bits(num_elements: int, count: int) -> float:
    share = count / num_elements
    if share == 1.0:
        return 0.0
    return float(-num_elements * (share * np.log2(share) + (1 - share) * np.log2(1 - share)))


# --- classes


def _encode_classes(changes: Changes, symbols: NDArray[np.uint8], width: int, old: Bits, dtype: str) -> Coded:
    classes = pos.classes_of(old, dtype)
    codes, parameters, counts, order = pos.encode_classes(classes, changes.positions)
    _, escapes = _split(changes.differences[order], width)
    empty = np.empty(0, np.uint8)
    listed = [*parameters, *counts, *(code.size for code in codes)]
    return _coded("classes", changes.size, (empty, np.concatenate(codes), symbols[order], escapes, empty), listed)


def _decode_classes(
    entry: ChunkEntry, packed: NDArray[np.uint8], num_elements: int, old: tuple[Bits, str] | None
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    if old is None or old[0].size != num_elements:
        raise ValueError("positions by exponent class need the old weights to be read")
    if len(entry.parameters) != 3 * NUM_CLASSES:
        raise ValueError(f"{len(entry.parameters)} parameters of classes")
    parameters, counts, sizes = (entry.parameters[part * NUM_CLASSES : (part + 1) * NUM_CLASSES] for part in range(3))
    if min(sizes) < 0 or sum(sizes) != packed.size:
        raise ValueError("the codes of the classes do not fill their stream")
    ends = np.cumsum(sizes)
    codes = [packed[end - size : end] for size, end in zip(sizes, ends.tolist(), strict=True)]
    return pos.decode_classes(pos.classes_of(*old), codes, parameters, counts)


# --- differences


def _split(differences: NDArray[np.int64], width: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """One byte for each difference, and the whole zigzag values of those that need more."""
    zigzag = (differences << 1) ^ (differences >> 63)
    symbols = np.minimum(zigzag, ESCAPE).astype(np.uint8)
    return symbols, zigzag[symbols == ESCAPE].astype(f"<u{width // 8}")


def _join(symbols: NDArray[np.uint8], escapes: NDArray[np.uint8], count: int, width: int) -> NDArray[np.int64]:
    if symbols.size != count or escapes.size % (width // 8):
        raise ValueError(f"{symbols.size} differences and {escapes.size} bytes of escapes for {count} elements")
    values = escapes.view(f"<u{width // 8}").astype(np.int64)
    differences = np.empty(count, np.int64)
    if _unzigzag(symbols, values, differences) != values.size:
        raise ValueError(f"{values.size} escapes, and another number is used")
    return differences


@compiled
def _unzigzag(symbols: NDArray[np.uint8], escapes: NDArray[np.int64], differences: NDArray[np.int64]) -> Word:
    used = 0
    for index in range(symbols.size):
        value = np.int64(symbols[index])
        if value == 255:
            if used < escapes.size:
                value = escapes[used]
            used += 1
        differences[index] = (value >> 1) ^ -(value & 1)
    return used


def _planes(changes: Changes, num_elements: int, width: int) -> NDArray[np.uint8]:
    every = np.zeros(num_elements, f"<u{width // 8}")
    every[changes.positions] = changes.differences.astype(every.dtype)
    return np.ascontiguousarray(every.view(np.uint8).reshape(num_elements, -1).T).reshape(-1)


def _from_planes(planes: NDArray[np.uint8], num_elements: int, width: int, count: int) -> Changes:
    if planes.size != num_elements * width // 8:
        raise ValueError(f"planes of {planes.size} bytes for {num_elements} elements")
    every = np.ascontiguousarray(planes.reshape(-1, num_elements).T).view(f"<i{width // 8}").reshape(-1)
    where = np.flatnonzero(every).astype(np.uint32)
    if where.size != count:
        raise ValueError(f"{where.size} elements change, {count} announced")
    return Changes(where, every[where].astype(np.int64))


def _coded(codec: Codec, num_changed: int, streams: tuple[NDArray[Any], ...], parameters: list[int]) -> Coded:
    data = [np.ascontiguousarray(stream).view(np.uint8).tobytes() for stream in streams]
    lengths = [len(stream) for stream in data]
    entry = ChunkEntry(codec, num_changed, (lengths[0], lengths[1], lengths[2], lengths[3], lengths[4]), parameters)
    return Coded(entry, (data[0], data[1], data[2], data[3], data[4]))
