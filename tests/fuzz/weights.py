"""Targets: weight files. Safetensors, deltas (opened, applied in place and copying, folded), and the coders beneath, where loops are compiled.

What is held lies between guard words, which show a write beyond an end; with NUMBA_BOUNDSCHECK=1 a read beyond one raises IndexError.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import zstandard

from protocol import rans, safetensors_file
from protocol.chunks import STREAMS, ChunkEntry, decode_chunk, encode_chunk
from protocol.delta import Delta, apply_file, apply_in_place, encode_delta, encode_snapshot, read_header
from protocol.errors import DamagedDelta, WeightsError
from protocol.fold import Leg, fold
from protocol.ulps import Changes, add_changes, find_changes
from protocol.weights import DTYPE_BITS, PolicyVersion, Tensor, Weights, root_hash
from tests.fuzz.fuzzing import Target
from tests.fuzz.mutate import INTEGERS, damage_bytes, damage_json, damage_tree, strange_json

GUARD: Final = 16
_GUARD_BYTE: Final = 0xA5
CODECS: Final = ["same", "gaps", "rice", "bitmap", "classes", "dense", "planes", "zip"]


class Example(NamedTuple):
    """A delta and the weights it leads from and to."""

    data: bytes
    old: Weights
    new: Weights


@functools.cache
def examples() -> list[Example]:
    """Deltas that use every codec, kind and stream."""
    rng = np.random.default_rng(1)
    sizes = {"few": 700, "half": 64, "most": 64, "every": 16, "kept": 5, "wide": 90}
    dtypes = {"most": "F16", "every": "F32", "wide": "F32"}
    old: Weights = {}
    for name, size in sizes.items():
        dtype = dtypes.get(name, "BF16")
        bits = (0x3C00 + rng.integers(0, 700, size)).astype(DTYPE_BITS[dtype])
        old[name] = Tensor(dtype, (size // 4, 4) if name == "few" else (size,), bits)
    new = {name: tensor._replace(bits=tensor.bits.copy()) for name, tensor in old.items()}
    new["few"].bits[[3, 4, 300, 699]] += np.array([1, 2, 0x4000, 0xFFFF], "<u2")
    new["half"].bits[::2] += 1
    new["most"].bits[rng.random(64) < 0.8] -= 1
    new["every"].bits[:] = rng.integers(0, 1 << 32, 16)
    new["wide"].bits[rng.random(90) < 0.3] += 3
    gone, added = Tensor("BF16", (5,), np.arange(5, dtype="<u2")), Tensor("F32", (3,), np.arange(3, dtype="<u4"))
    old_other, new_other = old | {"gone": gone, "reshaped": gone}, new | {"reshaped": gone._replace(shape=(5, 1)), "added": added}
    return [
        Example(_encoded(old, new), old, new),
        Example(_encoded(old, new, classes=True), old, new),
        Example(_encoded(old_other, new_other), old_other, new_other),
        Example(_encoded(new, old), new, old),
    ]


def _encoded(old: Weights, new: Weights, *, classes: bool = False) -> bytes:
    versions = PolicyVersion(3, 27, 0, root_hash(old)), PolicyVersion(4, 28, 0, root_hash(new))
    return encode_delta("run", old, new, *versions, classes=classes)[0]


def guarded(weights: Weights) -> tuple[Weights, list[np.ndarray[Any, Any]]]:
    """A copy that can be written, each tensor between guards; and the rooms it lies in."""
    rooms, copied = [], {}
    for name, tensor in weights.items():
        room = np.full(tensor.bits.nbytes + 2 * GUARD, _GUARD_BYTE, np.uint8)
        room[GUARD:-GUARD] = tensor.bits.view(np.uint8)
        rooms.append(room)
        copied[name] = tensor._replace(bits=room[GUARD:-GUARD].view(tensor.bits.dtype))
    return copied, rooms


def _deltas() -> Sequence[bytes]:
    return [example.data for example in examples()] + [
        encode_snapshot("run", examples()[0].new, PolicyVersion(4, 28, 0, root_hash(examples()[0].new)))
    ]


def _check_delta(data: bytes) -> None:
    """Every way to use it, on what it says it starts from and on other weights; a file that passes the check of the root is right."""
    header = read_header(data)
    refused: WeightsError | None = None
    is_good = False
    matching = [example for example in examples() if header.parent_root == root_of(example)]
    for example in [*matching[:1], examples()[data[-1] % len(examples())]]:
        moved, rooms = guarded(example.old)
        try:
            apply_in_place(Delta(data), moved)
        except DamagedDelta as error:
            refused = error
        for room in rooms:
            assert (room[:GUARD] == _GUARD_BYTE).all() and (room[-GUARD:] == _GUARD_BYTE).all(), "written beyond the end of a tensor"
        try:
            _, found = apply_file(data, example.old, header.parent_root)
        except WeightsError as error:
            refused = error
        else:
            assert root_hash(found) == header.new_root
            is_good = True
    if refused is not None and not is_good:
        raise refused


@functools.cache
def _roots() -> dict[int, str]:
    return {id(example): root_hash(example.old) for example in examples()}


def root_of(example: Example) -> str:
    """The root of what an example leads from."""
    return _roots()[id(example)]


def _damage_delta(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(rng, seeds)
    metadata, tensors = safetensors_file.deserialize(rng.choice(seeds[:-1]))
    parts = {name: tensor.bits.tobytes() for name, tensor in tensors.items()}
    manifest = msgspec.json.decode(zstandard.ZstdDecompressor().decompress(parts["manifest"]))
    what = rng.randrange(10)
    if what < 5:
        manifest = damage_tree(rng, manifest, _strange_entry)
    if what > 3:
        _damage_stream(rng, parts, manifest)
    if rng.random() < 0.1:
        metadata = damage_tree(rng, metadata, lambda r, v: r.choice(["", "-1", "9" * 30, "9" * 5000, "snapshot", f"{v}0"]))
        metadata = {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
    text = msgspec.json.encode(manifest)
    parts["manifest"] = _bomb() if rng.random() < 0.001 else zstandard.ZstdCompressor(level=1).compress(text)
    whole = {name: Tensor("U8", (len(part),), np.frombuffer(part, np.uint8)) for name, part in parts.items()}
    return safetensors_file.serialize(whole, metadata)


def _strange_entry(rng: random.Random, value: Any) -> Any:
    if isinstance(value, str):
        return rng.choice([*CODECS, "changed", "new", "removed", *DTYPE_BITS, "U8", "few", "every", "kept", ""])
    if isinstance(value, int) and rng.random() < 0.8:
        return rng.choice([*INTEGERS, value + rng.choice([-2, -1, 1, 2]), 16, 23, 48])
    return strange_json(rng, value)


def _damage_stream(rng: random.Random, parts: dict[str, bytes], manifest: Any) -> None:
    """Other contents in one stream: the compressor's own checks do not help against it. Of one shard, its size is made to fit."""
    number = rng.randrange(len(STREAMS))
    name = STREAMS[number]
    part = parts[name]
    if name == "packed":
        part = damage_bytes(rng, [part])
    elif part[:1] == b"z" and rng.random() < 0.8:
        content = bytearray(zstandard.ZstdDecompressor().decompress(part[1:]))
        for _ in range(rng.choice([1, 2, 8])):
            if content:
                content[rng.randrange(len(content))] = rng.choice([0, 1, 254, 255, rng.randrange(256)])
        coded = rng.random() < 0.5 and bytes(content)
        part = (
            b"r" + rans.encode(np.frombuffer(coded, np.uint8))
            if coded
            else b"z" + zstandard.ZstdCompressor(level=1).compress(bytes(content))
        )
    else:
        part = damage_bytes(rng, [part, b"z" + zstandard.ZstdCompressor().compress(bytes(1 << 20))])
    parts[name] = part
    with contextlib.suppress(TypeError, IndexError, KeyError):  # the manifest may have lost that place
        manifest[0][1][number] = len(part)


@functools.cache
def _bomb() -> bytes:
    """A manifest of a few kilobytes that is as long as may be when it is decompressed: one tensor of millions of chunks."""
    chunks = b",".join([b'["same",0,[0,0,0,0,0]]'] * 2_700_000)
    return zstandard.ZstdCompressor(level=3).compress(b'[[[["few","BF16",[11324620800000],"changed",[' + chunks + b"]]],[0,0,0,0,0]]]")


def _check_fold(data: bytes) -> None:
    """Folded with itself walked back, with a good delta before it, and alone, both ways."""
    good = examples()[3].data
    refused: WeightsError | None = None
    for legs in ([Leg(data)], [Leg(data, True)], [Leg(good), Leg(data)], [Leg(data), Leg(data, True)]):
        try:
            folded, _ = fold(legs)
        except WeightsError as error:
            refused = error
        else:
            Delta(folded)
    if refused is not None:
        raise refused


def _damage_safetensors(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.4:
        return damage_bytes(rng, seeds)
    data = rng.choice(seeds)
    length = int.from_bytes(data[:8], "little")
    header = damage_json(rng, [data[8 : 8 + length]])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _check_safetensors(data: bytes) -> None:
    _, tensors = safetensors_file.deserialize(data)
    assert sum(tensor.bits.nbytes for tensor in tensors.values()) <= len(data)
    root_hash(tensors)
    again = safetensors_file.serialize(tensors, {})
    assert root_hash(safetensors_file.deserialize(again)[1]) == root_hash(tensors)


# --- below the manifest: a chunk's entry and its streams, and the entropy coder


class _Chunk(msgspec.Struct, array_like=True):
    entry: ChunkEntry
    streams: tuple[bytes, bytes, bytes, bytes, bytes]
    num_elements: int
    dtype: str


def _chunks() -> Sequence[bytes]:
    rng, found = np.random.default_rng(5), []
    for dtype, classes in (("BF16", False), ("BF16", True), ("F16", True), ("F32", False), ("F32", True)):
        for share in (0.01, 0.1, 0.5, 1.0):
            bits = _held(dtype)
            moved = np.where(rng.random(bits.size) < share, bits + rng.choice(np.array([1, 2, 300], bits.dtype), bits.size), bits).astype(
                bits.dtype
            )
            coded = encode_chunk(find_changes(bits, moved), bits.size, 8 * bits.itemsize, (bits, dtype) if classes else None)
            found.append(msgspec.msgpack.encode(_Chunk(coded.entry, coded.streams, bits.size, dtype)))
    return found


@functools.cache
def _held(dtype: str) -> Any:
    return (0x3C00 + np.random.default_rng(6).integers(0, 2000, 333)).astype(DTYPE_BITS[dtype])


def _check_chunk(data: bytes) -> None:
    try:
        chunk = msgspec.msgpack.decode(data, type=_Chunk)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return  # damage that hit what only carries the case
    held = _held(chunk.dtype if chunk.dtype in DTYPE_BITS else "F32")
    dtype = chunk.dtype if chunk.dtype in DTYPE_BITS else "F32"
    streams = [np.frombuffer(stream, np.uint8) for stream in chunk.streams]
    moved, rooms = guarded({"w": Tensor(dtype, held.shape, held)})
    try:
        for old in (None, (held, dtype)):
            changes = decode_chunk(chunk.entry, tuple(streams), held.size, 8 * held.itemsize, old)  # type: ignore[arg-type]
            _assert_possible(changes, held.size)
            add_changes(moved["w"].bits, changes)
    finally:
        for room in rooms:
            assert (room[:GUARD] == _GUARD_BYTE).all() and (room[-GUARD:] == _GUARD_BYTE).all(), "written beyond the end of a tensor"


def _assert_possible(changes: Changes, size: int) -> None:
    places = changes.positions.astype(np.int64)
    assert changes.differences.size == places.size and (np.diff(places) > 0).all()
    assert not places.size or places[-1] < size


def _damage_chunk(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    entry, streams, size, dtype = msgspec.msgpack.decode(rng.choice(seeds))
    what = rng.randrange(6)
    if what == 0:
        entry[0] = rng.choice(CODECS[:-1])
    if what == 1:
        entry[1] = rng.choice([0, entry[1] + rng.choice([-1, 1]), 333, 334, *INTEGERS])
    if what == 2 and entry[3]:
        entry[3][rng.randrange(len(entry[3]))] = rng.choice([*INTEGERS, ~rng.randrange(30), rng.randrange(30)])
    if what > 1:
        number = rng.choice([place for place, stream in enumerate(streams) if stream] or [0])
        streams[number] = damage_bytes(rng, [streams[number]])
    return msgspec.msgpack.encode([entry, streams, size, rng.choice([dtype, dtype, *DTYPE_BITS])])


def _codes() -> Sequence[bytes]:
    rng = np.random.default_rng(7)
    contents = [rng.integers(0, 4, 900), rng.integers(0, 256, 300), np.zeros(2000), rng.geometric(0.3, 5000).clip(0, 255)]
    return [content.size.to_bytes(4, "little") + rans.encode(content.astype(np.uint8)) for content in contents]


def _check_code(data: bytes) -> None:
    length = int.from_bytes(data[:4], "little")
    decoded = rans.decode(np.frombuffer(data[4:], np.uint8), length)
    assert decoded.size == length


def targets() -> dict[str, Target]:
    """By name."""
    return {
        "safetensors": Target(_deltas, _check_safetensors, (DamagedDelta,), _damage_safetensors, share=2.0),
        "delta": Target(_deltas, _check_delta, (WeightsError,), _damage_delta, share=0.5),
        "fold": Target(
            lambda: _deltas()[:1] + _deltas()[3:4], _check_fold, (WeightsError,), lambda r, s: _damage_delta(r, [*s, s[0]]), share=0.05
        ),
        "chunk": Target(_chunks, _check_chunk, (ValueError,), _damage_chunk, share=2.0),
        "rans": Target(_codes, _check_code, (ValueError,), share=2.0),
    }
