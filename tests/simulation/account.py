"""The account of a run, kept from the recorded facts and from what really happened, with nothing borrowed from the ledger.

Invariant: whatever breaks a promise raises `Violation` at the fact that breaks it.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

from protocol import facts
from protocol.pacing import Pacing


class Violation(AssertionError):
    """A promise was broken."""


def require(holds: bool, text: str) -> None:
    """Raise Violation unless it holds."""
    if not holds:
        raise Violation(text)


@dataclass(slots=True)
class Truth:
    """What really happened, as only the simulation knows it."""

    steps_of_roots: dict[str, int] = field(default_factory=dict)
    """The step at which each root was the learner's weights."""
    sampled: dict[tuple[str, str, int], tuple[int, list[int], bytes]] = field(default_factory=dict)
    """For each group by actor, epoch and sequence number: its ticket, the versions of its tokens, its bytes."""


@dataclass(slots=True)
class Account:
    """What a list of facts amounts to."""

    pacing: Pacing
    truth: Truth
    place: dict[int, str] = field(default_factory=dict)
    holder: dict[int, tuple[str, str]] = field(default_factory=dict)
    present: dict[str, str] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    """Tickets that are open and in no batch, ascending."""
    group_of: dict[int, tuple[str, str, int]] = field(default_factory=dict)
    """The group that stands for a ticket."""
    steps: dict[int, int] = field(default_factory=dict)
    standing: dict[int, str] = field(default_factory=dict)
    batches: dict[int, list[int]] = field(default_factory=dict)
    acked: Counter[tuple[str, str]] = field(default_factory=Counter)
    committed: dict[int, int] = field(default_factory=dict)
    """For each step in the present line of steps, its batch."""
    step: int = 0
    num_joined: int = 0
    stopping: bool = False
    ended: bool = False
    halted: str = ""

    def versions_of(self, ticket: int) -> list[int]:
        """The versions that the tokens of a ticket's group were sampled from."""
        return self.truth.sampled[self.group_of[ticket]][1]

    def oldest(self, ticket: int) -> int:
        """The step of the oldest token of a ticket's group."""
        return min(self.steps[number] for number in self.versions_of(ticket))

    def largest_lag(self, ticket: int, step: int) -> int:
        """The lag at the last use of the batch that a waiting ticket is due in, if its oldest token is of `step`."""
        batch = len(self.batches) + bisect.bisect_left(self.waiting, ticket) // self.pacing.groups_per_batch
        return batch * self.pacing.reuse + self.pacing.reuse - 1 - step

    def places(self) -> Counter[str]:
        """How many tickets are in each place."""
        return Counter(self.place.values())

    def add(self, fact: facts.AnyFact) -> None:
        """Take in the next fact. Raises Violation."""
        match fact:
            case facts.ActorJoined():
                require(fact.actor not in self.present, f"{fact.actor} joined twice")
                self.present[fact.actor] = fact.epoch
                self.num_joined += 1
            case facts.ActorLeft():
                require(self.present.pop(fact.actor, None) == fact.epoch, f"{fact.actor} left and was not there")
                held = [ticket for ticket, holder in self.holder.items() if holder == (fact.actor, fact.epoch)]
                require(not held, f"{fact.actor} left, and tickets {held} are still with it")
            case facts.TicketIssued() | facts.TicketRevoked() | facts.TicketEnded():
                self._ticket(fact)
            case facts.GroupAccepted():
                self._accepted(fact)
            case facts.ResultRefused() | facts.AttemptFailed():
                self._taken(fact)
            case facts.BatchFormed():
                self._formed(fact)
            case facts.StepCommitted():
                self._committed(fact)
            case facts.RunStopping():
                self.stopping = True
            case facts.RunEnded():
                self.ended, self.halted = True, fact.halted
            case _:
                self._version(fact)

    def _ticket(self, fact: facts.TicketIssued | facts.TicketRevoked | facts.TicketEnded) -> None:
        number = fact.ticket
        place = self.place.get(number)
        match fact:
            case facts.TicketIssued():
                require(not self.stopping, f"ticket {number} was issued after the stop")
                if fact.attempt == 1:
                    require(number == len(self.place), f"ticket {number} was issued, the next number is {len(self.place)}")
                    self.waiting.append(number)
                else:
                    require(place == "pending", f"ticket {number} was issued again and is {place}")
                require(self.present.get(fact.actor) == fact.epoch, f"ticket {number} was issued to {fact.actor}, which is not there")
                require(self.standing.get(fact.version, "orphaned") != "orphaned", f"ticket {number} was issued for version {fact.version}")
                lag = self.largest_lag(number, self.steps[fact.version])
                require(lag <= self.pacing.max_lag, f"ticket {number} was issued and its lag will be {lag}")
                self.place[number], self.holder[number] = "outstanding", (fact.actor, fact.epoch)
            case facts.TicketRevoked():
                require(
                    place == "outstanding" or (place == "queued" and fact.reason == "orphaned"), f"ticket {number}, {place}, was revoked"
                )
                self.place[number] = "pending"
                self.holder.pop(number, None)
                self.group_of.pop(number, None)
            case facts.TicketEnded():
                require(place in ("pending", "outstanding", "queued"), f"ticket {number}, {place}, ended as {fact.outcome}")
                self.place[number] = fact.outcome
                self.holder.pop(number, None)
                self.waiting.remove(number)

    def _taken(self, fact: facts.GroupAccepted | facts.ResultRefused | facts.AttemptFailed) -> None:
        """Results are taken in turn, each once. (A group that was refused as invalid is also told as a failed attempt, of the same number.)"""
        key = fact.actor, fact.epoch
        again = isinstance(fact, facts.AttemptFailed) and fact.seq == self.acked[key]
        require(again or fact.seq == self.acked[key] + 1, f"result {fact.seq} of {key} was taken after {self.acked[key]}")
        self.acked[key] = fact.seq

    def _accepted(self, fact: facts.GroupAccepted) -> None:
        self._taken(fact)
        number, place = fact.ticket, self.place.get(fact.ticket)
        require(place in ("pending", "outstanding"), f"a group was accepted for ticket {number}, which is {place}")
        ticket, versions, _ = self.truth.sampled[fact.actor, fact.epoch, fact.seq]
        require((ticket, versions) == (number, fact.versions), f"group {fact} was made for ticket {ticket} from versions {versions}")
        require(all(self.standing.get(n, "orphaned") != "orphaned" for n in versions), f"a group of versions {versions} was accepted")
        self.group_of[number] = (fact.actor, fact.epoch, fact.seq)
        require(
            fact.oldest_step == self.oldest(number), f"the oldest step of ticket {number} is {self.oldest(number)}, not {fact.oldest_step}"
        )
        lag = self.largest_lag(number, fact.oldest_step)
        require(lag <= self.pacing.max_lag, f"the group of ticket {number} was accepted and its lag will be {lag}")
        self.place[number] = "queued"
        self.holder.pop(number, None)

    def _formed(self, fact: facts.BatchFormed) -> None:
        require(
            fact.batch == len(self.batches) == fact.step // self.pacing.reuse, f"batch {fact.batch} was formed after {len(self.batches)}"
        )
        require(fact.step == self.step, f"batch {fact.batch} was formed for step {fact.step} at step {self.step}")
        require(len(fact.tickets) == self.pacing.groups_per_batch, f"batch {fact.batch} has {len(fact.tickets)} groups")
        require(fact.tickets == sorted(set(fact.tickets)), f"batch {fact.batch} has tickets {fact.tickets}")
        window = self.waiting[: self.pacing.window * self.pacing.groups_per_batch]
        for number in fact.tickets:
            require(self.place.get(number) == "queued", f"ticket {number}, {self.place.get(number)}, is in batch {fact.batch}")
            require(number in window, f"ticket {number} is in batch {fact.batch} and beyond the window")
            orphans = [n for n in self.versions_of(number) if self.standing[n] == "orphaned"]
            require(not orphans, f"ticket {number} of the orphaned versions {orphans} is in batch {fact.batch}")
            self.place[number] = "batched"
            self.waiting.remove(number)
        self.batches[fact.batch] = fact.tickets

    def _committed(self, fact: facts.StepCommitted) -> None:
        require(fact.step == self.step and fact.batch == fact.step // self.pacing.reuse, f"step {fact.step} was committed at {self.step}")
        lags = [fact.step - self.oldest(number) for number in self.batches[fact.batch]]
        require(fact.lags == lags, f"the lags of step {fact.step} are {lags}, recorded are {fact.lags}")
        require(min(lags) >= 0 and max(lags) <= self.pacing.max_lag, f"step {fact.step} used groups of lags {lags}")
        self.committed[fact.step] = fact.batch
        self.step += 1
        if self.step % self.pacing.reuse == 0 or self.step == self.pacing.num_steps:
            for number in self.batches[fact.batch]:
                require(self.place[number] in ("batched", "consumed"), f"ticket {number} was consumed and is {self.place[number]}")
                self.place[number] = "consumed"

    def _version(self, fact: facts.AnyFact) -> None:
        match fact:
            case facts.VersionPublished(version=version):
                require(version.number == len(self.steps), f"version {version.number} was published after {len(self.steps)}")
                require(version.step == self.truth.steps_of_roots.get(version.root), f"{version} says a step that it was not taken at")
                doubtful = [n for n, standing in self.standing.items() if standing == "suspect" and self.steps[n] >= version.step]
                require(not doubtful, f"version {version.number} of step {version.step} leaves {doubtful} in doubt")
                self.steps[version.number], self.standing[version.number] = version.step, "good"
            case facts.VersionReproduced() | facts.VersionOrphaned():
                require(self.standing[fact.number] == "suspect", f"version {fact.number}, {self.standing[fact.number]}: {fact}")
                self.standing[fact.number] = "good" if isinstance(fact, facts.VersionReproduced) else "orphaned"
            case facts.LearnerStarted():
                require(fact.step <= self.step, f"a learner started at step {fact.step}, the journal is at {self.step}")
                self.step = fact.step
                self.committed = {step: batch for step, batch in self.committed.items() if step < fact.step}
                if self.ended:
                    self.stopping, self.ended, self.halted = False, False, ""
                for number, step in self.steps.items():
                    if step > fact.step and self.standing[number] == "good":
                        self.standing[number] = "suspect"
