"""Publishing weights: diff against the last published bits, store, announce.

Invariant: `published` are the bits that the broker knows under `version`, so the next delta always starts where actors can be.
"""

from __future__ import annotations

from typing import NamedTuple

from protocol.delta import encode_delta, encode_snapshot, read_header
from protocol.messages import LearnerWelcome, Publish
from protocol.ports import LearnerPort
from protocol.weights import PolicyVersion, Weights, num_bytes, root_hash


class Published(NamedTuple):
    """What the broker has been told last."""

    version: PolicyVersion
    weights: Weights
    bytes_since_snapshot: int


class Publisher:
    """Publishes from rank 0."""

    def __init__(self, port: LearnerPort, welcome: LearnerWelcome, published: Published | None) -> None:
        self._port, self._run, self._lineage = port, welcome.run, welcome.lineage
        self._next_number = welcome.next_version
        self.published = published

    def publish(self, step: int, weights: Weights) -> dict[str, float]:
        """Make theta_step available to actors; returns metrics.

        The first publication of a run carries a snapshot, and so does one before which the deltas since the last snapshot have outgrown
        the weights themselves: a late joiner never fetches more than twice the weights.
        """
        version = PolicyVersion(self._next_number, step, self._lineage, root_hash(weights))
        full_bytes = num_bytes(weights)
        previous = self.published
        delta = snapshot = None
        since = 0
        bound = full_bytes
        if previous is not None:
            data = encode_delta(self._run, previous.weights, weights, previous.version, version)
            delta, bound = self._port.put_blob(data), read_header(data).bound_bytes
            since = previous.bytes_since_snapshot + delta.size
        if previous is None or since > full_bytes:
            snapshot, since = self._port.put_blob(encode_snapshot(self._run, weights, version)), 0
        parent = -1 if previous is None else previous.version.number
        answer = self._port.publish(Publish(version, parent, delta, snapshot, full_bytes, bound))
        self._next_number = answer.next_version
        known = PolicyVersion(answer.number, step, self._lineage, version.root)
        self.published = Published(known, weights, since)
        size = delta.size if delta is not None else full_bytes
        return {"publication_bytes": size, "publication_bound_bytes": bound, "full_bytes": full_bytes}
