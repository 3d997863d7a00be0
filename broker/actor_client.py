"""The actor's port over ZeroMQ, in asyncio.

Invariant: results are sent in order and kept until acknowledged; the broker hears from this side at least once a second as long as the
event loop turns, and no longer (so a hung actor loses its lease).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from broker.downloads import Downloads, Sources
from broker.keys import KeyFile
from broker.put_off import PutOff
from broker.server import make_identity
from broker.session import ActorSession, Result
from broker.sockets import Channel, Renewal, client_socket, endpoint, made_connections, wait_connected
from protocol import codec, messages
from protocol.errors import BrokerUnreachable, MalformedFrame, PeerError, ProtocolError
from protocol.groups import MAX_GROUP_BYTES, Group, encode_group
from protocol.messages import HEARTBEAT_SECONDS, PROTOCOL_VERSION, ActorReport, WireTicket
from protocol.weights import BlobRef, PolicyVersion

log = logging.getLogger("actor")
CONNECT_SECONDS = 20.0
RESEND_SECONDS = 2.0
"""Results without an acknowledgement for this long are sent again."""
GONE_SECONDS = 300.0
"""A broker that has said nothing for this long is given up; before that it is waited for, and the log says so."""
MAX_UNACKED = 64


class ActorClient:
    """Implements protocol.ports.ActorPort."""

    def __init__(self, address: str, key: KeyFile, name: str, sources: Sources | None = None) -> None:
        self._address, self._key, self._name = address, key, name
        self._sources = sources or Sources()
        self._epoch = os.urandom(6).hex()
        self._session, self._put_off = ActorSession(), PutOff(log)
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: PeerError | ProtocolError | None = None
        self._heard_at = self._sent_at = time.monotonic()
        self._downloads: Downloads | None = None
        self._report_wanted = asyncio.Event()

    @property
    def newest(self) -> PolicyVersion | None:
        return self._session.newest

    @property
    def stopping(self) -> str:
        return self._session.stopping

    def held_tickets(self) -> list[int]:
        return self._session.held()

    async def join(self, engine: str, report: Callable[[], ActorReport]) -> messages.ActorWelcome:
        self._engine, self._report = engine, report
        self._context: zmq.Context[Any] = zmq.Context()
        identity = make_identity(self._name, self._epoch)
        self._raw = client_socket(self._context, self._address, Channel.ACTORS, self._key, identity)
        connecting = asyncio.ensure_future(
            asyncio.to_thread(wait_connected, self._raw, self._address, Channel.ACTORS, "actor", CONNECT_SECONDS)
        )
        try:
            await asyncio.shield(connecting)
        except BaseException:
            await asyncio.wait([connecting])  # the thread has the socket; it ends within CONNECT_SECONDS
            self._raw.close(linger=0)
            self._context.term()
            raise
        self._raw_connections = made_connections(self._raw)
        self._socket = zmq.asyncio.Socket.from_socket(self._raw)
        self._connections = zmq.asyncio.Socket.from_socket(self._raw_connections)
        self._renewal = Renewal(self._socket, endpoint(self._address, Channel.ACTORS))
        self._downloads = Downloads(self._context, self._address, self._key, identity, self._sources)
        self._heard_at = time.monotonic()
        self._tasks = [asyncio.create_task(loop()) for loop in (self._receive, self._heartbeat, self._go_on)]
        await self._hello()
        await self._until(lambda: bool(self._session.welcome or self._session.put_off), "the welcome", CONNECT_SECONDS)
        await self._until(lambda: self._session.welcome is not None, "the welcome")
        assert self._session.welcome is not None
        self._downloads.keep([file.blob for file in self._session.welcome.policy_files])
        return self._session.welcome

    def report_now(self) -> None:
        self._report_wanted.set()

    async def next_ticket(self) -> WireTicket | None:
        await self._until(lambda: bool(self._session.tickets or self._session.stopping), "a ticket")
        return self._session.tickets.popleft() if self._session.tickets and not self._session.stopping else None

    async def new_version(self, held: int) -> PolicyVersion | None:
        session = self._session
        await self._until(
            lambda: bool(session.stopping) or (session.newest is not None and session.newest.number != held),
            f"a version newer than {held}",
        )
        return None if session.stopping else session.newest

    async def submit(self, group: Group, attempt: int) -> None:
        payload = encode_group(group)
        if len(payload) > MAX_GROUP_BYTES:
            reason = f"the group has {len(payload)} bytes, {MAX_GROUP_BYTES} is the limit; lower rollout.group_size or max_tokens"
            await self._hand_in(self._session.fail(group.ticket, attempt, reason))
            return
        await self._hand_in(self._session.finish(group.ticket, attempt, payload))

    async def fail(self, ticket: WireTicket, reason: str) -> None:
        await self._hand_in(self._session.fail(ticket.number, ticket.attempt, reason))

    async def _hand_in(self, result: Result) -> None:
        if len(self._session.unacked) == 1:
            self._sent_at = time.monotonic()
        await self._send(result.message, result.payload)
        await self._until(lambda: len(self._session.unacked) < MAX_UNACKED, "acknowledgements")

    async def route(self, held: int, failed: str = "") -> messages.Route:
        self._session.route = None
        while self._session.route is None or self._session.route.held != held:
            await self._send(messages.GetRoute(held, failed))
            failed = ""  # once is enough: it may ask for a snapshot
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESEND_SECONDS):
                    await self._until(
                        lambda: self._session.route is not None and self._session.route.held == held, "a route to the newest version"
                    )
        return self._session.route

    async def fetch(self, blob: BlobRef) -> Path:
        assert self._downloads is not None
        return await asyncio.wrap_future(self._downloads.start(blob))

    def forget(self, blob: BlobRef) -> None:
        if self._downloads is not None:
            self._downloads.forget(blob)

    async def leave(self) -> None:
        if self._tasks:
            with contextlib.suppress(TimeoutError, PeerError, ProtocolError):
                await self._until(lambda: not self._session.unacked, "acknowledgements", 2 * RESEND_SECONDS)
            with contextlib.suppress(zmq.ZMQError):
                await self._send(messages.ActorBye())
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._raw.disable_monitor()
            self._connections.close()
            self._raw_connections.close()
            self._socket.close(linger=200)
            self._raw.close()
        if self._downloads is not None:
            await asyncio.to_thread(self._downloads.stop)
            self._downloads.close()
            self._context.term()

    # --- the three loops

    async def _receive(self) -> None:
        """Consumes messages of the broker; waits for the next; unblocked by the broker; produces changes of the session."""
        while True:
            frames = await self._socket.recv_multipart()
            num_unacked = len(self._session.unacked)
            try:
                message, _ = codec.to_actor.decode(frames)
                self._session.receive(message)
            except MalformedFrame as error:
                log.warning("ignored a message of the broker: %s", error)
                continue
            except (PeerError, ProtocolError) as error:
                self._failure = error
            self._heard_at = time.monotonic()
            if isinstance(message, messages.NotNow):
                self._put_off.told(message.request, message.reason, self._heard_at)
            elif isinstance(message, messages.ActorWelcome):
                self._put_off.over()
            if len(self._session.unacked) < num_unacked:
                self._sent_at = self._heard_at  # acknowledgements are coming; what is left is not late yet
            if self._session.hello_wanted:
                self._session.hello_wanted = False
                await self._hello()
            if isinstance(message, messages.ActorWelcome):
                await self._resend()
                self._report_wanted.set()
            async with self._changed:
                self._changed.notify_all()

    async def _heartbeat(self) -> None:
        """Produces a report every second or when asked, and resends; waits for the clock; gives up on a broker gone for good."""
        told = False
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._report_wanted.wait()
            self._report_wanted.clear()
            if self._session.welcome is None:
                # The hello may be in the journal and its answer lost with the broker: the next one knows this actor, and takes a report as it is.
                await self._hello()
            else:
                await self._send(self._report())
            now = time.monotonic()
            if self._session.unacked and now - self._sent_at > RESEND_SECONDS:
                await self._resend()
            silent = now - self._heard_at
            self._renewal.consider(self._heard_at, now)
            if silent > 5 * HEARTBEAT_SECONDS and not told:
                log.warning("waiting for the broker at %s, last heard %.0f s ago", self._address, silent)
                told = True
            elif told and silent < HEARTBEAT_SECONDS:
                log.info("the broker answers again")
                told = False
            if silent > GONE_SECONDS:
                self._failure = BrokerUnreachable(self._address, silent, "any message")
                async with self._changed:
                    self._changed.notify_all()

    async def _go_on(self) -> None:
        """Consumes news of a connection made anew; waits for the next; unblocked by libzmq; produces at once what the old one may have lost.

        By the next heartbeat this connection may have gone as well, and one that nobody was heard on is the slowest to be missed.
        """
        while True:
            await self._connections.recv_multipart()
            await self._resend()
            self._report_wanted.set()

    async def _hello(self) -> None:
        held = self._session.held()
        await self._send(
            messages.ActorHello(PROTOCOL_VERSION, self._name, self._epoch, self._engine, platform.node() or "unknown", os.getpid(), held)
        )

    async def _resend(self) -> None:
        self._sent_at = time.monotonic()
        for result in list(self._session.unacked.values()):
            await self._send(result.message, result.payload)

    async def _send(self, message: messages.Message, payload: bytes = b"") -> None:
        """Send, or drop if the broker is away: everything that matters is sent again. After `leave` nothing is sent, whoever still asks."""
        if self._socket.closed:
            return
        with contextlib.suppress(zmq.Again):
            await self._socket.send_multipart(codec.encode(message, payload), zmq.NOBLOCK)

    async def _until(self, condition: Callable[[], bool], waiting_for: str, seconds: float | None = None) -> None:
        """Wait for a change of the session. Raises what the receiving side found out, BrokerUnreachable after `seconds`."""
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: condition() or self._failure is not None)
        except TimeoutError:
            if seconds is None:
                raise
            raise BrokerUnreachable(self._address, seconds, waiting_for) from None
        if self._failure is not None:
            raise self._failure
