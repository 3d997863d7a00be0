"""The same ports without sockets: broker, actors and learner in one process and one event loop.

The learner's calls block, so while it waits for a batch it turns the event loop in which the actors live. Everything else, journal and
blobs included, is the broker that the socket server runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from broker.core import LEARNER, PUBLISHER, Broker, actor_peer
from broker.put_off import ASK_AGAIN_SECONDS, PutOff
from broker.session import ActorSession, Result
from protocol import messages
from protocol.errors import IncompatiblePeer, RequestRefused
from protocol.groups import Group, encode_group
from protocol.messages import PROTOCOL_VERSION, ActorReport, WireTicket
from protocol.ports import Clock, ReceivedBatch
from protocol.weights import BlobRef, PolicyVersion

log = logging.getLogger("learner")
AHEAD_SECONDS = 2.0
TURN_SECONDS = 0.002
"""How long the learner lets the event loop turn before it asks again."""

R = TypeVar("R", bound=messages.Message)


class MemoryBroker:
    """A broker and the mailboxes of the peers beside it in the process."""

    def __init__(self, broker: Broker, clock: Clock) -> None:
        self.broker, self.clock = broker, clock
        self._actors: dict[tuple[str, str], MemoryActorPort] = {}
        self.learner: MemoryLearnerPort | None = None

    def actor_port(self, name: str) -> MemoryActorPort:
        """A port for one actor."""
        port = MemoryActorPort(self, name)
        self._actors[name, port.epoch] = port
        return port

    def learner_port(self, loop: asyncio.AbstractEventLoop, check: Callable[[], None]) -> MemoryLearnerPort:
        """The learner's port; while it waits it turns `loop`, and calls `check`, which raises if waiting has become useless."""
        self.learner = MemoryLearnerPort(self, loop, check)
        return self.learner

    def from_actor(self, port: MemoryActorPort, message: messages.ActorMessage, payload: bytes = b"") -> None:
        """Carry a message from an actor to the broker, and everything that follows to where it belongs."""
        self.broker.actor_message(port.name, port.epoch, message, payload, self.clock.monotonic(), self.clock.wall())
        self._deliver()

    def from_learner(self, session: str, message: messages.LearnerMessage) -> None:
        """Carry a message from the learner to the broker. Nobody lets the broker's time pass here, so that it looks at its disk now."""
        self.broker.measure_room(self.clock.monotonic(), self.clock.wall())
        self.broker.learner_message(session, message, self.clock.monotonic(), self.clock.wall())
        self._deliver()

    def _deliver(self) -> None:
        for outgoing in self.broker.flush():
            if outgoing.peer in (LEARNER, PUBLISHER):
                if self.learner is not None and self.learner.session == outgoing.session:
                    self.learner.inbox.append((outgoing.message, outgoing.payload))
                continue
            port = self._actors.get((outgoing.peer.removeprefix(actor_peer("")), outgoing.session))
            if port is not None:
                port.receive(outgoing.message)


class MemoryActorPort:
    """Implements protocol.ports.ActorPort."""

    def __init__(self, memory: MemoryBroker, name: str) -> None:
        self._memory, self.name = memory, name
        self.epoch = os.urandom(6).hex()
        self._session = ActorSession()
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._report: Callable[[], ActorReport] | None = None

    @property
    def newest(self) -> PolicyVersion | None:
        return self._session.newest

    @property
    def stopping(self) -> str:
        return self._session.stopping

    def held_tickets(self) -> list[int]:
        return self._session.held()

    def receive(self, message: messages.Message) -> None:
        """A message of the broker."""
        try:
            self._session.receive(message)  # type: ignore[arg-type]
        except (IncompatiblePeer, RequestRefused) as error:
            self._failure = error
        self._changed.set()

    async def join(self, engine: str, report: Callable[[], ActorReport]) -> messages.ActorWelcome:
        self._report = report
        hello = messages.ActorHello(PROTOCOL_VERSION, self.name, self.epoch, engine, "memory", os.getpid(), [])
        while self._session.welcome is None:
            self._memory.from_actor(self, hello)
            await self._until(lambda: self._session.welcome is not None, messages.HEARTBEAT_SECONDS)
        assert self._session.welcome is not None
        self.report_now()
        return self._session.welcome

    def report_now(self) -> None:
        if self._report is not None:
            self._memory.from_actor(self, self._report())
        for result in list(self._session.unacked.values()):  # there was no room for it
            self._memory.from_actor(self, result.message, result.payload)

    async def next_ticket(self) -> WireTicket | None:
        self.report_now()
        await self._until(lambda: bool(self._session.tickets or self._session.stopping))
        return self._session.tickets.popleft() if self._session.tickets and not self._session.stopping else None

    async def new_version(self, held: int) -> PolicyVersion | None:
        session = self._session
        await self._until(lambda: bool(session.stopping) or (session.newest is not None and session.newest.number != held))
        return None if session.stopping else session.newest

    async def submit(self, group: Group, attempt: int) -> None:
        self._hand_in(self._session.finish(group.ticket, attempt, encode_group(group)))

    async def fail(self, ticket: WireTicket, reason: str) -> None:
        self._hand_in(self._session.fail(ticket.number, ticket.attempt, reason))

    def _hand_in(self, result: Result) -> None:
        self._memory.from_actor(self, result.message, result.payload)

    async def route(self, held: int, failed: str = "") -> messages.Route:
        self._session.route = None
        self._memory.from_actor(self, messages.GetRoute(held, failed))
        while self._session.route is None:
            await self._until(lambda: self._session.route is not None, messages.HEARTBEAT_SECONDS)
            self._memory.from_actor(self, messages.GetRoute(held))
        return self._session.route

    async def fetch(self, blob: BlobRef) -> Path:
        if self._memory.broker.blobs.size(blob.digest) != blob.size:
            raise RequestRefused(f"blob {blob.digest[:16]}", "the store does not have it")
        return self._memory.broker.blobs.path(blob.digest)

    def forget(self, blob: BlobRef) -> None:
        pass  # the broker's own file

    async def leave(self) -> None:
        self._memory.from_actor(self, messages.ActorBye())

    async def _until(self, condition: Callable[[], bool], seconds: float = float("inf")) -> None:
        """Wait for a change, `seconds` at most. A heartbeat each second keeps the lease, as over sockets."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not condition() and asyncio.get_running_loop().time() < deadline:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            try:
                async with asyncio.timeout(messages.HEARTBEAT_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                self.report_now()


class MemoryLearnerPort:
    """Implements protocol.ports.LearnerPort."""

    def __init__(self, memory: MemoryBroker, loop: asyncio.AbstractEventLoop, check: Callable[[], None]) -> None:
        self._memory, self._loop, self._check = memory, loop, check
        self.session = os.urandom(6).hex()
        self.inbox: list[tuple[messages.Message, bytes]] = []
        self._put_off = PutOff(log)

    def join(self, step: int, world_size: int, environment: dict[str, str]) -> messages.LearnerWelcome:
        hello = messages.LearnerHello(PROTOCOL_VERSION, self.session, step, world_size, environment)
        return self._ask(hello, messages.LearnerWelcome)

    def next_batch(self, step: int, while_waiting: Callable[[], None]) -> ReceivedBatch | None:
        while True:
            while_waiting()
            self._memory.from_learner(self.session, messages.NextBatch(step))
            for message, _ in self._take():
                if isinstance(message, messages.Stop):
                    return None
                if isinstance(message, messages.BatchReady):
                    self._let_actors_run_ahead(while_waiting)
                    payloads = [self._payload(ticket) for ticket in message.tickets]
                    return ReceivedBatch(message.batch, payloads, message.version_steps)
            self._turn(TURN_SECONDS)

    def _let_actors_run_ahead(self, while_waiting: Callable[[], None]) -> None:
        """Nothing runs beside the learner here: without this actors would be only as far ahead as a batch took them, not as far as max_lag allows.

        They are as far as they can come with the newest version when they hold it, or an orphaned one beyond it, and have no ticket. Ends after
        AHEAD_SECONDS in any case.
        """
        ledger, clock = self._memory.broker.ledger, self._memory.clock
        until = clock.monotonic() + AHEAD_SECONDS
        while clock.monotonic() < until:
            newest = ledger.versions.newest
            actors = ledger.actors.values()
            if not any(actor.tickets or (newest is not None and actor.version < newest.number) for actor in actors):
                return
            while_waiting()
            self._turn(TURN_SECONDS)

    def _payload(self, ticket: int) -> bytes:
        self._memory.from_learner(self.session, messages.GetGroup(ticket))
        return next(payload for message, payload in self._take() if isinstance(message, messages.GroupData))

    def commit(self, step: int, batch: int, lags: list[int], metrics: dict[str, float], notes: Sequence[messages.Note] = ()) -> None:
        self._ask(messages.CommitStep(step, batch, lags, metrics, list(notes)), messages.Committed)

    def confirm(self) -> None:
        pass

    def put_blob(self, data: bytes) -> BlobRef:
        while self._memory.broker.no_room_for(len(data)):
            self._turn(ASK_AGAIN_SECONDS)
        return self._memory.broker.blobs.add(data)

    def publish(self, publication: messages.Publish) -> messages.Published:
        return self._ask(publication, messages.Published)

    def evaluated(self, step: int, reward: float, num_prompts: int) -> None:
        self._ask(messages.Evaluation(step, reward, num_prompts), messages.EvaluationNoted)

    def doing(self, text: str) -> None:
        del text

    def done(self, step: int, summary: dict[str, float]) -> None:
        self._ask(messages.LearnerDone(step, summary), messages.Goodbye)

    def close(self) -> None:
        pass

    def _ask(self, request: messages.LearnerMessage, answer: type[R]) -> R:
        """The answer to a request; one that is put off is made again for as long as it takes."""
        is_put_off = True
        while is_put_off:
            self._memory.from_learner(self.session, request)
            is_put_off = False
            for message, _ in self._take():
                if isinstance(message, answer):
                    self._put_off.over()
                    return message
                if isinstance(message, messages.NotNow):
                    is_put_off = True
                    self._put_off.told(message.request, message.reason, self._memory.clock.monotonic())
            if is_put_off:
                self._turn(ASK_AGAIN_SECONDS)
        raise RequestRefused(type(request).__name__, "no answer")

    def _turn(self, seconds: float) -> None:
        """Let the actors live for a while."""
        self._check()
        self._loop.run_until_complete(asyncio.sleep(seconds))

    def _take(self) -> list[tuple[messages.Message, bytes]]:
        taken, self.inbox = self.inbox, []
        for message, _ in taken:
            if isinstance(message, messages.LearnerRefused):
                raise RequestRefused(message.request, message.reason)
        return taken
