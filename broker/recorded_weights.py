"""The weights of any version of a recorded run, built again from its files: the base or a snapshot, and deltas.

Invariant: what `at` returns has the root that was published for that version.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from broker.blobs import BlobStore
from broker.publications import Hop, Publication, Publications, Way
from protocol.base import WEIGHTS_SUFFIX, base_tensors
from protocol.delta import Delta, apply_in_place, read_header
from protocol.errors import RootMismatch, WeightsError
from protocol.fold import Leg, fold
from protocol.messages import NamedBlob
from protocol.safetensors_file import deserialize
from protocol.weights import BlobRef, Tensor, Weights, root_hash


class RecordedWeights:
    """One set of weights that is moved from version to version. For one thread."""

    def __init__(self, publications: Publications, blobs: BlobStore, policy_files: list[NamedBlob]) -> None:
        """`policy_files` are those of the policy that the run started from."""
        self._publications, self._blobs = publications, blobs
        self._policy_files = policy_files
        self._number, self._weights = -1, Weights()

    def at(self, number: int) -> Weights:
        """The weights of version `number`; good until the next call. Raises WeightsError if the files that lead there are not all left."""
        if number == self._number:
            return self._weights
        published = self._publications.by_number.get(number)
        if published is None:
            raise WeightsError(f"the run has no version {number}. It has versions 0 to {self._publications.next_number - 1}.")
        way, self._number = self._way(self._number, published), -1
        if way.start != "held":
            self._weights = self._start(way)
        for hop in way.hops:
            self._weights = _follow(self._map(hop.delta), self._weights, inverted=hop.inverted)
        found = root_hash(self._weights)
        if found != published.version.root:
            raise RootMismatch(published.version.root, found, f"version {number}, built again from its files")
        self._number = number
        return self._weights

    def _way(self, held: int, published: Publication) -> Way:
        """The shorter of the ways from version `held` and from nothing."""
        delta, number = published.fact.delta, published.version.number
        if published.fact.parent == held and delta is not None and published.has_delta:  # as most often, and found without a search
            return Way("held", None, (Hop(delta),))
        ways = [self._publications.way_between(held, number), self._publications.way_to(number)]
        found = min((way for way in ways if way is not None), key=lambda way: len(way.hops), default=None)
        if found is None:
            raise WeightsError(f"version {number} cannot be built again: the deltas that lead there were dropped to save room.")
        return found

    def _start(self, way: Way) -> Weights:
        if way.start == "base":
            return base_weights(self._blobs, self._policy_files)
        assert way.snapshot is not None
        return {name: _own(tensor) for name, tensor in deserialize(self._map(way.snapshot))[1].items()}

    def _map(self, blob: BlobRef) -> memoryview:
        with recorded_file(self._blobs, blob).open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def base_weights(blobs: BlobStore, policy_files: list[NamedBlob]) -> Weights:
    """The policy's own weights, rounded to bf16. Raises WeightsError."""
    paths = [recorded_file(blobs, file.blob) for file in policy_files if file.name.endswith(WEIGHTS_SUFFIX)]
    return {name: _own(tensor) for name, tensor in base_tensors(paths)}


def recorded_file(blobs: BlobStore, blob: BlobRef) -> Path:
    """A file of the recording. Raises WeightsError if it is not there whole."""
    if blobs.size(blob.digest) != blob.size:
        raise WeightsError(f"the file {blob.digest[:16]} of the recording is missing or cut. Copy the run's blobs/ directory whole.")
    return blobs.path(blob.digest)


def moved(data: bytes | memoryview, weights: Weights) -> Weights:
    """The weights that a weight file leads to from `weights`, which are not changed. Raises DamagedDelta."""
    if read_header(data).kind == "snapshot":
        return deserialize(data)[1]
    return _follow(data, {name: _own(tensor) for name, tensor in weights.items()}, inverted=False)


def _follow(data: bytes | memoryview, weights: Weights, *, inverted: bool) -> Weights:
    if inverted:
        data, _ = fold([Leg(data, inverted=True)])
    delta = Delta(data)
    if not delta.keeps_layout:
        raise WeightsError("a delta of the recording adds or removes tensors; only runs of one layout can be built again.")
    apply_in_place(delta, weights)
    return weights


def _own(tensor: Tensor) -> Tensor:
    """A copy whose bits can be written."""
    return tensor._replace(bits=tensor.bits.copy())
