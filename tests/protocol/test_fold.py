from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import safetensors_file
from protocol.chunks import CHUNK_ELEMENTS
from protocol.delta import Delta, DeltaHeader, apply_file, apply_in_place, encode_delta, encode_snapshot, entropy_bound, read_header
from protocol.errors import DamagedDelta, WeightsError, WrongParent
from protocol.fold import Leg, fold
from protocol.weights import DTYPE_BITS, PolicyVersion, Tensor, Weights, root_hash

SPECIAL_16 = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7F81, 0x7FFF, 0xFFC1, 0xFFFF, 0x0001, 0x8001, 0x7C00, 0xFC00, 0x7E01, 0x3F80, 0x3F81]
SPECIAL_32 = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF, 1, 0x80000001, 0x3F800000]
NAMES = ["a", "model.layers.0.weight", "ä"]
SLOW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def elements(dtype: str) -> st.SearchStrategy[int]:
    special, top = (SPECIAL_32, 0xFFFFFFFF) if dtype == "F32" else (SPECIAL_16, 0xFFFF)
    return st.sampled_from(special) | st.integers(0, top)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=2)))
    size = math.prod(shape)
    return Tensor(dtype, shape, np.array(draw(st.lists(elements(dtype), min_size=size, max_size=size)), DTYPE_BITS[dtype]))


@st.composite
def moved(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    bits = tensor.bits.copy()
    for index in draw(st.sets(st.integers(0, max(0, bits.size - 1)), max_size=6)):
        if index < bits.size:
            near = (int(bits[index]) + draw(st.integers(-3, 3))) % (1 << 8 * bits.dtype.itemsize)
            bits[index] = draw(st.just(near) | elements(tensor.dtype))
    return tensor._replace(bits=bits)


@st.composite
def ways(draw: st.DrawFn, length: int) -> list[Weights]:
    """States of one layout; a state may return to one that was before."""
    states: list[Weights] = [draw(st.dictionaries(st.sampled_from(NAMES), tensors(), max_size=3))]
    while len(states) < length:
        states.append({name: draw(st.just(states[0][name]) | moved(tensor)) for name, tensor in states[-1].items()})
    return states


@st.composite
def ways_with_other_tensors(draw: st.DrawFn, length: int) -> list[Weights]:
    """States between which tensors come, go and change their shape or dtype as well."""
    states: list[Weights] = [draw(st.dictionaries(st.sampled_from(NAMES), tensors(), max_size=3))]
    while len(states) < length:
        following: Weights = draw(st.dictionaries(st.sampled_from(NAMES), tensors(), max_size=1))
        for name, tensor in states[-1].items():
            if draw(st.integers(0, 5)):
                following.setdefault(name, draw(st.just(tensor) | moved(tensor)))
        states.append(following)
    return states


def delta(old: Weights, new: Weights, start: int = 3, end: int = 4, *, classes: bool = False, run: str = "run") -> bytes:
    versions = (PolicyVersion(number, number, 0, root_hash(weights)) for number, weights in ((start, old), (end, new)))
    return encode_delta(run, old, new, *versions, classes=classes)[0]


def legs_of(states: list[Weights]) -> list[Leg]:
    return [Leg(delta(old, new, number, number + 1)) for number, (old, new) in enumerate(itertools.pairwise(states))]


def same(one: Weights, other: Weights) -> bool:
    """Bit for bit, written without the root hash."""
    return one.keys() == other.keys() and all(
        (one[n].dtype, tuple(one[n].shape), one[n].bits.tobytes()) == (other[n].dtype, tuple(other[n].shape), other[n].bits.tobytes())
        for n in one
    )


def applied(data: bytes, weights: Weights) -> Weights:
    return apply_file(data, weights, root_hash(weights))[1]


def weights_of(**tensors: list[int]) -> Weights:
    return {name: Tensor("BF16", (len(bits),), np.array(bits, "<u2")) for name, bits in tensors.items()}


def manifest_of(data: bytes) -> list[Any]:
    found = safetensors_file.deserialize(data)[1]["manifest"]
    shards: list[Any] = json.loads(zstandard.ZstdDecompressor().decompress(found.bits.tobytes()))
    return shards


def rebuilt(data: bytes, manifest: list[Any], **metadata: str) -> bytes:
    """A delta with another manifest and metadata."""
    said, found = safetensors_file.deserialize(data)
    packed = zstandard.ZstdCompressor().compress(json.dumps(manifest).encode())
    return safetensors_file.serialize(found | {"manifest": Tensor("U8", (len(packed),), np.frombuffer(packed, np.uint8))}, said | metadata)


# --- forwards


@SLOW
@given(st.integers(2, 4).flatmap(ways))
def test_deltas_fold_into_one_that_leads_from_the_first_state_to_the_last_bit_for_bit(states: list[Weights]) -> None:
    data, _ = fold(legs_of(states))
    assert same(applied(data, states[0]), states[-1])
    moving = {name: tensor._replace(bits=tensor.bits.copy()) for name, tensor in states[0].items()}
    apply_in_place(Delta(data), moving)
    assert same(moving, states[-1])


@SLOW
@given(ways(3))
def test_a_folded_delta_says_what_one_made_from_the_weights_says(states: list[Weights]) -> None:
    data, header = fold(legs_of(states))
    first, last = states[0], states[-1]
    changed = [int((first[name].bits != last[name].bits).sum()) for name in first]
    assert header == read_header(data) == read_header(delta(first, last, 0, 2))
    assert (header.kind, header.run, header.from_version, header.to_version) == ("delta", "run", 0, 2)
    assert (header.parent_root, header.new_root) == (root_hash(first), root_hash(last))
    assert (header.num_changed, header.num_elements) == (sum(changed), sum(tensor.bits.size for tensor in first.values()))


def test_the_bound_of_a_folded_delta_is_that_of_the_sums_and_not_of_what_cancelled() -> None:
    states = [weights_of(x=bits) for bits in ([5] * 100, [7] * 50 + [5] * 50, [5] * 49 + [8] + [5] * 50)]
    _, header = fold(legs_of(states))
    assert (header.num_changed, header.bound_bytes) == (1, entropy_bound(100, {3: 1}))


@SLOW
@given(ways_with_other_tensors(2))
def test_one_leg_folds_into_a_delta_of_the_same_effect(states: list[Weights]) -> None:
    data, header = fold(legs_of(states))
    assert same(applied(data, states[0]), states[1])
    assert header == read_header(delta(states[0], states[1], 0, 1))


@SLOW
@given(ways(4), st.integers(1, 2))
def test_folded_deltas_fold_again(states: list[Weights], first: int) -> None:
    legs = legs_of(states)
    front, back = fold(legs[:first])[0], fold(legs[first:])[0]
    data, header = fold([Leg(front), Leg(back)])
    assert same(applied(data, states[0]), states[-1]) and header == fold(legs)[1]


def test_legs_may_have_their_tensors_in_any_order_and_in_any_shards() -> None:
    u, v, w = weights_of(x=[1, 2], y=[3], z=[]), weights_of(z=[], y=[4], x=[1, 3]), weights_of(y=[3], x=[0, 3], z=[])
    shards = manifest_of(delta(v, w))
    shards = [[[tensor], [0] * 5] for tensor in shards[0][0] if tensor[3] == "same"] + [
        [[tensor for tensor in shards[0][0] if tensor[3] != "same"], shards[0][1]]
    ]
    for end in (delta(v, w), rebuilt(delta(v, w), shards)):
        assert same(applied(fold([Leg(delta(u, v)), Leg(end)])[0], u), w)


def test_a_tensor_of_several_chunks_is_folded() -> None:
    size = CHUNK_ELEMENTS + 9
    bits = [np.random.default_rng(2).integers(0, 1 << 16, size, np.uint16)]
    for places in ([0, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, size - 1], [CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS + 3]):
        bits.append(bits[-1].copy())
        bits[-1][places] ^= 0x8001
    states: list[Weights] = [{"x": Tensor("BF16", (size,), found)} for found in bits]
    data, header = fold(legs_of(states))
    assert same(applied(data, states[0]), states[2]) and header.num_changed == int((bits[0] != bits[2]).sum()) == 4


# --- backwards


@SLOW
@given(ways(2))
def test_a_delta_walked_backwards_leads_from_its_child_to_its_parent(states: list[Weights]) -> None:
    u, v = states
    data, header = fold([Leg(delta(u, v, 3, 8), inverted=True)])
    assert same(applied(data, v), u)
    assert header == read_header(delta(v, u, 8, 3))


@SLOW
@given(ways(2))
def test_there_and_back_again_is_nothing_changed(states: list[Weights]) -> None:
    u, v = states
    there = delta(u, v)
    for legs, begin in (
        ([Leg(there), Leg(there, True)], u),
        ([Leg(there, True), Leg(there)], v),
        ([Leg(there), Leg(delta(v, u, 4, 5))], u),
    ):
        data, header = fold(legs)
        assert header.num_changed == header.bound_bytes == 0 and header.parent_root == header.new_root == root_hash(begin)
        assert all(tensor.kind == "same" for tensor in Delta(data).tensors)
        assert same(applied(data, begin), begin)


@SLOW
@given(ways(4), st.lists(st.booleans(), min_size=3, max_size=3))
def test_any_way_of_legs_forwards_and_backwards_folds_exactly(states: list[Weights], backwards: list[bool]) -> None:
    """As a learner that was resumed from an older version has a tree of versions: up to the fork, then down."""
    legs = [
        Leg(delta(new, old, number + 1, number), True) if inverted else Leg(delta(old, new, number, number + 1))
        for number, (old, new, inverted) in enumerate(zip(states, states[1:], backwards, strict=False))
    ]
    data, header = fold(legs)
    assert same(applied(data, states[0]), states[-1])
    assert (header.from_version, header.to_version) == (0, 3)


# --- tensors that come and go


@SLOW
@given(st.integers(2, 4).flatmap(ways_with_other_tensors))
def test_tensors_that_come_go_or_change_their_shape_are_folded(states: list[Weights]) -> None:
    data, header = fold(legs_of(states))
    assert same(applied(data, states[0]), states[-1])
    assert (header.parent_root, header.new_root) == (root_hash(states[0]), root_hash(states[-1]))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_a_tensor_that_comes_and_then_changes_is_folded_at_every_size(size: int, dtype: str) -> None:
    states: list[Weights] = [{}] + [{"x": Tensor(dtype, (size,), np.full(size, value, DTYPE_BITS[dtype]))} for value in (5, 6, 9)]
    assert same(applied(fold(legs_of(states))[0], {}), states[-1])


@pytest.mark.parametrize("before, after", [({}, {"x": [1]}), ({"x": [1]}, {}), ({"x": [1]}, {"x": [1, 2]})])
def test_a_delta_that_adds_removes_or_reshapes_has_no_inverse(before: dict[str, list[int]], after: dict[str, list[int]]) -> None:
    u, v = weights_of(kept=[3], **before), weights_of(kept=[3], **after)
    with pytest.raises(DamagedDelta, match=r"delta to version 4 .* no inverse"):
        fold([Leg(delta(u, v), inverted=True)])


# --- refused


def test_legs_that_do_not_follow_one_another_are_refused() -> None:
    u, v, w = weights_of(x=[1]), weights_of(x=[2]), weights_of(x=[3])
    there, on = Leg(delta(u, v, 3, 4)), Leg(delta(v, w, 4, 5))
    for legs in ([on, there], [there, there], [there, on, on], [there._replace(inverted=True), on], [there, on._replace(inverted=True)]):
        with pytest.raises(WrongParent):
            fold(legs)
    with pytest.raises(WrongParent) as caught:
        fold([there, there])
    assert (caught.value.expected, caught.value.held) == (root_hash(u), root_hash(v))


@pytest.mark.parametrize("inverted", [False, True])
def test_a_delta_coded_by_classes_is_refused_by_the_name_of_its_tensor(inverted: bool) -> None:
    # Small weights scattered among large ones, and only they change: their class says where.
    small = [0x3000 if index * 7919 % 64 < 16 else 0x3C00 for index in range(4096)]
    u, v = weights_of(some=small, other=[1]), weights_of(some=[bits + (bits == 0x3000) for bits in small], other=[1])
    data = delta(u, v, classes=True)
    with pytest.raises(DamagedDelta, match=r"'some'.*class"):
        fold([Leg(data, inverted)])


def test_a_delta_that_could_have_been_coded_by_classes_but_changes_nothing_is_folded() -> None:
    u = weights_of(x=[1, 2, 3])
    assert same(applied(fold([Leg(delta(u, u, classes=True))])[0], u), u)


def test_a_snapshot_is_no_leg() -> None:
    u = weights_of(x=[1])
    with pytest.raises(DamagedDelta, match="snapshot"):
        fold([Leg(encode_snapshot("run", u, PolicyVersion(0, 0, 0, root_hash(u))))])


def test_a_leg_that_does_not_decode_is_refused() -> None:
    u, v = weights_of(x=[1]), weights_of(x=[2])
    for data in (b"", b"noise", delta(u, v)[:-1], delta(u, v)[:200]):
        with pytest.raises(DamagedDelta):
            fold([Leg(data)])


def test_a_leg_that_forgets_a_tensor_is_refused_by_its_name() -> None:
    u, v, w = weights_of(x=[1], y=[1]), weights_of(x=[2], y=[1]), weights_of(x=[3], y=[1])
    shards = manifest_of(delta(v, w))
    shards[0][0] = [tensor for tensor in shards[0][0] if tensor[0] != "y"]
    with pytest.raises(DamagedDelta, match="'y'"):
        fold([Leg(delta(u, v)), Leg(rebuilt(delta(v, w), shards))])


# --- legs whose roots fit but which contradict each other


def lying_pair(first: Weights, second: Weights) -> list[Leg]:
    """A delta that ends with `first`, and one that changes `second` and lies that this is the same."""
    start = {name: tensor._replace(bits=tensor.bits ^ 1) for name, tensor in first.items()}
    end = {name: tensor._replace(bits=tensor.bits ^ 3) for name, tensor in second.items()}
    on = delta(second, end, 4, 5)
    return [Leg(delta(start, first, 3, 4)), Leg(rebuilt(on, manifest_of(on), parent_root=root_hash(first)))]


@pytest.mark.parametrize(
    "other",
    [
        Tensor("BF16", (5,), np.zeros(5, "<u2")),
        Tensor("BF16", (3,), np.zeros(3, "<u2")),
        Tensor("BF16", (2, 2), np.zeros(4, "<u2")),
        Tensor("F16", (4,), np.zeros(4, "<u2")),
        Tensor("F32", (4,), np.zeros(4, "<u4")),
        Tensor("BF16", (CHUNK_ELEMENTS + 1,), np.zeros(CHUNK_ELEMENTS + 1, "<u2")),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tensor.shape}",
)
def test_legs_that_disagree_about_a_tensor_are_refused_by_its_name(other: Tensor) -> None:
    first: Weights = {"x": Tensor("BF16", (4,), np.zeros(4, "<u2"))}
    for legs in (lying_pair(first, {"x": other}), lying_pair({"x": other}, first)):
        with pytest.raises(DamagedDelta, match="'x'"):
            fold(legs)


@pytest.mark.parametrize("size", [3, 5, CHUNK_ELEMENTS + 1])
def test_a_leg_that_disagrees_about_a_tensor_that_came_before_is_refused_by_its_name(size: int) -> None:
    v, other = weights_of(x=[0] * 4), {"x": Tensor("BF16", (size,), np.zeros(size, "<u2"))}
    on = lying_pair(v, other)[1]
    with pytest.raises(DamagedDelta, match="'x'"):
        fold([Leg(delta({}, v)), on])


@pytest.mark.timeout(10)
@pytest.mark.parametrize("elements", [1 << 40, 1 << 43, 1 << 62])
def test_an_unchanged_tensor_that_claims_to_be_huge_takes_neither_memory_nor_long(elements: int) -> None:
    """It costs a line in the manifest; nothing may be counted off chunk by chunk."""
    u = weights_of(x=[1])
    shards = manifest_of(delta(u, u))
    shards[0][0][0][2] = [elements]
    try:
        data, _ = fold([Leg(rebuilt(delta(u, u), shards))])
    except DamagedDelta:
        return
    with pytest.raises(WeightsError):
        applied(data, u)


@st.composite
def lying_legs(draw: st.DrawFn) -> list[bytes]:
    """Two deltas that follow one another; the manifest of one lies in one or two places."""
    legs = [leg.data for leg in legs_of(example())]
    index = draw(st.integers(0, 1))
    shards = manifest_of(legs[index])
    number = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 20, 24, 1 << 31, 1 << 40])
    for _ in range(draw(st.integers(1, 2))):
        tensor = draw(st.sampled_from(shards[0][0]))
        chunk = draw(st.sampled_from(tensor[4])) if tensor[4] else ["same", 0, [0] * 5, []]
        match draw(st.sampled_from(["name", "dtype", "shape", "kind", "codec", "num_changed", "length", "parameters"])):
            case "name":
                tensor[0] = draw(st.sampled_from(["x", "y", "z", "other"]))
            case "dtype":
                tensor[1] = draw(st.sampled_from(sorted(DTYPE_BITS)))
            case "shape":
                tensor[2] = draw(st.lists(number, max_size=2))
            case "kind":
                tensor[3] = draw(st.sampled_from(["same", "changed", "new", "removed"]))
                tensor[4] = draw(st.sampled_from([tensor[4], [], [chunk]]))
            case "codec":
                chunk[0] = draw(st.sampled_from(["same", "gaps", "rice", "bitmap", "classes", "dense", "planes"]))
            case "num_changed":
                chunk[1] = draw(number)
            case "length":
                chunk[2][draw(st.integers(0, 4))] = draw(number)
            case "parameters":
                chunk[3] = draw(st.lists(number, max_size=2))
    legs[index] = rebuilt(legs[index], shards)
    return [bytes(leg) for leg in legs]


def example() -> list[Weights]:
    states = [weights_of(x=list(range(20)), y=[1, 2, 3, 4])]
    for step in (1, 3):
        new = {
            name: tensor._replace(bits=tensor.bits ^ (np.arange(tensor.bits.size) % 3 == 0) * step) for name, tensor in states[-1].items()
        }
        states.append({name: tensor._replace(bits=tensor.bits.astype("<u2")) for name, tensor in new.items()})
    states[1]["z"], states[2]["z"] = (Tensor("F32", (4,), np.array([value] * 4, "<u4")) for value in (7, 1 << 31))
    return states


@pytest.mark.timeout(60)
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lying_legs())
def test_legs_that_lie_are_refused_or_fold_into_a_delta_that_is_right_or_refused(legs: list[bytes]) -> None:
    states = example()
    try:
        data, header = fold([Leg(leg) for leg in legs])
        assert isinstance(header, DeltaHeader)
        found = applied(data, states[0])
    except WeightsError:
        return
    assert same(found, states[-1])
