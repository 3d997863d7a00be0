"""An actor's files: fetched from a relay beside it or from the broker, kept as long as somebody may want them.

Invariant: a path that was handed out names a complete, verified file until it is forgotten. All downloads happen in one thread, one after the
other, so a file that two ask for is fetched once.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import zmq

from broker.blob_client import BlobClient
from broker.blobs import BlobStore
from broker.keys import KeyFile
from broker.relay import Relay
from protocol.errors import DamagedDelta, PeerError, ProtocolError
from protocol.weights import BlobRef

log = logging.getLogger("actor")
NUM_RELAYED: Final = 16
"""Weight files that a relay keeps for its neighbours after it has no use for them itself."""
KEPT_SECONDS: Final = 30 * 24 * 3600.0
"""The policy's files are kept between runs, until nobody has used them for this long."""
RELAY_SECONDS: Final = 30.0
"""A relay that is silent for this long is passed over."""
PASSED_OVER_SECONDS: Final = 60.0
"""A relay that did not help is not asked again for this long."""


class Sources:
    """Where an actor's files come from: `relay`, the address of an actor beside it, and `serve`, an address to be one for others."""

    def __init__(self, relay: str | None = None, serve: str | None = None, cache: Path | None = None) -> None:
        self.relay, self.serve = relay, serve
        self.cache = cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "slipstream" / "blobs"


class Downloads:
    """The files of one actor process."""

    def __init__(self, context: zmq.Context[Any], address: str, key: KeyFile, identity: bytes, sources: Sources) -> None:
        """Raises AddressInUse if `sources.serve` cannot be bound."""
        self._folder = tempfile.TemporaryDirectory(prefix="slipstream-files-")
        self._passing, self._lasting = BlobStore(Path(self._folder.name)), BlobStore(sources.cache)
        self._lasting.remove_unused(time.time() - KEPT_SECONDS)
        self._broker = BlobClient(context, address, key, identity)
        self._relay = (
            BlobClient(context, sources.relay, key, identity, relay=True, give_up_seconds=RELAY_SECONDS) if sources.relay else None
        )
        self._thread = ThreadPoolExecutor(1, "blobs")
        self._policy_files: set[str] = set()
        self._relay_again_at = 0.0
        self._lock = threading.Lock()
        self._in_use: Counter[str] = Counter()
        """How often this actor has asked for a file and not forgotten it."""
        self._relayed: OrderedDict[str, None] = OrderedDict()
        self._served = Relay(sources.serve, key, (self._passing, self._lasting), self._start_for_neighbour) if sources.serve else None
        if self._served is not None:
            self._served.start()
            log.info("serving weight files to the actors beside this one at %s", self._served.address)

    @property
    def served_at(self) -> str:
        """Where this actor's relay listens; empty if it is none."""
        return self._served.address if self._served is not None else ""

    def keep(self, policy_files: list[BlobRef]) -> None:
        """These files are the policy's: they are worth keeping between runs."""
        self._policy_files |= {blob.digest for blob in policy_files}

    def start(self, blob: BlobRef) -> Future[Path]:
        """Bring a file here; its path. The future raises RequestRefused, DamagedDelta or BrokerUnreachable."""
        with self._lock:
            self._in_use[blob.digest] += 1
        future = self._thread.submit(self._bring, blob)
        future.add_done_callback(lambda done: self.forget(blob) if done.cancelled() or done.exception() is not None else None)
        return future

    def forget(self, blob: BlobRef) -> None:
        """A file is not needed any more by this actor; a relay keeps it for a while for others."""
        with self._lock:
            self._in_use[blob.digest] -= 1
        self._offer(blob)

    def _start_for_neighbour(self, blob: BlobRef) -> Future[Path]:
        future = self._thread.submit(self._bring, blob)
        future.add_done_callback(lambda _: self._offer(blob))
        return future

    def _offer(self, blob: BlobRef) -> None:
        """A file that this actor need not keep; of those the last few stay here. May be called from any thread."""
        with self._lock:
            if blob.digest in self._policy_files:
                return
            self._relayed[blob.digest] = None
            self._relayed.move_to_end(blob.digest)
            while len(self._relayed) > (NUM_RELAYED if self._served is not None else 0):
                digest, _ = self._relayed.popitem(last=False)
                if self._in_use[digest] <= 0:  # otherwise it is offered again when it is forgotten
                    del self._in_use[digest]
                    self._passing.remove(digest)

    def stop(self) -> None:
        """Give up what is under way and wait for the thread."""
        if self._served is not None:
            self._served.stop()
        for client in filter(None, (self._broker, self._relay)):
            client.stop()
        self._thread.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Release connections and files; after `stop`."""
        for client in filter(None, (self._broker, self._relay)):
            client.close()
        self._folder.cleanup()

    def _bring(self, blob: BlobRef) -> Path:
        store = self._lasting if blob.digest in self._policy_files else self._passing
        if self._relay is not None and time.monotonic() >= self._relay_again_at:
            try:
                return self._relay.get(blob, store)
            except (PeerError, ProtocolError, DamagedDelta) as error:
                log.warning("the relay did not help, asking the broker for the next %.0f s: %s", PASSED_OVER_SECONDS, error)
                self._relay_again_at = time.monotonic() + PASSED_OVER_SECONDS
        return self._broker.get(blob, store)
