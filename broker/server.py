"""The broker's shell: sockets around `broker.core.Broker`.

One thread serves control, actors and learner; another serves blobs, so that a transfer of gigabytes never delays an acknowledgement.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import Counter
from typing import Any

import zmq

from broker.blobs import BlobStore
from broker.core import LEARNER, PUBLISHER, Broker, actor_peer
from broker.keys import KeyFile, Role
from broker.sockets import Authenticator, Channel, bind_all, channel_keys, receive
from protocol import codec, messages
from protocol.errors import MalformedFrame

log = logging.getLogger("broker")
TICK_SECONDS = 0.25
MAX_MESSAGES_PER_ROUND = 256


class Wakeup:
    """Lets another thread end a poll. `set` may be called from any thread."""

    def __init__(self) -> None:
        self.receiver, self._sender = socket.socketpair()
        self.receiver.setblocking(False)
        self._sender.setblocking(False)

    def set(self) -> None:
        """End the poll that is under way, or the next one."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is set already; closed: nobody polls any more
            self._sender.send(b"1")

    def clear(self) -> None:
        """Take in that it was set."""
        with contextlib.suppress(BlockingIOError):
            self.receiver.recv(4096)

    def close(self) -> None:
        """Release the descriptors."""
        self.receiver.close()
        self._sender.close()


class Server:
    """Serves one run until told to shut down."""

    def __init__(self, broker: Broker, address: str, key: KeyFile, allowed: dict[Role, set[str]], wakeup: Wakeup) -> None:
        """Bind the sockets. `wakeup` is set by work beside the broker when its `tick` has something to collect. Raises AddressInUse."""
        self._broker, self._wakeup = broker, wakeup
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator = Authenticator(self._context, channel_keys(allowed))
        try:
            self.address, self._sockets = bind_all(self._context, address, key)
        except BaseException:
            self._authenticator.close()
            self._context.term()
            raise
        self._stopping = threading.Event()
        self._blobs = BlobThread(self._sockets[Channel.BLOBS], broker.blobs, self._stopping)
        self.malformed: Counter[str] = Counter()
        self.undeliverable = 0

    def serve(self) -> None:
        """The main loop.

        consumes:     messages of control, actors and learner
          waits for:    any of them, or the next tick
          unblocked by: peers, and time
        produces:     answers, after the journal has committed what they rest on
          waits for:    nothing: what cannot be sent at once is dropped, and asked for again by whoever misses it
        """
        self._blobs.start()
        poller = zmq.Poller()
        channels = (Channel.CONTROL, Channel.ACTORS, Channel.LEARNER)
        for channel in channels:
            poller.register(self._sockets[channel], zmq.POLLIN)
        poller.register(self._wakeup.receiver, zmq.POLLIN)
        next_tick = 0.0
        try:
            while not self._stopping.is_set():
                ready = dict(poller.poll(max(0, int((next_tick - time.monotonic()) * 1000))))
                for channel in channels:
                    if self._sockets[channel] in ready:
                        self._drain(channel)
                if self._wakeup.receiver.fileno() in ready:
                    self._wakeup.clear()
                    next_tick = 0.0
                if time.monotonic() >= next_tick:
                    self._broker.tick(time.monotonic(), time.time())
                    next_tick = time.monotonic() + TICK_SECONDS
                self._flush()
        finally:
            self.close()
        if self._blobs.failure is not None:
            raise self._blobs.failure

    def stop(self) -> None:
        """End `serve` soon; may be called from any thread or a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """Release the sockets and the journal."""
        self._stopping.set()
        if self._blobs.is_alive():
            self._blobs.join()
        for opened in self._sockets.values():
            opened.close(linger=500)
        self._wakeup.close()
        self._authenticator.close()
        self._context.term()
        self._broker.close()

    def _drain(self, channel: Channel) -> None:
        for _ in range(MAX_MESSAGES_PER_ROUND):
            try:
                identity, *frames = receive(self._sockets[channel])
            except zmq.Again:
                return
            try:
                self._take(channel, identity, frames)
            except MalformedFrame as error:
                self.malformed[error.reason] += 1
                log.warning("refused a message on %s from %r: %s", channel.name.lower(), identity[:64], error)

    def _take(self, channel: Channel, identity: bytes, frames: list[bytes]) -> None:
        now, wall = time.monotonic(), time.time()
        if channel is Channel.CONTROL:
            request, _ = codec.from_control.decode(frames)
            if isinstance(request, messages.ShutDown):
                self.stop()
            answer = self._broker.control_message(request, now, wall)
            self._flush()
            self._send(channel, identity, answer, b"")
        elif channel is Channel.ACTORS:
            message, payload = codec.from_actor.decode(frames)
            actor, epoch = _parse_identity(identity)
            self._broker.actor_message(actor, epoch, message, payload, now, wall)
        else:
            learner_message, _ = codec.from_learner.decode(frames)
            _, session = _parse_identity(identity)
            self._broker.learner_message(session, learner_message, now, wall)

    def _flush(self) -> None:
        for outgoing in self._broker.flush():
            if outgoing.peer in (LEARNER, PUBLISHER):
                self._send(Channel.LEARNER, make_identity(outgoing.peer, outgoing.session), outgoing.message, outgoing.payload)
            else:
                name = outgoing.peer.removeprefix(actor_peer(""))
                self._send(Channel.ACTORS, make_identity(name, outgoing.session), outgoing.message, outgoing.payload)

    def _send(self, channel: Channel, identity: bytes, message: messages.Message, payload: bytes) -> None:
        try:
            self._sockets[channel].send_multipart([identity, *codec.encode(message, payload)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.undeliverable += 1


class BlobThread(threading.Thread):
    """Serves blobs.

    consumes:     pieces to store and requests for pieces
      waits for:    the next one, or the server's end
      unblocked by: clients, each of which keeps only a few requests open (its credit)
    produces:     one answer for each
    """

    def __init__(self, channel: zmq.Socket[bytes], store: BlobStore, stopping: threading.Event) -> None:
        super().__init__(name="blobs", daemon=True)
        self._socket, self._store, self._stopping = channel, store, stopping
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self.failure = error  # without blobs nothing can go on: `Server.serve` raises it, and the supervisor starts the broker again
            raise
        finally:
            self._stopping.set()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            if not self._socket.poll(100):
                continue
            identity, *frames = receive(self._socket)
            try:
                message, payload = codec.from_blob_client.decode(frames)
            except MalformedFrame as error:
                log.warning("refused a message on blobs from %r: %s", identity[:64], error)
                continue
            answer, data = self._answer(message, payload)
            try:
                self._socket.send_multipart([identity, *codec.encode(answer, data)], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise

    def _answer(self, message: messages.BlobMessage, payload: bytes | memoryview) -> tuple[messages.ToBlobClient, bytes]:
        match message:
            case messages.PutChunk(digest=digest, size=size, offset=offset):
                try:
                    have, stored = self._store.put_chunk(digest, size, offset, payload)
                except OSError as error:
                    return messages.BlobRefused(digest, f"cannot store: {error.strerror}"), b""
                return messages.PutOk(digest, have, stored), b""
            case messages.GetChunk(digest=digest, offset=offset, length=length):
                try:
                    total, data = self._store.size(digest), self._store.read(digest, offset, length)
                except OSError as error:
                    return messages.BlobRefused(digest, f"cannot read: {error.strerror}"), b""
                if total is None or data is None:
                    return messages.BlobRefused(digest, "the store does not have it"), b""
                return messages.Chunk(digest, offset, total), data


def make_identity(name: str, session: str) -> bytes:
    """The routing id of an actor's epoch or a learner's session."""
    return f"{name}/{session}".encode()


def _parse_identity(identity: bytes) -> tuple[str, str]:
    try:
        name, _, session = identity.decode("ascii").partition("/")
    except UnicodeDecodeError:
        raise MalformedFrame("identity", f"{identity[:32]!r} is not name/session") from None
    if not (0 < len(name) <= 128 and 0 < len(session) <= 128):
        raise MalformedFrame("identity", f"{identity[:32]!r} is not name/session")
    return name, session
