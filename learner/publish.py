"""Publishing weights beside the training loop: round, diff against the last published bits, store, announce.

Invariants: `version` is what the broker was told last and each rank holds its own share of exactly those bits, so the next delta always starts
where actors can be; publications are announced in the order of their steps; at most one is under way.

The loop only rounds the weights to bf16 (a copy on the device); everything else happens in one thread of its own on each rank. A rank diffs
and hashes its share of the tensors, rank 0 puts the shares into one file.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec

from learner.model import Rounded, published_weights, round_weights
from learner.ranks import Ranks
from protocol.delta import Shard, assemble, encode_shard, encode_snapshot, split_names
from protocol.messages import LearnerWelcome, Publish
from protocol.ports import LearnerPort
from protocol.weights import PolicyVersion, Weights, num_bytes, root_hash, root_of_digests, tensor_digest

log = logging.getLogger("learner")
NO_VERSION = PolicyVersion(-1, -1, -1, "")


class Published(NamedTuple):
    """What the broker was told last. `weights` are this rank's share of the bits."""

    version: PolicyVersion
    weights: Weights


class _Share(msgspec.Struct, array_like=True):
    """What one rank contributes to a publication."""

    shards: list[Shard]
    compact: list[Shard]
    digests: dict[str, tuple[str, tuple[int, ...], bytes]]
    num_bytes: int


class Publisher:
    """One rank's part. `port` and `welcome` are given on rank 0 only."""

    def __init__(
        self,
        model: Any,
        ranks: Ranks,
        port: LearnerPort | None,
        welcome: LearnerWelcome | None,
        published: Published | None,
        base_root: Callable[[], str],
        *,
        compact: bool = False,
        threads: int = 1,
        beside: bool = True,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`base_root` gives the root of the run's base (protocol.base); `compact` also encodes positions by class; `beside` is False where
        the port belongs to the loop's own thread."""
        self._model, self._ranks, self._port, self._welcome = model, ranks, port, welcome
        self._base_root, self._compact, self._monotonic = base_root, compact, monotonic
        sizes = {name: 2 * parameter.numel() for name, parameter in model.named_parameters()}
        self._names = share_of(sizes, ranks.rank, ranks.world_size)
        self._full_bytes = sum(sizes.values())
        self._next_number = welcome.next_version if welcome is not None else 0
        self.published = published
        self._snapshot_wanted = False
        self._thread = ThreadPoolExecutor(1, "publisher") if beside else None
        self._encoders = ThreadPoolExecutor(threads, "encoder") if threads > 1 else None
        self._under_way: Future[None] | None = None

    def publish(self, step: int) -> None:
        """Make theta_step available to actors. Returns once the weights are rounded; waits for the publication before, and raises its error."""
        if self.published is None:
            self._publish_first(step)
            return
        self.flush()
        started = self._monotonic()
        everything = self._snapshot_wanted and self._port is not None
        rounded = round_weights(self._model, None if everything else self._names)
        seconds = {"round": self._monotonic() - started}
        if self._thread is None:
            self._work(step, rounded, seconds)
        else:
            self._under_way = self._thread.submit(self._work_or_end, step, rounded, seconds)

    def flush(self) -> None:
        """Wait until everything is announced. Raises the error of a publication that failed."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def check(self) -> None:
        """Raise the error of a publication that failed."""
        if self._under_way is not None and self._under_way.done():
            self.flush()

    def close(self) -> None:
        """Release the threads, after `flush`."""
        for pool in filter(None, (self._thread, self._encoders)):
            pool.shutdown(cancel_futures=True)

    # --- in the publisher's thread

    def _work_or_end(self, step: int, rounded: Rounded, seconds: dict[str, float]) -> None:
        try:
            self._work(step, rounded, seconds)
        except BaseException as error:
            if self._port is None:
                # Rank 0 waits for this share, and this rank's loop for rank 0: only torchrun can end that, and it watches processes.
                log.critical("the publication of step %d failed on rank %d: %r", step, self._ranks.rank, error)
                os._exit(1)
            raise

    def _work(self, step: int, rounded: Rounded, seconds: dict[str, float]) -> None:
        assert self.published is not None
        clock = _Laps(self._monotonic, seconds)
        bits = rounded.bits()
        clock.lap("copy")
        old, new = self.published.weights, {name: bits[name] for name in self._names}
        share = self._share(old, new)
        clock.lap("encode")
        shares = self._ranks.gather(msgspec.msgpack.encode(share))
        clock.lap("gather")
        version = NO_VERSION
        if shares is not None:
            version = self._announce(step, [msgspec.msgpack.decode(data, type=_Share) for data in shares], bits, clock)
        self.published = Published(version, new)

    def _share(self, old: Weights, new: Weights) -> _Share:
        lists = split_names({name: tensor.bits.nbytes for name, tensor in new.items()})
        shards = self._map(lambda names: encode_shard(names, old, new), lists)
        compact = self._map(lambda names: encode_shard(names, old, new, classes=True), lists) if self._compact else []
        digests = self._map(lambda item: (item[0], (item[1].dtype, item[1].shape, tensor_digest(item[1]))), list(new.items()))
        return _Share(shards, compact, dict(digests), num_bytes(new))

    def _map(self, function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        return list(self._encoders.map(function, items) if self._encoders is not None else map(function, items))

    def _announce(self, step: int, shares: list[_Share], bits: Weights, clock: _Laps) -> PolicyVersion:
        """Rank 0: one file of all shares, stored and announced."""
        assert self._port is not None and self._welcome is not None and self.published is not None
        before = self.published.version
        root = root_of_digests({name: digest for share in shares for name, digest in share.digests.items()})
        version = PolicyVersion(self._next_number, step, self._welcome.lineage, root)
        data, header = assemble(self._welcome.run, before, version, [shard for share in shares for shard in share.shards])
        delta = self._port.put_blob(data)
        compact = None
        if self._compact:
            compact = self._port.put_blob(assemble(self._welcome.run, before, version, [s for share in shares for s in share.compact])[0])
        snapshot = None
        if len(bits) == sum(len(share.digests) for share in shares) and self._snapshot_wanted:
            snapshot = self._port.put_blob(encode_snapshot(self._welcome.run, bits, version))
        clock.lap("upload")
        full_bytes = sum(share.num_bytes for share in shares)
        return self._tell(Publish(version, before.number, delta, snapshot, full_bytes, header.bound_bytes, compact, seconds=clock.seconds))

    def _tell(self, publication: Publish) -> PolicyVersion:
        assert self._port is not None
        answer = self._port.publish(publication)
        self._next_number, self._snapshot_wanted = answer.next_version, answer.snapshot_wanted
        return msgspec.structs.replace(publication.version, number=answer.number)

    def _publish_first(self, step: int) -> None:
        """The run's first version, from which all others follow: the base if the files give these very weights, otherwise a snapshot."""
        version = NO_VERSION
        weights = published_weights(self._model)
        if self._port is not None and self._welcome is not None:
            version = PolicyVersion(self._next_number, step, self._welcome.lineage, root_hash(weights))
            is_base = self._base_root() == version.root
            snapshot = None if is_base else self._port.put_blob(encode_snapshot(self._welcome.run, weights, version))
            version = self._tell(Publish(version, -1, None, snapshot, self._full_bytes, self._full_bytes, is_base=is_base))
        self.published = Published(version, {name: weights[name] for name in self._names})


class _Laps:
    """How long each part of a publication took."""

    def __init__(self, monotonic: Callable[[], float], seconds: dict[str, float]) -> None:
        self._monotonic, self.seconds, self._since = monotonic, seconds, monotonic()

    def lap(self, name: str) -> None:
        now = self._monotonic()
        self.seconds[name], self._since = now - self._since, now


def share_of(sizes: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """The names that a rank diffs: about an equal share of the bytes for each, the same on every rank that asks."""
    loads = [0] * world_size
    owners: dict[str, int] = {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += size
    return [name for name in sizes if owners[name] == rank]
