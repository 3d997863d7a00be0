"""A recorded run through the ledger alone, under another pacing: what would have been held back, expired, waited for.

Pure: facts with their times in, an account out. What is taken from the recording: how long each ticket took from issue to acceptance, how long
the learner was busy with each step and with publishing it, how long an actor took to sample from a new version, when actors came and went and how
many tickets they had in hand. The ledger is the real one; only the clock and the peers are made up. With the recorded pacing the account should be
about what was recorded, and `repace` is worth as much as it is.
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
    """One process of an actor: seconds from the run's start to its coming and going, tickets in hand at most, seconds to take a version over."""

    name: str
    epoch: str
    came: float
    went: float
    capacity: int
    update_seconds: float


@dataclass(slots=True)
class Course:
    """What a recording says about durations, all in seconds. The defaults stand in where the recording says nothing."""

    ticket_seconds: dict[int, float] = field(default_factory=dict)
    step_seconds: dict[int, float] = field(default_factory=dict)
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


class _Reader:
    """Takes in facts with their times."""

    def __init__(self) -> None:
        self.course = Course()
        self._start: float | None = None
        self._last = 0.0
        self._issued: dict[int, tuple[float, str, str]] = {}
        self._in_hand: Counter[tuple[str, str]] = Counter()
        self._most: Counter[tuple[str, str]] = Counter()
        self._came: dict[tuple[str, str], float] = {}
        self._went: dict[tuple[str, str], float] = {}
        self._published: dict[int, float] = {}
        self._first_use: dict[tuple[str, str], dict[int, float]] = {}
        self._stepped_at = 0.0
        self._publishing: list[float] = []

    def take(self, wall: float, fact: facts.AnyFact) -> None:
        if self._start is None:
            self._start = wall
        now = wall - self._start
        self._last = max(self._last, now)
        match fact:
            case facts.ActorJoined():
                self._came[fact.actor, fact.epoch] = now
            case facts.ActorLeft():
                self._went[fact.actor, fact.epoch] = now
                self._in_hand[fact.actor, fact.epoch] = 0
            case facts.TicketIssued():
                peer = (fact.actor, fact.epoch)
                self._issued[fact.ticket] = (now, *peer)
                self._in_hand[peer] += 1
                self._most[peer] = max(self._most[peer], self._in_hand[peer])
                if fact.version in self._published:
                    self._first_use.setdefault(peer, {}).setdefault(fact.version, now - self._published[fact.version])
            case facts.GroupAccepted() | facts.AttemptFailed():
                issued, *peer_of = self._issued.get(fact.ticket, (now, fact.actor, fact.epoch))
                self._in_hand[peer_of[0], peer_of[1]] -= 1
                if isinstance(fact, facts.GroupAccepted):
                    self.course.ticket_seconds[fact.ticket] = now - issued
            case facts.TicketEnded():
                self.course.expired += fact.outcome == "expired"
            case _:
                self._take_learner(now, fact)

    def _take_learner(self, now: float, fact: facts.AnyFact) -> None:
        course = self.course
        match fact:
            case facts.LearnerStarted():
                course.learner_came = course.learner_came or now
                self._stepped_at = now
            case facts.VersionPublished():
                self._published[fact.version.number] = now
                self._publishing.append(max(0.0, now - self._stepped_at))
            case facts.StepCommitted():
                waited = fact.metrics.get("seconds_waiting") or 0.0
                course.step_seconds[fact.step] = max(0.0, now - self._stepped_at - waited)
                course.waiting += waited
                course.lags.update(fact.lags)
                course.num_steps = max(course.num_steps, fact.step + 1)
                self._stepped_at = now
                course.elapsed = now

    def finish(self) -> Course:
        self.course.publish_seconds = statistics.median(self._publishing) if self._publishing else 0.0
        for peer, came in self._came.items():
            updates = list(self._first_use.get(peer, {}).values())
            took = min(updates) if updates else 0.0
            went = self._went.get(peer, float("inf"))
            if self._most[peer]:
                self.course.presences.append(
                    Presence(*peer, came, went if went < self.course.elapsed else float("inf"), self._most[peer], took)
                )
        return self.course


def repace(course: Course, config: Config) -> Account:
    """Run the ledger of `config` over a recorded course."""
    return _Repacing(course, config).run()


class _Repacing:
    """One simulated run: a heap of things to happen, and the ledger that reacts to them."""

    def __init__(self, course: Course, config: Config) -> None:
        self._course = course
        self._ledger = Ledger(config.pacing, config.run.seed, 1, 0)
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

        self._at(self._now + self._course.ticket_seconds.get(ticket, self._usual_ticket), arrive)

    # --- learner

    def _learner_comes(self) -> None:
        self._do(ev.LearnerHere(SESSION, 0, 1))
        self._publish(0)
        self._want(0)

    def _want(self, step: int) -> None:
        self._asked_at = self._now
        self._do(ev.BatchWanted(SESSION, step))

    def _batch_comes(self, step: int, batch: int) -> None:
        self._account.waiting += self._now - self._asked_at

        def done() -> None:
            lags = [step - oldest for oldest in self._ledger.tickets.batches[batch].oldest_steps]
            self._do(ev.StepDone(SESSION, step, batch, lags, {}))
            if step + 1 >= self._course.num_steps:
                self._finished = True
                return
            if self._ledger.pacing.publishes(step + 1):
                self._at(self._now + self._course.publish_seconds, lambda: self._publish(step + 1))
            self._want(step + 1)

        self._at(self._now + self._course.step_seconds.get(step, self._usual_step), done)

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
