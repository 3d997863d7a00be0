"""Reading and writing safetensors files as bits, bf16 included, without torch.

The format is the public one (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON header of
{name: {dtype, shape, data_offsets}} with an optional "__metadata__" of strings, then the tensors' bytes. The reader trusts nothing:
lengths, offsets, overlaps, dtypes and shapes are all checked before a tensor is handed out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np

from protocol.errors import DamagedDelta
from protocol.weights import DTYPE_BITS, Tensor

MAX_HEADER_BYTES: Final = 64 << 20
MAX_DIMENSIONS: Final = 8
MAX_SIZE: Final = 1 << 53
"""Of one dimension, beside which another may be 0."""
_READABLE: Final[Mapping[str, np.dtype[Any]]] = {**DTYPE_BITS, "U8": np.dtype("u1")}


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file. Tensor order is kept; the header is padded to 8 bytes."""
    header, _ = header_of({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata)
    return b"".join([header, *(np.ascontiguousarray(t.bits).view(np.uint8).data for t in tensors.values())])


def header_of(layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """What precedes the tensors' bytes in a file of tensors with these dtypes and shapes, and the size of the whole file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + math.prod(shape) * _READABLE[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, 8 + len(encoded) + offset


def deserialize(data: bytes | memoryview) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; the tensors are views into `data`.

    Raises DamagedDelta for anything that is not a well-formed file of known dtypes.
    """
    view = memoryview(data)
    metadata, entries, body = _read_header(view)
    tensors: dict[str, Tensor] = {}
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != expected or end < begin or end > len(body):
            raise DamagedDelta(f"tensor {name!r} lies at {begin}:{end}, expected to start at {expected} of {len(body)} bytes")
        expected = end
        tensors[name] = _tensor(name, entry, body[begin:end])
    if expected != len(body):
        raise DamagedDelta(f"{len(body) - expected} bytes belong to no tensor")
    return metadata, tensors


def _read_header(view: memoryview) -> tuple[dict[str, str], dict[str, _Entry], memoryview]:
    if len(view) < 8:
        raise DamagedDelta(f"only {len(view)} bytes")
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > len(view):
        raise DamagedDelta(f"header claims {length} bytes of {len(view)}")
    try:
        header = msgspec.json.decode(view[8 : 8 + length], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedDelta(f"header: {error}") from None
    return metadata, entries, view[8 + length :]


def _tensor(name: str, entry: _Entry, data: memoryview) -> Tensor:
    dtype = _READABLE.get(entry.dtype)
    if dtype is None:
        raise DamagedDelta(f"tensor {name!r} has dtype {entry.dtype!r}; known are {', '.join(_READABLE)}")
    is_possible = len(entry.shape) <= MAX_DIMENSIONS and all(0 <= size <= MAX_SIZE for size in entry.shape)
    if not is_possible or math.prod(entry.shape) * dtype.itemsize != len(data):
        raise DamagedDelta(f"tensor {name!r} of shape {entry.shape} and dtype {entry.dtype} cannot have {len(data)} bytes")
    return Tensor(entry.dtype, tuple(entry.shape), np.frombuffer(data, dtype))
