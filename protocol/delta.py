"""Weight files: deltas between two published versions, and full snapshots. Exact for every bit pattern.

A delta holds, for each changed element, how far its bit pattern moved in units in the last place (ULPs). Ordinals
`ord(u) = u if u < 0x8000 else -(u & 0x7fff) - 1` map the 65536 patterns of a 16-bit float one to one onto consecutive integers (and likewise
for 32 bits), so differences are small, add exactly over versions and lose nothing: -0, infinities and NaN payloads keep their ordinals.

File layout (safetensors, all streams U8, each one zstd frame over all tensors in manifest order):

    __metadata__  format, kind, run, from_version, to_version, parent_root, new_root, num_changed, num_elements, bound_bytes
    manifest      JSON list of {name, dtype, shape, codec, num_changed, lengths of this tensor's part of each stream}
    positions     codec "gaps": differences of sorted flat indices in base-255 bytes; codec "bitmap": one bit per element
    ulps          zigzag of the ULP difference in one byte, 255 = see escapes
    escapes       the zigzag values that do not fit a byte, little-endian, twice the element's width
    raw           codec "raw": the new bits themselves (new or reshaped tensors, and dense changes)

A snapshot is an ordinary safetensors file of the bf16 tensors under their Hugging Face names, with the same metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from protocol import safetensors_file
from protocol.errors import DamagedDelta, RootMismatch, WrongParent
from protocol.weights import DTYPE_BITS, PolicyVersion, Tensor, Weights, num_bytes, root_hash

DELTA_FORMAT: Final = "slipstream-delta/1"
SNAPSHOT_FORMAT: Final = "slipstream-snapshot/1"
ESCAPE: Final = 255
MAX_MANIFEST_BYTES: Final = 64 << 20
STREAMS: Final = ("positions", "ulps", "escapes", "raw")
Codec = Literal["same", "gaps", "bitmap", "raw", "removed"]


class DeltaHeader(msgspec.Struct, frozen=True):
    """What a weight file says about itself. `bound_bytes` is the i.i.d. entropy bound of what it encodes, in bytes."""

    kind: Literal["delta", "snapshot"]
    run: str
    from_version: int
    to_version: int
    parent_root: str
    new_root: str
    num_changed: int
    num_elements: int
    bound_bytes: int


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """One tensor's entry in the manifest; `lengths` follows STREAMS, in bytes before compression."""

    name: str
    dtype: str
    shape: list[int]
    codec: Codec
    num_changed: int
    lengths: tuple[int, int, int, int]


class _Encoded(NamedTuple):
    part: _Part
    streams: tuple[bytes, bytes, bytes, bytes]
    value_counts: NDArray[np.int64]


def encode_delta(run: str, old: Weights, new: Weights, old_version: PolicyVersion, new_version: PolicyVersion) -> bytes:
    """The delta file that turns `old` (of `old_version`) into `new` (of `new_version`)."""
    encoded = [_encode_tensor(name, old.get(name), new[name]) for name in new]
    encoded += [_removed(name, old[name]) for name in old if name not in new]
    compressor = zstandard.ZstdCompressor(level=1)
    tensors = {"manifest": _stream(compressor.compress(msgspec.json.encode([e.part for e in encoded])))}
    for position, stream in enumerate(STREAMS):
        tensors[stream] = _stream(compressor.compress(b"".join(e.streams[position] for e in encoded)))
    num_elements = sum(t.bits.size for t in new.values())
    num_changed = sum(e.part.num_changed for e in encoded)
    header = DeltaHeader(
        kind="delta",
        run=run,
        from_version=old_version.number,
        to_version=new_version.number,
        parent_root=old_version.root,
        new_root=new_version.root,
        num_changed=num_changed,
        num_elements=num_elements,
        bound_bytes=entropy_bound(num_elements, num_changed, sum((e.value_counts for e in encoded), np.zeros(ESCAPE + 1, np.int64))),
    )
    return safetensors_file.serialize(tensors, _metadata(header, DELTA_FORMAT))


def encode_snapshot(run: str, weights: Weights, version: PolicyVersion) -> bytes:
    """A snapshot file of `weights`."""
    num_elements = sum(t.bits.size for t in weights.values())
    header = DeltaHeader("snapshot", run, -1, version.number, "", version.root, num_elements, num_elements, num_bytes(weights))
    return safetensors_file.serialize(weights, _metadata(header, SNAPSHOT_FORMAT))


def apply_file(data: bytes | memoryview, held: Weights | None, held_root: str) -> tuple[DeltaHeader, Weights]:
    """The weights after applying a weight file to `held` (which has root `held_root`); `held` itself is not changed.

    Raises WrongParent for a delta from other weights, DamagedDelta for a file that contradicts itself, and RootMismatch when the result
    is not what was published. A snapshot needs nothing held.
    """
    metadata, tensors = safetensors_file.deserialize(data)
    header = _header(metadata)
    if header.kind == "snapshot":
        new: Weights = tensors
    else:
        if held is None or header.parent_root != held_root:
            raise WrongParent(header.parent_root, held_root)
        new = _apply_delta(tensors, held)
    found = root_hash(new)
    if found != header.new_root:
        raise RootMismatch(header.new_root, found, f"version {header.to_version} after decoding")
    return header, new


def read_header(data: bytes | memoryview) -> DeltaHeader:
    """The header of a weight file."""
    return _header(safetensors_file.deserialize(data)[0])


def entropy_bound(num_elements: int, num_changed: int, value_counts: NDArray[np.int64]) -> int:
    """Bytes that any lossless code needs if positions and ULP differences were independent and identically distributed.

    num_elements * H(num_changed / num_elements) for the positions plus num_changed * H(value | changed), in bits, rounded up to bytes.
    """
    if not 0 < num_changed <= num_elements:
        return 0
    p = num_changed / num_elements
    position_bits = 0.0 if p == 1 else -num_elements * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
    counts = value_counts[value_counts > 0].astype(np.float64)
    total = counts.sum()
    value_bits = float(-(counts * np.log2(counts / total)).sum()) if total else 0.0
    return math.ceil((position_bits + value_bits) / 8)


def ordinals(bits: NDArray[Any]) -> NDArray[np.int64]:
    """Bit patterns to consecutive integers in the order of the floats they stand for (NaNs at the ends)."""
    sign = np.int64(1) << (bits.dtype.itemsize * 8 - 1)
    wide = bits.astype(np.int64)
    return np.where(wide < sign, wide, -(wide - sign) - 1)


def bits_of(ordinal: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The inverse of `ordinals`."""
    sign = np.int64(1) << (dtype.itemsize * 8 - 1)
    return np.where(ordinal >= 0, ordinal, sign - ordinal - 1).astype(dtype)


def _encode_tensor(name: str, old: Tensor | None, new: Tensor) -> _Encoded:
    no_values = np.zeros(ESCAPE + 1, np.int64)
    if old is None or (old.dtype, old.shape) != (new.dtype, new.shape):
        return _raw(name, new, new.bits.size, no_values)
    changed = np.flatnonzero(old.bits != new.bits)
    if changed.size == 0:
        return _Encoded(_Part(name, new.dtype, list(new.shape), "same", 0, (0, 0, 0, 0)), (b"", b"", b"", b""), no_values)
    zigzag = _zigzag(ordinals(new.bits[changed]) - ordinals(old.bits[changed]))
    symbols = np.minimum(zigzag, ESCAPE).astype(np.uint8)
    counts = np.bincount(symbols, minlength=ESCAPE + 1)
    escapes = zigzag[zigzag >= ESCAPE].astype(f"<u{2 * new.bits.itemsize}").tobytes()
    codec: Codec
    if changed.size * 8 < new.bits.size:
        codec, positions = "gaps", _encode_gaps(changed)
    else:
        codec, positions = "bitmap", np.packbits(old.bits != new.bits).tobytes()
    if len(positions) + symbols.size + len(escapes) >= new.bits.nbytes:
        return _raw(name, new, changed.size, counts)
    streams = (positions, symbols.tobytes(), escapes, b"")
    return _Encoded(_Part(name, new.dtype, list(new.shape), codec, changed.size, _lengths(streams)), streams, counts)


def _raw(name: str, new: Tensor, num_changed: int, counts: NDArray[np.int64]) -> _Encoded:
    streams = (b"", b"", b"", np.ascontiguousarray(new.bits).tobytes())
    return _Encoded(_Part(name, new.dtype, list(new.shape), "raw", num_changed, _lengths(streams)), streams, counts)


def _removed(name: str, old: Tensor) -> _Encoded:
    empty = (b"", b"", b"", b"")
    part = _Part(name, old.dtype, list(old.shape), "removed", 0, (0, 0, 0, 0))
    return _Encoded(part, empty, np.zeros(ESCAPE + 1, np.int64))


def _lengths(streams: tuple[bytes, bytes, bytes, bytes]) -> tuple[int, int, int, int]:
    return (len(streams[0]), len(streams[1]), len(streams[2]), len(streams[3]))


def _apply_delta(tensors: Mapping[str, Tensor], held: Weights) -> Weights:
    if set(tensors) != {"manifest", *STREAMS}:
        raise DamagedDelta(f"streams are {sorted(tensors)}")
    try:
        parts = msgspec.json.decode(_decompress(tensors["manifest"], MAX_MANIFEST_BYTES), type=list[_Part])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedDelta(f"manifest: {error}") from None
    streams = [
        _decompress(tensors[stream], sum(max(0, part.lengths[position]) for part in parts)) for position, stream in enumerate(STREAMS)
    ]
    offsets = [0, 0, 0, 0]
    new: Weights = {}
    for part in parts:
        pieces = []
        for position, length in enumerate(part.lengths):
            begin, offsets[position] = offsets[position], offsets[position] + length
            if length < 0 or offsets[position] > len(streams[position]):
                raise DamagedDelta(f"tensor {part.name!r} reads past the end of stream {STREAMS[position]!r}")
            pieces.append(streams[position][begin : offsets[position]])
        if part.codec != "removed":
            new[part.name] = _decode_tensor(part, pieces, held.get(part.name))
    if any(offset != len(stream) for offset, stream in zip(offsets, streams, strict=True)):
        raise DamagedDelta("a stream is longer than its manifest")
    forgotten = set(held) - {part.name for part in parts}
    if forgotten:
        raise DamagedDelta(f"tensors {sorted(forgotten)[:3]} are neither kept, changed nor removed")
    return new


def _decode_tensor(part: _Part, pieces: list[bytes], held: Tensor | None) -> Tensor:
    dtype = DTYPE_BITS.get(part.dtype)
    if dtype is None:
        raise DamagedDelta(f"tensor {part.name!r} has dtype {part.dtype!r}")
    shape = tuple(part.shape)
    size = math.prod(shape)
    if part.codec == "raw":
        if len(pieces[3]) != size * dtype.itemsize:
            raise DamagedDelta(f"tensor {part.name!r} of shape {shape} has {len(pieces[3])} raw bytes")
        return Tensor(part.dtype, shape, np.frombuffer(pieces[3], dtype))
    if held is None or (held.dtype, held.shape) != (part.dtype, shape):
        raise DamagedDelta(f"tensor {part.name!r} {part.dtype}{list(shape)} is changed in place, but is not held like that")
    if part.codec == "same":
        return held
    changed = _decode_positions(part, pieces[0], size)
    symbols = np.frombuffer(pieces[1], np.uint8).astype(np.int64)
    if len(pieces[2]) % (2 * dtype.itemsize):
        raise DamagedDelta(f"tensor {part.name!r} has {len(pieces[2])} bytes of escapes")
    escapes = np.frombuffer(pieces[2], f"<u{2 * dtype.itemsize}").astype(np.int64)
    escaped = symbols == ESCAPE
    if changed.size != part.num_changed or symbols.size != changed.size or int(escaped.sum()) != escapes.size:
        raise DamagedDelta(f"tensor {part.name!r}: {changed.size} positions, {symbols.size} values, {part.num_changed} announced")
    symbols[escaped] = escapes
    bits = held.bits.copy()
    bits[changed] = bits_of(ordinals(bits[changed]) + _unzigzag(symbols), dtype)
    return Tensor(part.dtype, shape, bits)


def _decode_positions(part: _Part, data: bytes, size: int) -> NDArray[np.int64]:
    if part.codec == "bitmap":
        if len(data) != (size + 7) // 8:
            raise DamagedDelta(f"tensor {part.name!r}: bitmap of {len(data)} bytes for {size} elements")
        return np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), count=size))
    positions = _decode_gaps(data)
    if positions.size and positions[-1] >= size:
        raise DamagedDelta(f"tensor {part.name!r}: position {positions[-1]} of {size} elements")
    return positions


def _encode_gaps(positions: NDArray[np.int64]) -> bytes:
    """Sorted positions as gaps; a gap g is g // 255 bytes of 255 followed by the byte g % 255."""
    gaps = np.diff(positions, prepend=-1) - 1
    whole, rest = np.divmod(gaps, ESCAPE)
    ends = np.cumsum(whole + 1)
    out = np.full(int(ends[-1]), ESCAPE, np.uint8)
    out[ends - 1] = rest
    return out.tobytes()


def _decode_gaps(data: bytes) -> NDArray[np.int64]:
    symbols = np.frombuffer(data, np.uint8)
    if symbols.size and symbols[-1] == ESCAPE:
        raise DamagedDelta("the gap stream ends inside a gap")
    (ends,) = np.nonzero(symbols != ESCAPE)
    return (np.cumsum(symbols, dtype=np.int64)[ends] + np.arange(ends.size)).astype(np.int64)


def _zigzag(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return (values << 1) ^ (values >> 63)


def _unzigzag(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return (values >> 1) ^ -(values & 1)


def _stream(data: bytes) -> Tensor:
    return Tensor("U8", (len(data),), np.frombuffer(data, np.uint8))


def _decompress(tensor: Tensor, limit: int) -> bytes:
    """A stream's bytes. Memory is taken as they come, so a frame that claims more than it holds costs nothing."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(tensor.bits.data) as reader:
            data = reader.read(limit + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise DamagedDelta(f"a stream does not decompress: {error}") from None
    if len(data) > limit:
        raise DamagedDelta(f"a stream holds more than the {limit} bytes of its manifest")
    return data


def _metadata(header: DeltaHeader, file_format: str) -> dict[str, str]:
    return {"format": file_format} | {key: str(value) for key, value in msgspec.structs.asdict(header).items()}


def _header(metadata: dict[str, str]) -> DeltaHeader:
    fields = dict(metadata)
    file_format = fields.pop("format", "none")
    if file_format not in (DELTA_FORMAT, SNAPSHOT_FORMAT):
        raise DamagedDelta(f"format {file_format!r}, known are {DELTA_FORMAT!r} and {SNAPSHOT_FORMAT!r}")
    try:
        return msgspec.convert(fields, DeltaHeader, strict=False)
    except msgspec.ValidationError as error:
        raise DamagedDelta(f"metadata: {error}") from None
