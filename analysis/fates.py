"""What became of tickets and batches, in memory: a few numbers for each ticket, whatever the size of the journal."""

from __future__ import annotations

from dataclasses import dataclass, field

from analysis.recording import Recording
from protocol import facts


@dataclass(slots=True)
class BatchFate:
    """A batch: the step it was formed for, the steps that used it, oldest first, and whether it is used up."""

    number: int
    formed_lsn: int
    formed_time: float
    first_step: int
    tickets: list[int]
    steps: list[int] = field(default_factory=list)
    num_repeated: int = 0
    """Steps done again by a learner that had gone back."""
    consumed: bool = False

    @property
    def last_use(self) -> int:
        """The last step that used it so far, or the first that will."""
        return self.steps[-1] if self.steps else self.first_step


@dataclass(slots=True)
class Fates:
    """See the module. `resampled_at` is the lsn of the last revocation of a ticket: a group accepted before it is not used."""

    batches: dict[int, BatchFate] = field(default_factory=dict)
    batch_of: dict[int, int] = field(default_factory=dict)
    ended: dict[int, facts.TicketEnded] = field(default_factory=dict)
    resampled_at: dict[int, int] = field(default_factory=dict)

    def batch(self, ticket: int) -> BatchFate | None:
        """The batch that a ticket's group is in."""
        number = self.batch_of.get(ticket)
        return None if number is None else self.batches[number]

    def outcome(self, ticket: int, accepted_lsn: int) -> str:
        """What became of the group that was accepted at `accepted_lsn`."""
        batch, ended = self.batch(ticket), self.ended.get(ticket)
        if accepted_lsn < self.resampled_at.get(ticket, 0):
            return "sampled again"
        if batch is not None:
            return "consumed" if batch.consumed else "in batch"
        return "queued" if ended is None else ended.outcome


def read_fates(recording: Recording) -> Fates:
    """Everything that decides what became of groups. Raises JournalDamaged."""
    fates, pacing = Fates(), recording.config().pacing
    kinds = (facts.BatchFormed, facts.StepCommitted, facts.TicketEnded, facts.TicketRevoked)
    for lsn, time, fact in recording.facts(*kinds):
        match fact:
            case facts.BatchFormed():
                fates.batches[fact.batch] = BatchFate(fact.batch, lsn, time, fact.step, fact.tickets)
                fates.batch_of.update(dict.fromkeys(fact.tickets, fact.batch))
            case facts.StepCommitted():
                batch = fates.batches.get(fact.batch)
                if batch is None:
                    continue  # the fact that formed it is gone: for `inspect verify` to tell
                if fact.step in batch.steps:
                    batch.num_repeated += 1
                else:
                    batch.steps.append(fact.step)
                batch.consumed = batch.consumed or fact.step in (pacing.last_use(fact.batch), pacing.num_steps - 1)
            case facts.TicketEnded():
                fates.ended[fact.ticket] = fact
            case facts.TicketRevoked():
                fates.resampled_at[fact.ticket] = lsn
    return fates
