"""An entropy coder for bytes: range asymmetric numeral systems (rANS) with one static table a block.

Weight deltas leave a general-purpose compressor nothing to find but the frequencies of bytes; Huffman codes then lose up to a bit a symbol where one
symbol is frequent, and false repetitions lose more. rANS stays within a few tenths of a per cent of the order-0 entropy.
J. Duda, "Asymmetric numeral systems", arXiv:1311.2540.

A block of up to BLOCK_SYMBOLS bytes is coded as: number of symbols (u32), bytes of code (u32), a map of the symbols that occur (32 bytes), their
frequencies out of 16384 less one (a byte below 255, otherwise 255 and a u16), the code. The reader trusts nothing: what does not decode raises
ValueError.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocol.ulps import Word, compiled

BLOCK_SYMBOLS: Final = 1 << 16
SCALE_BITS: Final = 14
_SCALE: Final = 1 << SCALE_BITS
_LOWEST: Final = 1 << 23
"""The state stays in [_LOWEST, 256 * _LOWEST): it is renormalised a byte at a time."""
_HEAD: Final = 8 + 32
Bytes = NDArray[np.uint8]


def encode(data: Bytes) -> bytes:
    """The code of `data`."""
    return b"".join(_encode_block(data[begin : begin + BLOCK_SYMBOLS]) for begin in range(0, data.size, BLOCK_SYMBOLS))


def decode(code: Bytes, length: int) -> Bytes:
    """`length` bytes. Raises ValueError for a code that does not hold exactly that many."""
    out = np.empty(min(length, code.size // _HEAD * BLOCK_SYMBOLS), np.uint8)
    done = position = 0
    while position < code.size:
        if code.size - position < _HEAD:
            raise ValueError("a block ends inside its head")
        count, size = code[position : position + 8].copy().view("<u4").tolist()
        symbols = np.flatnonzero(np.unpackbits(code[position + 8 : position + _HEAD], bitorder="little"))
        frequencies, begin = _read_table(code, position + _HEAD, symbols)
        position = begin + size
        if not 0 < count <= min(BLOCK_SYMBOLS, length - done) or position > code.size:
            raise ValueError(f"a block claims {count} symbols in {size} bytes")
        if frequencies.sum() != _SCALE:
            raise ValueError(f"the frequencies of a block add up to {frequencies.sum()}, not {_SCALE}")
        starts = np.cumsum(frequencies) - frequencies
        owners = np.repeat(np.arange(256, dtype=np.uint8), frequencies)
        if _read(code[begin:position], frequencies, starts, owners, out[done : done + count]) != size:
            raise ValueError("the code of a block is damaged")
        done += count
    if done != length:
        raise ValueError(f"{done} bytes were coded, {length} are wanted")
    return out[:done]


def _encode_block(data: Bytes) -> bytes:
    counts = np.bincount(data, minlength=256)
    frequencies = _normalized(counts)
    buffer = np.empty(2 * data.size + 16, np.uint8)
    begin = _write(data, frequencies, np.cumsum(frequencies) - frequencies, buffer)
    head = np.array([data.size, buffer.size - begin], "<u4").tobytes()
    table = b"".join(_frequency(value - 1) for value in frequencies[frequencies > 0].tolist())
    return head + np.packbits(frequencies > 0, bitorder="little").tobytes() + table + buffer[begin:].tobytes()


def _frequency(less_one: int) -> bytes:
    return bytes([less_one]) if less_one < 255 else b"\xff" + less_one.to_bytes(2, "little")


def _read_table(code: Bytes, position: int, symbols: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """The frequency of each symbol, and where the code begins."""
    data = code[position : position + 3 * symbols.size].tobytes()
    frequencies = np.zeros(256, np.int64)
    read = 0
    for symbol in symbols.tolist():
        width = 3 if data[read : read + 1] == b"\xff" else 1
        if read + width > len(data):
            raise ValueError("a block ends inside its table")
        frequencies[symbol] = 1 + int.from_bytes(data[read + width // 3 : read + width], "little")
        read += width
    return frequencies, position + read


def _normalized(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Frequencies that add up to _SCALE, at least 1 for each symbol that occurs, as near to `counts` as that allows."""
    present = counts > 0
    exact = counts * (_SCALE / counts.sum())
    frequencies = np.where(present, np.maximum(1, np.round(exact)), 0).astype(np.int64)
    while (excess := int(frequencies.sum()) - _SCALE) != 0:
        # One unit where it costs least: where the frequency is largest.
        if excess > 0:
            frequencies[int(np.argmax(np.where(frequencies > 1, frequencies, 0)))] -= 1
        else:
            frequencies[int(np.argmax(frequencies))] += 1
    return frequencies


@compiled
def _write(data: Bytes, frequencies: NDArray[np.int64], starts: NDArray[np.int64], buffer: Bytes) -> Word:
    """Code `data` backwards into the end of `buffer`; where the code begins."""
    state: Word = np.int64(1 << 23)
    position: Word = buffer.size
    for index in range(data.size - 1, -1, -1):
        symbol = data[index]
        frequency = frequencies[symbol]
        limit = ((1 << 23) >> 14 << 8) * frequency
        while state >= limit:
            position -= 1
            buffer[position] = state & 255
            state >>= 8
        state = ((state // frequency) << 14) + state % frequency + starts[symbol]
    for _ in range(4):
        position -= 1
        buffer[position] = state & 255
        state >>= 8
    return position


@compiled
def _read(code: Bytes, frequencies: NDArray[np.int64], starts: NDArray[np.int64], owners: Bytes, out: Bytes) -> Word:
    """How many bytes of `code` were read; -1 if it does not decode."""
    if code.size < 4:
        return -1
    state: Word = np.int64(0)
    for index in range(4):
        state = (state << 8) | np.int64(code[index])
    position: Word = 4
    for index in range(out.size):
        slot = state & 16383
        symbol = owners[slot]
        out[index] = symbol
        state = frequencies[symbol] * (state >> 14) + slot - starts[symbol]
        while state < (1 << 23):
            if position == code.size:
                return -1
            state = (state << 8) | np.int64(code[position])
            position += 1
    return position if state == (1 << 23) else -1
