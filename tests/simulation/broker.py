"""The real broker in a process that can be ended at any operation on its disk, in a shell that does what broker/server.py does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from broker.core import Broker, Outgoing
from broker.events import Event
from broker.journal import RunJournal
from broker.ledger import Ledger
from broker.server import MAX_MESSAGES_PER_ROUND, TICK_SECONDS
from protocol import codec, messages
from protocol.errors import JournalCommitFailed, JournalDamaged
from protocol.facts import AnyFact
from protocol.journal import JournalEntry
from tests.simulation.checks import Checks, is_about_learner
from tests.simulation.disk import FakeDisk, PowerLost
from tests.simulation.journal import SimulatedJournal
from tests.simulation.weights import SymbolicFolds

if TYPE_CHECKING:
    from tests.simulation.world import World

Sender = tuple[str, str, str]
"""Kind of peer (actor, learner), its name, its epoch or session."""


class WatchedJournal:
    """A journal that tells the checks what is written and what is committed."""

    def __init__(self, journal: SimulatedJournal, checks: Checks) -> None:
        self._journal, self._checks = journal, checks

    def entries(self) -> list[JournalEntry]:
        return self._journal.entries()

    def append(self, fact: AnyFact, payload: bytes, wall: float) -> None:
        self._journal.append(fact, payload, wall)
        self._checks.appended(fact)

    def commit(self) -> None:
        self._journal.commit()
        self._checks.committed()

    def payload(self, ticket: int) -> bytes | None:
        return self._journal.payload(ticket)

    def close(self) -> None:
        self._journal.close()


class SimulatedBroker(Broker):
    """The broker, with folding of names instead of bits, and watched."""

    def __init__(self, host: BrokerHost, directory: Path, journal: RunJournal) -> None:
        self._watching, plan = host.world.checks, host.world.plan
        place = (directory, "simulated", plan.config, plan.num_prompts, [], host.now, host.world.wall())
        super().__init__(*place, journal=journal, free=host.disk.room)
        self._folds = SymbolicFolds(self.blobs, host.run_beside, lambda: None)
        self._folds.wall = host.world.wall
        if self.ledger.versions.anchor is not None:
            self._folds.pin(self.ledger.versions.anchor.delta)

    def _handle(self, event: Event, now: float, wall: float) -> None:
        num_known = len(self._facts)
        super()._handle(event, now, wall)
        for fact, _, _ in self._facts[num_known:]:
            self._watching.recorded(fact)


class BrokerHost:
    """The machine of the broker: its disk, and one process after the other."""

    def __init__(
        self,
        world: World,
        directory: Path,
        broker: type[SimulatedBroker] = SimulatedBroker,
        ledger: type[Ledger] | None = None,
        journal: type[SimulatedJournal] = SimulatedJournal,
    ) -> None:
        """`broker`, `ledger` and `journal` other than the real ones have a defect that is to be found."""
        self.world, self._directory = world, directory
        self._kinds = broker, ledger, journal
        self.disk = FakeDisk(world.schedule.random)
        self.broker: SimulatedBroker | None = None
        self.damaged: JournalDamaged | None = None
        self.flipped = -1
        self._life = 0
        self._inbox: list[tuple[Sender, list[bytes]]] = []
        self._is_due = self._is_committing = False
        self._ledger_before: Ledger | None = None
        self.transactions: list[int] = []
        """Where in its file each committed transaction of the journal begins."""

    # --- life and death

    def start(self) -> None:
        """Start a process; if the disk will not let it, another one is started later."""
        if self.broker is not None or self.damaged is not None:
            return
        world, schedule = self.world, self.world.schedule
        self._life += 1
        self._is_committing = False
        schedule.note("broker starts, life", self._life)
        broker_kind, ledger_kind, journal_kind = self._kinds
        journal: RunJournal
        try:
            opened = journal_kind(self.disk)
            world.checks.recovered(opened.entries())
            self.transactions = opened.transactions
            journal = WatchedJournal(opened, world.checks)
            self.broker = broker_kind(self, self._directory, journal)
        except JournalDamaged as error:
            self.damaged = error
            return
        except (JournalCommitFailed, PowerLost) as error:
            self.die(power=isinstance(error, PowerLost))
            return
        if ledger_kind is not None:
            self.broker.ledger.__class__ = ledger_kind
        if self._ledger_before is not None:
            world.checks.same_after_recovery(self._ledger_before, self.broker.ledger)
        self._tick(self._life)

    def die(self, *, power: bool) -> None:
        """The process ends at once, and with `power` the machine; a supervisor starts it again."""
        schedule = self.world.schedule
        schedule.note("broker ends", "with the machine" if power else "")
        is_clean = self.broker is not None and self.world.checks.num_committed == len(self.world.checks.facts)
        self._ledger_before = self.broker.ledger if is_clean and self.broker is not None else None
        self.broker = None
        self._inbox.clear()
        if power:
            self.disk.lose_power()
        schedule.after(schedule.random.uniform(0.2, 4.0), self.start)

    @property
    def now(self) -> float:
        """The broker's monotonic clock."""
        return 1000.0 + self.world.schedule.now

    # --- what server.py does

    def receive(self, sender: Sender, frames: list[bytes]) -> None:
        """A message arrives."""
        if self.broker is not None:
            self._inbox.append((sender, frames))
            self._soon()

    def _soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self.world.schedule.after(self.world.schedule.random.choice([0.0, 0.001, 0.01]), partial(self._round, self._life))

    def _tick(self, life: int) -> None:
        if self.broker is not None and life == self._life:
            self._within(lambda broker: broker.tick(self.now, self.world.wall()))
            if self.broker is not None:
                self.world.checks.thorough(self.broker)
            self.world.schedule.after(TICK_SECONDS, partial(self._tick, life))

    def _round(self, life: int) -> None:
        self._is_due = False
        if self.broker is not None and life == self._life:
            taken, self._inbox = self._inbox[:MAX_MESSAGES_PER_ROUND], self._inbox[MAX_MESSAGES_PER_ROUND:]
            self._within(lambda broker: self._take(broker, taken))
            if self._inbox:
                self._soon()

    def _take(self, broker: Broker, taken: list[tuple[Sender, list[bytes]]]) -> None:
        world = self.world
        for (kind, name, session), frames in taken:
            world.schedule.note("broker <-", kind, name, session, frames[0])
            if kind == "actor":
                message, payload = codec.from_actor.decode(frames)
                broker.actor_message(name, session, message, payload, self.now, world.wall())
            else:
                request, _ = codec.from_learner.decode(frames)
                broker.learner_message(session, request, self.now, world.wall())

    def ask(self, request: messages.ControlMessage) -> None:
        """An administrator asks for something."""
        self._within(lambda broker: broker.control_message(request, self.now, self.world.wall()))

    def _within(self, work: Callable[[SimulatedBroker], object]) -> None:
        """A round: work, commit, and only then send."""
        if (broker := self.broker) is None:
            return
        try:
            work(broker)
            self.world.checks.cheap(broker.ledger)
            if self.world.plan.commit_seconds:
                self._send(broker.groups())
                self._begin_commit(broker)
            else:
                self._send(broker.flush())
        except PowerLost:
            self.die(power=self.world.schedule.random.random() < 0.7)
        except JournalCommitFailed:
            self.world.checks.commit_failed()
            self.die(power=self.world.schedule.random.random() < 0.3)

    def _begin_commit(self, broker: Broker) -> None:
        """A commit takes a while, and the broker goes on meanwhile."""
        if self._is_committing:
            return
        decided = broker.cut()
        if not decided.has_facts:
            self._send(broker.settle(decided))
            return
        self._is_committing = True
        life, random = self._life, self.world.schedule.random

        def finish() -> None:
            if life == self._life:
                self._is_committing = False
                self._within(lambda broker: (broker.commit(), self._send(broker.settle(decided))))

        self.world.schedule.after(random.expovariate(1 / self.world.plan.commit_seconds), finish)

    def _send(self, outgoing: list[Outgoing]) -> None:
        for message in outgoing:
            self.world.checks.sent(message)
            frames = codec.encode(message.message, message.payload)
            if is_about_learner(message):
                self.world.to_learner(message.peer, message.session, frames)
            else:
                self.world.to_actor(message.peer.removeprefix("actor:"), message.session, frames)

    def run_beside(self, job: Callable[[], None]) -> None:
        """Work beside the broker takes a while, and ends with its process."""
        life = self._life

        def finish() -> None:
            if self.broker is not None and life == self._life:
                job()

        self.world.schedule.after(self.world.schedule.random.expovariate(1 / 0.3), finish)
