"""Folding deltas in the store, beside everything else that the broker does.

Invariant: a way is folded at most once while its result is kept; whoever asks gets the result, or is told to come back.
"""

from __future__ import annotations

import logging
import mmap
from collections import OrderedDict
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

import blake3

from broker.blobs import BlobStore
from broker.publications import Hop
from protocol.errors import DamagedDelta
from protocol.weights import BlobRef

log = logging.getLogger("broker")
NUM_KEPT: Final = 32
"""Results kept; older files are removed unless they have become an anchor."""
Way = tuple[Hop, ...]
Finished = tuple[Way, BlobRef | str]
Run = Callable[[Callable[[], None]], object]
"""Runs a job: at once, or in another thread."""


class Folds:
    """Folded deltas by the way that they stand for."""

    def __init__(self, store: BlobStore, run: Run, wake: Callable[[], None]) -> None:
        """`run` carries a job out; `wake` is called, in whatever thread that was, once its result can be had by `collect`."""
        self._store, self._run, self._wake = store, run, wake
        self._found: OrderedDict[Way, BlobRef] = OrderedDict()
        self._failed: dict[Way, str] = {}
        self._pending: set[Way] = set()
        self._finished: SimpleQueue[Finished] = SimpleQueue()
        self._uncollected: list[Finished] = []
        self._pinned = ""

    def get(self, hops: Way) -> BlobRef | None:
        """The folded delta for a way of two deltas or more (or of one walked back); None while it is being made, or if it cannot be."""
        if hops not in self._found and hops not in self._pending and hops not in self._failed:
            self._pending.add(hops)
            self._run(lambda: self._fold(hops))
            self._take_in()
        if hops in self._found:
            self._found.move_to_end(hops)
        return self._found.get(hops)

    def has_failed(self, hops: Way) -> bool:
        """Whether this way, or one that it begins with, could not be folded."""
        return any(hops[: len(failed)] == failed for failed in self._failed)

    def forgive(self) -> None:
        """Try again what failed before, as when there was no room for it."""
        self._failed.clear()

    def collect(self) -> list[Finished]:
        """The ways that were folded since the last call, with their file or the reason why there is none."""
        self._take_in()
        collected, self._uncollected = self._uncollected, []
        return collected

    def pin(self, anchor: BlobRef) -> None:
        """Never remove this file. The one pinned before is not known here any more; whoever asked for it removes it."""
        self._found = OrderedDict((hops, blob) for hops, blob in self._found.items() if blob.digest != self._pinned)
        self._pinned = anchor.digest

    def _take_in(self) -> None:
        while not self._finished.empty():
            hops, result = self._finished.get()
            self._pending.discard(hops)
            if isinstance(result, BlobRef):
                self._found[hops] = result
            else:
                self._failed[hops] = result
                log.error("a way of %d deltas cannot be folded: %s", len(hops), result)
            self._uncollected.append((hops, result))
        while len(self._found) > NUM_KEPT + len(self._uncollected):  # what is not collected may yet be pinned
            _, blob = self._found.popitem(last=False)
            if blob.digest != self._pinned and blob not in self._found.values():  # two ways may fold into the same file
                self._store.remove(blob.digest)

    def _fold(self, hops: Way) -> None:
        try:
            from protocol.fold import Leg, fold  # compiles loops, which only a broker that folds should pay for

            legs = [Leg(self._map(hop.delta), hop.inverted) for hop in hops]
            result: BlobRef | str = self._store.add(fold(legs)[0])
        except Exception as error:  # whatever it was, somebody waits for the answer
            result = str(error) or repr(error)
        self._finished.put((hops, result))
        self._wake()

    def _map(self, blob: BlobRef) -> memoryview:
        with self._store.path(blob.digest).open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        # A bit that flipped may decode, and would be wrong in all that is folded with it.
        if blake3.blake3(data).hexdigest() != blob.digest:
            raise DamagedDelta(f"blob {blob.digest[:16]} has other bytes in the store than its name says")
        return data
