"""The base of a run: its policy's files, rounded to bf16. Whoever has the files has the weights that the first version starts from.

Tensors have the names of the files. Where a model's parameters are called otherwise, or are tied or fused on loading, the roots differ, and the
first version is published as a snapshot instead.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocol import safetensors_file
from protocol.errors import DamagedDelta
from protocol.weights import Tensor, root_of_digests, tensor_digest

WEIGHTS_SUFFIX: Final = ".safetensors"
_NAN: Final = np.uint16(0x7FC0)


def base_tensors(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the files, rounded to bf16 (to nearest, ties to even, as torch rounds).

    Raises DamagedDelta for a file that is no safetensors file, that holds anything but floats, or for a name that is there twice.
    """
    for name, tensor in _stored_tensors(paths):
        yield name, Tensor("BF16", tensor.shape, _rounded(name, tensor))


def base_layout(paths: Sequence[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of the base; raises DamagedDelta."""
    return {name: ("BF16", tensor.shape) for name, tensor in _stored_tensors(paths)}


def base_root(paths: Sequence[Path]) -> str:
    """The root hash of the base; raises what `base_tensors` does."""
    return root_of_digests({name: (t.dtype, t.shape, tensor_digest(t)) for name, t in base_tensors(paths)})


def round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bf16 bit patterns nearest to `values`, ties to even; every NaN becomes the same quiet one."""
    bits = values.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, _NAN, rounded) if is_nan.any() else rounded


def _stored_tensors(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    seen: set[str] = set()
    for path in sorted(paths):
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise DamagedDelta(f"{path.name} is empty")  # which cannot be mapped
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for name, tensor in safetensors_file.deserialize(data)[1].items():
            if name in seen:
                raise DamagedDelta(f"tensor {name!r} is in two files of the policy")
            seen.add(name)
            yield name, tensor


def _rounded(name: str, tensor: Tensor) -> NDArray[Any]:
    match tensor.dtype:
        case "BF16":
            return tensor.bits
        case "F32":
            return round_to_bf16(tensor.bits.view(np.float32))
        case "F16":
            return round_to_bf16(tensor.bits.view(np.float16).astype(np.float32))
    raise DamagedDelta(f"tensor {name!r} has dtype {tensor.dtype}, which is not rounded to bf16")
