"""Where the lag of the groups that are trained on comes from: a projection over the facts of a run, the same live and from a journal.

Invariant: at every step t that uses a group of a version of step v, publish + in flight + queued + reuse = t - v, in whole learner steps.

The learner's step is the next one to be committed. v <= issued <= arrived <= first <= t are learner steps: the oldest token's version, when the
attempt that was accepted was issued, when its group was accepted, the first use of its batch, and the step. The parts are what lies between. Two
things would upset that order: an actor samples from weights that are newer than the ticket, even than the last commit; and a learner that
resumes counts again from an earlier step. So each point is moved up to the one before it, and none lies after the first use: no part is negative
(unless v itself lay after the first use, which the ledger never allows), and they add up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from protocol import facts

NUM_RECENT: Final = 50
"""Steps that `recent` is over."""


class LagParts(NamedTuple):
    """A lag in learner steps: of one group, a sum, or a mean over groups."""

    publish: float
    """Weights the learner had when the ticket was issued and the actor did not: publication, transfer, waiting for a boundary."""
    in_flight: float
    """From the ticket, or from the weights if they are newer, to the group's arrival."""
    queued: float
    """From its arrival to the first use of its batch."""
    reuse: float
    """From the first use of its batch to this one."""

    @property
    def total(self) -> float:
        """The lag itself."""
        return sum(self)

    def in_words(self) -> str:
        """On one line, as `lag 3.1 = 0.4 publishing + 1.2 in flight + 1.0 queued + 0.5 reuse`."""
        named = zip(self, ("publishing", "in flight", "queued", "reuse"), strict=True)
        return f"lag {self.total:.1f} = {' + '.join(f'{part:.1f} {name}' for part, name in named)}"


class LagSum(NamedTuple):
    """The parts of `num_groups` lags, added up."""

    num_groups: int = 0
    parts: LagParts = LagParts(0, 0, 0, 0)

    def plus(self, other: LagSum) -> LagSum:
        """Both together."""
        return LagSum(self.num_groups + other.num_groups, _added((self.parts, other.parts)))

    @property
    def mean(self) -> LagParts | None:
        """The mean over the groups, None without any."""
        return LagParts(*(part / self.num_groups for part in self.parts)) if self.num_groups else None


class _Arrival(NamedTuple):
    """The first three points of an accepted group, in order."""

    oldest: int
    issued: int
    arrived: int


@dataclass(slots=True)
class _Ticket:
    """A ticket that is in no batch yet: the learner's step when each attempt was issued, and its group if it has one."""

    issued: dict[int, int] = field(default_factory=dict)
    arrival: _Arrival | None = None


class _Batch(NamedTuple):
    """A batch: its first use, and the lags of its groups there."""

    first: int
    at_first: LagSum


class LagAccount:
    """See the module. Keeps the tickets that are in no batch, the groups of the newest batch, and one sum for each batch before."""

    def __init__(self) -> None:
        self.total = LagSum()
        """Over all groups at all steps, steps done again after a resume included."""
        self._step = 0
        self._tickets: dict[int, _Ticket] = {}
        self._batches: dict[int, _Batch] = {}
        """Those used up as well: a learner that goes back uses them again."""
        self._newest: tuple[int, list[LagParts]] = -1, []
        """The batch formed last, and the parts of each of its groups at its first use."""
        self._recent: deque[LagSum] = deque(maxlen=NUM_RECENT)

    def add(self, fact: facts.AnyFact) -> LagParts | None:
        """Take in the next fact. For a committed step: the mean parts over its groups. What contradicts the facts before is left out."""
        match fact:
            case facts.TicketIssued():
                self._tickets.setdefault(fact.ticket, _Ticket()).issued[fact.attempt] = self._step
            case facts.GroupAccepted():
                self._accept(fact)
            case facts.TicketEnded():
                self._tickets.pop(fact.ticket, None)
            case facts.BatchFormed():
                self._form(fact)
            case facts.LearnerStarted():
                self._step = fact.step
            case facts.StepCommitted():
                self._step = fact.step + 1
                return self._commit(fact)
        return None

    @property
    def recent(self) -> LagParts | None:
        """The mean over the groups of the last NUM_RECENT steps, None before the first step."""
        found = LagSum()
        for one in self._recent:
            found = found.plus(one)
        return found.mean

    def at_first_use(self, batch: int) -> LagParts | None:
        """The mean over the groups of a batch at its first use, reuse 0; None if it is not known."""
        found = self._batches.get(batch)
        return found.at_first.mean if found is not None else None

    def groups_at(self, step: facts.StepCommitted) -> list[LagParts]:
        """The parts of each group of a step, in ticket order; empty if a newer batch than the step's has been formed since."""
        number, groups = self._newest
        return [_reused(parts, step.step - self._batches[number].first) for parts in groups] if number == step.batch else []

    def _accept(self, fact: facts.GroupAccepted) -> None:
        ticket = self._tickets.setdefault(fact.ticket, _Ticket())
        issued = max(fact.oldest_step, ticket.issued.get(fact.attempt, fact.oldest_step))
        ticket.arrival = _Arrival(fact.oldest_step, issued, max(issued, self._step))

    def _form(self, fact: facts.BatchFormed) -> None:
        tickets = [self._tickets.pop(number, _Ticket()) for number in fact.tickets]
        groups = [_at_first_use(ticket.arrival, fact.step) for ticket in tickets if ticket.arrival is not None]
        self._newest = fact.batch, groups
        self._batches[fact.batch] = _Batch(fact.step, LagSum(len(groups), _added(groups)))

    def _commit(self, fact: facts.StepCommitted) -> LagParts | None:
        batch = self._batches.get(fact.batch)
        if batch is None:
            return None
        num_groups, parts = batch.at_first
        found = LagSum(num_groups, _reused(parts, num_groups * (fact.step - batch.first)))
        self.total = self.total.plus(found)
        self._recent.append(found)
        return found.mean


def _at_first_use(arrival: _Arrival, first: int) -> LagParts:
    issued, arrived = min(arrival.issued, first), min(arrival.arrived, first)
    return LagParts(issued - arrival.oldest, arrived - issued, first - arrived, 0)


def _reused(parts: LagParts, reuse: int) -> LagParts:
    return parts._replace(reuse=parts.reuse + reuse)


def _added(found: Iterable[LagParts]) -> LagParts:
    return LagParts(*map(sum, zip(*found, strict=True))) if (found := list(found)) else LagParts(0, 0, 0, 0)
