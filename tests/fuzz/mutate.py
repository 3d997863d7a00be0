"""Damage: valid bytes in, hostile bytes out, all of it decided by a random.Random, so that a seed gives the same damage every time.

Bytes are flipped, cut, spliced, repeated and extended, and what looks like a length is edited; trees (the content of msgpack, JSON or TOML) have
values replaced, dropped, repeated and nested without end.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

MAX_BYTES: Final = 1 << 16
"""Damaged inputs stay below this, so that what they make a reader do is out of proportion if it is large."""
DEPTH: Final = 10_000
LENGTHS: Final = [0, 1, 2, 7, 255, 256, 0x7FFF, 0xFFFF, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
INTEGERS: Final = [
    0,
    1,
    -1,
    2,
    3,
    24,
    25,
    127,
    128,
    255,
    4096,
    65537,
    1 << 22,
    1 << 31,
    1 << 40,
    (1 << 53) + 1,
    1 << 62,
    -(1 << 63),
    (1 << 64) - 1,
]
FLOATS: Final = [0.0, -0.0, 1e-310, 1e308, -1e308, 1e15, float("nan"), float("inf"), float("-inf")]
TEXTS: Final = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "a\n",
    "a\0b",
    "\uffff",
    "ä" * 64,
    "x" * 5000,
    "9" * 5000,
    "1e999",
    "-1",
    "NaN",
    "\U0001f600",
]
Damage = Callable[[random.Random, Sequence[bytes]], bytes]


def damage_bytes(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds` with one to four places damaged; `seeds` is not empty."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        rng.choice(_BYTE_EDITS)(rng, data, seeds)
    return bytes(data[:MAX_BYTES])


def _flip(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= rng.choice([0xFF, 1 << rng.randrange(8), rng.randrange(1, 256)])


def _cut(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _drop(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    begin = rng.randrange(len(data) + 1)
    del data[begin : begin + rng.choice([1, 2, 4, 8, 100])]


def _splice(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = rng.choice(seeds)
    begin, place = rng.randrange(len(other) + 1), rng.randrange(len(data) + 1)
    part = other[begin : begin + rng.choice([1, 4, 16, 256, 4096])]
    data[place : place + rng.choice([0, len(part)])] = part


def _repeat(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    begin = rng.randrange(len(data) + 1)
    part = bytes(data[begin : begin + rng.choice([1, 2, 8, 64])])
    data[begin:begin] = part * rng.choice([1, 2, 50])


def _extend(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    data.extend(rng.choice([b"\0", b"\xff", b"\x91", b"[", rng.randbytes(8)]) * rng.choice([1, 8, 1000]))


def _edit_length(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    """Write a number where one may stand, in either byte order."""
    code = rng.choice(["<B", "<H", ">H", "<I", ">I", "<Q", ">Q"])
    size = struct.calcsize(code)
    if len(data) < size:
        return
    place = rng.choice([0, rng.randrange(len(data) - size + 1)])
    near = int.from_bytes(data[place : place + size], "little" if code[0] == "<" else "big") + rng.choice([-1, 1, 8])
    struct.pack_into(code, data, place, rng.choice([*LENGTHS, near]) % (1 << 8 * size))


_BYTE_EDITS: Final = [_flip, _flip, _flip, _cut, _drop, _splice, _repeat, _extend, _edit_length, _edit_length]


# --- trees


def damage_tree(rng: random.Random, tree: Any, strange: Callable[[random.Random, Any], Any]) -> Any:
    """A copy of `tree` (dicts, lists and plain values) with one to three nodes replaced, dropped, repeated, renamed or swapped.

    `strange` gives what a value is replaced by.
    """
    for _ in range(rng.choice([1, 1, 2, 3])):
        tree = _damage_node(rng, tree, strange)
    return tree


def _damage_node(rng: random.Random, node: Any, strange: Callable[[random.Random, Any], Any]) -> Any:
    if not isinstance(node, dict | list | tuple) or not node or rng.random() < 0.04:
        return strange(rng, node)
    items: list[Any] = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
    place = rng.randrange(len(items))
    key, value = items[place]
    match rng.randrange(12):
        case 0:
            del items[place]
        case 1:
            items.insert(place, items[rng.randrange(len(items))])
        case 2:
            items[place] = (rng.choice([*TEXTS, items[rng.randrange(len(items))][0]]), value)
        case 3:
            items[place] = (key, items[rng.randrange(len(items))][1])
        case 4:
            items.append((rng.choice(TEXTS), strange(rng, value)))
        case _:
            items[place] = (key, _damage_node(rng, value, strange))
    return dict(items) if isinstance(node, dict) else [value for _, value in items]


def strange_value(rng: random.Random, value: Any) -> Any:
    """A value that is near `value`, at the edge of its type, or of another type."""
    if isinstance(value, bool) or rng.random() < 0.3:
        return rng.choice([None, True, False, [], {}, [[]], b"", b"\xff" * 9, [0] * 300, {"a": 1}, rng.choice(TEXTS)])
    if isinstance(value, int) and rng.random() < 0.9:
        return rng.choice([*INTEGERS, max(-(1 << 63), min(value + rng.choice([-1, 1, 8]), (1 << 64) - 1))])
    if isinstance(value, bytes) and value and rng.random() < 0.9:
        return damage_bytes(rng, [value])
    if isinstance(value, str) and rng.random() < 0.7:
        return rng.choice([*TEXTS, value[:-1], value.upper(), value * 2])
    return rng.choice([*INTEGERS, *FLOATS, *TEXTS])


_BOMBS: Final = [
    b"\x91" * DEPTH,
    b"\x81\xa1a" * DEPTH,
    b"\x81" * DEPTH,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xdc\xff\xff" + b"\xc0" * 20,
    b"\xa3\xff\xfe\xfd",
    b"\xa3\xed\xa0\x80",
    b"\xc1",
]
"""Pieces of msgpack: nesting without end, lengths of 4 GB, text that is not UTF-8, an unassigned type."""


def strange_msgpack(rng: random.Random, value: Any) -> Any:
    """As `strange_value`, or a piece of msgpack that no encoder writes."""
    return msgspec.Raw(rng.choice(_BOMBS)) if rng.random() < 0.15 else strange_value(rng, value)


def damage_msgpack(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds`, which are msgpack, damaged as a tree or as bytes."""
    if rng.random() < 0.35:
        return damage_bytes(rng, seeds)
    encoded = msgspec.msgpack.encode(damage_tree(rng, msgspec.msgpack.decode(rng.choice(seeds)), strange_msgpack))
    return encoded if rng.random() < 0.9 else damage_bytes(rng, [encoded])


def strange_json(rng: random.Random, value: Any) -> Any:
    """As `strange_value`, or a piece of JSON that no encoder writes."""
    pieces = [
        b"[" * DEPTH,
        b'{"a":' * DEPTH,
        b"9" * 25,
        b"9" * 4300,
        b"9" * 5000,
        b"1e999",
        b"-0",
        b'"\\ud800"',
        b'"\xff"',
        b"NaN",
        b"1" + b"0" * 21,
    ]
    return msgspec.Raw(rng.choice(pieces)) if rng.random() < 0.2 else strange_value(rng, value)


def damage_json(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds`, which are JSON, damaged as a tree or as bytes."""
    if rng.random() < 0.35:
        return damage_bytes(rng, seeds)
    data = rng.choice(seeds)
    try:
        tree = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # damaged before
        return damage_bytes(rng, [data])
    return msgspec.json.encode(damage_tree(rng, tree, strange_json))
