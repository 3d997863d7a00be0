from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidGroup
from protocol.groups import MAX_COMPLETIONS, MAX_GROUP_BYTES, Group, check_group, decode_group, encode_group

ARRAYS = ("prompt_ids", "num_tokens", "token_ids", "logprobs", "versions", "rewards", "finish")


def group(lengths: list[int] | None = None, **changes: Any) -> Group:
    """A valid group of completions of these lengths, with some fields replaced."""
    lengths = [3, 1, 2] if lengths is None else lengths
    total = sum(lengths)
    fields: dict[str, Any] = {
        "ticket": 12,
        "prompt": 5,
        "seed": (1 << 62) - 1,
        "actor": "actor-0",
        "engine": "transformers",
        "prompt_ids": np.array([1, 2, 3], np.int32),
        "num_tokens": np.array(lengths, np.int32),
        "token_ids": np.arange(total, dtype=np.int32),
        "logprobs": -np.arange(total, dtype=np.float32) / 8,
        "versions": np.array([4 + (i > total // 2) for i in range(total)], np.int32),
        "rewards": np.linspace(0, 1, len(lengths), dtype=np.float32),
        "finish": np.array([i % 2 for i in range(len(lengths))], np.uint8),
    }
    return Group(**(fields | changes))


def wire(**changes: Any) -> bytes:
    """The payload of a valid group with some wire fields replaced, written by another msgpack library."""
    return msgpack.packb(msgpack.unpackb(encode_group(group())) | changes)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_a_group_survives_the_wire_bit_for_bit(data: st.DataObject, lengths: list[int]) -> None:
    total = sum(lengths)
    logprobs = data.draw(st.lists(st.floats(-(2.0**100), 0, width=32), min_size=total, max_size=total))
    versions = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=total, max_size=total))
    original = group(lengths, logprobs=np.array(logprobs, np.float32), versions=np.array(versions, np.int32))
    found = decode_group(memoryview(encode_group(original)))
    for name in ARRAYS:
        assert getattr(found, name).tobytes() == getattr(original, name).tobytes()
        assert getattr(found, name).dtype == getattr(original, name).dtype
    assert (found.ticket, found.prompt, found.seed, found.actor, found.engine) == (12, 5, (1 << 62) - 1, "actor-0", "transformers")
    assert (found.oldest_version, found.newest_version) == (min(versions), max(versions))
    parts = [found.token_ids[part].tolist() for part in found.completions()]
    assert [len(part) for part in parts] == lengths and [token for part in parts for token in part] == list(range(total))


def test_arrays_of_other_layouts_are_written_in_the_wire_s_own() -> None:
    strange = group(token_ids=np.arange(12, dtype=np.int64)[::2], logprobs=np.zeros(6, ">f8"), prompt_ids=np.array([1, 2, 3], ">i4"))
    found = decode_group(encode_group(strange))
    assert found.token_ids.tolist() == [0, 2, 4, 6, 8, 10] and found.prompt_ids.tolist() == [1, 2, 3]


def i4(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def f4(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("lengths", {"num_tokens": b""}),
        ("lengths", {"num_tokens": i4(3, 1, 1)}),
        ("lengths", {"num_tokens": i4(3, 0, 3)}),
        ("lengths", {"num_tokens": i4(7, -3, 2)}),
        ("lengths", {"num_tokens": i4(2**31 - 1, 2**31 - 1, 8)}),
        ("lengths", {"num_tokens": i4(3, 3)}),
        ("lengths", {"token_ids": i4(1, 2, 3)}),
        ("lengths", {"token_ids": i4(1, 2, 3) + b"\0"}),
        ("lengths", {"logprobs": f4(-1, -1)}),
        ("lengths", {"versions": i4(1)}),
        ("lengths", {"rewards": f4(1, 1)}),
        ("lengths", {"rewards": b""}),
        ("lengths", {"finish": b"\0"}),
        ("lengths", {"prompt_ids": b""}),
        ("lengths", {"prompt_ids": b"\0\0\0"}),
        ("range", {"token_ids": i4(1, 2, 3, 4, 5, -6)}),
        ("range", {"prompt_ids": i4(-1)}),
        ("range", {"versions": i4(0, 0, 0, 0, 0, -1)}),
        ("range", {"finish": b"\0\1\2"}),
        ("logprobs", {"logprobs": f4(0, 0, 0, 0, 0, 0.1)}),
        ("logprobs", {"logprobs": f4(0, 0, 0, 0, 0, float("nan"))}),
        ("logprobs", {"logprobs": f4(0, 0, 0, 0, 0, float("-inf"))}),
        ("rewards", {"rewards": f4(0, 1, float("nan"))}),
        ("rewards", {"rewards": f4(0, 1, float("inf"))}),
        ("malformed", {"ticket": "twelve"}),
        ("malformed", {"ticket": 2**64 + 0.5}),
        ("malformed", {"surprise": 1}),
        ("malformed", {"actor": "x" * 257}),
        ("malformed", {"rewards": [0.0, 1.0, 0.5]}),
    ],
)
def test_a_group_that_contradicts_itself_is_refused_with_the_reason(reason: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidGroup) as caught:
        decode_group(wire(**changes))
    assert caught.value.reason == reason


@pytest.mark.parametrize("missing", [*ARRAYS, "ticket", "prompt", "seed", "actor", "engine"])
def test_a_group_without_one_of_its_fields_is_malformed(missing: str) -> None:
    fields = msgpack.unpackb(encode_group(group()))
    del fields[missing]
    with pytest.raises(InvalidGroup) as caught:
        decode_group(msgpack.packb(fields))
    assert caught.value.reason == "malformed"


def test_a_log_probability_a_rounding_error_above_zero_is_let_through() -> None:
    check_group(group(logprobs=np.full(6, 1e-6, np.float32)))


def test_too_many_completions_are_refused() -> None:
    check_group(group([1] * MAX_COMPLETIONS))
    with pytest.raises(InvalidGroup) as caught:
        check_group(group([1] * (MAX_COMPLETIONS + 1)))
    assert caught.value.reason == "lengths"


def test_a_payload_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(InvalidGroup) as caught:
        decode_group(bytes(MAX_GROUP_BYTES + 1))
    assert caught.value.reason == "oversize"


def refused_or_consistent(payload: bytes) -> None:
    """Nothing but InvalidGroup may be raised, and what gets through must agree with itself, checked slowly."""
    try:
        found = decode_group(payload)
    except InvalidGroup:
        return
    lengths = found.num_tokens.tolist()
    assert lengths and min(lengths) >= 1
    assert sum(lengths) == len(found.token_ids) == len(found.logprobs) == len(found.versions)
    assert len(lengths) == len(found.rewards) == len(found.finish) and len(found.prompt_ids)
    assert all(np.isfinite(value) and value <= 1e-3 for value in found.logprobs)
    assert all(np.isfinite(value) for value in found.rewards)
    assert min([*found.token_ids, *found.prompt_ids, *found.versions]) >= 0 and set(found.finish.tolist()) <= {0, 1}


@settings(max_examples=200, deadline=None)
@given(payload=st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_invalid_group(payload: bytes) -> None:
    with pytest.raises(InvalidGroup):
        decode_group(payload)


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3), cut=st.integers(0, 10_000))
def test_a_damaged_group_is_refused_or_agrees_with_itself(edits: list[tuple[int, int]], cut: int) -> None:
    payload = bytearray(encode_group(group()))
    for position, value in edits:
        payload[position % len(payload)] = value
    refused_or_consistent(bytes(payload))
    refused_or_consistent(bytes(payload[: cut % len(payload)]))


@settings(max_examples=300, deadline=None)
@given(arrays=st.dictionaries(st.sampled_from(ARRAYS), st.binary(max_size=32), min_size=1, max_size=3))
def test_any_contents_of_the_arrays_are_refused_or_agree(arrays: dict[str, bytes]) -> None:
    refused_or_consistent(wire(**arrays))


def nested(depth: int) -> bytes:
    return b"\x91" * depth


def text_that_is_no_utf_8(payload: bytes) -> bytes:
    return payload.replace(b"actor-0", b"\xff\xfe\xfd\xff\xff\xff\xff")


@pytest.mark.parametrize("make", [lambda: nested(200_000), lambda: text_that_is_no_utf_8(encode_group(group()))])
def test_traps_for_decoders_are_malformed(make: Callable[[], bytes]) -> None:
    with pytest.raises(InvalidGroup) as caught:
        decode_group(make())
    assert caught.value.reason == "malformed"


def test_a_group_cannot_be_changed_by_whoever_holds_it() -> None:
    found = decode_group(encode_group(group()))
    with pytest.raises(AttributeError):
        found.ticket = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        found.rewards[0] = 1
