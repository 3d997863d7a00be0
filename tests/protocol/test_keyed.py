from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.keyed import KeyedPermutation, split_key


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 600), seed=st.integers(0, 2**63 - 1))
def test_every_value_below_the_size_occurs_exactly_once(size: int, seed: int) -> None:
    permutation = KeyedPermutation(size, split_key(seed, "test"))
    assert sorted(permutation(index) for index in range(size)) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2**40, 2**62), indexes=st.sets(st.integers(0, 2**40 - 1), min_size=2, max_size=20))
def test_values_of_huge_ranges_are_different_and_in_range(size: int, indexes: set[int]) -> None:
    permutation = KeyedPermutation(size, split_key(0, "test"))
    values = {permutation(index) for index in indexes}
    assert len(values) == len(indexes)
    assert all(0 <= value < size for value in values)


def test_the_order_is_the_same_on_every_machine_and_in_every_release() -> None:
    permutation = KeyedPermutation(1000, split_key(7, "test"))
    assert [permutation(index) for index in range(8)] == [761, 177, 417, 615, 405, 746, 48, 784]


def test_seeds_and_purposes_give_different_keys() -> None:
    keys = {split_key(seed, purpose) for seed in range(3) for purpose in ("one", "two")}
    assert len(keys) == 6


def test_low_indexes_do_not_stay_low() -> None:
    permutation = KeyedPermutation(10_000, split_key(0, "test"))
    mean = sum(permutation(index) for index in range(400)) / 400
    assert 4000 < mean < 6000
