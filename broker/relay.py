"""A relay: an actor serves the weight files it has to the actors beside it, so that each crosses a slow link to its site once.

Invariant: a question is kept until its file is here or cannot be had; whoever waits hears once a second that it is coming.

A relay accepts only the key that it has itself: actors that share a relay share one actor key. Files are named by the digest of their bytes, and
whoever fetches one checks it, so a relay cannot pass on anything but what was published.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final

import zmq

from broker import limits
from broker.blobs import BlobStore
from broker.door import Door
from broker.guard import Guard
from broker.keys import KeyFile
from broker.sockets import Authenticator, server_socket
from broker.turned_away import TurnedAway
from protocol import codec, messages
from protocol.errors import AddressInUse, MalformedFrame, SlipstreamError
from protocol.messages import HEARTBEAT_SECONDS
from protocol.weights import BlobRef

log = logging.getLogger("actor")
DOMAIN: Final = "RELAY"
MAX_WAITING: Final = 4096
"""Questions kept for files that are not here yet; more are dropped, and asked again."""
Question = tuple[bytes, messages.GetChunk]


class Relay(threading.Thread):
    """Serves chunks until stopped.

    consumes:     questions for pieces of files
      waits for:    the next one, or for a file to arrive
      unblocked by: neighbours, and the download of a file that is not here
    produces:     one answer for each; and while a file is on its way, a sign of life
    """

    def __init__(self, address: str, key: KeyFile, stores: Sequence[BlobStore], obtain: Callable[[BlobRef], Future[Any]]) -> None:
        """Bind. `obtain` starts to bring a file into one of `stores`. Raises AddressInUse."""
        super().__init__(name="relay", daemon=True)
        self._stores, self._obtain = stores, obtain
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator = Authenticator(self._context, {DOMAIN: {key.public}})
        self._socket = server_socket(self._context, DOMAIN, key, limits.relay())
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._release()
            raise AddressInUse(address, str(error)) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._waiting: dict[str, list[Question]] = {}
        self._coming: dict[str, Future[Any]] = {}
        self._stopped = threading.Event()
        self._door = Door(DOMAIN.lower(), self._socket, limits.relay(), TurnedAway(log))
        self._guard = Guard([self._door], self._stopped.set)
        self.num_bytes = 0

    def run(self) -> None:
        """The loop."""
        self._guard.start()
        told_at = 0.0
        while not self._stopped.is_set():
            if self._door.wait(50):
                self._take()
            for digest in [digest for digest, future in self._coming.items() if future.done()]:
                self._arrived(digest)
            if time.monotonic() - told_at >= HEARTBEAT_SECONDS:
                told_at = time.monotonic()
                for questions in self._waiting.values():
                    for identity, question in dict(questions).items():
                        self._send(identity, messages.Chunk(question.digest, question.offset, question.size), b"")
        self._guard.stop()
        self._release()

    def stop(self) -> None:
        """End the loop and wait for it."""
        self._stopped.set()
        if self.is_alive():
            self.join()

    def _take(self) -> None:
        received = self._door.receive()
        identity = received.identity
        try:
            message, _ = codec.from_blob_client.decode(received.frames)
        except MalformedFrame as error:
            self._door.refuse(received, error)
            return
        if not isinstance(message, messages.GetChunk):
            self._send(identity, messages.BlobRefused(message.digest, "a relay takes no files"), b"")
        elif not self._answer(identity, message):
            self._wait((identity, message))

    def _answer(self, identity: bytes, question: messages.GetChunk) -> bool:
        for store in self._stores:
            try:
                size, data = store.size(question.digest), store.read(question.digest, question.offset, question.length)
            except OSError as error:
                log.warning("the relay cannot read %s: %s", question.digest[:16], error)
                continue
            if size is not None and data is not None:
                self.num_bytes += len(data)
                self._send(identity, messages.Chunk(question.digest, question.offset, size), data)
                return True
        return False

    def _wait(self, question: Question) -> None:
        digest = question[1].digest
        if sum(map(len, self._waiting.values())) < MAX_WAITING:
            self._waiting.setdefault(digest, []).append(question)
        if digest not in self._coming:
            self._coming[digest] = self._obtain(BlobRef(digest, question[1].size))

    def _arrived(self, digest: str) -> None:
        error = self._coming.pop(digest).exception()
        for identity, question in self._waiting.pop(digest, []):
            if error is not None or not self._answer(identity, question):
                reason = str(error) if isinstance(error, SlipstreamError) else "the relay could not fetch it"
                self._send(identity, messages.BlobRefused(digest, reason[: messages.MAX_TEXT]), b"")

    def _send(self, identity: bytes, message: messages.ToBlobClient, data: bytes) -> None:
        self._door.send(identity, codec.encode(message, data))

    def _release(self) -> None:
        self._socket.close(linger=200)
        self._authenticator.close()
        self._context.term()
