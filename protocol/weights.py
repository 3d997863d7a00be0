"""Weights as bits, and the hash that names them.

A policy's weights are a mapping from Hugging Face parameter name to the bit pattern of the tensor. Everything that must be exact
(deltas, hashes, comparisons) works on bits: two NaNs with different payloads are different, -0 and +0 are different.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, NamedTuple

import blake3
import msgspec
import numpy as np
from numpy.typing import NDArray

DTYPE_BITS: Final[Mapping[str, np.dtype[Any]]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
}
"""Supported dtypes under their safetensors names, and the unsigned integer that holds one element's bits."""


class Tensor(NamedTuple):
    """One parameter: `dtype` (safetensors name), `shape`, and `bits` (flat, row-major, of DTYPE_BITS[dtype])."""

    dtype: str
    shape: tuple[int, ...]
    bits: NDArray[Any]


Weights = dict[str, Tensor]


class PolicyVersion(msgspec.Struct, frozen=True, array_like=True):
    """A publication of weights.

    `number` is monotonic and never reused; `step` is the learner step t of the weights; `lineage` counts resumes of the learner;
    `root` is the root hash of the bf16 weights.
    """

    number: Annotated[int, msgspec.Meta(ge=-1, le=1 << 53)]
    step: Annotated[int, msgspec.Meta(ge=-1, le=1 << 53)]
    lineage: Annotated[int, msgspec.Meta(ge=-1, le=1 << 53)]
    root: Annotated[str, msgspec.Meta(max_length=128)]


class BlobRef(msgspec.Struct, frozen=True, array_like=True):
    """A content-addressed file: BLAKE3 of its bytes, and its size in bytes."""

    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size: Annotated[int, msgspec.Meta(ge=0)]


def tensor_digest(tensor: Tensor, threads: int = 1) -> bytes:
    """BLAKE3 (32 bytes) of a tensor's bits."""
    return blake3.blake3(np.ascontiguousarray(tensor.bits).view(np.uint8).data, max_threads=threads).digest()


def root_hash(weights: Mapping[str, Tensor]) -> str:
    """BLAKE3 root over the sorted (name, dtype, shape, digest) of all tensors, in hexadecimal.

    Two mappings have the same root exactly when they hold the same names, dtypes, shapes and bits.
    """
    return root_of_digests({name: (t.dtype, t.shape, tensor_digest(t)) for name, t in weights.items()})


def root_of_digests(entries: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    """The root hash from per-tensor (dtype, shape, digest); see `root_hash`."""
    listing = [[name, dtype, list(shape), digest] for name, (dtype, shape, digest) in sorted(entries.items())]
    return blake3.blake3(msgspec.msgpack.encode(listing)).hexdigest()


def num_bytes(weights: Mapping[str, Tensor]) -> int:
    """Bytes of the weights at full size."""
    return sum(t.bits.nbytes for t in weights.values())
