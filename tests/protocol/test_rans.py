from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import rans
from protocol.rans import BLOCK_SYMBOLS, SCALE_BITS


def coded(data: bytes) -> bytes:
    return rans.encode(np.frombuffer(data, np.uint8))


def decoded(code: bytes, length: int) -> bytes:
    return rans.decode(np.frombuffer(code, np.uint8), length).tobytes()


def slow_decoded(code: bytes) -> bytes:
    """The reference: the documented layout, read with Python integers."""
    found = bytearray()
    while code:
        count, size = int.from_bytes(code[:4], "little"), int.from_bytes(code[4:8], "little")
        present = int.from_bytes(code[8:40], "little")
        code = code[40:]
        slots: list[tuple[int, int, int]] = []
        for symbol in range(256):
            if present >> symbol & 1:
                width = 3 if code[0] == 255 else 1
                frequency = 1 + (int.from_bytes(code[1:3], "little") if width == 3 else code[0])
                code = code[width:]
                slots += [(symbol, frequency, place) for place in range(frequency)]
        assert len(slots) == 1 << SCALE_BITS
        state, rest = int.from_bytes(code[:4], "big"), list(code[4:size])
        for _ in range(count):
            symbol, frequency, place = slots[state % len(slots)]
            found.append(symbol)
            state = frequency * (state // len(slots)) + place
            while state < 1 << 23:
                state = state << 8 | rest.pop(0)
        assert not rest
        code = code[size:]
    return bytes(found)


def refused_or_as_long(code: bytes, length: int) -> bool:
    """Whether a damaged code was read; anything but a ValueError or `length` bytes fails the test."""
    try:
        found = decoded(code, length)
    except ValueError:
        return False
    assert len(found) == length
    return True


def skewed(size: int, seed: int, symbols: int = 7) -> bytes:
    generator = np.random.default_rng(seed)
    shares = 0.3 ** np.arange(symbols)
    return generator.choice(generator.permutation(256)[:symbols], size, p=shares / shares.sum()).astype(np.uint8).tobytes()


EXAMPLES = [b"\0", b"aaaa", bytes(range(256)), skewed(300, 1), skewed(200, 2, 2), b"\xff" * 500 + b"\0"]


@settings(deadline=None)
@given(st.binary(max_size=400) | st.tuples(st.integers(1, 3000), st.integers(0, 99), st.integers(1, 256)).map(lambda drawn: skewed(*drawn)))
def test_any_bytes_are_read_back_and_are_laid_out_as_documented(data: bytes) -> None:
    code = coded(data)
    assert decoded(code, len(data)) == data == slow_decoded(code)


@pytest.mark.parametrize("size", [0, 1, BLOCK_SYMBOLS - 1, BLOCK_SYMBOLS, BLOCK_SYMBOLS + 1, 3 * BLOCK_SYMBOLS + 7])
def test_any_number_of_blocks_is_read_back(size: int) -> None:
    for data in (bytes(size), skewed(size, 3), np.random.default_rng(4).integers(0, 256, size, np.uint8).tobytes()):
        assert decoded(coded(data), size) == data


@pytest.mark.parametrize("symbols", [2, 3, 10, 60])
def test_a_code_is_within_a_per_cent_of_the_entropy(symbols: int) -> None:
    data = skewed(BLOCK_SYMBOLS, 5, symbols)
    entropy = -sum(count * math.log2(count / len(data)) for count in Counter(data).values()) / 8
    assert entropy < len(coded(data)) < 1.01 * entropy + 40 + 3 * symbols


@pytest.mark.parametrize("data", EXAMPLES)
def test_a_damaged_code_is_refused_or_as_long_as_it_should_be(data: bytes) -> None:
    code = coded(data)
    for bit in range(8 * len(code)):
        refused_or_as_long(code[: bit // 8] + bytes([code[bit // 8] ^ 1 << bit % 8]) + code[bit // 8 + 1 :], len(data))


@pytest.mark.parametrize("data", EXAMPLES)
def test_a_code_that_was_cut_short_has_a_tail_or_another_length_is_refused(data: bytes) -> None:
    code = coded(data)
    for length in range(len(code)):
        assert not refused_or_as_long(code[:length], len(data))
    for tail in (b"\0", bytes(40), bytes(100), b"\xff" * 100, code):
        assert not refused_or_as_long(code + tail, len(data))
    for wrong in (0, len(data) - 1, len(data) + 1, 2 * len(data) + 1, 1 << 40, 1 << 70):
        assert wrong == len(data) or not refused_or_as_long(code, wrong)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(EXAMPLES), st.data())
def test_a_block_whose_head_or_table_lies_is_refused_or_as_long_as_it_should_be(data: bytes, draws: st.DataObject) -> None:
    code = bytearray(coded(data))
    for _ in range(draws.draw(st.integers(1, 4))):
        place = draws.draw(st.integers(0, min(len(code), 60) - 1))
        code[place] = draws.draw(st.sampled_from([0, 1, 2, 127, 128, 254, 255]) | st.integers(0, 255))
    refused_or_as_long(bytes(code), len(data))


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 100))
def test_noise_is_refused_or_as_long_as_it_should_be(noise: bytes, length: int) -> None:
    refused_or_as_long(noise, length)
    table = b"\xff" + (16383).to_bytes(2, "little")
    head = (max(length, 1)).to_bytes(4, "little") + len(noise).to_bytes(4, "little") + (1 << 7).to_bytes(32, "little")
    refused_or_as_long(head + table + noise, max(length, 1))
