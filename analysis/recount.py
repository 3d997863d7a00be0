"""The promises, counted again from a run's journal alone: lag, conservation, and that no group was used twice.

Nothing of the ledger is used here: lags are derived a second time, from the versions of the recorded tokens themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from protocol import facts
from protocol.config import parse_config_json
from protocol.errors import JournalDamaged
from protocol.groups import decode_group
from protocol.journal import open_read_only, read_facts, read_payload
from protocol.pacing import Pacing


@dataclass(slots=True)
class Recount:
    """What a journal says. Lags count groups over every optimizer step that used them, steps repeated after a resume included."""

    pacing: Pacing
    lags: Counter[int] = field(default_factory=Counter)
    ledger_lags: Counter[int] = field(default_factory=Counter)
    learner_largest_lag: int = 0
    issued: set[int] = field(default_factory=set)
    consumed: set[int] = field(default_factory=set)
    ended: dict[int, str] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    num_reissued: int = 0
    broken: list[str] = field(default_factory=list)
    """What contradicts the promises, in words; empty if all is well."""

    @property
    def largest_lag(self) -> int:
        """The largest lag of any group at any step."""
        return max(self.lags, default=0)

    @property
    def num_open(self) -> int:
        """Tickets that have neither been consumed nor ended."""
        return len(self.issued - self.consumed - self.ended.keys())

    def num_ended(self, outcome: facts.Outcome) -> int:
        """Tickets that ended in this way."""
        return sum(found == outcome for found in self.ended.values())


def recount(path: Path) -> Recount:
    """Count a journal. Raises JournalError if it cannot be read or is damaged."""
    connection = open_read_only(path)
    try:
        (config,) = connection.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
        counter = Recounter(parse_config_json(config).pacing, lambda ticket: _versions(path, read_payload(connection, path, ticket)))
        for entry in read_facts(connection, path):
            counter.add(entry.fact)
    finally:
        connection.close()
    return counter.finish()


class Recounter:
    """Counts a journal's facts, given one at a time in order.

    `versions_of` gives the numbers of the versions that the tokens of a ticket's group were sampled from; it is asked once for each
    ticket of a batch, when the batch is formed.
    """

    def __init__(self, pacing: Pacing, versions_of: Callable[[int], list[int]]) -> None:
        self._count, self._versions_of = Recount(pacing), versions_of
        self._version_steps: dict[int, int] = {}
        self._batches: dict[int, list[int]] = {}
        self._oldest_steps: dict[int, list[int]] = {}

    def add(self, fact: facts.AnyFact) -> None:
        """Take the next fact into account. Raises what `versions_of` raises."""
        match fact:
            case facts.VersionPublished():
                self._version_steps[fact.version.number] = fact.version.step
            case facts.BatchFormed():
                self._batches[fact.batch] = fact.tickets
                self._oldest_steps[fact.batch] = [self._oldest_step(ticket) for ticket in fact.tickets]
            case facts.StepCommitted(batch=batch) if batch not in self._batches:
                self._count.broken.append(f"step {fact.step} used batch {batch}, which was not formed")
            case facts.StepCommitted():
                _count_step(self._count, fact, self._batches[fact.batch], self._oldest_steps[fact.batch])
            case _:
                _count_ticket(self._count, fact)

    def finish(self) -> Recount:
        """The count, checked as a whole."""
        _check(self._count, self._batches)
        return self._count

    def _oldest_step(self, ticket: int) -> int:
        numbers = self._versions_of(ticket)
        unknown = [number for number in numbers if number not in self._version_steps]
        if unknown:
            self._count.broken.append(f"ticket {ticket} has tokens of version {unknown[0]}, which was not published before its batch")
        return min((self._version_steps[number] for number in numbers if number not in unknown), default=-1)


def _versions(path: Path, payload: bytes | None) -> list[int]:
    if payload is None:
        raise JournalDamaged(path, "table groups", "a batch has a ticket without a group")
    found: list[int] = np.unique(decode_group(payload).versions).tolist()
    return found


def _count_step(count: Recount, fact: facts.StepCommitted, tickets: list[int], oldest_steps: list[int]) -> None:
    lags = [fact.step - oldest for oldest in oldest_steps]
    count.lags.update(lags)
    count.ledger_lags.update(fact.lags)
    count.learner_largest_lag = max(count.learner_largest_lag, int(fact.metrics.get("lag_max") or 0))
    if lags != fact.lags:
        count.broken.append(f"step {fact.step}: the ledger counted lags {fact.lags}, the tokens say {lags}")
    if int(fact.metrics.get("lag_max", max(lags)) or 0) != max(lags):
        count.broken.append(f"step {fact.step}: the learner's largest lag is {fact.metrics['lag_max']}, the tokens say {max(lags)}")
    if max(lags) > count.pacing.max_lag:
        count.broken.append(f"step {fact.step} used a group with lag {max(lags)}, max_lag is {count.pacing.max_lag}")
    if fact.step in (count.pacing.last_use(fact.batch), count.pacing.num_steps - 1):
        count.consumed.update(tickets)


def _count_ticket(count: Recount, fact: facts.AnyFact) -> None:
    match fact:
        case facts.TicketIssued():
            count.num_reissued += fact.ticket in count.issued
            count.issued.add(fact.ticket)
        case facts.TicketEnded():
            if fact.ticket in count.ended:
                count.broken.append(f"ticket {fact.ticket} ended twice")
            count.ended[fact.ticket] = fact.outcome
        case facts.ResultRefused():
            count.refused[fact.reason] += 1


def _check(count: Recount, batches: dict[int, list[int]]) -> None:
    members = Counter(ticket for tickets in batches.values() for ticket in tickets)
    for ticket, times in members.items():
        if times > 1:
            count.broken.append(f"ticket {ticket} is in {times} batches")
    for ticket in count.ended.keys() & members.keys():
        count.broken.append(f"ticket {ticket} ended as {count.ended[ticket]} and is in a batch")
    for ticket in (count.ended.keys() | members.keys()) - count.issued:
        count.broken.append(f"ticket {ticket} was never issued")
