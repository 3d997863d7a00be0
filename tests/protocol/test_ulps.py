from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocol.ulps import Changes, add_changes, find_changes, negated, sum_changes

UNSIGNED = {16: np.dtype("<u2"), 32: np.dtype("<u4")}
SPECIAL = {
    16: [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7F81, 0x7FFF, 0xFFC1, 0xFFFF, 0x0001, 0x8001, 0x7C00, 0xFC00, 0x7E01, 0x3F80, 0x3F81],
    32: [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF, 1, 0x80000001, 0x3F800000],
}


# --- the slow reference, in Python integers


def ordinal(pattern: int, width: int) -> int:
    sign = 2 ** (width - 1)
    return pattern if pattern < sign else -(pattern - sign) - 1


def pattern_of(number: int, width: int) -> int:
    return number if number >= 0 else 2 ** (width - 1) - number - 1


def signed(value: int, width: int) -> int:
    value %= 2**width
    return value - 2**width if value >= 2 ** (width - 1) else value


def slow_find(old: list[int], new: list[int], width: int) -> dict[int, int]:
    pairs = enumerate(zip(old, new, strict=True))
    return {index: signed(ordinal(after, width) - ordinal(before, width), width) for index, (before, after) in pairs if before != after}


def slow_add(old: list[int], changes: dict[int, int], width: int) -> list[int]:
    return [pattern_of(signed(ordinal(bits, width) + changes.get(index, 0), width), width) for index, bits in enumerate(old)]


def slow_sum(first: dict[int, int], second: dict[int, int], width: int) -> dict[int, int]:
    added = {place: signed(first.get(place, 0) + second.get(place, 0), width) for place in first.keys() | second.keys()}
    return {place: value for place, value in added.items() if value}


# --- what is tried


def array(patterns: list[int], width: int) -> NDArray[Any]:
    return np.array(patterns, UNSIGNED[width])


def changes_from(found: dict[int, int]) -> Changes:
    places = sorted(found)
    return Changes(np.array(places, np.uint32), np.array([found[place] for place in places], np.int64))


def as_dict(changes: Changes) -> dict[int, int]:
    """Checks the form as well: ascending, one difference each, in the documented types."""
    assert (changes.positions.dtype, changes.differences.dtype) == (np.uint32, np.int64)
    places = changes.positions.tolist()
    assert places == sorted(set(places)) and len(places) == changes.differences.size == changes.size
    return dict(zip(places, changes.differences.tolist(), strict=True))


def patterns(width: int) -> st.SearchStrategy[int]:
    return st.sampled_from(SPECIAL[width]) | st.integers(0, 2**width - 1)


@st.composite
def states(draw: st.DrawFn, count: int) -> tuple[int, list[list[int]]]:
    """A width, and `count` lists of patterns of one length that are alike in most places."""
    width = draw(st.sampled_from([16, 32]))
    found = [draw(st.lists(patterns(width), max_size=30))]
    while len(found) < count:
        following = list(found[draw(st.integers(0, len(found) - 1))])
        for index in draw(st.sets(st.integers(0, 29), max_size=12)):
            if index < len(following):
                following[index] = draw(patterns(width))
        found.append(following)
    return width, found


def differences(width: int) -> st.SearchStrategy[dict[int, int]]:
    value = st.integers(-3, 3) | st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1) | st.just(-(2 ** (width - 1)))
    return st.dictionaries(st.integers(0, 29), value.filter(bool), max_size=12)


@st.composite
def some_differences(draw: st.DrawFn, count: int) -> tuple[int, list[dict[int, int]]]:
    width = draw(st.sampled_from([16, 32]))
    return width, [draw(differences(width)) for _ in range(count)]


# --- ordinals


def test_ordinals_of_16_bits_are_consecutive_and_in_the_order_of_the_floats() -> None:
    """The difference from +0, whose ordinal is 0, is the ordinal."""
    every = np.arange(1 << 16, dtype="<u2")
    found = as_dict(find_changes(np.zeros(1 << 16, "<u2"), every)) | {0: 0}
    assert sorted(found.values()) == list(range(-(1 << 15), 1 << 15))
    assert found == {pattern: ordinal(pattern, 16) for pattern in range(1 << 16)}
    finite = [pattern for pattern in range(1 << 16) if (pattern & 0x7F80) != 0x7F80 and pattern != 0x8000]
    by_value = sorted(finite, key=lambda pattern: struct.unpack("<f", struct.pack("<I", pattern << 16))[0])
    assert by_value == sorted(finite, key=found.__getitem__)


def test_minus_zero_is_one_step_below_zero_and_nans_are_at_the_ends() -> None:
    old, new = array([0x0000, 0x7F80, 0xFF80, 0x7FFF], 16), array([0x8000, 0x7F81, 0xFF81, 0xFFFF], 16)
    assert find_changes(old, new).differences.tolist() == [-1, 1, -1, 1], "one step beyond the last NaN is the first one"


# --- finding


@settings(deadline=None)
@given(states(2))
def test_changes_are_the_ordinals_differences_modulo_the_width_where_bits_differ(drawn: tuple[int, list[list[int]]]) -> None:
    width, (old, new) = drawn
    assert as_dict(find_changes(array(old, width), array(new, width))) == slow_find(old, new, width)


@settings(deadline=None)
@given(states(2), st.integers(1, 3), st.integers(0, 7))
def test_changes_do_not_depend_on_where_and_how_the_bits_lie_in_memory(
    drawn: tuple[int, list[list[int]]], stride: int, offset: int
) -> None:
    width, (old, new) = drawn
    room = bytearray(len(old) * width // 8 + offset)
    shifted = np.frombuffer(room, UNSIGNED[width], offset=offset)
    shifted[:] = old
    strided = np.repeat(array(new, width), stride)[::stride]
    assert as_dict(find_changes(shifted, strided)) == slow_find(old, new, width)
    frozen = array(old, width)
    frozen.flags.writeable = False
    assert as_dict(find_changes(frozen, shifted)) == {}


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 8, 9])
def test_a_change_is_found_at_every_place_of_every_size(width: int, size: int) -> None:
    for place in range(size):
        old = array([7] * size, width)
        new = old.copy()
        new[place] = 9
        assert as_dict(find_changes(old, new)) == {place: 2}


# --- adding


@settings(deadline=None)
@given(states(2))
def test_adding_the_changes_found_gives_the_new_bits(drawn: tuple[int, list[list[int]]]) -> None:
    width, (old, new) = drawn
    bits = array(old, width)
    add_changes(bits, find_changes(bits, array(new, width)))
    assert bits.tolist() == new


@settings(deadline=None)
@given(states(1), st.data())
def test_every_difference_is_valid_on_every_pattern(drawn: tuple[int, list[list[int]]], data: st.DataObject) -> None:
    width, (old,) = drawn
    moved = {place: value for place, value in data.draw(differences(width)).items() if place < len(old)}
    bits = array(old, width)
    add_changes(bits, changes_from(moved))
    assert bits.tolist() == slow_add(old, moved, width)


@pytest.mark.parametrize("target", SPECIAL[16])
def test_every_pattern_of_16_bits_can_become_every_special_one_and_back(target: int) -> None:
    every, special = np.arange(1 << 16, dtype="<u2"), np.full(1 << 16, target, "<u2")
    there, back = find_changes(every, special), find_changes(special, every)
    bits = every.copy()
    add_changes(bits, there)
    assert (bits == special).all()
    add_changes(bits, back)
    assert (bits == every).all()
    assert as_dict(back) == as_dict(negated(there, 16))


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("place", [3, 4, 1 << 20, (1 << 32) - 1])
def test_a_position_beyond_the_end_is_refused_before_anything_is_written(width: int, place: int) -> None:
    bits = array([1, 2, 3], width)
    with pytest.raises(IndexError):
        add_changes(bits, changes_from({0: 5, place: 5}))
    assert bits.tolist() == [1, 2, 3]


# --- the group


@settings(deadline=None)
@given(some_differences(2))
def test_a_sum_is_the_sum_modulo_the_width_without_what_cancels(drawn: tuple[int, list[dict[int, int]]]) -> None:
    width, (first, second) = drawn
    assert as_dict(sum_changes(changes_from(first), changes_from(second), width)) == slow_sum(first, second, width)


@settings(deadline=None)
@given(some_differences(3))
def test_sums_may_be_taken_in_any_order(drawn: tuple[int, list[dict[int, int]]]) -> None:
    width, found = drawn
    a, b, c = (changes_from(f) for f in found)
    left = sum_changes(sum_changes(a, b, width), c, width)
    assert (
        as_dict(left)
        == as_dict(sum_changes(a, sum_changes(b, c, width), width))
        == as_dict(sum_changes(c, sum_changes(b, a, width), width))
    )


@settings(deadline=None)
@given(some_differences(1))
def test_a_negation_is_the_negative_modulo_the_width_and_cancels(drawn: tuple[int, list[dict[int, int]]]) -> None:
    width, (found,) = drawn
    changes = changes_from(found)
    assert as_dict(negated(changes, width)) == {place: signed(-value, width) for place, value in found.items()}
    assert as_dict(negated(negated(changes, width), width)) == found == as_dict(changes)
    assert sum_changes(changes, negated(changes, width), width).size == 0


@settings(deadline=None)
@given(states(3))
def test_the_changes_of_two_steps_add_up_to_those_of_both(drawn: tuple[int, list[list[int]]]) -> None:
    width, (u, v, w) = drawn
    first, second = find_changes(array(u, width), array(v, width)), find_changes(array(v, width), array(w, width))
    assert as_dict(sum_changes(first, second, width)) == slow_find(u, w, width)
    assert as_dict(negated(first, width)) == slow_find(v, u, width)
