"""A recorded run through the ledger alone, under another pacing: what would have been held back, expired, waited for.

Pure: facts with their times in, an account out. What is taken from the recording: how long an actor worked on each ticket, how long each batch was
under way to the learner, how long the learner was busy with each step and with publishing it, what a learner that died lost, how long an actor took
to sample from a new version, when actors came and went, how many tickets they had in hand and on how many of those they worked at a time. The ledger
is the real one; only the clock and the peers are made up. With the recorded pacing the account should be about what was recorded, and `repace` is
worth as much as it is.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from broker import events as ev
from broker.ledger import Ledger
from protocol import facts, messages
from protocol.config import Config
from protocol.journal import JournalEntry
from protocol.messages import ActorReport
from protocol.weights import PolicyVersion

SESSION = "learner"
BLOB = "0" * 64


class Presence(NamedTuple):
    """One process of an actor: seconds from the run's start to its coming and going, tickets in hand at most, seconds to take a version over.

    It works on `at_a_time` of its tickets, in the order of their issue; the others wait.
    """

    name: str
    epoch: str
    came: float
    went: float
    capacity: int
    update_seconds: float
    at_a_time: int


@dataclass(slots=True)
class Course:
    """What a recording says about durations, all in seconds. The defaults stand in where the recording says nothing."""

    ticket_seconds: dict[int, float] = field(default_factory=dict)
    """From when an actor could begin with a ticket (issued, and those before it done) until its group was accepted."""
    delivery_seconds: dict[int, float] = field(default_factory=dict)
    """For each step, from when its batch was complete and asked for until the learner had it."""
    step_seconds: dict[int, float] = field(default_factory=dict)
    lost_seconds: dict[int, float] = field(default_factory=dict)
    """For each step that a learner resumed at: from the first commit of the step before until then, in work done again and without a learner."""
    publish_seconds: float = 0.0
    learner_came: float = 0.0
    presences: list[Presence] = field(default_factory=list)
    num_steps: int = 0
    elapsed: float = 0.0
    waiting: float = 0.0
    lags: Counter[int] = field(default_factory=Counter)
    expired: int = 0


@dataclass(slots=True)
class Account:
    """What a pacing comes to. `num_held_back` tickets were issued later than an actor asked, `held_back_seconds` of asking in all."""

    max_lag: int
    elapsed: float = 0.0
    waiting: float = 0.0
    """Seconds that the learner waited for batches."""
    idle_share: float = 0.0
    """Share of the actors' credit, over time, that had no ticket."""
    num_held_back: int = 0
    held_back_seconds: float = 0.0
    expired: int = 0
    lags: Counter[int] = field(default_factory=Counter)


def course_of(entries: Iterable[JournalEntry]) -> Course:
    """The durations in a recording."""
    reader = _Reader()
    for entry in entries:
        reader.take(entry.time, entry.fact)
    return reader.finish()


class _ActorReader:
    """One process of an actor, as the facts tell of it."""

    def __init__(self, came: float) -> None:
        self.came, self.went = came, float("inf")
        self._began: float | None = None
        """When the first ticket was issued to it."""
        self.in_hand: dict[int, float] = {}
        """When each ticket in hand was issued, in that order."""
        self.most = self.most_overtaken = 0
        self.first_use: dict[int, float] = {}
        """For each version, seconds from its publication to the first ticket issued under it."""
        self._groups: list[tuple[int, float, float]] = []
        """Each group's ticket, when that was issued, and when it was accepted, in the order of acceptance."""

    def issue(self, now: float, ticket: int) -> None:
        self._began = now if self._began is None else self._began
        self.in_hand.pop(ticket, None)
        self.in_hand[ticket] = now
        self.most = max(self.most, len(self.in_hand))

    def end(self, now: float, ticket: int, *, accepted: bool) -> None:
        """A ticket leaves the hand."""
        if ticket not in self.in_hand:
            return
        self.most_overtaken = max(self.most_overtaken, next(place for place, one in enumerate(self.in_hand) if one == ticket))
        issued = self.in_hand.pop(ticket)
        if accepted:
            self._groups.append((ticket, issued, now))

    def presence(self, name: str, epoch: str, end: float) -> Presence:
        """Its coming and going in a run that ended at `end`. It comes when it turns to its first version: before that it builds its engine."""
        updating = min(self.first_use.values(), default=0.0)
        came = self.came if self._began is None else max(self.came, self._began - updating)
        return Presence(name, epoch, came, self.went if self.went < end else float("inf"), self.most, updating, self.at_a_time)

    @property
    def at_a_time(self) -> int:
        """A ticket that is done before others that were issued earlier was worked on beside them."""
        return 1 + self.most_overtaken

    def ticket_seconds(self) -> dict[int, float]:
        """How long each ticket was worked on, if `at_a_time` of them are, in the order of their issue."""
        free = [float("-inf")] * self.at_a_time
        """When each place to work at became free."""
        found = {}
        for ticket, issued, done in self._groups:
            began = max(issued, heapq.heappop(free))
            found[ticket] = max(0.0, done - began)
            heapq.heappush(free, done)
        return found


class _Reader:
    """Takes in facts with their times."""

    def __init__(self) -> None:
        self.course = Course()
        self._start: float | None = None
        self._actors: dict[tuple[str, str], _ActorReader] = {}
        self._gone: list[tuple[tuple[str, str], _ActorReader]] = []
        self._published: dict[int, float] = {}
        self._publishing: list[float] = []
        self._committed: dict[int, float] = {}
        """When each step was committed first."""
        self._formed_at = self._stepped_at = 0.0
        self._waiting: dict[int, float] = {}
        self._lags: dict[int, list[int]] = {}

    def take(self, wall: float, fact: facts.AnyFact) -> None:
        if self._start is None:
            self._start = wall
        now = wall - self._start
        match fact:
            case facts.TicketIssued():
                actor = self._actor(now, fact.actor, fact.epoch)
                actor.issue(now, fact.ticket)
                if fact.version in self._published:
                    actor.first_use.setdefault(fact.version, now - self._published[fact.version])
            case facts.GroupAccepted() | facts.AttemptFailed():
                self._actor(now, fact.actor, fact.epoch).end(now, fact.ticket, accepted=isinstance(fact, facts.GroupAccepted))
            case facts.TicketRevoked():
                for actor in self._actors.values():
                    actor.in_hand.pop(fact.ticket, None)
            case facts.ActorJoined():
                self._actor(now, fact.actor, fact.epoch)
            case facts.ActorLeft():
                self._leave(now, (fact.actor, fact.epoch))
            case facts.TicketEnded():
                self.course.expired += fact.outcome == "expired"
            case _:
                self._take_learner(now, fact)

    def _actor(self, now: float, name: str, epoch: str) -> _ActorReader:
        if (name, epoch) not in self._actors:
            self._actors[name, epoch] = _ActorReader(now)
        return self._actors[name, epoch]

    def _leave(self, now: float, peer: tuple[str, str]) -> None:
        if (actor := self._actors.pop(peer, None)) is not None:
            actor.went = now
            self._gone.append((peer, actor))

    def _take_learner(self, now: float, fact: facts.AnyFact) -> None:
        course = self.course
        match fact:
            case facts.LearnerStarted():
                if fact.step in course.step_seconds or fact.step - 1 in self._committed:
                    course.lost_seconds[fact.step] = now - self._committed.get(fact.step - 1, course.learner_came)
                else:
                    course.learner_came = now
                self._stepped_at = now
            case facts.VersionPublished():
                self._published[fact.version.number] = now
                self._publishing.append(now - self._committed.get(fact.version.step - 1, now))
            case facts.BatchFormed():
                self._formed_at = now
            case facts.StepCommitted():
                self._take_step(now, fact)

    def _take_step(self, now: float, fact: facts.StepCommitted) -> None:
        course, step = self.course, fact.step
        waited = fact.metrics.get("seconds_waiting") or 0.0
        worked = (fact.metrics.get("seconds_training") or 0.0) + (fact.metrics.get("seconds_publishing") or 0.0)
        began = now - worked if worked else self._formed_at
        course.delivery_seconds[step] = min(waited, max(0.0, began - self._formed_at))
        course.step_seconds[step] = max(0.0, now - self._stepped_at - waited)
        course.num_steps = max(course.num_steps, step + 1)
        self._waiting[step], self._lags[step] = waited, fact.lags
        self._committed.setdefault(step, now)
        self._stepped_at = course.elapsed = now

    def finish(self) -> Course:
        course = self.course
        course.publish_seconds = statistics.median(self._publishing) if self._publishing else 0.0
        course.waiting = sum(self._waiting.values())
        for lags in self._lags.values():
            course.lags.update(lags)
        for peer, actor in [*self._gone, *self._actors.items()]:
            course.ticket_seconds |= actor.ticket_seconds()
            if actor.most:
                course.presences.append(actor.presence(*peer, course.elapsed))
        course.presences.sort(key=lambda presence: presence.came)
        return course


def repace(course: Course, config: Config) -> Account:
    """Run the ledger of `config` over a recorded course."""
    return _Repacing(course, config).run()


class _Repacing:
    """One simulated run: a heap of things to happen, and the ledger that reacts to them."""

    def __init__(self, course: Course, config: Config) -> None:
        self._course = course
        self._ledger = Ledger(config.pacing, config.run.seed, max(1, len(course.ticket_seconds)), 0)
        self._account = Account(config.pacing.max_lag)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._usual_ticket = statistics.median(course.ticket_seconds.values()) if course.ticket_seconds else 0.0
        self._usual_step = statistics.median(course.step_seconds.values()) if course.step_seconds else 0.0
        self._present: dict[str, Presence] = {}
        self._held: dict[str, set[int]] = {}
        self._seq: Counter[str] = Counter()
        self._version: dict[str, int] = {}
        self._free_since: dict[str, list[float]] = {}
        """For each actor, since when each of its free places has been free."""
        self._working_until: dict[str, list[float]] = {}
        """For each actor, when it will be done with what it works on, a heap of at most `at_a_time`."""
        self._asked_at = 0.0
        self._credit_seconds = self._idle_seconds = 0.0
        self._finished = False

    def run(self) -> Account:
        for presence in self._course.presences:
            self._at(presence.came, lambda presence=presence: self._come(presence))  # type: ignore[misc]
            if presence.went < float("inf"):
                self._at(presence.went, lambda presence=presence: self._go(presence))  # type: ignore[misc]
        self._at(self._course.learner_came, self._learner_comes)
        while self._heap and not self._finished:
            when, _, action = heapq.heappop(self._heap)
            self._pass_time(when)
            action()
        account = self._account
        account.elapsed = self._now
        account.expired = self._ledger.tickets.counts.expired
        account.lags = self._ledger.progress.lags
        account.idle_share = self._idle_seconds / self._credit_seconds if self._credit_seconds else 0.0
        return account

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), action))

    def _pass_time(self, when: float) -> None:
        span = when - self._now
        self._credit_seconds += span * sum(presence.capacity for presence in self._present.values())
        self._idle_seconds += span * sum(len(free) for free in self._free_since.values())
        self._now = when

    def _do(self, event: ev.Event) -> None:
        for effect in self._ledger.handle(event, self._now):
            match effect:
                case ev.SendActor(actor, _, messages.IssueTicket(ticket)):
                    self._issued(actor, ticket.number, ticket.attempt)
                case ev.SendLearner(_, messages.BatchReady(step, batch)):
                    self._batch_comes(step, batch)
                case ev.SendAllActors(messages.NewVersion(version)):
                    for presence in self._present.values():
                        self._take_over(presence, version.number)

    # --- actors

    def _come(self, presence: Presence) -> None:
        self._present[presence.name] = presence
        self._held[presence.name] = set()
        self._seq[presence.name] = 0
        self._free_since[presence.name] = [self._now] * presence.capacity
        self._working_until[presence.name] = [self._now] * presence.at_a_time
        self._do(ev.ActorHere(presence.name, presence.epoch, "", ""))
        newest = self._ledger.versions.newest
        if newest is not None:
            self._take_over(presence, newest.number)

    def _go(self, presence: Presence) -> None:
        if self._present.get(presence.name) is presence:
            del self._present[presence.name], self._held[presence.name], self._free_since[presence.name]
            self._do(ev.ActorGone(presence.name, presence.epoch))

    def _take_over(self, presence: Presence, number: int) -> None:
        def report() -> None:
            if self._present.get(presence.name) is presence:
                self._version[presence.name] = number
                tickets = sorted(self._held[presence.name])
                self._do(ev.ActorReported(presence.name, presence.epoch, ActorReport(number, presence.capacity, tickets, 0.0, 0.0, 0, "")))

        self._at(self._now + presence.update_seconds, report)

    def _issued(self, actor: str, ticket: int, attempt: int) -> None:
        presence, version = self._present[actor], self._version[actor]
        if ticket in self._held[actor]:
            return  # sent again
        self._held[actor].add(ticket)
        asked = self._free_since[actor].pop(0)
        if self._now > asked:
            self._account.num_held_back += 1
            self._account.held_back_seconds += self._now - asked

        def arrive() -> None:
            if self._present.get(actor) is not presence or ticket not in self._held[actor]:
                return
            self._held[actor].discard(ticket)
            self._free_since[actor].append(self._now)
            self._seq[actor] += 1
            self._do(ev.GroupArrived(actor, presence.epoch, self._seq[actor], ticket, attempt, [version], 1, 0.0))

        begins = max(self._now, heapq.heappop(self._working_until[actor]))
        done = begins + self._course.ticket_seconds.get(ticket, self._usual_ticket)
        heapq.heappush(self._working_until[actor], done)
        self._at(done, arrive)

    # --- learner

    def _learner_comes(self) -> None:
        self._do(ev.LearnerHere(SESSION, 0, 1))
        self._publish(0)
        self._want(0)

    def _want(self, step: int) -> None:
        self._asked_at = self._now
        self._do(ev.BatchWanted(SESSION, step))

    def _batch_comes(self, step: int, batch: int) -> None:
        delivery = self._course.delivery_seconds.get(step, 0.0)
        self._account.waiting += self._now - self._asked_at + delivery

        def done() -> None:
            lags = [step - oldest for oldest in self._ledger.tickets.batches[batch].oldest_steps]
            self._do(ev.StepDone(SESSION, step, batch, lags, {}))
            if step + 1 >= self._course.num_steps:
                self._finished = True
                return
            if self._ledger.pacing.publishes(step + 1):
                self._at(self._now + self._course.publish_seconds, lambda: self._publish(step + 1))
            self._at(self._now + self._course.lost_seconds.get(step + 1, 0.0), lambda: self._want(step + 1))

        self._at(self._now + delivery + self._course.step_seconds.get(step, self._usual_step), done)

    def _publish(self, step: int) -> None:
        versions = self._ledger.versions
        version = PolicyVersion(versions.next_number, step, self._ledger.progress.lineage, f"step {step}")
        self._do(ev.VersionReady(SESSION, version, version.number - 1, None, None, 1, 1, is_base=True))


def lines(course: Course, recorded: Account, other: Account) -> list[str]:
    """The account of a pacing beside the recorded one, in words."""
    rows = [
        ("", "recorded", f"S = {recorded.max_lag}, modelled", f"S = {other.max_lag}, modelled"),
        ("seconds in all", f"{course.elapsed:.1f}", f"{recorded.elapsed:.1f}", f"{other.elapsed:.1f}"),
        ("learner waits, s", f"{course.waiting:.1f}", f"{recorded.waiting:.1f}", f"{other.waiting:.1f}"),
        ("actors without a ticket", "", f"{recorded.idle_share:.1%}", f"{other.idle_share:.1%}"),
        ("tickets held back", "", f"{recorded.num_held_back}", f"{other.num_held_back}"),
        ("  seconds of asking", "", f"{recorded.held_back_seconds:.1f}", f"{other.held_back_seconds:.1f}"),
        ("tickets expired", f"{course.expired}", f"{recorded.expired}", f"{other.expired}"),
        *(
            (f"groups used at lag {lag}", f"{course.lags[lag]}", f"{recorded.lags[lag]}", f"{other.lags[lag]}")
            for lag in sorted({*course.lags, *recorded.lags, *other.lags})
        ),
    ]
    return [f"{name:<26}{a:>16}{b:>18}{c:>18}" for name, a, b, c in rows]
