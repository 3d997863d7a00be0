"""The account of tickets, kept a second time from the facts alone: every change must be possible, and the sum must be right after each.

Invariant (conserved): issued = outstanding + queued + consumed + expired + failed + void.

The broker keeps the same account in its ledger; nothing of that is used here. A ticket that nobody holds is outstanding, as in the
ledger's account; one in a batch is queued until the last step on the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from protocol import facts
from protocol.pacing import Pacing

OPEN: Final = ("pending", "outstanding", "queued", "batched")
ENDED: Final = ("consumed", "expired", "failed", "void")


class Account:
    """See the module. `broken` is called with each contradiction, in words."""

    def __init__(self, pacing: Pacing, broken: Callable[[str], None]) -> None:
        self._pacing, self._broken = pacing, broken
        self.num_issued = 0
        self.counts: Counter[str] = Counter()
        self._open: dict[int, tuple[str, int]] = {}
        """State and attempt of every open ticket."""
        self._batches: dict[int, list[int]] = {}

    def add(self, lsn: int, fact: facts.AnyFact) -> None:
        """Carry the next fact into the account."""
        match fact:
            case facts.TicketIssued():
                self._issue(lsn, fact)
            case facts.TicketRevoked():
                self._move(lsn, fact.ticket, "pending", ("outstanding", "queued"))
            case facts.GroupAccepted():
                self._move(lsn, fact.ticket, "queued", ("pending", "outstanding"))
            case facts.TicketEnded():
                self._move(lsn, fact.ticket, fact.outcome, ("pending", "outstanding", "queued"))
            case facts.BatchFormed():
                self._form(lsn, fact)
            case facts.StepCommitted():
                if fact.step in (self._pacing.last_use(fact.batch), self._pacing.num_steps - 1):
                    for ticket in self._batches.pop(fact.batch, []):  # a step done again after a resume consumes nothing more
                        self._move(lsn, ticket, "consumed", ("batched",))
            case _:
                return
        if self.num_issued != sum(self.counts[name] for name in (*OPEN, *ENDED)) or min(self.counts.values(), default=0) < 0:
            self._broken(f"event {lsn}: not conserved any more: {self.figures()}")

    def figures(self) -> str:
        """The account in words."""
        parts = {
            "outstanding": self.counts["pending"] + self.counts["outstanding"],
            "queued": self.counts["queued"] + self.counts["batched"],
            **{name: self.counts[name] for name in ENDED},
        }
        return f"{self.num_issued} issued = {' + '.join(f'{count} {name}' for name, count in parts.items())}"

    def _issue(self, lsn: int, fact: facts.TicketIssued) -> None:
        state, attempt = self._open.get(fact.ticket, ("", 0))
        if state not in ("", "pending") or fact.attempt != attempt + 1:
            self._broken(
                f"event {lsn}: ticket {fact.ticket} is issued as attempt {fact.attempt}, after attempt {attempt} ({state or 'none'})"
            )
        if not state:
            if fact.ticket != self.num_issued:
                self._broken(f"event {lsn}: ticket {fact.ticket} is issued where {self.num_issued} is the next number")
            self.num_issued += 1
        else:
            self.counts[state] -= 1
        self.counts["outstanding"] += 1
        self._open[fact.ticket] = "outstanding", fact.attempt

    def _move(self, lsn: int, ticket: int, to: str, possible: tuple[str, ...]) -> None:
        state, attempt = self._open.get(ticket, ("", 0))
        if state not in possible:
            where = state or ("ended already" if 0 <= ticket < self.num_issued else "never issued")
            self._broken(f"event {lsn}: ticket {ticket} becomes {to}, but it is {where}")
        if not state:
            return  # the first contradiction is told; the account goes on as if this had not been written
        self.counts[state] -= 1
        self.counts[to] += 1
        if to in ENDED:
            del self._open[ticket]
        else:
            self._open[ticket] = to, attempt

    def _form(self, lsn: int, fact: facts.BatchFormed) -> None:
        if len(fact.tickets) != self._pacing.groups_per_batch:
            self._broken(f"event {lsn}: batch {fact.batch} has {len(fact.tickets)} groups, {self._pacing.groups_per_batch} make one")
        for ticket in fact.tickets:
            self._move(lsn, ticket, "batched", ("queued",))
        self._batches[fact.batch] = fact.tickets
