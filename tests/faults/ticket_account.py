"""The tickets of a run, counted again from the journal's facts. Nothing of the ledger is used.

Invariant: every ticket that was issued is in exactly one place; each fact moves it along an edge that exists, or is a finding.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable
from typing import Final

from protocol import facts
from protocol.pacing import Pacing

Find = Callable[[str, str], None]
"""Takes the kind of a finding, and what it is in words."""
NOT_CONSERVED: Final = "not conserved"
TICKET_LOST: Final = "ticket lost"
TRAINED_TWICE: Final = "trained twice"
TOO_EARLY: Final = "issued too early"
OPEN: Final = frozenset({"pending", "outstanding", "queued", "batched"})


class TicketAccount:
    """Where every ticket is."""

    def __init__(self, pacing: Pacing, find: Find) -> None:
        self._pacing, self._find = pacing, find
        self.place: dict[int, str] = {}
        self.attempt: dict[int, int] = {}
        self.given_to: dict[tuple[int, int], tuple[str, str]] = {}
        """Actor and epoch that each attempt at a ticket was given to."""
        self.batches: dict[int, list[int]] = {}
        self.in_batch: dict[int, int] = {}
        self.counts: Counter[str] = Counter()
        self.num_issued = 0
        self._unbatched: list[int] = []

    def take(self, fact: facts.AnyFact) -> None:
        """Count one fact, and everything again."""
        match fact:
            case facts.TicketIssued():
                self._issued(fact)
            case facts.TicketRevoked():
                self._move(fact.ticket, {"outstanding", "queued"}, "pending")
                if fact.attempt != self.attempt.get(fact.ticket):
                    self._find(NOT_CONSERVED, f"attempt {fact.attempt} at ticket {fact.ticket} was revoked, it was not the last")
            case facts.GroupAccepted():
                self._move(fact.ticket, {"pending", "outstanding"}, "queued")
            case facts.TicketEnded():
                self._move(fact.ticket, {"pending", "outstanding", "queued"}, fact.outcome)
                self._leave_line(fact.ticket)
            case facts.BatchFormed():
                self._formed(fact)
            case facts.StepCommitted():
                if fact.step == self._pacing.last_use(fact.batch):
                    self._consumed(fact.batch)
            case facts.RunEnded():
                self._ended()
            case _:
                return
        counted = sum(number for place, number in self.counts.items() if place != "nowhere")
        if counted != self.num_issued or min((number for place, number in self.counts.items() if place != "nowhere"), default=0) < 0:
            self._find(NOT_CONSERVED, f"{self.num_issued} tickets were issued, {counted} are counted after {fact}: {dict(self.counts)}")

    def batch_of(self, ticket: int) -> int:
        """The batch that an unbatched ticket is due in, by its place in the line."""
        return len(self.batches) + bisect.bisect_left(self._unbatched, ticket) // self._pacing.groups_per_batch

    def _move(self, ticket: int, before: set[str], after: str) -> None:
        found = self.place.get(ticket, "nowhere")
        if found not in before:
            self._find(NOT_CONSERVED, f"ticket {ticket} became {after}, and was {found}")
        self.counts[found] -= 1
        self.counts[after] += 1
        self.place[ticket] = after

    def _issued(self, fact: facts.TicketIssued) -> None:
        if fact.ticket not in self.place:
            if fact.ticket != self.num_issued:
                self._find(TICKET_LOST, f"ticket {fact.ticket} was issued after {self.num_issued} others")
            self.num_issued += 1
            bisect.insort(self._unbatched, fact.ticket)
            self._move(fact.ticket, {"nowhere"}, "outstanding")
        else:
            self._move(fact.ticket, {"pending"}, "outstanding")
        if fact.attempt != self.attempt.get(fact.ticket, 0) + 1:
            self._find(NOT_CONSERVED, f"attempt {fact.attempt} at ticket {fact.ticket} follows attempt {self.attempt.get(fact.ticket, 0)}")
        self.attempt[fact.ticket] = fact.attempt
        self.given_to[fact.ticket, fact.attempt] = (fact.actor, fact.epoch)
        if fact.step < self._pacing.oldest_step(self.batch_of(fact.ticket)):
            self._find(TOO_EARLY, f"ticket {fact.ticket} of batch {self.batch_of(fact.ticket)} was to be sampled from step {fact.step}")

    def _formed(self, fact: facts.BatchFormed) -> None:
        if fact.batch != len(self.batches) or len(fact.tickets) != self._pacing.groups_per_batch:
            self._find(NOT_CONSERVED, f"batch {fact.batch} of {len(fact.tickets)} groups was formed after {len(self.batches)} others")
        first = self._unbatched[: self._pacing.window * self._pacing.groups_per_batch]
        for ticket in fact.tickets:
            if ticket in self.in_batch:
                self._find(TRAINED_TWICE, f"ticket {ticket} is in the batches {self.in_batch[ticket]} and {fact.batch}")
            elif ticket not in first:  # with a window of one batch this is exact ticket order
                self._find(TICKET_LOST, f"batch {fact.batch} was formed with ticket {ticket} out of turn, and passed over some of {first}")
            self.in_batch[ticket] = fact.batch
            self._move(ticket, {"queued"}, "batched")
            self._leave_line(ticket)
        self.batches[fact.batch] = fact.tickets

    def _consumed(self, batch: int) -> None:
        for ticket in self.batches.get(batch, []):
            if self.place[ticket] != "consumed":  # a learner that has resumed does it again
                self._move(ticket, {"batched"}, "consumed")

    def _leave_line(self, ticket: int) -> None:
        place = bisect.bisect_left(self._unbatched, ticket)
        if self._unbatched[place : place + 1] == [ticket]:
            del self._unbatched[place]

    def _ended(self) -> None:
        """Nothing is with an actor any more, and no number was left out."""
        for ticket in range(max(self.place, default=-1) + 1):
            if self.place.get(ticket, "nowhere") in ("nowhere", "pending", "outstanding"):
                self._find(TICKET_LOST, f"ticket {ticket} is {self.place.get(ticket, 'nowhere')} at the end of the run")
