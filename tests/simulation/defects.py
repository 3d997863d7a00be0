"""Brokers, ledgers and journals with one defect each, to see that the simulator finds it."""

from __future__ import annotations

from typing import Any

from broker import events as ev
from broker.core import Decided, Outgoing
from broker.ledger import Ledger
from broker.state import ActorState
from broker.tickets import Ticket
from protocol import facts, messages
from protocol.messages import WireTicket
from protocol.sampling import ticket_seed
from tests.simulation.broker import SimulatedBroker
from tests.simulation.journal import SimulatedJournal


class SendsBeforeItCommits(SimulatedBroker):
    """Hands out at once what waits for a commit."""

    early: list[Outgoing] = []

    def cut(self) -> Decided:
        decided = super().cut()
        self.early = decided.outgoing
        return decided._replace(outgoing=[])

    def groups(self) -> list[Outgoing]:
        early, self.early = self.early, []
        return [*early, *super().groups()]


class CommitsEveryOtherTime(SimulatedBroker):
    """Saves a sync now and then, and sends all the same."""

    num_commits = 0

    def commit(self) -> None:
        self.num_commits += 1
        if self.num_commits % 2:
            super().commit()


class JournalThatDoesNotSync(SimulatedJournal):
    """Returns from a commit once it is written."""

    def _sync(self) -> None:
        pass


class JournalThatTearsTransactions(SimulatedJournal):
    """Takes in the facts of a record one by one, so that half a transaction survives."""

    def commit(self) -> None:
        rows, self.pending = self.pending, []
        for row in rows:
            self.pending = [row]
            super().commit()


class IgnoresTheLagAtIssue(Ledger):
    """Issues tickets to actors of any version."""

    def _actor_for(self, oldest_step: int) -> ActorState | None:
        return super()._actor_for(-(1 << 30))


class IgnoresTheLagOfGroups(Ledger):
    """Takes groups that are too old for their batch."""

    def _refusal(self, event: ev.GroupArrived, ticket: Ticket | None, oldest_step: int | None) -> str:
        reason = super()._refusal(event, ticket, oldest_step)
        return "" if reason == "stale" else reason


class ForgetsToRevoke(Ledger):
    """Lets an actor go with its tickets."""

    def _lose(self, name: str, reason: str) -> None:
        self._record(facts.ActorLeft(name, self.actors[name].epoch, reason))


class ForgetsOrphans(Ledger):
    """Keeps queued groups of a version that is orphaned."""

    def _orphan(self, number: int) -> None:
        self._record(facts.VersionOrphaned(number, self.progress.lineage))


class TakesResultsTwice(Ledger):
    """Does not look at sequence numbers."""

    def _in_sequence(self, actor: str, epoch: str, seq: int) -> bool:
        return self._present(actor, epoch) is not None


class SkipsGaps(Ledger):
    """Takes a result after the one that was lost, and so acknowledges both."""

    def _in_sequence(self, actor: str, epoch: str, seq: int) -> bool:
        return super()._in_sequence(actor, epoch, seq) or (
            self._present(actor, epoch) is not None and seq > self._acked.get((actor, epoch), 0)
        )


class SaysThingsOnce(Ledger):
    """Does not repeat an announcement that was lost."""

    def _remind(self, actor: ActorState) -> None:
        pass


class SendsTicketsOnce(Ledger):
    """Does not repeat a ticket that was lost."""

    def _actor_reported(self, event: ev.ActorReported) -> None:
        actor = self._present(event.actor, event.epoch)
        held = sorted(actor.tickets) if actor is not None else []
        super()._actor_reported(ev.ActorReported(event.actor, event.epoch, _holding(event.report, held)))


class DrawsASeedForEachAttempt(Ledger):
    """Gives a ticket another seed when it is issued again."""

    def _send_ticket(self, ticket: Ticket) -> None:
        super()._send_ticket(ticket)
        effect = self._effects.pop()
        assert isinstance(effect, ev.SendActor) and isinstance(effect.message, messages.IssueTicket)
        wire = effect.message.ticket
        seed = ticket_seed(self._run_seed, ticket.number + (ticket.attempt - 1) * 1000)
        self._send(effect.actor, effect.epoch, messages.IssueTicket(WireTicket(wire.number, wire.attempt, wire.prompt, seed)))


class NeverExpiresLeases(Ledger):
    """Waits for an actor that is gone."""

    def _expire_leases(self) -> None:
        pass


class FormsBatchesAgain(Ledger):
    """Gives a resumed learner other groups than before."""

    def _batch_wanted(self, learner: Any, step: int) -> None:
        super()._batch_wanted(learner, step)
        batch = self.tickets.batches.get(self.pacing.batch_of_step(step))
        if batch is not None and len(batch.tickets) > 1 and learner.lineage > 0:
            batch.tickets = batch.tickets[1:]


def _holding(report: messages.ActorReport, tickets: list[int]) -> messages.ActorReport:
    return messages.ActorReport(
        report.version, report.num_wanted, tickets, report.busy_seconds, report.elapsed_seconds, report.num_tokens, report.doing
    )


DEFECTS: dict[str, dict[str, Any]] = {
    "sends before it commits": {"broker": SendsBeforeItCommits},
    "commits every other time": {"broker": CommitsEveryOtherTime},
    "does not sync": {"journal": JournalThatDoesNotSync},
    "tears transactions": {"journal": JournalThatTearsTransactions},
    **{
        kind.__doc__.rstrip("."): {"ledger": kind}
        for kind in (
            IgnoresTheLagAtIssue,
            IgnoresTheLagOfGroups,
            ForgetsToRevoke,
            ForgetsOrphans,
            TakesResultsTwice,
            SkipsGaps,
            SaysThingsOnce,
            SendsTicketsOnce,
            DrawsASeedForEachAttempt,
            NeverExpiresLeases,
            FormsBatchesAgain,
        )
    },
}
"""What is wrong, and the keyword arguments of World that bring it about."""
