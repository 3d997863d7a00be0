"""The ledger alone against every interleaving hypothesis can think of, beside a slow account kept from the facts that it records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker import events as ev
from broker.ledger import Ledger
from protocol import facts, messages
from protocol.pacing import Pacing, smallest_max_lag
from protocol.weights import BlobRef, PolicyVersion

SNAPSHOT = BlobRef("ab" * 32, 1)

SEED, NUM_PROMPTS = 5, 7
ANY = st.integers(0, 1 << 20)


@st.composite
def pacings(draw: st.DrawFn) -> Pacing:
    """The queue pipeline, or the paper's strict cycles."""
    if draw(st.booleans()):
        sync = draw(st.integers(1, 3))
        reuse, max_lag = 1, draw(st.integers(smallest_max_lag(1, sync), 4))
    else:
        reuse = sync = draw(st.integers(1, 4))
        max_lag = reuse - 1
    size, window = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Pacing(max_lag, reuse, sync, size, num_steps=draw(st.integers(1, 9)), window=window)


def surviving(ledger: Ledger) -> dict[str, Any]:
    """All state that must survive a crash; times, credit and what is re-sent by itself left out."""
    tickets = ledger.tickets
    plain = ("number", "state", "attempt", "num_failures", "actor", "epoch", "versions", "oldest_step")
    learner = ledger.learner
    return {
        "tickets": {n: [getattr(t, name) for name in plain] for n, t in tickets.open.items()},
        "counts": tickets.counts,
        "batches": tickets.batches,
        "next_batch": tickets.next_batch,
        "unbatched": [t.number for t in tickets.unbatched()],
        "next_issue": tickets.next_issue(),
        "versions": ledger.versions.by_number,
        "anchor": ledger.versions.anchor,
        "progress": ledger.progress,
        "actors": {a.name: (a.epoch, a.engine, a.host, a.tickets) for a in ledger.actors.values()},
        "learner": learner and (learner.session, learner.lineage, learner.step, learner.world_size),
        "desired": ledger.desired_actors,
        "acked": ledger._acked,
        "failed_in_a_row": ledger._failed_in_a_row,
    }


@dataclass
class Account:
    """The promises, checked fact by fact with nothing borrowed from the ledger."""

    pacing: Pacing
    place: dict[int, str] = field(default_factory=dict)
    versions_of: dict[int, set[int]] = field(default_factory=dict)
    """The versions that the tokens of each ticket's standing group came from."""
    steps: dict[int, int] = field(default_factory=dict)
    standing: dict[int, str] = field(default_factory=dict)
    batches: dict[int, list[int]] = field(default_factory=dict)
    step: int = 0
    stopping: bool = False
    ended: bool = False
    halted: str = ""
    acked: Counter[tuple[str, str]] = field(default_factory=Counter)

    def due(self, ticket: int) -> int:
        """The batch that a ticket outside all batches is due in."""
        waiting = [n for n, place in self.place.items() if place in ("pending", "outstanding", "queued") and n < ticket]
        return len(self.batches) + len(waiting) // self.pacing.groups_per_batch

    def largest_lag(self, batch: int, step: int) -> int:
        return batch * self.pacing.reuse + self.pacing.reuse - 1 - step

    def oldest(self, ticket: int) -> int:
        return min(self.steps[number] for number in self.versions_of[ticket])

    def add(self, fact: facts.AnyFact, sampled: dict[tuple[str, str, int], set[int]]) -> None:
        match fact:
            case facts.TicketIssued():
                assert not self.stopping, "a ticket was issued after the stop"
                if fact.attempt == 1:
                    assert fact.ticket == len(self.place), "ticket numbers have no gaps"
                else:
                    assert self.place[fact.ticket] == "pending"
                assert self.steps[fact.version] == fact.step and self.standing[fact.version] != "orphaned"
                assert self.largest_lag(self.due(fact.ticket), fact.step) <= self.pacing.max_lag
                self.place[fact.ticket] = "outstanding"
            case facts.TicketRevoked():
                assert self.place[fact.ticket] in (("outstanding", "queued") if fact.reason == "orphaned" else ("outstanding",))
                self.place[fact.ticket] = "pending"
                self.versions_of.pop(fact.ticket, None)
            case facts.GroupAccepted():
                self._in_turn(fact.actor, fact.epoch, fact.seq)
                assert self.place[fact.ticket] in ("pending", "outstanding"), "a second group for the same ticket"
                versions = sampled[fact.actor, fact.epoch, fact.seq]
                assert self.standing[min(versions)] != "orphaned" and self.standing[max(versions)] != "orphaned"
                self.versions_of[fact.ticket] = versions
                assert fact.oldest_step == self.oldest(fact.ticket)
                assert self.largest_lag(self.due(fact.ticket), fact.oldest_step) <= self.pacing.max_lag
                self.place[fact.ticket] = "queued"
            case facts.ResultRefused():
                self._in_turn(fact.actor, fact.epoch, fact.seq)
            case facts.AttemptFailed():
                self.acked[fact.actor, fact.epoch] = fact.seq
            case facts.TicketEnded():
                assert self.place[fact.ticket] in ("pending", "outstanding", "queued")
                self.place[fact.ticket] = fact.outcome
            case facts.BatchFormed():
                assert fact.batch == len(self.batches) == fact.step // self.pacing.reuse and fact.step == self.step
                assert len(fact.tickets) == self.pacing.groups_per_batch and fact.tickets == sorted(set(fact.tickets))
                for ticket in fact.tickets:
                    assert self.place[ticket] == "queued", "only whole groups are delivered"
                    assert self.largest_lag(fact.batch, self.oldest(ticket)) <= self.pacing.max_lag
                    ends = min(self.versions_of[ticket]), max(self.versions_of[ticket])
                    assert all(self.standing[number] != "orphaned" for number in ends)
                    self.place[ticket] = "batched"
                self.batches[fact.batch] = fact.tickets
            case facts.StepCommitted():
                assert fact.step == self.step and fact.batch == fact.step // self.pacing.reuse
                assert fact.lags == [fact.step - self.oldest(t) for t in self.batches[fact.batch]]
                assert min(fact.lags) >= 0 and max(fact.lags) <= self.pacing.max_lag
                self.step += 1
                if self.step % self.pacing.reuse == 0 or self.step == self.pacing.num_steps:
                    for ticket in self.batches[fact.batch]:
                        self.place[ticket] = "consumed"
            case facts.VersionPublished():
                assert fact.version.number == len(self.steps), "numbers are monotonic and never reused"
                in_doubt = [n for n, standing in self.standing.items() if standing == "suspect" and self.steps[n] >= fact.version.step]
                assert not in_doubt, "the learner is elsewhere now, so what was published there before is orphaned first"
                self.steps[fact.version.number], self.standing[fact.version.number] = fact.version.step, "good"
            case facts.VersionReproduced():
                assert self.standing[fact.number] == "suspect"
                self.standing[fact.number] = "good"
            case facts.VersionOrphaned():
                assert self.standing[fact.number] == "suspect"
                self.standing[fact.number] = "orphaned"
            case facts.LearnerStarted():
                assert fact.step <= self.step
                self.step, self.stopping, self.ended = fact.step, False, False
                for number, step in self.steps.items():
                    if step > fact.step and self.standing[number] == "good":
                        self.standing[number] = "suspect"
            case facts.RunStopping():
                self.stopping = True
            case facts.RunEnded():
                self.ended, self.halted = True, fact.halted

    def _in_turn(self, actor: str, epoch: str, seq: int) -> None:
        assert seq == self.acked[actor, epoch] + 1, "results are taken in order, each once"
        self.acked[actor, epoch] = seq


@dataclass
class FakeActor:
    """One actor process."""

    name: str
    epoch: str
    version: int = -1
    wanted: int = 2
    inbox: list[messages.ToActor] = field(default_factory=list)
    in_hand: dict[int, tuple[int, set[int]]] = field(default_factory=dict)
    """Ticket -> attempt, and the versions sampled from so far."""
    results: list[ev.GroupArrived | ev.AttemptGivenUp] = field(default_factory=list)
    """All results ever; result i has sequence number i + 1."""
    acked: int = 0
    hello_wanted: bool = True
    reports: list[messages.ActorReport] = field(default_factory=list)

    def read(self) -> None:
        for message in self.inbox:
            match message:
                case messages.IssueTicket(ticket):
                    under_way = {result.ticket for result in self.results[self.acked :]}
                    if ticket.number not in self.in_hand and ticket.number not in under_way:
                        self.in_hand[ticket.number] = (ticket.attempt, {self.version})
                case messages.Ack(seq):
                    assert seq <= len(self.results), "an acknowledgement of something never sent"
                    self.acked = max(self.acked, seq)
                case messages.HelloWanted():
                    self.hello_wanted = True
        self.inbox.clear()

    def report(self) -> messages.ActorReport:
        under_way = {result.ticket for result in self.results[self.acked :]}
        tickets = sorted(set(self.in_hand) | under_way)
        self.reports.append(messages.ActorReport(self.version, self.wanted if self.version >= 0 else 0, tickets, 0.0, 0.0, 0, ""))
        return self.reports[-1]


@dataclass
class FakeLearner:
    """One learner session, doing what learner/loop.py does in the same order."""

    session: str
    step: int
    welcomed: bool = False
    next_version: int = -1
    lineage: int = -1
    batch: int | None = None
    published: int = -1
    told_to_stop: bool = False
    gone: bool = False


class LedgerMachine(RuleBasedStateMachine):
    @initialize(pacing=pacings(), may_stop=st.sampled_from([False, False, False, True]))
    def begin(self, pacing: Pacing, may_stop: bool) -> None:
        self.pacing, self.may_stop = pacing, may_stop
        self.ledger = Ledger(pacing, SEED, NUM_PROMPTS, 2)
        self.account = Account(pacing)
        self.facts: list[facts.AnyFact] = []
        self.sampled: dict[tuple[str, str, int], set[int]] = {}
        self.actors: dict[str, FakeActor] = {}
        self.dead: list[FakeActor] = []
        self.branch = dict.fromkeys(range(pacing.num_steps + 1), 0)
        self.zombies: list[FakeLearner] = []
        self.learner = FakeLearner("learner-0", 0)
        self.last: ev.Event | None = None
        self.now, self.births, self.turns = 0.0, 0, 0
        for name in "abc":
            self.an_actor_starts_or_is_replaced(name, 2)
        self.the_learner_goes_on(3)
        self.all_actors_read_and_report()

    # --- plumbing

    def handle(self, happened: ev.Event) -> list[ev.Effect]:
        effects = self.ledger.handle(happened, self.now)
        for effect in effects:
            match effect:
                case ev.Record(fact):
                    self.facts.append(fact)
                    self.account.add(fact, self.sampled)
                case ev.WelcomeActor(name, epoch, acked):
                    if (actor := self.process(name, epoch)) is not None:
                        actor.hello_wanted, actor.acked = False, max(actor.acked, acked)
                        assert acked <= len(actor.results)
                case ev.SendActor(name, epoch, message):
                    if (actor := self.process(name, epoch)) is not None:
                        actor.inbox.append(message)
                case ev.WelcomeLearner(session, lineage, number) if session == self.learner.session:
                    self.learner.welcomed, self.learner.lineage, self.learner.next_version = True, lineage, number
                case ev.SendLearner(session, message) if session == self.learner.session:
                    self.learner_reads(message)
        return effects

    def recorded(self, effects: list[ev.Effect]) -> list[facts.AnyFact]:
        return [effect.fact for effect in effects if isinstance(effect, ev.Record)]

    def process(self, name: str, epoch: str) -> FakeActor | None:
        actor = self.actors.get(name)
        return actor if actor is not None and actor.epoch == epoch else None

    def learner_reads(self, message: messages.ToLearner) -> None:
        learner = self.learner
        match message:
            case messages.BatchReady():
                if learner.batch is None and message.step == learner.step:
                    assert message.tickets == self.account.batches[message.batch]
                    for ticket in message.tickets:
                        for number in self.account.versions_of[ticket]:
                            assert message.version_steps[number] == self.account.steps[number]
                    learner.batch = message.batch
            case messages.Committed(step):
                if step == learner.step:
                    learner.step += 1
                    if learner.step % self.pacing.reuse == 0:
                        learner.batch = None
            case messages.Published(step, _, next_version):
                learner.published, learner.next_version = step, next_version
            case messages.Stop():
                learner.told_to_stop = True
            case messages.Goodbye():
                learner.gone = True
            case messages.LearnerRefused(request, reason):
                raise AssertionError(f"a learner that does its work in order was refused: {request}: {reason}")

    def publication(self, step: int) -> ev.VersionReady:
        learner = self.learner
        version = PolicyVersion(learner.next_version, step, learner.lineage, f"root-{step}-{self.branch[step]}")
        return ev.VersionReady(learner.session, version, -1, None, SNAPSHOT, 1, 1)

    def next_of_learner(self) -> ev.Event:
        learner = self.learner
        if not learner.welcomed:
            return ev.LearnerHere(learner.session, learner.step, 1)
        if learner.step == 0 and learner.published < 0:
            return self.publication(0)
        if learner.step >= self.pacing.num_steps or (learner.told_to_stop and learner.batch is None):
            return ev.LearnerGone(learner.session, learner.step, {})
        if learner.batch is None:
            return ev.BatchWanted(learner.session, learner.step)
        if (learner.step + 1) % self.pacing.sync_every == 0 and learner.published != learner.step + 1:
            return self.publication(learner.step + 1)
        lags = [learner.step - self.account.oldest(ticket) for ticket in self.account.batches[learner.batch]]
        return ev.StepDone(learner.session, learner.step, learner.batch, lags, {})

    def newest(self) -> int:
        return max((n for n, standing in self.account.standing.items() if standing != "orphaned"), default=-1)

    def pick(self, choice: int, ready: list[Any]) -> Any:
        return ready[choice % len(ready)]

    def finished_group(self, actor: FakeActor, ticket: int, oldest: int | None = None, invalid: str = "") -> None:
        attempt, versions = actor.in_hand.pop(ticket)
        versions = versions | ({oldest} if oldest is not None else set())
        seq = len(actor.results) + 1
        self.sampled[actor.name, actor.epoch, seq] = versions
        place = (actor.name, actor.epoch, seq, ticket, attempt)
        group = (
            ev.GroupArrived(*place, invalid=invalid)
            if invalid
            else ev.GroupArrived(*place, versions=sorted(versions), num_tokens=4, reward=0.5)
        )
        actor.results.append(group)

    def advance(self, actor: FakeActor) -> None:
        """In-flight update: what is being sampled goes on from the newest version."""
        actor.version = self.newest()
        for _, versions in actor.in_hand.values():
            versions.add(actor.version)
            # A generation whose middle ran under a version orphaned since is the subject of a scenario of its own.
            versions -= {n for n in versions if self.account.standing[n] == "orphaned" and min(versions) < n < max(versions)}

    # --- actors

    @rule(name=st.sampled_from("abc"), wanted=st.integers(1, 4))
    def an_actor_starts_or_is_replaced(self, name: str, wanted: int) -> None:
        if name in self.actors:
            self.dead.append(self.actors[name])
        self.births += 1
        self.actors[name] = FakeActor(name, f"epoch-{self.births}", wanted=wanted)
        self.handle(ev.ActorHere(name, self.actors[name].epoch, "fake", "here"))

    @precondition(lambda self: self.actors)
    @rule(choice=ANY)
    def an_actor_dies_silently(self, choice: int) -> None:
        name = self.pick(choice, sorted(self.actors))
        self.dead.append(self.actors.pop(name))

    @precondition(lambda self: self.actors)
    @rule(choice=ANY)
    def an_actor_leaves(self, choice: int) -> None:
        actor = self.actors.pop(self.pick(choice, sorted(self.actors)))
        self.handle(ev.ActorGone(actor.name, actor.epoch))

    @precondition(lambda self: self.actors)
    @rule(choice=ANY, update=st.booleans())
    def an_actor_reads_and_reports(self, choice: int, update: bool) -> None:
        self.turn(self.actors[self.pick(choice, sorted(self.actors))], update)

    @rule()
    def all_actors_read_and_report(self) -> None:
        for actor in list(self.actors.values()):
            self.turn(actor, True)

    def turn(self, actor: FakeActor, update: bool) -> None:
        actor.read()
        if actor.hello_wanted:
            self.handle(ev.ActorHere(actor.name, actor.epoch, "fake", "here"))
        if update and self.newest() >= 0:
            self.advance(actor)
        self.handle(ev.ActorReported(actor.name, actor.epoch, actor.report()))

    @precondition(lambda self: any(actor.reports for actor in self.actors.values()))
    @rule(choice=ANY)
    def a_stale_report_arrives(self, choice: int) -> None:
        reports = [(actor, report) for actor in self.actors.values() for report in actor.reports]
        actor, report = self.pick(choice, reports)
        self.handle(ev.ActorReported(actor.name, actor.epoch, report))

    @precondition(lambda self: any(actor.inbox for actor in self.actors.values()))
    @rule(choice=ANY)
    def what_was_sent_to_an_actor_is_lost(self, choice: int) -> None:
        self.pick(choice, [actor for actor in self.actors.values() if actor.inbox]).inbox.clear()

    @precondition(lambda self: any(actor.in_hand for actor in self.actors.values()))
    @rule(choice=ANY, how=st.sampled_from(["whole", "whole", "whole", "old", "invalid", "failed"]), version=ANY)
    def an_actor_finishes_a_ticket(self, choice: int, how: str, version: int) -> None:
        actor, ticket = self.pick(choice, [(a, t) for a in self.actors.values() for t in a.in_hand])
        if how == "failed":
            attempt, _ = actor.in_hand.pop(ticket)
            actor.results.append(ev.AttemptGivenUp(actor.name, actor.epoch, len(actor.results) + 1, ticket, attempt, "broken"))
        elif how == "old":
            self.finished_group(actor, ticket, oldest=self.pick(version, sorted(self.account.steps)))
        else:
            self.finished_group(actor, ticket, invalid="invalid: lengths" if how == "invalid" else "")

    @precondition(lambda self: any(actor.results for actor in self.actors.values()))
    @rule(choice=ANY, count=st.integers(1, 4))
    def results_arrive_in_order(self, choice: int, count: int) -> None:
        actor = self.pick(choice, [actor for actor in self.actors.values() if actor.results])
        for result in actor.results[actor.acked : actor.acked + count]:
            self.handle(result)

    @precondition(lambda self: any(actor.results for actor in [*self.actors.values(), *self.dead]))
    @rule(choice=ANY)
    def any_result_arrives_again_or_out_of_turn(self, choice: int) -> None:
        result = self.pick(choice, [result for actor in [*self.actors.values(), *self.dead] for result in actor.results])
        known = self.ledger._acked.get((result.actor, result.epoch), 0)
        recorded = self.recorded(self.handle(result))
        if result.seq != known + 1:
            told = (facts.GroupAccepted, facts.ResultRefused, facts.AttemptFailed)
            assert not any(isinstance(fact, told) for fact in recorded), "a result was counted out of turn"

    # --- learner

    @precondition(lambda self: not self.learner.gone)
    @rule(count=st.integers(1, 3))
    def the_learner_goes_on(self, count: int) -> None:
        for _ in range(count):
            if self.learner.gone:
                break
            self.last = self.next_of_learner()
            self.handle(self.last)

    @precondition(lambda self: isinstance(self.last, ev.StepDone | ev.VersionReady | ev.LearnerHere | ev.LearnerGone))
    @rule()
    def the_learner_repeats_itself(self) -> None:
        if self.last.session == self.learner.session:
            recorded = self.recorded(self.handle(self.last))
            assert all(isinstance(fact, facts.TicketIssued) for fact in recorded), "a repeated request had a second effect"

    @precondition(lambda self: self.account.step > 0)
    @rule(step=ANY, same=st.booleans())
    def the_learner_starts_again_from_a_checkpoint(self, step: int, same: bool) -> None:
        self.turns += 1
        self.zombies.append(self.learner)
        self.last = None
        resumed = step % (self.account.step + 1)
        if not same:
            self.branch |= {later: self.turns for later in self.branch if later > resumed}
        self.learner = FakeLearner(f"learner-{self.turns}", resumed)

    @precondition(lambda self: self.zombies and self.ledger.learner is not None)
    @rule(choice=ANY)
    def a_learner_that_was_replaced_still_speaks(self, choice: int) -> None:
        zombie = self.pick(choice, self.zombies)
        if zombie.session == self.ledger.learner.session:
            return
        for stale in (ev.BatchWanted(zombie.session, zombie.step), ev.LearnerGone(zombie.session, zombie.step, {})):
            effects = self.handle(stale)
            assert not [f for f in self.recorded(effects) if not isinstance(f, facts.TicketIssued | facts.BatchFormed)]
            assert any(isinstance(e, ev.SendLearner) and isinstance(e.message, messages.LearnerRefused) for e in effects)

    # --- the world

    @rule(seconds=st.sampled_from([0.3, 2.5, 7.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.handle(ev.Tick())

    @rule(rounds=st.integers(1, 6))
    def all_goes_well(self, rounds: int) -> None:
        """Everybody who is left does everything that is to be done."""
        for _ in range(rounds):
            if self.learner.gone:
                break
            self.now += 1.1
            self.handle(ev.Tick())
            self.the_learner_goes_on(2)
            for actor in list(self.actors.values()):
                self.turn(actor, True)
                actor.read()
                for ticket in list(actor.in_hand):
                    self.finished_group(actor, ticket)
                for result in actor.results[actor.acked :]:
                    self.handle(result)
                actor.read()

    @rule()
    def the_broker_is_killed_and_recovers(self) -> None:
        self.ledger = self.recovered()
        self.ledger.recovered(self.now)

    @precondition(lambda self: self.may_stop and len(self.facts) > 40)
    @rule()
    def somebody_stops_the_run(self) -> None:
        self.handle(ev.StopWanted("enough"))

    # --- the promises

    @invariant()
    def promise_2_conserved(self) -> None:
        if not hasattr(self, "account"):
            return
        places, counts = Counter(self.account.place.values()), self.ledger.tickets.counts
        assert counts.conserved and counts.issued == len(self.account.place)
        assert counts.outstanding == places["pending"] + places["outstanding"]
        assert counts.queued == places["queued"] + places["batched"]
        for outcome in ("consumed", "expired", "failed", "void"):
            assert getattr(counts, outcome) == places[outcome]
        for number, ticket in self.ledger.tickets.open.items():
            assert ticket.state.value == self.account.place[number]
            holders = [actor.name for actor in self.ledger.actors.values() if number in actor.tickets]
            assert holders == ([ticket.actor] if ticket.state.value == "outstanding" else [])

    @invariant()
    def the_run_is_never_further_ahead_than_pacing_says(self) -> None:
        if hasattr(self, "account"):
            assert sum(1 for _ in self.ledger.tickets.unbatched()) <= self.pacing.run_ahead

    def recovered(self) -> Ledger:
        fresh = Ledger(self.pacing, SEED, NUM_PROMPTS, 2)
        for fact in self.facts:
            fresh.apply(fact)
        assert surviving(fresh) == surviving(self.ledger)
        return fresh

    def teardown(self) -> None:
        """From wherever this is, a run whose parts behave from now on comes to its end."""
        if not hasattr(self, "account"):
            return
        self.recovered()
        self.an_actor_starts_or_is_replaced("d", 3)
        self.all_goes_well(60 + 12 * self.pacing.num_steps)
        assert self.learner.gone and self.account.ended, f"the run waits for ever: {self.ledger.why_waiting()}"
        if not self.learner.told_to_stop and not self.account.halted:
            assert self.account.step == self.pacing.num_steps
        self.promise_2_conserved()
        places = Counter(self.account.place.values())
        assert not places["pending"] and not places["outstanding"], "what is outstanding at the end becomes void"
        if self.account.step == self.pacing.num_steps:
            assert self.ledger.tickets.counts.queued == 0 and not self.ledger.tickets.open
        self.recovered()
        for name, value in self.ledger.progress.refused.items():
            if value:
                event(f"refused: {name}")
        event(f"ended at the last step: {self.account.step == self.pacing.num_steps}")
        event(f"halted: {bool(self.account.halted)}, orphans: {'orphaned' in self.account.standing.values()}")


TestEveryPromiseHoldsUnderAnyInterleaving = LedgerMachine.TestCase
TestEveryPromiseHoldsUnderAnyInterleaving.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


ACTIONS = {
    "an_actor_starts_or_is_replaced": 1,
    "an_actor_dies_silently": 1,
    "an_actor_leaves": 1,
    "an_actor_reads_and_reports": 14,
    "all_actors_read_and_report": 4,
    "a_stale_report_arrives": 3,
    "what_was_sent_to_an_actor_is_lost": 2,
    "an_actor_finishes_a_ticket": 24,
    "results_arrive_in_order": 16,
    "any_result_arrives_again_or_out_of_turn": 5,
    "the_learner_goes_on": 14,
    "the_learner_repeats_itself": 3,
    "the_learner_starts_again_from_a_checkpoint": 1,
    "a_learner_that_was_replaced_still_speaks": 1,
    "time_passes": 4,
    "all_goes_well": 1,
    "the_broker_is_killed_and_recovers": 1,
    "somebody_stops_the_run": 1,
}
"""How often each rule is taken in a long walk."""


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 40), pacing=pacings(), may_stop=st.sampled_from([False, False, False, True]), data=st.data())
def test_every_promise_holds_on_long_random_walks(seed: int, pacing: Pacing, may_stop: bool, data: st.DataObject) -> None:
    random, machine = Random(seed), LedgerMachine()
    machine.begin(msgspec.structs.replace(pacing, num_steps=4 * pacing.num_steps + 6), may_stop)
    rules = {known.function.__name__: known for known in (machine.rules() if callable(machine.rules) else machine.rules)}
    assert set(rules) == set(ACTIONS)
    weights = [weight * random.choice([0.2, 1.0, 1.0, 3.0]) for weight in ACTIONS.values()]
    gloomy = random.random() < 0.15
    for _ in range(data.draw(st.integers(20, 600))):
        if machine.learner.gone and random.random() < 0.1:
            break
        name = random.choices(list(ACTIONS), weights)[0]
        if gloomy and name == "an_actor_finishes_a_ticket" and any(actor.in_hand for actor in machine.actors.values()):
            machine.an_actor_finishes_a_ticket(VALUES["choice"](random), "failed", 0)
            continue
        if not all(condition(machine) for condition in rules[name].preconditions):
            continue
        getattr(machine, name)(**{argument: VALUES[argument](random) for argument in rules[name].arguments_strategies})
        machine.promise_2_conserved()
        machine.the_run_is_never_further_ahead_than_pacing_says()
    machine.teardown()


VALUES: dict[str, Callable[[Random], Any]] = {
    "name": lambda random: random.choice("abc"),
    "wanted": lambda random: random.randint(1, 4),
    "choice": lambda random: random.randrange(1 << 20),
    "version": lambda random: random.randrange(1 << 20),
    "step": lambda random: random.randrange(1 << 20),
    "count": lambda random: random.randint(1, 4),
    "rounds": lambda random: random.randint(1, 4),
    "update": lambda random: random.random() < 0.7,
    "same": lambda random: random.random() < 0.5,
    "how": lambda random: random.choice(["whole"] * 8 + ["old", "old", "invalid", "failed"]),
    "seconds": lambda random: random.choice([0.3, 0.3, 2.5, 7.0]),
}
"""A value for each argument of the rules."""
