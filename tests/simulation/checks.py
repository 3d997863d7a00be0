"""The promises, checked as a simulation goes: at every fact, at every message, at every recovery, and at the end.

Invariant: what this compares the broker with comes from the peers and from the facts, never from the broker's own judgement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.actor_client import MAX_UNACKED
from broker.core import LEARNER, PUBLISHER, Outgoing
from broker.folding import NUM_KEPT
from broker.ledger import Ledger
from broker.session import Result
from protocol import facts, messages
from protocol.groups import decode_group
from protocol.sampling import prompt_index, ticket_seed
from tests.simulation.account import Account, Truth, Violation, require

if TYPE_CHECKING:
    from protocol.journal import JournalEntry
    from tests.simulation.broker import SimulatedBroker
    from tests.simulation.learner import SimulatedLearner
    from tests.simulation.world import World

__all__ = ["Checks", "Violation"]


class Checks:
    """Watches one simulation."""

    def __init__(self, world: World) -> None:
        self._world, self._pacing = world, world.plan.pacing
        self.truth = Truth({}, {})
        self.account = Account(self._pacing, self.truth)
        self.facts: list[facts.AnyFact] = []
        """Everything decided, whether it is written and committed or not."""
        self.num_committed = self.num_appended = 0
        self._acked: dict[tuple[str, str], int] = {}
        """What the committed facts allow to be acknowledged."""
        self._wire: dict[int, tuple[int, int]] = {}
        self._batches: dict[int, list[int]] = {}
        self._told: list[facts.Fact | tuple[object, ...]] = []
        self._committed_steps: dict[int, int] = {}
        self.counts: dict[str, int] = {}
        """How often what happened, to see that the simulation does what it is for."""

    def require(self, holds: bool, text: str) -> None:
        """Raise Violation unless it holds."""
        require(holds, text)

    def count(self, what: str) -> None:
        """Something worth counting happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    # --- facts

    def recorded(self, fact: facts.AnyFact) -> None:
        """The broker decided a fact."""
        self.facts.append(fact)
        self.account.add(fact)
        self.count(type(fact).__name__)
        self._world.schedule.note("   fact", fact)

    def appended(self, fact: facts.AnyFact) -> None:
        """A fact was written: the next one that was decided, or one that the broker tells of itself."""
        if self.num_appended == len(self.facts):
            self.recorded(fact)
        require(self.facts[self.num_appended] == fact, f"{fact} was written, and decided was {self.facts[self.num_appended]}")
        self.num_appended += 1

    def committed(self) -> None:
        """A commit has returned."""
        for fact in self.facts[self.num_committed : self.num_appended]:
            if isinstance(fact, facts.GroupAccepted | facts.ResultRefused | facts.AttemptFailed):
                self._acked[fact.actor, fact.epoch] = fact.seq
        self.num_committed = self.num_appended

    def commit_failed(self) -> None:
        """A disk that fills up while the broker can see it leads to no failed commit."""
        self.count("failed commits")
        kinds = {kind for _, kind in self._world.plan.faults}
        require(bool(kinds & {"disk_is_full", "syncs_fail"}), "a commit failed")

    def recovered(self, entries: list[JournalEntry]) -> None:
        """Durable: everything committed is there, and of the transaction after it everything or nothing."""
        found = [entry.fact for entry in entries]
        require([entry.lsn for entry in entries] == list(range(1, len(entries) + 1)), "the journal's numbers have gaps")
        require(len(found) >= self.num_committed, f"{self.num_committed} facts were committed, {len(found)} came back")
        require(found == self.facts[: len(found)], "what came back is not what was written")
        require(len(found) in (self.num_committed, self.num_appended), "half a transaction came back")
        self.facts, self.num_appended = found, len(found)
        self.account = Account(self._pacing, self.truth)
        for fact in found:
            self.account.add(fact)
        self.committed()
        for process in self._world.all_actors:
            acked = self.account.acked[process.actor, process.epoch]
            require(process.acked <= acked, f"{process.name} was told that result {process.acked} is safe, the journal ends at {acked}")
        for step, batch in self._committed_steps.items():
            require(any(isinstance(f, facts.StepCommitted) and f.step == step and f.batch == batch for f in found), f"step {step} is lost")

    # --- what the broker says

    def sent(self, outgoing: Outgoing) -> None:
        """A message leaves the broker, so whatever it rests on must be committed."""
        message = outgoing.message
        match message:
            case messages.Ack(seq) | messages.ActorWelcome(acked=seq) | messages.Refused(seq=seq):
                key = outgoing.peer.removeprefix("actor:"), outgoing.session
                known = self._acked.get(key, 0)
                require(seq <= known, f"result {seq} of {key} is acknowledged, and {known} are committed")
            case messages.IssueTicket(ticket):
                number, plan = ticket.number, self._world.plan
                right = prompt_index(plan.run_seed, number, plan.num_prompts), ticket_seed(plan.run_seed, number)
                require((ticket.prompt, ticket.seed) == right, f"ticket {number} has another prompt or seed at attempt {ticket.attempt}")
            case messages.BatchReady(batch=batch, tickets=tickets):
                require(self.account.batches.get(batch) == tickets, f"batch {batch} was delivered and is not in the journal")
                require(self._batches.setdefault(batch, tickets) == tickets, f"batch {batch} was another one before")
            case messages.Goodbye():
                require(any(isinstance(fact, facts.RunEnded) for fact in self.facts), "a learner was let go before the run has ended")
            case messages.LearnerRefused():
                self.count(f"refused {message.request}")
            case _:
                pass

    # --- what the peers see

    def finished(self, actor: str, epoch: str, result: Result, versions: list[int]) -> None:
        """An actor hands in a group."""
        self.truth.sampled[actor, epoch, result.message.seq] = (result.ticket, versions, result.payload)

    def batch_received(self, learner: SimulatedLearner, ready: messages.BatchReady, payloads: list[bytes]) -> None:
        """Whole: each group is, byte for byte, what an actor made for that ticket from versions that are what they say."""
        for number, payload in zip(ready.tickets, payloads, strict=True):
            ticket, versions, made = self.truth.sampled[self.account.group_of[number]]
            require((ticket, made) == (number, payload), f"{learner.name} got other bytes for ticket {number}")
            require(set(decode_group(payload).versions.tolist()) == set(versions), f"ticket {number} has tokens of other versions")
            for version in versions:
                told, true = ready.version_steps.get(version), self.account.steps[version]
                require(told == true, f"{learner.name} was told that version {version} is of step {told}, it is of {true}")

    def stepped(self, learner: SimulatedLearner, step: int, batch: int, lags: list[int]) -> None:
        """Bounded: counted by the learner from the tokens' versions."""
        require(batch == step // self._pacing.reuse, f"{learner.name} trains on batch {batch} at step {step}")
        require(min(lags) >= 0 and max(lags) <= self._pacing.max_lag, f"{learner.name} trains at step {step} on groups of lags {lags}")

    def answered(self, learner: SimulatedLearner, answer: messages.ToLearner) -> None:
        """The learner takes an answer in; a commit that it was told of must survive everything."""
        if isinstance(answer, messages.Committed) and learner is self._world.learner:
            self._committed_steps[answer.step] = answer.step // self._pacing.reuse

    def learner_refused(self, learner: SimulatedLearner, request: str, reason: str) -> None:
        """A learner is told no. Where links keep order, that happens to one that was replaced, and to nobody else."""
        self._world.schedule.note(learner.name, "was refused", request, reason)
        replaced = "taken over" in reason or ("of lineage" in reason and len(self._world.learners) > 1)
        excused = replaced or not self._world.plan.keeps_order or self._world.num_jumps > 0
        require(excused, f"{learner.name} did its work in order and was refused {request}: {reason}")

    # --- after every event, and now and then

    def cheap(self, ledger: Ledger) -> None:
        """Conserved, and nobody further ahead than pacing says. After every round of the broker."""
        counts = ledger.tickets.counts
        require(counts.conserved and counts.issued == len(self.account.place), f"tickets are not conserved: {counts}")
        ahead = len(self.account.waiting)
        require(ahead <= self._pacing.run_ahead, f"{ahead} tickets are under way, {self._pacing.run_ahead} are allowed")

    def thorough(self, broker: SimulatedBroker) -> None:
        """The ledger agrees with the account ticket by ticket, and nothing has grown out of bounds."""
        ledger, account, places = broker.ledger, self.account, self.account.places()
        counts = ledger.tickets.counts
        require(counts.outstanding == places["pending"] + places["outstanding"], f"outstanding: {counts}, {places}")
        require(counts.queued == places["queued"] + places["batched"], f"queued: {counts}, {places}")
        for outcome in ("consumed", "expired", "failed", "void"):
            require(getattr(counts, outcome) == places[outcome], f"{outcome}: {counts}, {places}")
        for number, ticket in ledger.tickets.open.items():
            require(ticket.state.value == account.place[number], f"ticket {number} is {ticket.state.value} and {account.place[number]}")
            holders = [(actor.name, actor.epoch) for actor in ledger.actors.values() if number in actor.tickets]
            known = [account.holder[number]] if number in account.holder else []
            require(holders == known, f"ticket {number} is with {holders} and with {known}")
        require({actor.name: actor.epoch for actor in ledger.actors.values()} == account.present, "others are present")
        self._sizes(broker)

    def _sizes(self, broker: SimulatedBroker) -> None:
        ledger, world = broker.ledger, self._world
        names, epochs = len({process.actor for process in world.all_actors}), len(world.all_actors)
        num_open = self._pacing.run_ahead + self._pacing.groups_per_batch
        sizes: list[tuple[str, int, int]] = [
            ("messages not sent", len(broker._outgoing), 100 * (names + 1)),
            ("facts not written", len(broker._facts), 100 * (names + 1)),
            ("files not removed", len(broker._removals), 100),
            ("ways wanted", len(broker._routes_wanted), names),
            ("ways folded", len(broker._folds._found), 2 * NUM_KEPT),
            ("open tickets", len(ledger.tickets.open), num_open),
            ("unbatched tickets", sum(1 for _ in ledger.tickets.unbatched()), self._pacing.run_ahead),
            ("batches", len(ledger.tickets.batches), self._pacing.num_batches),
            ("actors", len(ledger.actors), names),
            ("acknowledged epochs", len(ledger._acked), epochs),
            ("rates", len(broker.book._rates), names),
        ]
        for process in world.actors.values():
            sizes.append((f"unacknowledged of {process.name}", len(process.session.unacked), MAX_UNACKED + process.num_slots))
            sizes.append((f"in hand of {process.name}", len(process.session.in_hand), 2 * num_open))
            require(len(process.session.tickets) <= len(process.session.in_hand), f"{process.name} has tickets twice")
        for what, size, bound in sizes:
            require(size <= bound, f"{what}: {size}, at most {bound} make sense")

    def same_after_recovery(self, before: Ledger, after: Ledger) -> None:
        """A ledger that is rebuilt from the journal is the ledger that was."""
        old, new = surviving(before), surviving(after)
        for name, value in old.items():
            require(value == new[name], f"{name} was {value} and came back as {new[name]}")

    # --- at the end

    def over(self, learner: SimulatedLearner) -> None:
        """Effectively once: the line of steps that the learner ends with has each step once, and each ticket in one batch."""
        account, trained = self.account, learner.state.trained
        require(len(trained) == learner.state.step == account.step, f"the learner ends at {len(trained)}, the journal at {account.step}")
        batch_of: dict[int, int] = {}
        for step, (batch, tickets) in enumerate(trained):
            require(batch == step // self._pacing.reuse and account.committed.get(step) == batch, f"step {step} used batch {batch}")
            require(list(tickets) == account.batches[batch], f"step {step} trained on {tickets}, batch {batch} is {account.batches[batch]}")
            for number in tickets:
                require(batch_of.setdefault(number, batch) == batch, f"ticket {number} was trained on in two batches")
        places = account.places()
        require(not places["pending"] and not places["outstanding"], f"the run has ended with {places}")
        if account.step == self._pacing.num_steps:
            require(not places["queued"] and not places["batched"], f"the last step is done, and {places}")


def surviving(ledger: Ledger) -> dict[str, Any]:
    """What must come back after a crash; times, credit and what is sent again by itself left out."""
    plain = ("state", "attempt", "num_failures", "actor", "epoch", "versions", "oldest_step")
    tickets, learner = ledger.tickets, ledger.learner
    return {
        "tickets": {number: [getattr(ticket, name) for name in plain] for number, ticket in tickets.open.items()},
        "counts": tickets.counts,
        "batches": tickets.batches,
        "unbatched": [ticket.number for ticket in tickets.unbatched()],
        "next": tickets.next_issue(),
        "versions": ledger.versions.by_number,
        "anchor": ledger.versions.anchor,
        "progress": ledger.progress,
        "actors": {actor.name: (actor.epoch, actor.engine, actor.host, actor.tickets) for actor in ledger.actors.values()},
        "learner": learner and (learner.session, learner.lineage, learner.step, learner.world_size),
        "desired": ledger.desired_actors,
        "acked": ledger._acked,
        "failed in a row": ledger._failed_in_a_row,
    }


def is_about_learner(outgoing: Outgoing) -> bool:
    """Whether a message goes to the learner."""
    return outgoing.peer in (LEARNER, PUBLISHER)
