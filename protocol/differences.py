"""How two sets of weights differ: which tensors, how many elements, by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.errors import WeightsError
from protocol.weights import DTYPE_BITS, Tensor


class TensorDifference(NamedTuple):
    """A tensor that is not the same on both sides. `largest_ulps` is the largest difference of an element in units of the last place."""

    name: str
    num_elements: int
    num_different: int
    largest_ulps: int


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[TensorDifference]:
    """The tensors whose bits differ, in the order of `theirs`. Raises WeightsError if the two have not the same layout."""
    layouts = [{name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()} for weights in (ours, theirs)]
    if layouts[0] != layouts[1]:
        odd = sorted(dict(layouts[0].items() ^ layouts[1].items()))
        raise WeightsError(f"the two sets of weights have not the same tensors: {', '.join(odd[:4])}. Compare weights of one model.")
    found = []
    for name, tensor in theirs.items():
        apart = np.flatnonzero(ours[name].bits != tensor.bits)
        if apart.size:
            ulps = np.abs(_ordinals(ours[name], apart) - _ordinals(tensor, apart))
            found.append(TensorDifference(name, tensor.bits.size, apart.size, int(ulps.max())))
    return found


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The Euclidean distance of two sets of BF16 weights of one layout, all tensors together."""
    total = 0.0
    for name, tensor in theirs.items():
        gap = _values(ours[name]) - _values(tensor)
        total += float(np.dot(gap, gap))
    return math.sqrt(total)


def _values(tensor: Tensor) -> NDArray[np.float32]:
    if tensor.dtype != "BF16":
        raise WeightsError(f"distances are taken between BF16 weights, as they are published, not {tensor.dtype}.")
    return (tensor.bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _ordinals(tensor: Tensor, positions: NDArray[np.intp]) -> NDArray[np.int64]:
    """The place of each element's bit pattern in the order of the floats (protocol.ulps)."""
    sign = 1 << (8 * DTYPE_BITS[tensor.dtype].itemsize - 1)
    bits = tensor.bits[positions].astype(np.int64)
    return np.where(bits < sign, bits, -(bits - sign) - 1)
