"""Weight files: deltas between two published versions, and full snapshots. Exact for every bit pattern.

A delta holds, for each changed element, how far its bit pattern moved in units in the last place (protocol.ulps). Such differences are small,
add exactly over versions (protocol.fold) and can be undone. A tensor that is new, or has another shape or dtype, is there whole.

File layout (safetensors; all tensors U8):

    __metadata__  format, kind, run, from_version, to_version, parent_root, new_root, num_changed, num_elements, bound_bytes
    manifest      zstd of a JSON list of shards: [[tensors, sizes], …]; a tensor is [name, dtype, shape, kind, chunks], see TensorEntry
    positions, packed, ulps, escapes, planes
                  the streams of protocol.chunks. Each is the shards' parts one behind the other, a part of `sizes` bytes being all chunks
                  of the shard, compressed: a byte that says how (zstd, or the entropy coder of protocol.rans), and the code. `packed` is
                  not compressed

A shard is a set of whole tensors, coded by one rank; shards can be coded and decoded beside each other.
A snapshot is an ordinary safetensors file of the bf16 tensors under their Hugging Face names, with the same metadata.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final, Literal

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from protocol import rans, safetensors_file
from protocol.chunks import CHUNK_ELEMENTS, STREAMS, ChunkEntry, decode_chunk, encode_chunk
from protocol.errors import DamagedDelta, RootMismatch, WrongParent
from protocol.positions import entropy_bits
from protocol.ulps import Bits, Changes, add_changes, find_changes
from protocol.weights import DTYPE_BITS, PolicyVersion, Tensor, Weights, num_bytes, root_hash

DELTA_FORMAT: Final = "slipstream-delta/2"
SNAPSHOT_FORMAT: Final = "slipstream-snapshot/1"
MAX_MANIFEST_BYTES: Final = 64 << 20
SMALL_MANIFEST_BYTES: Final = 1 << 20
MANIFEST_RATIO: Final = 256
"""A manifest has up to SMALL_MANIFEST_BYTES and this many times its compressed size: names and chunks compress well, but not without end."""
SHARD_BYTES: Final = 256 << 20
"""Tensors are put into one shard up to this many bytes."""
LISTED_SHARE: Final = 4
"""Positions are listed while no chunk has more than one element in this many changed."""
NEAR: Final = 128
_ZSTD: Final = b"z"
_RANS: Final = b"r"
_WORTH_IT: Final = 0.99
"""The entropy coder is used where it makes less than this share of what zstd makes: it is several times slower."""
Streams = tuple[Bits, Bits, Bits, Bits, Bits]


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


class TensorEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor in the manifest. `changed` has its chunks; `new` has its bits in byte planes, in one chunk of codec planes."""

    name: str
    dtype: str
    shape: list[int]
    kind: Literal["same", "changed", "new", "removed"]
    chunks: list[ChunkEntry] = []


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """Some tensors, coded: what a rank contributes to a file. `streams` are compressed; `differences` counts each value."""

    tensors: list[TensorEntry]
    streams: list[bytes]
    num_elements: int
    num_changed: int
    differences: dict[int, int]


class _ShardEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    tensors: list[TensorEntry]
    sizes: tuple[int, int, int, int, int]


# --- writing


class ShardWriter:
    """Puts tensors into a shard one by one."""

    def __init__(self) -> None:
        self._tensors: list[TensorEntry] = []
        self._streams: list[list[bytes]] = [[] for _ in STREAMS]
        self._num_elements = self._num_changed = 0
        self._near = np.zeros(2 * NEAR + 1, np.int64)
        """How often each difference from -NEAR to NEAR occurs."""
        self._far: Counter[int] = Counter()

    def change(self, name: str, old: Tensor, new: Tensor, *, classes: bool = False) -> None:
        """A tensor of the same dtype and shape. With `classes` it can only be decoded by whoever holds the old bits, and not be folded."""
        parts = zip(_chunks(old.bits), _chunks(new.bits), strict=True)
        coded = ((find_changes(before, after), before) for before, after in parts)
        self.put_changes(name, old.dtype, old.shape, ((c, (before, old.dtype) if classes else None) for c, before in coded))

    def put_changes(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[tuple[Changes, tuple[Bits, str] | None]]) -> None:
        """A tensor's changes, chunk by chunk; with the old bits, positions are coded by their classes."""
        width = 8 * DTYPE_BITS[dtype].itemsize
        size = math.prod(shape)
        entries = []
        for begin, (changes, old) in zip(range(0, size, CHUNK_ELEMENTS), chunks, strict=True):
            coded = encode_chunk(changes, min(CHUNK_ELEMENTS, size - begin), width, old)
            entries.append(coded.entry)
            for stream, data in zip(self._streams, coded.streams, strict=True):
                stream.append(data)
            self._num_changed += changes.size
            self._count(changes.differences)
        self._num_elements += size
        is_same = all(entry.codec == "same" for entry in entries)
        self._tensors.append(TensorEntry(name, dtype, list(shape), "same" if is_same else "changed", [] if is_same else entries))

    def keep(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """A tensor that does not change."""
        self._tensors.append(TensorEntry(name, dtype, list(shape), "same"))
        self._num_elements += math.prod(shape)

    def put_new(self, name: str, tensor: Tensor) -> None:
        """A tensor that the parent does not have like this, whole."""
        data = np.ascontiguousarray(tensor.bits.view(np.uint8).reshape(-1, tensor.bits.itemsize).T).tobytes()
        self._streams[STREAMS.index("planes")].append(data)
        size = tensor.bits.size
        entry = ChunkEntry("planes", size, (0, 0, 0, 0, len(data)))
        self._tensors.append(TensorEntry(name, tensor.dtype, list(tensor.shape), "new", [entry]))
        self._num_elements += size
        self._num_changed += size

    def remove(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """A tensor that the child does not have."""
        self._tensors.append(TensorEntry(name, dtype, list(shape), "removed"))

    def _count(self, differences: NDArray[np.int64]) -> None:
        """For the entropy bound."""
        near = np.abs(differences) <= NEAR
        self._near += np.bincount(differences[near] + NEAR, minlength=self._near.size)
        if not near.all():
            values, counts = np.unique(differences[~near], return_counts=True)
            self._far.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def finish(self) -> Shard:
        """The shard."""
        joined = [b"".join(parts) for parts in self._streams]
        streams = [data if name == "packed" else _compress(data) for name, data in zip(STREAMS, joined, strict=True)]
        differences = {value - NEAR: int(self._near[value]) for value in np.flatnonzero(self._near).tolist()} | dict(self._far)
        return Shard(self._tensors, streams, self._num_elements, self._num_changed, differences)


def encode_shard(names: Iterable[str], old: Mapping[str, Tensor], new: Mapping[str, Tensor], *, classes: bool = False) -> Shard:
    """What happens to the tensors `names` between `old` and `new`."""
    writer = ShardWriter()
    for name in names:
        before, after = old.get(name), new.get(name)
        if after is None:
            assert before is not None, f"tensor {name!r} is neither in the old nor in the new weights"
            writer.remove(name, before.dtype, before.shape)
        elif before is None or (before.dtype, before.shape) != (after.dtype, after.shape):
            writer.put_new(name, after)
        else:
            writer.change(name, before, after, classes=classes)
    return writer.finish()


def split_names(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> list[list[str]]:
    """Names in order, in lists of up to `limit` bytes together, or of one."""
    lists: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not lists or size > room:
            lists.append([])
            room = limit
        lists[-1].append(name)
        room -= size
    return lists


def assemble(run: str, old_version: PolicyVersion, new_version: PolicyVersion, shards: Iterable[Shard]) -> tuple[bytes, DeltaHeader]:
    """The delta file made of `shards`, and its header."""
    shards = list(shards)
    manifest = [_ShardEntry(shard.tensors, _five(len(stream) for stream in shard.streams)) for shard in shards]
    tensors = {"manifest": _stream(zstandard.ZstdCompressor(level=3).compress(msgspec.json.encode(manifest)))}
    for number, name in enumerate(STREAMS):
        tensors[name] = _stream(b"".join(shard.streams[number] for shard in shards))
    differences: Counter[int] = Counter()
    for shard in shards:
        differences.update(shard.differences)
    num_elements, num_changed = sum(s.num_elements for s in shards), sum(s.num_changed for s in shards)
    whole = sum(_new_bytes(entry) for shard in shards for entry in shard.tensors)
    header = DeltaHeader(
        kind="delta",
        run=run,
        from_version=old_version.number,
        to_version=new_version.number,
        parent_root=old_version.root,
        new_root=new_version.root,
        num_changed=num_changed,
        num_elements=num_elements,
        bound_bytes=whole + entropy_bound(num_elements, differences),
    )
    return safetensors_file.serialize(tensors, _metadata(header, DELTA_FORMAT)), header


def encode_delta(
    run: str, old: Weights, new: Weights, old_version: PolicyVersion, new_version: PolicyVersion, *, classes: bool = False
) -> tuple[bytes, DeltaHeader]:
    """The delta file that turns `old` (of `old_version`) into `new` (of `new_version`), and its header."""
    sizes = {name: tensor.bits.nbytes for name, tensor in (old | new).items()}
    return assemble(run, old_version, new_version, (encode_shard(names, old, new, classes=classes) for names in split_names(sizes)))


def encode_snapshot(run: str, weights: Weights, version: PolicyVersion) -> bytes:
    """A snapshot file of `weights`."""
    num_elements = sum(t.bits.size for t in weights.values())
    header = DeltaHeader("snapshot", run, -1, version.number, "", version.root, num_elements, num_elements, num_bytes(weights))
    return safetensors_file.serialize(weights, _metadata(header, SNAPSHOT_FORMAT))


def entropy_bound(num_elements: int, differences: Mapping[int, int]) -> int:
    """Bytes that any lossless code needs if positions and ULP differences were independent and identically distributed.

    num_elements * H(num_changed / num_elements) for the positions plus num_changed * H(value | changed), in bits, rounded up to bytes.
    `differences` counts how often each value occurs.
    """
    num_changed = sum(differences.values())
    if not 0 < num_changed <= num_elements:
        return 0
    p = num_changed / num_elements
    position_bits = 0.0 if p == 1 else -num_elements * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
    counts = np.array(list(differences.values()), np.float64)
    value_bits = float(-(counts * np.log2(counts / num_changed)).sum())
    return math.ceil((position_bits + value_bits) / 8)


# --- reading


class Delta:
    """An opened delta file. Nothing is decompressed before it is asked for."""

    def __init__(self, data: bytes | memoryview) -> None:
        """Raises DamagedDelta for anything that is not a delta."""
        metadata, self._tensors = safetensors_file.deserialize(data)
        self.header = _header(metadata)
        if self.header.kind != "delta":
            raise DamagedDelta("this is a snapshot, a delta was expected")
        self.shards = self._read_manifest()
        names = [entry.name for shard in self.shards for entry in shard.tensors]
        if len(set(names)) != len(names):
            raise DamagedDelta("a tensor is there twice")

    @property
    def tensors(self) -> Iterator[TensorEntry]:
        """All entries."""
        return (entry for shard in self.shards for entry in shard.tensors)

    @property
    def keeps_layout(self) -> bool:
        """Whether parent and child have the same tensors with the same dtypes and shapes."""
        return all(entry.kind in ("same", "changed") for entry in self.tensors)

    def streams(self, number: int) -> dict[str, list[Streams]]:
        """The streams of each chunk of shard `number`, by tensor. Memory is taken as they are decompressed."""
        shard = self.shards[number]
        whole = [self._decompress(number, index, stream) for index, stream in enumerate(STREAMS)]
        offsets = [0] * len(STREAMS)
        found: dict[str, list[Streams]] = {}
        for entry in shard.tensors:
            found[entry.name] = []
            for chunk in entry.chunks:
                parts = []
                for index, length in enumerate(chunk.lengths):
                    parts.append(whole[index][offsets[index] : offsets[index] + length])
                    offsets[index] += length
                found[entry.name].append((parts[0], parts[1], parts[2], parts[3], parts[4]))
        return found

    def _read_manifest(self) -> list[_ShardEntry]:
        if set(self._tensors) != {"manifest", *STREAMS}:
            raise DamagedDelta(f"streams are {sorted(self._tensors)}")
        try:
            packed = self._tensors["manifest"].bits
            limit = min(MAX_MANIFEST_BYTES, SMALL_MANIFEST_BYTES + MANIFEST_RATIO * packed.size)
            shards = msgspec.json.decode(_decompress(packed, limit, exact=False), type=list[_ShardEntry])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DamagedDelta(f"manifest: {error}") from None
        for index, name in enumerate(STREAMS):
            if any(shard.sizes[index] < 0 for shard in shards) or sum(s.sizes[index] for s in shards) != self._tensors[name].bits.size:
                raise DamagedDelta(f"the shards do not fill stream {name!r}")
        for shard in shards:
            for entry in shard.tensors:
                _check_entry(entry)
        self._begins = [list(accumulate((shard.sizes[index] for shard in shards), initial=0)) for index in range(len(STREAMS))]
        return shards

    def _decompress(self, number: int, index: int, name: str) -> Bits:
        begin = self._begins[index][number]
        data = self._tensors[name].bits[begin : begin + self.shards[number].sizes[index]]
        length = sum(chunk.lengths[index] for entry in self.shards[number].tensors for chunk in entry.chunks)
        if name == "packed":
            if data.size != length:
                raise DamagedDelta(f"stream {name!r} has {data.size} bytes, its manifest {length}")
            return data
        return _decompress_part(data, length)


def apply_in_place(delta: Delta, weights: Weights) -> dict[str, Bits | None]:
    """Move `weights`, whose bits can be written, from the delta's parent to its child.

    Returns the tensors that changed, each with the flat positions that did, or None where they are so many that a list would not pay.
    The root is not looked at. Raises DamagedDelta; the weights are then somewhere between parent and child.
    """
    if not delta.keeps_layout:
        raise DamagedDelta("the delta adds or removes tensors, which cannot be done in place")
    _check_held(delta, weights)
    changed: dict[str, Bits | None] = {}
    for number in range(len(delta.shards)):
        for entry, chunks in _changes_of(delta, number, weights):
            positions: list[Bits] | None = []
            for index, (bits, changes) in enumerate(chunks):
                add_changes(bits, changes)
                if positions is not None:
                    positions.append(changes.positions.astype(np.int64) + index * CHUNK_ELEMENTS)
                if changes.size * LISTED_SHARE > bits.size:
                    positions = None
            changed[entry.name] = np.concatenate(positions) if positions is not None else None
    return changed


def apply_file(data: bytes | memoryview, held: Weights | None, held_root: str) -> tuple[DeltaHeader, Weights]:
    """The weights after applying a weight file to `held` (which has root `held_root`); `held` itself is not changed.

    Raises WrongParent for a delta from other weights, DamagedDelta for a file that contradicts itself, and RootMismatch when the result
    is not what was published. A snapshot needs nothing held.
    """
    header = read_header(data)
    if header.kind == "snapshot":
        new: Weights = safetensors_file.deserialize(data)[1]
    else:
        if held is None or header.parent_root != held_root:
            raise WrongParent(header.parent_root, held_root)
        new = _apply_copying(Delta(data), held)
    found = root_hash(new)
    if found != header.new_root:
        raise RootMismatch(header.new_root, found, f"version {header.to_version} after decoding")
    return header, new


def read_header(data: bytes | memoryview) -> DeltaHeader:
    """The header of a weight file."""
    return _header(safetensors_file.deserialize(data)[0])


def new_tensor(entry: TensorEntry, streams: list[Streams]) -> Tensor:
    """A tensor that a delta brings whole. Raises DamagedDelta."""
    dtype, shape = DTYPE_BITS[entry.dtype], tuple(entry.shape)
    planes = streams[0][-1] if len(streams) == 1 else np.empty(0, np.uint8)
    if planes.size != math.prod(shape) * dtype.itemsize:
        raise DamagedDelta(f"tensor {entry.name!r} of shape {shape} has {planes.size} bytes")
    return Tensor(entry.dtype, shape, np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).view(dtype).reshape(-1).copy())


def chunk_changes(entry: TensorEntry, streams: list[Streams], number: int, old: Bits | None) -> Changes:
    """The changes of one chunk of a changed tensor. Raises DamagedDelta."""
    size = min(CHUNK_ELEMENTS, math.prod(entry.shape) - number * CHUNK_ELEMENTS)
    width = 8 * DTYPE_BITS[entry.dtype].itemsize
    try:
        return decode_chunk(entry.chunks[number], streams[number], size, width, None if old is None else (old, entry.dtype))
    except ValueError as error:
        raise DamagedDelta(f"tensor {entry.name!r}, chunk {number}: {error}") from None


def _changes_of(delta: Delta, number: int, weights: Weights) -> Iterator[tuple[TensorEntry, Iterator[tuple[Bits, Changes]]]]:
    """For each changed tensor of a shard, each chunk of its bits and how that changes; to be used up in order."""
    streams = delta.streams(number)
    for entry in delta.shards[number].tensors:
        if entry.kind == "changed":
            yield entry, _decoded(entry, streams[entry.name], _chunks(weights[entry.name].bits))


def _decoded(entry: TensorEntry, streams: list[Streams], chunks: list[Bits]) -> Iterator[tuple[Bits, Changes]]:
    for number, bits in enumerate(chunks):
        yield bits, chunk_changes(entry, streams, number, bits)


def _check_held(delta: Delta, held: Weights) -> None:
    """Raise DamagedDelta unless the delta is about the tensors held. Before any stream is decompressed, so that their size is a bound of it."""
    forgotten = set(held) - {entry.name for entry in delta.tensors}
    if forgotten:
        raise DamagedDelta(f"tensors {sorted(forgotten)[:3]} are neither kept, changed nor removed")
    for entry in delta.tensors:
        tensor = held.get(entry.name)
        is_alike = tensor is not None and (tensor.dtype, list(tensor.shape)) == (entry.dtype, entry.shape)
        if entry.kind in ("same", "changed") and not is_alike:
            raise DamagedDelta(f"tensor {entry.name!r} {entry.dtype}{entry.shape} is changed in place, but is not held like that")


def _apply_copying(delta: Delta, held: Weights) -> Weights:
    _check_held(delta, held)
    new: Weights = {}
    for number, shard in enumerate(delta.shards):
        for entry in shard.tensors:
            if entry.kind == "new":
                new[entry.name] = new_tensor(entry, delta.streams(number)[entry.name])
            elif entry.kind == "same":
                new[entry.name] = held[entry.name]
            elif entry.kind == "changed":
                tensor = held[entry.name]
                new[entry.name] = Tensor(tensor.dtype, tensor.shape, tensor.bits.copy())
        for _, chunks in _changes_of(delta, number, new):
            for bits, changes in chunks:
                add_changes(bits, changes)
    return new


def _chunks(bits: Bits) -> list[Bits]:
    return [bits[begin : begin + CHUNK_ELEMENTS] for begin in range(0, bits.size, CHUNK_ELEMENTS)]


def _new_bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * DTYPE_BITS[entry.dtype].itemsize if entry.kind == "new" else 0


def _check_entry(entry: TensorEntry) -> None:
    if entry.dtype not in DTYPE_BITS:
        raise DamagedDelta(f"tensor {entry.name!r} has dtype {entry.dtype!r}")
    sizes, lengths = entry.shape, [length for chunk in entry.chunks for length in chunk.lengths]
    if not all(0 <= size <= safetensors_file.MAX_SIZE for size in sizes) or min(lengths, default=0) < 0:
        raise DamagedDelta(f"tensor {entry.name!r} has an impossible size")
    if len(entry.shape) > safetensors_file.MAX_DIMENSIONS:
        raise DamagedDelta(f"tensor {entry.name!r} has {len(entry.shape)} dimensions")
    elements, width = math.prod(entry.shape), DTYPE_BITS[entry.dtype].itemsize
    if entry.kind == "changed" and not elements:
        raise DamagedDelta(f"tensor {entry.name!r} has nothing that could change")
    expected = {"changed": -(-elements // CHUNK_ELEMENTS), "new": 1}.get(entry.kind, 0)
    if len(entry.chunks) != expected:
        raise DamagedDelta(f"tensor {entry.name!r} of shape {entry.shape} has {len(entry.chunks)} chunks, not {expected}")
    for number, chunk in enumerate(entry.chunks):
        size = elements if entry.kind == "new" else min(CHUNK_ELEMENTS, elements - number * CHUNK_ELEMENTS)
        # Nothing that an encoder writes is longer; so no small file can make its reader take much memory.
        if max(chunk.lengths) > size * max(4, width) + 64:
            raise DamagedDelta(f"tensor {entry.name!r} has a chunk of {chunk.lengths} bytes for {size} elements")


def _five(lengths: Iterable[int]) -> tuple[int, int, int, int, int]:
    first, second, third, fourth, fifth = lengths
    return first, second, third, fourth, fifth


def _stream(data: bytes) -> Tensor:
    return Tensor("U8", (len(data),), np.frombuffer(data, np.uint8))


def _compress(data: bytes) -> bytes:
    """zstd where there are repetitions, the entropy coder where there is nothing but frequencies; nothing for nothing."""
    if not data:
        return b""
    zstd = zstandard.ZstdCompressor(level=1)
    symbols = np.frombuffer(data, np.uint8)
    middle = max(0, symbols.size - rans.BLOCK_SYMBOLS) // 2
    sample = symbols[middle : middle + rans.BLOCK_SYMBOLS]
    if entropy_bits(np.bincount(sample, minlength=256)) / 8 >= _WORTH_IT * len(zstd.compress(sample.data)):
        return _ZSTD + zstd.compress(data)
    coded = rans.encode(symbols)
    if symbols.size > rans.BLOCK_SYMBOLS:
        return _RANS + coded
    packed = zstd.compress(data)  # of so few, the coder's table of frequencies is a part that counts
    return _RANS + coded if len(coded) < len(packed) else _ZSTD + packed


def _decompress_part(data: Bits, length: int) -> Bits:
    if not data.size and not length:
        return np.empty(0, np.uint8)
    kind, code = data[:1].tobytes(), data[1:]
    if kind == _ZSTD:
        return np.frombuffer(_decompress(code, length, exact=True), np.uint8)
    if kind != _RANS:
        raise DamagedDelta(f"a stream is compressed in an unknown way ({kind!r})")
    try:
        return rans.decode(code, length)
    except ValueError as error:
        raise DamagedDelta(f"a stream does not decompress: {error}") from None


def _decompress(frame: Bits, limit: int, *, exact: bool) -> bytes:
    """A stream's bytes. Memory is taken as they come, so a frame that claims more than it holds costs nothing."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(np.ascontiguousarray(frame).data) as reader:
            data = reader.read(limit + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise DamagedDelta(f"a stream does not decompress: {error}") from None
    if len(data) > limit or (exact and len(data) != limit):
        raise DamagedDelta(f"a stream holds {len(data)} bytes or more, its manifest says {limit}")
    return data


def _metadata(header: DeltaHeader, file_format: str) -> dict[str, str]:
    return {"format": file_format} | {key: str(value) for key, value in msgspec.structs.asdict(header).items()}


def _header(metadata: dict[str, Any]) -> DeltaHeader:
    fields = dict(metadata)
    file_format = fields.pop("format", "none")
    if file_format not in (DELTA_FORMAT, SNAPSHOT_FORMAT):
        raise DamagedDelta(f"format {file_format!r}, known are {DELTA_FORMAT!r} and {SNAPSHOT_FORMAT!r}")
    try:
        return msgspec.convert(fields, DeltaHeader, strict=False)
    except msgspec.ValidationError as error:
        raise DamagedDelta(f"metadata: {error}") from None
