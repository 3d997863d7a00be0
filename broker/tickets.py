"""The tickets that are open, and the account of all that ever were.

Invariant (conserved): issued = outstanding + queued + consumed + expired + failed + void, after every call.

An open ticket is pending (nobody has it), outstanding (an actor has it), queued (its group is in the journal) or in a batch that the learner
has not finished with. A ticket that is in no batch yet has a slot: its place in ticket order among all such tickets. Slot i belongs to batch
`next_batch + i // P`. Tickets that end unused make later ones move forward, never back, so a lag that was safe stays safe.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from protocol.facts import Outcome
from protocol.pacing import Pacing


class State(Enum):
    """Where an open ticket is."""

    PENDING = "pending"
    OUTSTANDING = "outstanding"
    QUEUED = "queued"
    BATCHED = "batched"


@dataclass(slots=True)
class Ticket:
    """An open ticket. The version fields are set while QUEUED or BATCHED; the actor fields while OUTSTANDING."""

    number: int
    state: State = State.PENDING
    attempt: int = 0
    num_failures: int = 0
    actor: str = ""
    epoch: str = ""
    sent_at: float = 0.0
    versions: list[int] = field(default_factory=list)
    oldest_step: int = -1


@dataclass(slots=True)
class Batch:
    """A batch that was given to the learner; `oldest_steps` in ticket order. Kept, so that a resumed learner can have it again."""

    number: int
    tickets: list[int]
    oldest_steps: list[int]
    oldest_version: int
    consumed: bool = False


@dataclass(slots=True)
class Counts:
    """The account of tickets; see the module's invariant."""

    issued: int = 0
    outstanding: int = 0
    queued: int = 0
    consumed: int = 0
    expired: int = 0
    failed: int = 0
    void: int = 0

    @property
    def conserved(self) -> bool:
        """Whether every ticket is accounted for exactly once."""
        ended = self.consumed + self.expired + self.failed + self.void
        return self.issued == self.outstanding + self.queued + ended


@dataclass(slots=True)
class TicketTable:
    """Open tickets by number, their slots, and the batches formed. Knows pacing; knows nothing of actors, versions or time."""

    pacing: Pacing
    counts: Counts = field(default_factory=Counts)
    open: dict[int, Ticket] = field(default_factory=dict)
    batches: dict[int, Batch] = field(default_factory=dict)
    next_batch: int = 0
    _order: list[int] = field(default_factory=list)
    _pending: list[int] = field(default_factory=list)
    _num_queued: int = 0
    """Tickets that are queued and in no batch: with too few of them no batch can be complete."""
    _needed: int = -1
    """A ticket without which the next batch cannot be complete, if one is known. Asked after every event, so worth remembering."""

    # --- questions

    def batch_of(self, number: int) -> int:
        """The batch that an unbatched open ticket is due in."""
        return self.next_batch + bisect.bisect_left(self._order, number) // self.pacing.groups_per_batch

    def next_issue(self) -> tuple[int, int] | None:
        """The ticket to issue next and the batch it is due in: the lowest pending one, else a new one, else None at the run's end."""
        if self._pending:
            return self._pending[0], self.batch_of(self._pending[0])
        batch = self.next_batch + len(self._order) // self.pacing.groups_per_batch
        return None if batch >= self.pacing.num_batches else (self.counts.issued, batch)

    def complete(self) -> list[Ticket] | None:
        """The tickets of the next batch if enough groups within the window are queued, in ticket order."""
        size = self.pacing.groups_per_batch
        if self._num_queued < size or (self._needed in self.open and self.open[self._needed].state is not State.QUEUED):
            return None
        eligible = self._order[: self.pacing.window * size]
        queued, num_spare = [], len(eligible) - size
        for number in eligible:
            if self.open[number].state is State.QUEUED:
                queued.append(self.open[number])
            elif num_spare:
                num_spare -= 1
            else:
                self._needed = number if self.pacing.window == 1 else -1
                return None
        return queued[:size]

    def missing(self) -> list[Ticket]:
        """The tickets of the next batch that are issued and not queued, in ticket order."""
        return [self.open[n] for n in self._order[: self.pacing.groups_per_batch] if self.open[n].state is not State.QUEUED]

    def num_queued_for_next(self) -> int:
        """How many groups of the next batch are there."""
        first = self._order[: self.pacing.groups_per_batch]
        return sum(self.open[n].state is State.QUEUED for n in first)

    def unbatched(self) -> Iterator[Ticket]:
        """All open tickets that are in no batch, in ticket order."""
        return (self.open[number] for number in list(self._order))

    # --- changes

    def issue(self, number: int, attempt: int, actor: str, epoch: str, now: float) -> Ticket:
        """A pending or new ticket goes to an actor."""
        ticket = self.open.get(number)
        if ticket is None:
            ticket = self.open[number] = Ticket(number)
            self._order.append(number)
            self.counts.issued += 1
            self.counts.outstanding += 1
        else:
            self._pending.remove(number)
        ticket.state, ticket.attempt = State.OUTSTANDING, attempt
        ticket.actor, ticket.epoch, ticket.sent_at = actor, epoch, now
        return ticket

    def revoke(self, number: int) -> None:
        """An outstanding or queued ticket becomes pending."""
        ticket = self.open[number]
        if ticket.state is State.QUEUED:
            self._num_queued -= 1
            self.counts.queued -= 1
            self.counts.outstanding += 1
        ticket.state, ticket.actor, ticket.epoch = State.PENDING, "", ""
        bisect.insort(self._pending, number)

    def accept(self, number: int, versions: list[int], oldest_step: int) -> None:
        """The group of a pending or outstanding ticket is in the journal."""
        ticket = self.open[number]
        if ticket.state is State.PENDING:
            self._pending.remove(number)
        ticket.state, ticket.actor, ticket.epoch = State.QUEUED, "", ""
        ticket.versions, ticket.oldest_step = versions, oldest_step
        self.counts.outstanding -= 1
        self.counts.queued += 1
        self._num_queued += 1

    def end(self, number: int, outcome: Outcome) -> None:
        """An unbatched ticket ends unused."""
        ticket = self.open.pop(number)
        self._order.remove(number)
        if ticket.state is State.PENDING:
            self._pending.remove(number)
        if ticket.state is State.QUEUED:
            self._num_queued -= 1
            self.counts.queued -= 1
        else:
            self.counts.outstanding -= 1
        setattr(self.counts, outcome, getattr(self.counts, outcome) + 1)

    def form(self, batch: int, tickets: list[int]) -> None:
        """Queued tickets become the next batch."""
        members = [self.open[number] for number in tickets]
        for ticket in members:
            ticket.state = State.BATCHED
            self._order.remove(ticket.number)
        self._num_queued -= len(members)
        self._needed = -1
        oldest_version = min(ticket.versions[0] for ticket in members)
        self.batches[batch] = Batch(batch, tickets, [ticket.oldest_step for ticket in members], oldest_version)
        self.next_batch = batch + 1

    def consume(self, batch: int) -> None:
        """The last optimizer step on a batch is done; doing it again after a resume changes nothing."""
        formed = self.batches[batch]
        if formed.consumed:
            return
        formed.consumed = True
        for number in formed.tickets:
            del self.open[number]
        self.counts.queued -= len(formed.tickets)
        self.counts.consumed += len(formed.tickets)
