"""Moving blobs to and from a store in pieces.

Invariant: at most CREDIT pieces are under way, so neither side holds more than CREDIT * CHUNK_BYTES for one transfer; what has arrived is in a
file; and a transfer that was cut goes on where it stopped as soon as there is a connection again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import blake3
import zmq
from zmq.utils.monitor import recv_monitor_message

from broker.blobs import BlobStore
from broker.keys import KeyFile
from broker.pieces import CREDIT, Pieces
from broker.put_off import ASK_AGAIN_SECONDS, PutOff
from broker.sockets import NO_CONNECTION_SECONDS, Channel, Renewal, client_socket, endpoint, send_or_drop
from protocol import codec, messages
from protocol.errors import BrokerUnreachable, DamagedDelta, RequestRefused
from protocol.messages import CHUNK_BYTES
from protocol.weights import BlobRef

log = logging.getLogger("blobs")
RETRY_SECONDS: Final = 15.0
"""Questions without an answer for this long are asked again, even if the connection seems to hold."""
POLL_MILLISECONDS: Final = 200
SAY_SECONDS: Final = 5.0
GIVE_UP_SECONDS: Final = 300.0
PATIENCE: Final = 20
"""A relay that says that a file is coming is believed this many times longer than silence."""


class BlobClient:
    """One connection to a store; used by one thread at a time."""

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        key: KeyFile,
        identity: bytes,
        *,
        relay: bool = False,
        give_up_seconds: float = GIVE_UP_SECONDS,
        put_off: PutOff | None = None,
    ) -> None:
        """Connect to the blobs channel of the broker at `address`, or with `relay` to the one socket of an actor that serves what it has.

        `put_off` is kept up while the other side has no room for an upload, which is waited for without end.
        """
        self._put_off = put_off or PutOff(log)
        self._address, self._stopped, self._give_up_seconds = address, threading.Event(), give_up_seconds
        server = key.public if relay else key.broker
        self._socket = client_socket(context, address, Channel.BLOBS, key._replace(broker=server), identity)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        where = address if relay else endpoint(address, Channel.BLOBS)
        self._socket.connect(where)
        self._renewal, self._connected_at = Renewal(self._socket, where), time.monotonic()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def stop(self) -> None:
        """Give up the transfer that is under way; may be called from another thread."""
        self._stopped.set()

    def close(self) -> None:
        """Release the connection."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def get(self, blob: BlobRef, store: BlobStore) -> Path:
        """Bring a blob into `store`; its path there.

        Raises RequestRefused if the other side does not have it, DamagedDelta if what came is not what its name says, BrokerUnreachable.
        """
        if store.holds(blob):
            return store.path(blob.digest)
        pieces = Pieces(blob.size)
        clock = _Rate()
        with store.incoming(blob.digest) as file:

            def ask() -> None:
                for piece in pieces.ask():
                    self._send(messages.GetChunk(blob.digest, piece.offset, piece.length, blob.size))

            def take(message: messages.ToBlobClient, payload: bytes | memoryview) -> None:
                if not isinstance(message, messages.Chunk):
                    return
                if message.size != blob.size:
                    raise DamagedDelta(f"blob {blob.digest[:16]} has {message.size} bytes on the other side, {blob.size} were announced")
                if pieces.receive(message.offset, len(payload)):
                    os.pwrite(file.fileno(), payload, message.offset)
                    pieces.adapt(clock.add(len(payload)))

            def again() -> None:
                pieces.lose()
                clock.restart()

            self._exchange(blob, ask, take, lambda: pieces.is_complete, again)
            file.flush()
            if not store.keep(blob.digest, file):
                raise DamagedDelta(f"blob {blob.digest[:16]} arrived with other bytes than its name says")
        return store.path(blob.digest)

    def put(self, data: bytes) -> BlobRef:
        """Store `data` on the broker's machine."""
        blob = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        progress = {"sent": 0, "have": 0, "stored": False}
        ends = {0}
        """Where a piece that was sent ended."""

        def ask() -> None:
            while progress["sent"] - progress["have"] < CREDIT * CHUNK_BYTES and (progress["sent"] < blob.size or not blob.size):
                offset = int(progress["sent"])
                chunk = memoryview(data)[offset : offset + CHUNK_BYTES]
                self._send(messages.PutChunk(blob.digest, blob.size, offset), chunk)
                progress["sent"] = offset + len(chunk)
                ends.add(offset + len(chunk))
                if not blob.size:
                    return

        def take(message: messages.ToBlobClient, payload: bytes | memoryview) -> None:
            del payload
            if isinstance(message, messages.PutOk):
                if message.offset not in ends:
                    progress["sent"] = message.offset  # the store has another part of it than was sent: go on from there
                progress["have"] = message.offset
                progress["stored"] = message.stored

        def again() -> None:
            progress["sent"] = progress["have"]

        self._exchange(blob, ask, take, lambda: bool(progress["stored"]), again)
        return blob

    def _exchange(
        self,
        blob: BlobRef,
        ask: Callable[[], None],
        take: Callable[[messages.ToBlobClient, bytes | memoryview], None],
        finished: Callable[[], bool],
        again: Callable[[], None],
    ) -> None:
        """Ask and take until finished; after a cut, RETRY_SECONDS of silence or a "not now", ask again for what is missing."""
        heard_at = asked_at = gained_at = time.monotonic()
        is_lost, ask_from, said_at = False, 0.0, heard_at
        while not finished():
            if self._stopped.is_set():
                raise RequestRefused(f"blob {blob.digest[:16]}", "the transfer was given up")
            is_lost = self._has_reconnected() or is_lost
            if not self._socket.poll(0, zmq.POLLOUT):
                self._renewal.consider(self._connected_at, time.monotonic(), NO_CONNECTION_SECONDS)
            else:
                self._connected_at = time.monotonic()
                if is_lost or 0 < ask_from <= time.monotonic():
                    asked_at, is_lost, ask_from = time.monotonic(), False, 0.0
                    again()
                if not ask_from:
                    ask()
            ready = dict(self._poller.poll(POLL_MILLISECONDS))
            now = time.monotonic()
            if self._socket in ready:
                message, payload = codec.to_blob_client.decode(self._socket.recv_multipart())
                if isinstance(message, messages.NotNow):
                    if message.request == blob.digest:
                        heard_at = gained_at = now
                        ask_from = now + ASK_AGAIN_SECONDS
                        self._put_off.told(f"the upload of blob {blob.digest[:16]}", message.reason, now)
                    continue
                if message.digest != blob.digest:
                    continue  # an answer to an earlier transfer
                if isinstance(message, messages.BlobRefused):
                    raise RequestRefused(f"blob {blob.digest[:16]}", message.reason)
                heard_at = now
                gained_at = now if payload or isinstance(message, messages.PutOk) else gained_at
                if not ask_from:
                    self._put_off.over()
                take(message, payload)
            if now - gained_at > PATIENCE * self._give_up_seconds:
                raise BrokerUnreachable(self._address, now - gained_at, f"blob {blob.digest[:16]}, which is always coming and never comes")
            if now - max(heard_at, said_at) > SAY_SECONDS:
                said_at = now
                log.warning("waiting for blob %s, %s was last heard %.0f s ago", blob.digest[:16], self._address, now - heard_at)
            if now - heard_at > self._give_up_seconds:
                raise BrokerUnreachable(self._address, now - heard_at, f"blob {blob.digest[:16]}")
            if now - max(heard_at, asked_at) >= RETRY_SECONDS:
                asked_at = now
                again()

    def _has_reconnected(self) -> bool:
        """Whether there was a new connection since this was asked before."""
        found = False
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            found = True
        return found

    def _send(self, message: messages.BlobMessage, payload: bytes | memoryview = b"") -> None:
        """Send, waiting for a connection; a broker that is away for long is noticed by whoever waits for the answer."""
        send_or_drop(self._socket, codec.encode(message, payload), POLL_MILLISECONDS)


class _Rate:
    """Bytes per second of a download since its connection was made."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._num_bytes = time.monotonic(), 0

    def add(self, num_bytes: int) -> float:
        self._num_bytes += num_bytes
        return self._num_bytes / max(1e-6, time.monotonic() - self._since)
