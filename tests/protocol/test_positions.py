from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocol import positions as pos
from protocol.positions import ESCAPE, MAX_PARAMETER, NUM_CLASSES

Places = NDArray[np.uint32]
LARGEST = 1 << 22
"""Elements of the largest chunk."""


# --- slow references, bit by bit


def gaps_of(places: list[int]) -> list[int]:
    return [after - before - 1 for before, after in zip([-1, *places], places, strict=False)]


def slow_gaps(places: list[int]) -> bytes:
    return b"".join(b"\xff" * (gap // ESCAPE) + bytes([gap % ESCAPE]) for gap in gaps_of(places))


def slow_rice(places: list[int], parameter: int) -> bytes:
    text = ""
    for gap in gaps_of(places):
        text += "1" * (gap >> parameter) + "0" + "".join(str(gap >> bit & 1) for bit in range(parameter))
    text += "0" * (-len(text) % 8)
    return bytes(int(text[begin : begin + 8][::-1], 2) for begin in range(0, len(text), 8))


def rice_bits(places: list[int], parameter: int) -> int:
    return sum((gap >> parameter) + 1 + parameter for gap in gaps_of(places))


def slow_class(value: float) -> int:
    """0 from 1.0 up, then one for each halving."""
    if math.isnan(value) or abs(value) >= 1:
        return 0
    return next((number for number in range(1, NUM_CLASSES) if abs(value) >= 2.0**-number), NUM_CLASSES - 1)


def float_of(pattern: int, dtype: str) -> float:
    if dtype == "F16":
        return float(struct.unpack("<e", struct.pack("<H", pattern))[0])
    return float(struct.unpack("<f", struct.pack("<I", pattern << 16 if dtype == "BF16" else pattern))[0])


# --- what is tried


def array(places: list[int]) -> Places:
    return np.array(places, np.uint32)


@st.composite
def chunks(draw: st.DrawFn, most: int = LARGEST) -> tuple[int, list[int]]:
    """The size of a chunk, and sorted positions in it: scattered, in runs, at its ends, all or none."""
    size = draw(st.integers(1, 40) | st.integers(1, 3000) | st.integers(1, most) | st.just(most))
    if draw(st.booleans()):
        found = draw(st.sets(st.integers(0, size - 1), max_size=30))
    else:
        begin, step = draw(st.integers(0, size - 1)), draw(st.sampled_from([1, 2, 3, 254, 255, 256, 257, 511]))
        found = set(range(begin, size, step)[: draw(st.integers(0, 300))])
    return size, sorted(found | draw(st.sampled_from([set(), {0}, {size - 1}])))


@st.composite
def classified(draw: st.DrawFn) -> tuple[NDArray[np.uint8], list[int]]:
    """The classes of the elements of a chunk, and the positions that change, which depend on the class."""
    size = draw(st.integers(1, 300))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    used = draw(st.lists(st.integers(0, NUM_CLASSES - 1), min_size=1, max_size=5, unique=True))
    chance = np.zeros(NUM_CLASSES)
    chance[used] = [draw(st.sampled_from([0, 0.01, 0.1, 0.5, 0.9, 1])) for _ in used]
    classes = generator.choice(np.array(used, np.uint8), size)
    return classes, np.flatnonzero(generator.random(size) < chance[classes]).tolist()


def in_order_and_in_number_or_refused(decode: Callable[[], Places], count: int) -> bool:
    """Whether damaged bytes were read; anything but a ValueError or a list that can be used fails the test."""
    try:
        found = decode().tolist()
    except ValueError:
        return False
    assert len(found) == count and found == sorted(set(found))
    return True


def damaged(data: bytes, flips: int = 1) -> list[NDArray[np.uint8]]:
    """Every truncation, a byte more, and every flip of a bit."""
    variants = [data[:length] for length in range(len(data))] + [
        data + b"\0",
        data + b"\xff",
        b"\xff" * len(data),
        b"\xff" * 100,
        bytes(100),
    ]
    variants += [data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :] for bit in range(0, 8 * len(data), flips)]
    return [np.frombuffer(variant, np.uint8) for variant in variants]


EXAMPLES = [
    [],
    [0],
    [255],
    [256],
    [99_999],
    list(range(40)),
    list(range(3, 90, 7)),
    sorted(random.Random(1).sample(range(1000), 60)),
    [0, 1, 2, 700, 701, 3000, 65_535, 65_536, 99_998],
]


# --- gaps


@settings(deadline=None)
@given(chunks())
def test_gaps_are_written_in_base_255_and_read_back(chunk: tuple[int, list[int]]) -> None:
    _, places = chunk
    data = pos.encode_gaps(array(places))
    assert data.tobytes() == slow_gaps(places)
    assert pos.decode_gaps(data, len(places)).tolist() == places


@pytest.mark.parametrize("places", EXAMPLES)
def test_damaged_gaps_are_refused_or_in_order_and_in_number(places: list[int]) -> None:
    data = pos.encode_gaps(array(places)).tobytes()
    for variant in damaged(data):
        in_order_and_in_number_or_refused(lambda variant=variant: pos.decode_gaps(variant, len(places)), len(places))
    for count in {len(places) + 1, abs(len(places) - 1), 2 * len(places) + 1}:
        assert not in_order_and_in_number_or_refused(lambda count=count: pos.decode_gaps(np.frombuffer(data, np.uint8), count), count)


def test_gaps_that_end_inside_a_gap_are_refused() -> None:
    with pytest.raises(ValueError, match="gaps"):
        pos.decode_gaps(np.array([3, 255], np.uint8), 1)


def test_gaps_beyond_32_bits_are_refused() -> None:
    data = np.full((1 << 32) // 255 + 2, 255, np.uint8)
    data[-1] = 7
    with pytest.raises(ValueError, match="gaps"):
        pos.decode_gaps(data, 1)


# --- rice


@settings(deadline=None)
@given(chunks(), st.integers(0, MAX_PARAMETER))
def test_rice_bits_are_as_documented_for_every_parameter_and_are_read_back(chunk: tuple[int, list[int]], parameter: int) -> None:
    _, places = chunk
    parameter = max(parameter, min(MAX_PARAMETER, (max(gaps_of(places), default=0) >> 12).bit_length()))
    data = pos.encode_rice(array(places), parameter, rice_bits(places, parameter))
    assert data.tobytes() == slow_rice(places, parameter)
    assert pos.decode_rice(data, parameter, len(places)).tolist() == places


@settings(deadline=None)
@given(chunks())
def test_a_rice_code_is_as_long_as_was_measured_and_its_neighbours_are_no_shorter(chunk: tuple[int, list[int]]) -> None:
    size, places = chunk
    _, bits, parameter = pos.measure_gaps(array(places), size)
    assert 0 <= parameter <= MAX_PARAMETER, "what is measured can be read"
    assert bits == rice_bits(places, parameter)
    guess = pos.rice_parameter(size, len(places))
    assert bits == min(rice_bits(places, near) for near in {max(guess - 1, 0), guess, guess + 1})
    data = pos.encode_rice(array(places), parameter, bits)
    assert data.size == (bits + 7) // 8
    assert pos.decode_rice(data, parameter, len(places)).tolist() == places


@pytest.mark.parametrize("chance", [0.0003, 0.002, 0.01, 0.05, 0.2])
def test_a_rice_code_of_evenly_scattered_positions_is_within_a_few_per_cent_of_their_entropy(chance: float) -> None:
    size = 400_000
    places = np.flatnonzero(np.random.default_rng(3).random(size) < chance).astype(np.uint32)
    share = places.size / size
    entropy = -size * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    _, bits, _ = pos.measure_gaps(places, size)
    assert entropy * 0.98 < bits < entropy * 1.05


@pytest.mark.parametrize("places", EXAMPLES)
@pytest.mark.parametrize("parameter", [0, 3, 11])
def test_damaged_rice_bits_are_refused_or_in_order_and_in_number(places: list[int], parameter: int) -> None:
    parameter = max(parameter, (max(gaps_of(places), default=0) >> 6).bit_length())
    data = pos.encode_rice(array(places), parameter, rice_bits(places, parameter)).tobytes()
    count = len(places)
    for variant in damaged(data):
        in_order_and_in_number_or_refused(lambda variant=variant: pos.decode_rice(variant, parameter, count), count)
    for claimed in {count + 9, 2 * count + 9, 1 << 20}:
        assert not in_order_and_in_number_or_refused(
            lambda claimed=claimed: pos.decode_rice(np.frombuffer(data, np.uint8), parameter, claimed), claimed
        )
    for other in range(-2, MAX_PARAMETER + 3):
        in_order_and_in_number_or_refused(lambda other=other: pos.decode_rice(np.frombuffer(data, np.uint8), other, count), count)


@pytest.mark.parametrize("parameter", [-(1 << 70), -1, MAX_PARAMETER + 1, 63, 64, 1 << 31, 1 << 70])
def test_a_rice_parameter_out_of_range_is_refused(parameter: int) -> None:
    with pytest.raises(ValueError, match="Rice"):
        pos.decode_rice(np.zeros(1000, np.uint8), parameter, 1)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_rice_code_that_is_cut_short_or_has_a_tail_is_refused(cut: int) -> None:
    places = EXAMPLES[7]
    data = pos.encode_rice(array(places), 3, rice_bits(places, 3))
    for variant in (data[:-cut], np.concatenate([data, np.zeros(cut, np.uint8)])):
        with pytest.raises(ValueError, match="Rice"):
            pos.decode_rice(variant, 3, len(places))


def test_rice_gaps_beyond_32_bits_are_refused() -> None:
    data = np.full(40, 255, np.uint8)
    data[-4:] = 0
    with pytest.raises(ValueError, match="Rice"):
        pos.decode_rice(data, MAX_PARAMETER, 1)


# --- bitmap


@settings(deadline=None)
@given(chunks(most=20_000))
def test_a_bitmap_has_one_bit_for_each_element_and_is_read_back(chunk: tuple[int, list[int]]) -> None:
    size, places = chunk
    data = pos.encode_bitmap(array(places), size)
    marked = set(places)
    text = "".join("1" if index in marked else "0" for index in range(size)) + "0" * (-size % 8)
    assert data.tobytes() == bytes(int(text[begin : begin + 8], 2) for begin in range(0, len(text), 8))
    assert pos.decode_bitmap(data, size, len(places)).tolist() == places


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100])
def test_a_damaged_bitmap_is_refused_but_for_the_padding(size: int) -> None:
    places = list(range(0, size, 3))
    data = pos.encode_bitmap(array(places), size).tobytes()
    for variant in damaged(data):
        if in_order_and_in_number_or_refused(lambda variant=variant: pos.decode_bitmap(variant, size, len(places)), len(places)):
            assert pos.decode_bitmap(variant, size, len(places)).tolist() == places
    for count in (-1, len(places) - 1, len(places) + 1, 1 << 40):
        with pytest.raises(ValueError, match="bitmap"):
            pos.decode_bitmap(np.frombuffer(data, np.uint8), size, count)


# --- classes


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_class_of_every_pattern_of_16_bits_counts_the_halvings_from_one(dtype: str) -> None:
    every = np.arange(1 << 16, dtype="<u2")
    assert pos.classes_of(every, dtype).tolist() == [slow_class(float_of(pattern, dtype)) for pattern in range(1 << 16)]


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 32) - 1) | st.sampled_from([0, 1 << 31, 0x3F800000, 0x3F7FFFFF, 0x7F800000, 0xFFFFFFFF]), max_size=50))
def test_the_class_of_a_pattern_of_32_bits_counts_the_halvings_from_one(patterns: list[int]) -> None:
    assert pos.classes_of(np.array(patterns, "<u4"), "F32").tolist() == [slow_class(float_of(pattern, "F32")) for pattern in patterns]


@settings(deadline=None)
@given(classified())
def test_positions_by_class_are_read_back_with_the_order_of_the_changes(drawn: tuple[NDArray[np.uint8], list[int]]) -> None:
    classes, places = drawn
    codes, parameters, counts, order = pos.encode_classes(classes, array(places))
    assert len(codes) == len(parameters) == len(counts) == NUM_CLASSES
    assert counts == [sum(int(classes[place]) == number for place in places) for number in range(NUM_CLASSES)]
    assert order.tolist() == sorted(range(len(places)), key=lambda index: (int(classes[places[index]]), index))
    found, found_order = pos.decode_classes(classes, codes, parameters, counts)
    assert found.tolist() == places and found_order.tolist() == order.tolist()


@settings(deadline=None)
@given(classified())
def test_the_code_of_a_class_is_the_rice_code_of_its_rarer_elements(drawn: tuple[NDArray[np.uint8], list[int]]) -> None:
    classes, places = drawn
    codes, parameters, counts, _ = pos.encode_classes(classes, array(places))
    changing = set(places)
    for number, (code, parameter, count) in enumerate(zip(codes, parameters, counts, strict=True)):
        members = np.flatnonzero(classes == number).tolist()
        wanted = [index for index, place in enumerate(members) if (place in changing) == (parameter >= 0)]
        assert code.tobytes() == (slow_rice(wanted, max(parameter, ~parameter)) if count else b"")
        assert not count or len(wanted) == min(count, len(members) - count)


def classes_example() -> tuple[NDArray[np.uint8], list[int]]:
    generator = np.random.default_rng(5)
    classes = generator.choice(np.array([0, 3, 4, 15], np.uint8), 500)
    chance = np.array([0.02, 0, 0, 0.2, 0.85] + [0] * 10 + [1.0])
    return classes, np.flatnonzero(generator.random(500) < chance[classes]).tolist()


def usable(classes: NDArray[np.uint8], codes: list[Any], parameters: list[int], counts: list[int]) -> bool:
    try:
        found, order = pos.decode_classes(classes, codes, parameters, counts)
    except ValueError:
        return False
    assert found.tolist() == sorted(set(found.tolist())) and found.size == sum(counts)
    assert found.size == 0 or found[-1] < classes.size
    assert sorted(order.tolist()) == list(range(found.size))
    return True


def test_a_damaged_code_of_a_class_is_refused_or_in_order_and_in_number() -> None:
    classes, places = classes_example()
    codes, parameters, counts, _ = pos.encode_classes(classes, array(places))
    assert usable(classes, codes, parameters, counts) and min(parameters) < 0 < max(parameters)
    for number in range(NUM_CLASSES):
        for variant in damaged(codes[number].tobytes()):
            usable(classes, [*codes[:number], variant, *codes[number + 1 :]], parameters, counts)


def test_classes_that_contradict_their_codes_are_refused_or_in_order_and_in_number() -> None:
    classes, places = classes_example()
    codes, parameters, counts, _ = pos.encode_classes(classes, array(places))
    for number in range(NUM_CLASSES):
        for parameter in [*range(-27, 27), 1 << 40, -(1 << 40), 1 << 70, -(1 << 70)]:
            usable(classes, codes, [*parameters[:number], parameter, *parameters[number + 1 :]], counts)
        for count in [*range(130), 500, 1 << 31]:
            usable(classes, codes, parameters, [*counts[:number], count, *counts[number + 1 :]])
        for count in (-1, 501, 1 << 40, 1 << 70, -(1 << 70)):
            assert not usable(classes, codes, parameters, [*counts[:number], count, *counts[number + 1 :]])


def test_codes_read_with_the_classes_of_other_weights_are_refused_or_in_order_and_in_number() -> None:
    classes, places = classes_example()
    codes, parameters, counts, _ = pos.encode_classes(classes, array(places))
    for seed in range(50):
        shuffled = np.random.default_rng(seed).permutation(classes)
        assert usable(shuffled, codes, parameters, counts), "each class is as large as it was"
        usable(shuffled[: classes.size - 1 - seed], codes, parameters, counts)
    assert not usable(classes[:0], codes, parameters, counts)


# --- estimates


@given(st.lists(st.integers(0, 1000), max_size=20))
def test_the_estimate_for_the_compressor_is_the_entropy_of_the_symbols(counts: list[int]) -> None:
    expected = sum(-count * math.log2(count / sum(counts)) for count in counts if count)
    assert pos.entropy_bits(np.array(counts, np.int64)) == pytest.approx(expected)
