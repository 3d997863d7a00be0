"""Moving blobs to and from the broker in pieces.

Invariant: at most CREDIT pieces are under way, so neither side holds more than CREDIT * CHUNK_BYTES for one transfer, and a transfer that
was cut goes on where it stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

import blake3
import zmq

from broker.keys import KeyFile
from broker.sockets import Channel, client_socket, endpoint, send_or_drop
from protocol import codec, messages
from protocol.errors import BrokerUnreachable, DamagedDelta, RequestRefused
from protocol.messages import CHUNK_BYTES
from protocol.weights import BlobRef

CREDIT: Final = 8
RETRY_SECONDS: Final = 3.0
POLL_MILLISECONDS: Final = 200
GIVE_UP_SECONDS: Final = 300.0


class BlobClient:
    """One connection to the blobs channel; used by one thread at a time."""

    def __init__(self, context: zmq.Context[Any], address: str, key: KeyFile, identity: bytes) -> None:
        self._address, self._stopped = address, threading.Event()
        self._socket = client_socket(context, address, Channel.BLOBS, key, identity)
        self._socket.connect(endpoint(address, Channel.BLOBS))

    def stop(self) -> None:
        """Give up the transfer that is under way; may be called from another thread."""
        self._stopped.set()

    def close(self) -> None:
        """Release the connection."""
        self._socket.close(linger=0)

    def get(self, blob: BlobRef) -> bytes:
        """The bytes of a blob. Raises RequestRefused if the store does not have it, DamagedDelta if it is not what its name says."""
        data = bytearray(blob.size)
        missing = set(range(0, blob.size, CHUNK_BYTES)) or {0}
        asked: set[int] = set()

        def ask() -> None:
            for offset in sorted(missing - asked)[: CREDIT - len(asked)]:
                self._send(messages.GetChunk(blob.digest, offset))
                asked.add(offset)

        def take(message: messages.ToBlobClient, payload: bytes | memoryview) -> None:
            if isinstance(message, messages.Chunk) and message.offset in missing and message.size == blob.size:
                data[message.offset : message.offset + len(payload)] = payload
                missing.discard(message.offset)
                asked.discard(message.offset)

        self._exchange(blob, ask, take, lambda: not missing, asked.clear)
        if blake3.blake3(data).hexdigest() != blob.digest:
            raise DamagedDelta(f"blob {blob.digest[:16]} arrived with other bytes than its name says")
        return bytes(data)

    def put(self, data: bytes) -> BlobRef:
        """Store `data` on the broker's machine."""
        blob = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        progress = {"sent": 0, "have": 0, "stored": False}

        def ask() -> None:
            while progress["sent"] - progress["have"] < CREDIT * CHUNK_BYTES and (progress["sent"] < blob.size or not blob.size):
                offset = int(progress["sent"])
                chunk = memoryview(data)[offset : offset + CHUNK_BYTES]
                self._send(messages.PutChunk(blob.digest, blob.size, offset), chunk)
                progress["sent"] = offset + len(chunk)
                if not blob.size:
                    return

        def take(message: messages.ToBlobClient, payload: bytes | memoryview) -> None:
            del payload
            if isinstance(message, messages.PutOk):
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
        """Ask and take until finished; after RETRY_SECONDS of silence ask again for what is missing."""
        heard_at = asked_at = time.monotonic()
        while not finished():
            if self._stopped.is_set():
                raise RequestRefused(f"blob {blob.digest[:16]}", "the transfer was given up")
            ask()
            if self._socket.poll(POLL_MILLISECONDS):
                message, payload = codec.to_blob_client.decode(self._socket.recv_multipart())
                if getattr(message, "digest", "") != blob.digest:
                    continue  # an answer to an earlier transfer
                if isinstance(message, messages.BlobRefused):
                    raise RequestRefused(f"blob {blob.digest[:16]}", message.reason)
                heard_at = time.monotonic()
                take(message, payload)
            now = time.monotonic()
            if now - heard_at > GIVE_UP_SECONDS:
                raise BrokerUnreachable(self._address, now - heard_at, f"blob {blob.digest[:16]}")
            if now - max(heard_at, asked_at) >= RETRY_SECONDS:
                asked_at = now
                again()

    def _send(self, message: messages.BlobMessage, payload: bytes | memoryview = b"") -> None:
        """Send, waiting for a connection; a broker that is away for long is noticed by whoever waits for the answer."""
        send_or_drop(self._socket, codec.encode(message, payload), POLL_MILLISECONDS)
