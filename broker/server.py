"""The broker's shell: sockets around `broker.core.Broker`.

One thread serves control, actors and learner; another serves blobs, so that a transfer of gigabytes never delays an acknowledgement. A third
waits for the disk: while it commits, messages are taken in for the next commit, and what rests on this one is sent when it has ended.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import msgspec
import zmq

from broker.blobs import BlobStore
from broker.core import LEARNER, PUBLISHER, Broker, Decided, Outgoing, actor_peer
from broker.door import Door
from broker.guard import Guard
from broker.keys import KeyFile, Role
from broker.sockets import Authenticator, Channel, bind_all, channel_keys, channel_limits
from broker.turned_away import TurnedAway
from protocol import codec, messages
from protocol.errors import MalformedFrame

log = logging.getLogger("broker")
TICK_SECONDS = 0.25
MAX_MESSAGES_PER_ROUND = 256
MAX_BYTES_PER_ROUND = 32 << 20
"""What is taken in of a channel before its facts are committed and the next channel has its turn."""
MAX_UNCOMMITTED_BYTES = 64 << 20
"""No more groups are taken in while so much waits for the disk."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


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
            limits = channel_limits(broker.config)
            self.address, sockets = bind_all(self._context, address, key, limits)
        except BaseException:
            self._authenticator.close()
            self._context.term()
            raise
        self._stopping = threading.Event()
        self._turned_away = TurnedAway(log)
        self._doors = {channel: Door(channel.name.lower(), sockets[channel], limits[channel], self._turned_away) for channel in Channel}
        self._guard = Guard(list(self._doors.values()), self._stopping.set)
        self._committer = ThreadPoolExecutor(1, "commits")
        self._committed = Wakeup()
        self._committing: tuple[Future[None], Decided] | None = None
        self._blobs = BlobThread(self._doors[Channel.BLOBS], broker.blobs, broker.no_room_for, self._stopping)

    def serve(self) -> None:
        """The main loop.

        consumes:     messages of control, actors and learner
          waits for:    any of them, or the next tick
          unblocked by: peers, and time
        produces:     answers, after the journal has committed what they rest on
          waits for:    the disk, beside the loop; once MAX_UNCOMMITTED_BYTES do, actors wait as well
          unblocked by: the end of the commit
          waits for:    nothing else: what cannot be sent at once is dropped, and asked for again by whoever misses it
        """
        self._guard.start()
        self._blobs.start()
        poller = zmq.Poller()
        channels = (Channel.CONTROL, Channel.ACTORS, Channel.LEARNER)
        for channel in channels:
            poller.register(self._doors[channel].socket, zmq.POLLIN)
        poller.register(self._wakeup.receiver, zmq.POLLIN)
        poller.register(self._committed.receiver, zmq.POLLIN)
        next_tick = 0.0
        try:
            while not self._stopping.is_set():
                is_full = self._broker.num_uncommitted > MAX_UNCOMMITTED_BYTES
                poller.modify(self._doors[Channel.ACTORS].socket, 0 if is_full else zmq.POLLIN)
                ready = dict(poller.poll(max(0, int((next_tick - time.monotonic()) * 1000))))
                for channel in channels:
                    if self._doors[channel].socket in ready:
                        self._drain(channel)
                if self._wakeup.receiver.fileno() in ready:
                    self._wakeup.clear()
                    next_tick = 0.0
                if time.monotonic() >= next_tick:
                    self._broker.tick(time.monotonic(), time.time())
                    next_tick = time.monotonic() + TICK_SECONDS
                self._committed.clear()
                self._flush()
            self._flush_all()
        finally:
            self.close()
        for thread in (self._blobs, self._guard):
            if thread.failure is not None:
                raise thread.failure

    def stop(self) -> None:
        """End `serve` soon; may be called from any thread or a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """Release the sockets and the journal."""
        self._stopping.set()
        if self._blobs.is_alive():
            self._blobs.join()
        self._guard.stop()
        self._committer.shutdown()
        self._committed.close()
        for door in self._doors.values():
            door.socket.close(linger=500)
        if counts := self._turned_away.counts():
            log.info("turned away in all: %s", ", ".join(f"{count} {kind}" for kind, count in counts.items()))
        self._wakeup.close()
        self._authenticator.close()
        self._context.term()
        self._broker.close()

    def _drain(self, channel: Channel) -> None:
        door, num_bytes = self._doors[channel], 0
        for _ in range(MAX_MESSAGES_PER_ROUND):
            try:
                received = door.receive()
            except zmq.Again:
                return
            try:
                self._take(channel, received.identity, received.frames)
            except MalformedFrame as error:
                door.refuse(received, error)
            num_bytes += received.num_bytes
            if num_bytes > MAX_BYTES_PER_ROUND:
                return

    def _take(self, channel: Channel, identity: bytes, frames: list[bytes]) -> None:
        now, wall = time.monotonic(), time.time()
        if channel is Channel.CONTROL:
            request, _ = codec.from_control.decode(frames)
            if isinstance(request, messages.ShutDown):
                self.stop()
            answer = self._broker.control_message(request, now, wall)
            if isinstance(answer, messages.RunStatus):
                answer = msgspec.structs.replace(answer, turned_away=self._turned_away.counts())
            self._flush_all()
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
        """Send what is committed, and begin to commit what has been decided meanwhile."""
        self._send_out(self._broker.groups())
        if self._committing is not None:
            commit, decided = self._committing
            if not commit.done():
                return
            commit.result()
            self._committing = None
            self._send_out(self._broker.settle(decided))
        decided = self._broker.cut()
        if not decided.has_facts:
            self._send_out(self._broker.settle(decided))
            return
        commit = self._committer.submit(self._broker.commit)
        self._committing = commit, decided
        commit.add_done_callback(lambda _: self._committed.set())

    def _flush_all(self) -> None:
        """Send everything that has been decided, and wait for the commits that it takes."""
        self._flush()
        while self._committing is not None:
            wait([self._committing[0]])
            self._flush()

    def _send_out(self, ready: list[Outgoing]) -> None:
        for outgoing in ready:
            if outgoing.peer in (LEARNER, PUBLISHER):
                self._send(Channel.LEARNER, make_identity(outgoing.peer, outgoing.session), outgoing.message, outgoing.payload)
            else:
                name = outgoing.peer.removeprefix(actor_peer(""))
                self._send(Channel.ACTORS, make_identity(name, outgoing.session), outgoing.message, outgoing.payload)

    def _send(self, channel: Channel, identity: bytes, message: messages.Message, payload: bytes) -> None:
        self._doors[channel].send(identity, codec.encode(message, payload))


class BlobThread(threading.Thread):
    """Serves blobs.

    consumes:     pieces to store and requests for pieces
      waits for:    the next one, or the server's end
      unblocked by: clients, each of which keeps only a few requests open (its credit)
    produces:     one answer for each
    """

    def __init__(self, door: Door, store: BlobStore, no_room_for: Callable[[int], str], stopping: threading.Event) -> None:
        """`no_room_for` says why so many bytes cannot be stored now, or nothing."""
        super().__init__(name="blobs", daemon=True)
        self._no_room_for = no_room_for
        self._door, self._store, self._stopping = door, store, stopping
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
            if not self._door.wait(100):
                continue
            received = self._door.receive()
            try:
                message, payload = codec.from_blob_client.decode(received.frames)
            except MalformedFrame as error:
                self._door.refuse(received, error)
                continue
            answer, data = self._answer(message, payload)
            self._door.send(received.identity, codec.encode(answer, data))

    def _answer(self, message: messages.BlobMessage, payload: bytes | memoryview) -> tuple[messages.ToBlobClient, bytes]:
        match message:
            case messages.PutChunk(digest=digest, size=size, offset=offset):
                shortage = self._no_room_for(len(payload))
                if shortage and self._store.size(digest) is None:
                    return messages.NotNow(digest, shortage), b""
                try:
                    have, stored = self._store.put_chunk(digest, size, offset, payload)
                except OSError as error:
                    if error.errno in NO_ROOM:
                        return messages.NotNow(digest, f"no room on the broker's disk: {error.strerror}"), b""
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
