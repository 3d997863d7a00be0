"""How two sets of weights differ."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from protocol.differences import TensorDifference, differences, distance
from protocol.errors import WeightsError
from protocol.weights import Tensor


def bf16(*values: float) -> Tensor:
    """Values that bf16 holds exactly."""
    bits = [struct.unpack("<I", struct.pack("<f", value))[0] >> 16 for value in values]
    return Tensor("BF16", (len(bits),), np.array(bits, np.uint16))


def test_equal_weights_do_not_differ() -> None:
    weights = {"a": bf16(1.0, -2.0), "b": bf16(0.5)}
    assert differences(weights, {"a": bf16(1.0, -2.0), "b": bf16(0.5)}) == []
    assert distance(weights, weights) == 0.0


def test_tensors_that_differ_are_named_with_the_number_of_elements_and_the_largest_step_between_floats() -> None:
    ours = {"a": bf16(1.0, -2.0, 3.0), "b": bf16(0.5)}
    theirs = {"a": bf16(1.0, -2.015625, 3.03125), "b": bf16(0.5)}
    assert differences(ours, theirs) == [TensorDifference("a", 3, 2, 2)]  # -2.015625 is the next float, 3.03125 the second next


def test_zero_and_minus_zero_differ_by_one_ulp_and_have_no_distance() -> None:
    ours, theirs = {"a": bf16(0.0)}, {"a": bf16(-0.0)}
    assert differences(ours, theirs) == [TensorDifference("a", 1, 1, 1)]
    assert distance(ours, theirs) == 0.0


def test_the_distance_is_euclidean_over_all_tensors_together() -> None:
    assert math.isclose(distance({"a": bf16(3.0, 1.0), "b": bf16(0.0)}, {"a": bf16(0.0, 1.0), "b": bf16(4.0)}), 5.0)


@pytest.mark.parametrize("theirs", [{"b": bf16(1.0)}, {"a": bf16(1.0, 2.0)}, {"a": Tensor("F32", (1,), np.zeros(1, np.uint32))}])
def test_weights_of_another_layout_are_refused_by_name(theirs: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match="a"):
        differences({"a": bf16(1.0)}, theirs)
