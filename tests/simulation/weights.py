"""Weights as names: a root is all there is of them, and a delta says from which root to which it leads.

What deltas do to real bits is tested elsewhere; here only the ways between versions matter.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import blake3
import msgspec

from broker.blobs import BlobStore
from broker.folding import Folds
from broker.publications import Hop
from protocol.errors import DamagedDelta
from protocol.weights import BlobRef

BASE_ROOT = "root of the policy's own files"


class WeightFile(msgspec.Struct, frozen=True, tag=True):
    """Leads from `parent` (empty: from nothing) to `root`. `note` makes files differ that lead the same way."""

    parent: str
    root: str
    note: str = ""


def encode(file: WeightFile) -> bytes:
    """The bytes of a file."""
    return msgspec.json.encode(file)


def decode(data: bytes) -> WeightFile:
    """A file from its bytes."""
    return msgspec.json.decode(data, type=WeightFile)


def refer(data: bytes) -> BlobRef:
    """The name under which the store keeps `data`."""
    return BlobRef(blake3.blake3(data).hexdigest(), len(data))


def put(store: BlobStore, data: bytes, wall: float) -> BlobRef:
    """Store `data` as an upload does, at a time of the simulation's."""
    ref = refer(data)
    path = store.path(ref.digest)
    if not path.exists():
        path.write_bytes(data)
    os.utime(path, (wall, wall))
    return ref


class SymbolicFolds(Folds):
    """Folds names instead of bits."""

    wall: Callable[[], float]

    def _fold(self, hops: tuple[Hop, ...]) -> None:
        ends: list[tuple[str, str]] = []
        result: BlobRef | str
        try:
            for hop in hops:
                file = decode(self._store.path(hop.delta.digest).read_bytes())
                ends.append((file.root, file.parent) if hop.inverted else (file.parent, file.root))
            if any(before[1] != after[0] for before, after in itertools.pairwise(ends)):
                raise DamagedDelta("the deltas do not follow one another")
            result = put(self._store, encode(WeightFile(ends[0][0], ends[-1][1], f"folded {len(ends)}")), self.wall())
        except (DamagedDelta, OSError) as error:
            result = str(error)
        self._finished.put((hops, result))
        self._wake()
