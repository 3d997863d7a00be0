from __future__ import annotations

import functools
import json
import math
import random
import struct
from collections import Counter

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import safetensors_file
from protocol.delta import apply_file, bits_of, encode_delta, encode_snapshot, entropy_bound, ordinals, read_header
from protocol.errors import DamagedDelta, RootMismatch, WeightsError, WrongParent
from protocol.weights import DTYPE_BITS, PolicyVersion, Tensor, Weights, root_hash

SPECIAL_16 = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7F81, 0x7FFF, 0xFFC1, 0xFFFF, 0x0001, 0x8001, 0x7C00, 0xFC00, 0x7E01, 0x3F80, 0x3F81]
SPECIAL_32 = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF, 1, 0x80000001, 0x3F800000]
NAMES = ["a", "model.layers.0.weight", "lm_head.weight", "ä"]


def elements(dtype: str) -> st.SearchStrategy[int]:
    special, top = (SPECIAL_32, 0xFFFFFFFF) if dtype == "F32" else (SPECIAL_16, 0xFFFF)
    return st.sampled_from(special) | st.integers(0, top)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[str, ...] = ("BF16", "F16", "F32")) -> Tensor:
    dtype = draw(st.sampled_from(dtypes))
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    size = math.prod(shape)
    return Tensor(dtype, shape, np.array(draw(st.lists(elements(dtype), min_size=size, max_size=size)), DTYPE_BITS[dtype]))


@st.composite
def moved(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """A tensor of the same shape in which some elements have moved, most of them a little."""
    bits = tensor.bits.copy()
    for index in draw(st.lists(st.integers(0, max(0, bits.size - 1)), max_size=6)):
        if index < bits.size:
            step = draw(st.integers(-3, 3))
            near = (int(bits[index]) + step) % (1 << 8 * bits.dtype.itemsize)
            bits[index] = draw(st.just(near) | elements(tensor.dtype))
    return tensor._replace(bits=bits)


@st.composite
def two_states(draw: st.DrawFn) -> tuple[Weights, Weights]:
    old = draw(st.dictionaries(st.sampled_from(NAMES), tensors(), max_size=4))
    new: Weights = {}
    for name, tensor in old.items():
        match draw(st.sampled_from(["keep", "move", "move", "remove", "other"])):
            case "keep":
                new[name] = tensor
            case "move":
                new[name] = draw(moved(tensor))
            case "other":
                new[name] = draw(tensors())
    return old, new | draw(st.dictionaries(st.sampled_from(["added", "added.too"]), tensors(), max_size=2))


def delta(old: Weights, new: Weights) -> bytes:
    return encode_delta("run", old, new, PolicyVersion(3, 30, 0, root_hash(old)), PolicyVersion(4, 31, 0, root_hash(new)))


def same(one: Weights, other: Weights) -> bool:
    """Bit for bit, written without the root hash."""
    return one.keys() == other.keys() and all(
        (one[n].dtype, tuple(one[n].shape), one[n].bits.tobytes()) == (other[n].dtype, tuple(other[n].shape), other[n].bits.tobytes())
        for n in one
    )


def large_states(changed: float, dtype: str = "BF16", size: int = 4000, seed: int = 0) -> tuple[Weights, Weights]:
    generator = np.random.default_rng(seed)
    old = generator.integers(0, 1 << 16, size).astype(DTYPE_BITS[dtype])
    mask = generator.random(size) < changed
    new = np.where(mask, old + generator.integers(1, 4, size).astype(old.dtype), old).astype(old.dtype)
    return {"w": Tensor(dtype, (size,), old)}, {"w": Tensor(dtype, (size,), new)}


# --- exact


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(states=two_states())
def test_any_state_follows_from_any_other_bit_for_bit(states: tuple[Weights, Weights]) -> None:
    old, new = states
    before = {name: tensor.bits.tobytes() for name, tensor in old.items()}
    header, found = apply_file(delta(old, new), old, root_hash(old))
    assert same(found, new)
    assert (header.from_version, header.to_version, header.new_root) == (3, 4, root_hash(new))
    assert {name: tensor.bits.tobytes() for name, tensor in old.items()} == before, "what is held is not changed"


@pytest.mark.parametrize("changed", [0.0, 0.0005, 0.01, 0.12, 0.13, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_encoding_is_exact_from_few_changes_to_all(changed: float, dtype: str) -> None:
    old, new = large_states(changed, dtype)
    assert same(apply_file(delta(old, new), old, root_hash(old))[1], new)


def test_every_pattern_of_16_bits_can_become_every_special_one() -> None:
    every = np.arange(1 << 16, dtype="<u2")
    old: Weights = {"w": Tensor("BF16", (1 << 16,), every)}
    for target in SPECIAL_16:
        new: Weights = {"w": Tensor("BF16", (1 << 16,), np.full(1 << 16, target, "<u2"))}
        assert same(apply_file(delta(old, new), old, root_hash(old))[1], new)
        assert same(apply_file(delta(new, old), new, root_hash(new))[1], old)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(weights=st.dictionaries(st.sampled_from(NAMES), tensors(), max_size=4))
def test_a_snapshot_needs_nothing_held_and_is_exact(weights: Weights) -> None:
    data = encode_snapshot("run", weights, PolicyVersion(4, 31, 0, root_hash(weights)))
    header, found = apply_file(data, None, "")
    assert same(found, weights) and header.kind == "snapshot"


def test_a_snapshot_is_an_ordinary_safetensors_file() -> None:
    from safetensors.numpy import load

    weights: Weights = {"w": Tensor("F32", (2, 3), np.arange(6, dtype="<f4").view("<u4"))}
    data = encode_snapshot("run", weights, PolicyVersion(0, 0, 0, root_hash(weights)))
    assert load(data)["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_ordinals_of_16_bits_are_consecutive_and_in_the_order_of_the_floats() -> None:
    every = np.arange(1 << 16, dtype="<u2")
    assert sorted(ordinals(every).tolist()) == list(range(-(1 << 15), 1 << 15))
    assert (bits_of(ordinals(every), every.dtype) == every).all()
    finite = [int(u) for u in every if (u & 0x7F80) != 0x7F80 and u != 0x8000]
    by_value = sorted(finite, key=lambda u: struct.unpack("<f", struct.pack("<I", u << 16))[0])
    assert by_value == sorted(finite, key=lambda u: ordinals(np.array([u], "<u2"))[0])


@given(bits=elements("F32"))
def test_ordinals_of_32_bits_follow_the_formula_and_lose_nothing(bits: int) -> None:
    array = np.array([bits], "<u4")
    assert ordinals(array)[0] == (bits if bits < 1 << 31 else -(bits & 0x7FFFFFFF) - 1)
    assert bits_of(ordinals(array), array.dtype)[0] == bits


# --- refused


def test_a_delta_from_other_weights_is_refused() -> None:
    old, new = large_states(0.1)
    data = delta(old, new)
    for held in (new, None):
        with pytest.raises(WrongParent) as caught:
            apply_file(data, held, root_hash(held or {}))
        assert caught.value.expected == root_hash(old)


def test_a_delta_applied_to_weights_that_lie_about_their_root_is_caught_by_the_new_root() -> None:
    old, new = large_states(0.1)
    other = {"w": old["w"]._replace(bits=old["w"].bits ^ 1)}
    with pytest.raises(RootMismatch):
        apply_file(delta(old, new), other, root_hash(old))


@functools.cache
def example_files() -> tuple[Weights, Weights, dict[str, bytes]]:
    """Old and new weights, and files to damage: a delta that uses every codec and stream, and a snapshot."""
    generator = np.random.default_rng(1)

    def random(size: int, dtype: str = "<u2") -> np.ndarray:
        return generator.integers(0, 1 << 16, size).astype(dtype)

    gaps, bitmap, dense, same_bits = random(700), random(64), random(16), random(5)
    gaps_new, bitmap_new = gaps.copy(), bitmap.copy()
    gaps_new[[3, 4, 300, 699]] = [gaps[3] + 1, gaps[4] - 1, gaps[300] ^ 0x4000, gaps[699] + 2]
    bitmap_new[::4] += 1
    old: Weights = {
        "gaps": Tensor("BF16", (7, 100), gaps),
        "bitmap": Tensor("BF16", (64,), bitmap),
        "dense": Tensor("F16", (16,), dense),
        "kept": Tensor("F32", (5,), same_bits.astype("<u4")),
        "gone": Tensor("BF16", (5,), same_bits),
        "reshaped": Tensor("BF16", (5,), same_bits),
    }
    new: Weights = {
        "gaps": Tensor("BF16", (7, 100), gaps_new),
        "bitmap": Tensor("BF16", (64,), bitmap_new),
        "dense": Tensor("F16", (16,), dense ^ 0x1234),
        "kept": old["kept"],
        "reshaped": Tensor("BF16", (5, 1), same_bits),
        "added": Tensor("F32", (3,), random(3, "<u4")),
    }
    files = {"delta": delta(old, new), "snapshot": encode_snapshot("run", new, PolicyVersion(4, 31, 0, root_hash(new)))}
    return old, new, files


def right_or_refused(data: bytes) -> bool:
    """Whether damaged bytes gave the right weights; any other outcome than that and a WeightsError fails the test."""
    old, new, _ = example_files()
    try:
        _, found = apply_file(data, old, root_hash(old))
    except WeightsError:
        return False
    assert same(found, new), "wrong weights were let through"
    return True


def test_the_undamaged_examples_are_right() -> None:
    _, _, files = example_files()
    parts = json.loads(zstandard.ZstdDecompressor().decompress(safetensors_file.deserialize(files["delta"])[1]["manifest"].bits.tobytes()))
    assert {part["codec"] for part in parts} == {"gaps", "bitmap", "raw", "same", "removed"}
    assert all(right_or_refused(data) for data in files.values())


@pytest.mark.parametrize("kind", ["delta", "snapshot"])
def test_a_damaged_byte_anywhere_is_refused_or_harmless(kind: str) -> None:
    data = example_files()[2][kind]
    generator = random.Random(2)
    for position in range(len(data)):
        for flip in {0xFF, 1 << generator.randrange(8), generator.randrange(1, 256)}:
            right_or_refused(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])


@pytest.mark.parametrize("kind", ["delta", "snapshot"])
def test_a_file_that_was_cut_short_or_has_a_tail_is_refused(kind: str) -> None:
    data = example_files()[2][kind]
    for length in range(len(data)):
        assert not right_or_refused(data[:length])
    assert not right_or_refused(data + b"\0")


@given(data=st.binary(max_size=300))
def test_bytes_that_are_no_weight_file_are_refused(data: bytes) -> None:
    for damaged in (data, struct.pack("<Q", len(data)) + data):
        with pytest.raises(WeightsError):
            apply_file(damaged, {}, "")
        with pytest.raises(WeightsError):
            read_header(damaged)


def rebuilt(**streams: bytes) -> bytes:
    """The example delta with some streams replaced by other (well compressed) contents."""
    metadata, found = safetensors_file.deserialize(example_files()[2]["delta"])
    for name, content in streams.items():
        packed = zstandard.ZstdCompressor().compress(content)
        found[name] = Tensor("U8", (len(packed),), np.frombuffer(packed, np.uint8))
    return safetensors_file.serialize(found, metadata)


def manifest() -> list[dict[str, object]]:
    found = safetensors_file.deserialize(example_files()[2]["delta"])[1]["manifest"]
    parts: list[dict[str, object]] = json.loads(zstandard.ZstdDecompressor().decompress(found.bits.tobytes()))
    return parts


@settings(max_examples=400, deadline=None)
@given(part=st.integers(0, 6), data=st.data())
def test_a_manifest_that_contradicts_its_streams_is_refused(part: int, data: st.DataObject) -> None:
    """The manifest is damaged before compression, so that the compressor's own checks do not help."""
    parts = manifest()
    entry = parts[part]
    number = st.sampled_from([-1, 0, 1, 2, 3, 5, 7, 1 << 31, 1 << 40, (1 << 62) + 1])
    changes = {
        "name": st.sampled_from(["gaps", "kept", "nothing", ""]),
        "dtype": st.sampled_from(["BF16", "F16", "F32", "U8", "I64"]),
        "shape": st.lists(number, max_size=3),
        "codec": st.sampled_from(["same", "gaps", "bitmap", "raw", "removed", "zip"]),
        "num_changed": number,
        "lengths": st.lists(number, min_size=4, max_size=4) | st.tuples(*(st.integers(max(0, n - 2), n + 2) for n in entry["lengths"])),  # type: ignore[attr-defined]
    }
    for key in data.draw(st.sets(st.sampled_from(sorted(changes)), min_size=1, max_size=2)):
        entry[key] = data.draw(changes[key])
    right_or_refused(rebuilt(manifest=json.dumps(parts).encode()))


@given(noise=st.binary(max_size=40), stream=st.sampled_from(["manifest", "positions", "ulps", "escapes", "raw"]))
def test_a_stream_with_other_contents_is_refused(noise: bytes, stream: str) -> None:
    right_or_refused(rebuilt(**{stream: noise}))


def test_a_manifest_that_is_no_utf_8_is_refused() -> None:
    text = json.dumps(manifest()).encode().replace(b'"gaps"', b'"\xff\xfe"')
    with pytest.raises(DamagedDelta):
        apply_file(rebuilt(manifest=text), example_files()[0], root_hash(example_files()[0]))


def test_escapes_cut_inside_a_number_are_refused() -> None:
    parts = manifest()
    for part in parts:
        if part["codec"] == "gaps":
            part["lengths"][2] -= 1  # type: ignore[index]
    old = example_files()[0]
    _, found = safetensors_file.deserialize(example_files()[2]["delta"])
    escapes = zstandard.ZstdDecompressor().decompress(found["escapes"].bits.tobytes())
    with pytest.raises(DamagedDelta):
        apply_file(rebuilt(manifest=json.dumps(parts).encode(), escapes=escapes[:-1]), old, root_hash(old))


@pytest.mark.parametrize("claimed", [1 << 30, 1 << 36, 1 << 39, 1 << 41, (1 << 63) + 1])
def test_a_stream_that_claims_to_be_huge_is_refused_before_memory_is_taken(claimed: int) -> None:
    metadata, found = safetensors_file.deserialize(example_files()[2]["delta"])
    frame = b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + struct.pack("<Q", claimed) + b"\x01\x00\x00"
    found["raw"] = Tensor("U8", (len(frame),), np.frombuffer(frame, np.uint8))
    with pytest.raises(DamagedDelta):
        apply_file(safetensors_file.serialize(found, metadata), example_files()[0], root_hash(example_files()[0]))


# --- what a delta says about itself


@settings(max_examples=100, deadline=None)
@given(num_elements=st.integers(1, 400), values=st.lists(st.integers(0, 255), max_size=60))
def test_the_entropy_bound_is_what_the_formula_says(num_elements: int, values: list[int]) -> None:
    values = values[:num_elements]
    counts = np.bincount(np.array(values, int), minlength=256)
    bits = 0.0
    if values:
        p = len(values) / num_elements
        for share in (p, 1 - p):
            bits -= num_elements * share * math.log2(share) if share > 0 else 0
        bits -= sum(count * math.log2(count / len(values)) for count in Counter(values).values())
    found = entropy_bound(num_elements, len(values), counts)
    assert found in {math.ceil(bits / 8 - 1e-9), math.ceil(bits / 8 + 1e-9)}


@pytest.mark.parametrize("changed", [0.001, 0.01, 0.1, 0.5])
def test_a_delta_of_independent_changes_is_no_smaller_than_its_bound_and_not_twice_as_large(changed: float) -> None:
    old, new = large_states(changed, size=400_000)
    data = delta(old, new)
    header = read_header(data)
    assert header.num_changed == int((old["w"].bits != new["w"].bits).sum()) and header.num_elements == 400_000
    assert header.bound_bytes <= len(data) < 2 * header.bound_bytes + 2000


def test_nothing_changed_is_a_small_file() -> None:
    old, _ = large_states(0, size=400_000)
    data = delta(old, old)
    assert len(data) < 1500 and read_header(data).num_changed == 0 == read_header(data).bound_bytes
