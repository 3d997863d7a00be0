"""Folding: several deltas along a path of versions, each walked forwards or backwards, become one delta from its start to its end.

ULP differences form a group (protocol.ulps), so (u -> v) + (v -> w) = (u -> w) exactly, and the inverse of a delta is its negation. No weights are
needed, except to read positions coded by exponent class, which are therefore refused here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from protocol.chunks import CHUNK_ELEMENTS
from protocol.delta import SHARD_BYTES, Delta, DeltaHeader, Shard, ShardWriter, Streams, TensorEntry, assemble, chunk_changes, new_tensor
from protocol.errors import DamagedDelta, WrongParent
from protocol.ulps import Changes, add_changes, negated, sum_changes
from protocol.weights import DTYPE_BITS, PolicyVersion, Tensor


class Leg(NamedTuple):
    """One delta on the way; `inverted` if it is walked from its child to its parent."""

    data: bytes | memoryview
    inverted: bool = False


class _Opened(NamedTuple):
    delta: Delta
    inverted: bool
    entries: dict[str, tuple[TensorEntry, list[Streams]]]

    @property
    def begin(self) -> PolicyVersion:
        return _end_of(self.delta.header, child=self.inverted)

    @property
    def end(self) -> PolicyVersion:
        return _end_of(self.delta.header, child=not self.inverted)


def fold(legs: Sequence[Leg]) -> tuple[bytes, DeltaHeader]:
    """One delta for the whole way, and its header.

    Raises WrongParent if a leg does not start where the one before ends, DamagedDelta for a leg that does not decode, that is coded by classes,
    or that is walked backwards although it adds or removes tensors.
    """
    if not legs:
        raise DamagedDelta("there is no delta to fold")
    opened = [_open(leg) for leg in legs]
    for before, after in itertools.pairwise(opened):
        if before.end.root != after.begin.root:
            raise WrongParent(after.begin.root, before.end.root)
    shards: list[Shard] = []
    writer, room = ShardWriter(), SHARD_BYTES
    for name in dict.fromkeys(name for leg in opened for name in leg.entries):
        size = _fold_tensor(name, opened, writer)
        room -= size
        if room <= 0:
            shards.append(writer.finish())
            writer, room = ShardWriter(), SHARD_BYTES
    shards.append(writer.finish())
    return assemble(opened[0].delta.header.run, opened[0].begin, opened[-1].end, shards)


def _open(leg: Leg) -> _Opened:
    delta = Delta(leg.data)
    if leg.inverted and not delta.keeps_layout:
        raise DamagedDelta(f"the delta to version {delta.header.to_version} adds or removes tensors, so it has no inverse")
    entries: dict[str, tuple[TensorEntry, list[Streams]]] = {}
    for number, shard in enumerate(delta.shards):
        streams = delta.streams(number)
        entries |= {entry.name: (entry, streams[entry.name]) for entry in shard.tensors}
    return _Opened(delta, leg.inverted, entries)


def _end_of(header: DeltaHeader, *, child: bool) -> PolicyVersion:
    number, root = (header.to_version, header.new_root) if child else (header.from_version, header.parent_root)
    return PolicyVersion(number, -1, -1, root)


def _fold_tensor(name: str, legs: list[_Opened], writer: ShardWriter) -> int:
    """Put what becomes of one tensor on the whole way into `writer`; its size in bytes."""
    sums: list[Changes] | None = None
    whole: Tensor | None = None
    last: TensorEntry | None = None
    for leg in legs:
        entry, streams = leg.entries.get(name, (None, []))
        if entry is None:
            if last is not None and last.kind != "removed":
                raise DamagedDelta(f"tensor {name!r} is neither kept, changed nor removed by the delta to version {leg.end.number}")
            continue
        if entry.kind in ("same", "changed") and last is not None and (last.dtype, last.shape) != (entry.dtype, entry.shape):
            raise DamagedDelta(f"tensor {name!r} {entry.dtype}{entry.shape} is changed in place, but is {last.dtype}{last.shape} before")
        match entry.kind:
            case "new":
                whole, sums = new_tensor(entry, streams), None
            case "removed":
                whole = sums = None
            case "changed":
                changes = [chunk_changes(entry, streams, number, None) for number in range(len(entry.chunks))]
                if leg.inverted:
                    changes = [negated(c, _width(entry)) for c in changes]
                if whole is not None:
                    _move(whole, changes)
                else:
                    sums = changes if sums is None else [sum_changes(a, b, _width(entry)) for a, b in zip(sums, changes, strict=True)]
        last = entry
    assert last is not None
    return _write(name, last, sums, whole, writer)


def _write(name: str, last: TensorEntry, sums: list[Changes] | None, whole: Tensor | None, writer: ShardWriter) -> int:
    shape = tuple(last.shape)
    if last.kind == "removed":
        writer.remove(name, last.dtype, shape)
        return 0
    if whole is not None:
        writer.put_new(name, whole)
        return whole.bits.nbytes
    if sums is None:
        writer.keep(name, last.dtype, shape)
        return 0
    writer.put_changes(name, last.dtype, shape, ((changes, None) for changes in sums))
    return math.prod(shape) * DTYPE_BITS[last.dtype].itemsize


def _move(whole: Tensor, changes: list[Changes]) -> None:
    for number, change in enumerate(changes):
        add_changes(whole.bits[number * CHUNK_ELEMENTS : (number + 1) * CHUNK_ELEMENTS], change)


def _width(entry: TensorEntry) -> int:
    return 8 * DTYPE_BITS[entry.dtype].itemsize
