"""One rule of the ledger per test. The names are the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from broker import events as ev
from broker.ledger import MAX_FAILURES, RESEND_SECONDS, Ledger
from protocol import codec, facts, messages
from protocol.messages import LEASE_SECONDS, ActorReport, WireTicket
from protocol.pacing import Pacing
from protocol.sampling import prompt_index, ticket_seed
from protocol.weights import BlobRef, PolicyVersion

SNAPSHOT = BlobRef("ab" * 32, 1)

SEED, NUM_PROMPTS = 3, 11
F = TypeVar("F")
M = TypeVar("M")


class Run:
    """A ledger with everything that ever came out of it, and the shortest words for putting things in."""

    def __init__(self, max_lag: int = 0, reuse: int = 1, sync_every: int = 1, size: int = 2, steps: int = 6, window: int = 1) -> None:
        self.pacing = Pacing(max_lag, reuse, sync_every, size, steps, window)
        self.ledger = Ledger(self.pacing, SEED, NUM_PROMPTS, 1)
        self.now = 100.0
        self.effects: list[ev.Effect] = []
        self.session = ""
        self.sequences: dict[str, int] = {}

    def do(self, event: ev.Event) -> list[ev.Effect]:
        effects = self.ledger.handle(event, self.now)
        self.effects += effects
        return effects

    # --- actors

    def actor(self, name: str, version: int = -1, wanted: int = 100, epoch: str = "e") -> None:
        self.do(ev.ActorHere(name, epoch, "fake", "here"))
        self.report(name, version, wanted, epoch)

    def report(self, name: str, version: int, wanted: int = 100, epoch: str = "e", tickets: list[int] | None = None) -> list[ev.Effect]:
        held = sorted(self.ledger.actors[name].tickets) if tickets is None and name in self.ledger.actors else tickets or []
        return self.do(ev.ActorReported(name, epoch, ActorReport(version, wanted, held, 0.0, 0.0, 0, "")))

    def _seq(self, name: str, epoch: str) -> int:
        self.sequences[name + epoch] = self.sequences.get(name + epoch, 0) + 1
        return self.sequences[name + epoch]

    def group(self, name: str, ticket: int, oldest: int, newest: int | None = None, attempt: int = 1, epoch: str = "e") -> list[ev.Effect]:
        newest = oldest if newest is None else newest
        return self.do(ev.GroupArrived(name, epoch, self._seq(name, epoch), ticket, attempt, list(range(oldest, newest + 1)), 4, 0.5))

    def give_up(self, name: str, ticket: int, attempt: int, epoch: str = "e") -> list[ev.Effect]:
        return self.do(ev.AttemptGivenUp(name, epoch, self._seq(name, epoch), ticket, attempt, "the engine broke"))

    # --- the learner

    def learner(self, session: str = "s", step: int = 0) -> list[ev.Effect]:
        self.session = session
        return self.do(ev.LearnerHere(session, step, 1))

    def publish(self, step: int, root: str = "root") -> list[ev.Effect]:
        version = PolicyVersion(self.ledger.versions.next_number, step, self.ledger.progress.lineage, f"{root}-{step}")
        return self.do(ev.VersionReady(self.session, version, -1, None, SNAPSHOT, 1, 1))

    def want(self, step: int) -> list[ev.Effect]:
        return self.do(ev.BatchWanted(self.session, step))

    def commit(self, step: int) -> list[ev.Effect]:
        batch = step // self.pacing.reuse
        formed = self.ledger.tickets.batches.get(batch)
        lags = [step - oldest for oldest in formed.oldest_steps] if formed else []
        return self.do(ev.StepDone(self.session, step, batch, lags, {}))

    def one_step(self, step: int, actor: str = "a", root: str = "root") -> None:
        """Serve the batch of `step` from the newest version, train on it, publish theta_{step+1} and let the actor take it."""
        newest = self.ledger.versions.newest
        assert newest is not None
        self.report(actor, newest.number)
        if step // self.pacing.reuse == self.ledger.tickets.next_batch:
            for ticket in self.ledger.tickets.missing():
                self.group(actor, ticket.number, newest.number, attempt=ticket.attempt)
        self.want(step)
        if (step + 1) % self.pacing.sync_every == 0:
            self.publish(step + 1, root)
        self.commit(step)
        newest = self.ledger.versions.newest
        assert newest is not None
        self.report(actor, newest.number)

    # --- what came out

    def recorded(self, kind: Callable[..., F], effects: list[ev.Effect] | None = None) -> list[F]:
        found = self.effects if effects is None else effects
        return [effect.fact for effect in found if isinstance(effect, ev.Record) and isinstance(effect.fact, kind)]  # type: ignore[arg-type]

    def sent(self, kind: Callable[..., M], to: str = "", effects: list[ev.Effect] | None = None) -> list[M]:
        found = self.effects if effects is None else effects
        return [
            effect.message
            for effect in found
            if isinstance(effect, ev.SendActor | ev.SendLearner | ev.SendAllActors)
            and isinstance(effect.message, kind)  # type: ignore[arg-type]
            and (not to or (isinstance(effect, ev.SendActor) and effect.actor == to))
        ]

    def issued(self) -> list[int]:
        return [fact.ticket for fact in self.recorded(facts.TicketIssued)]

    def wire(self, to: str) -> list[WireTicket]:
        return [message.ticket for message in self.sent(messages.IssueTicket, to)]


def started(**pacing: int) -> Run:
    """A run with a learner that has published version 0."""
    run = Run(**pacing)
    run.learner()
    run.publish(0)
    return run


# --- actors and their tickets


def test_a_ticket_is_issued_again_with_the_same_prompt_and_seed_after_its_actor_fell_silent() -> None:
    run = started(size=1)
    run.actor("a", 0)
    (first,) = run.wire("a")
    run.now += LEASE_SECONDS + 0.1
    run.actor("b", 0)
    run.do(ev.Tick())
    (again,) = run.wire("b")
    assert (again.number, again.prompt, again.seed) == (first.number, first.prompt, first.seed)
    assert again.attempt == first.attempt + 1
    assert again.prompt == prompt_index(SEED, 0, NUM_PROMPTS) and again.seed == ticket_seed(SEED, 0)
    assert run.recorded(facts.ActorLeft)[0].actor == "a"


def test_an_actor_keeps_its_tickets_for_exactly_a_lease() -> None:
    run = started()
    run.actor("a", 0)
    run.now += LEASE_SECONDS
    run.do(ev.Tick())
    assert not run.recorded(facts.TicketRevoked)
    run.now += 0.001
    run.do(ev.Tick())
    assert [fact.ticket for fact in run.recorded(facts.TicketRevoked)] == [0, 1]


def test_a_ticket_that_got_lost_on_the_way_is_sent_again() -> None:
    run = started()
    run.actor("a", 0, wanted=1)
    run.now += RESEND_SECONDS
    run.report("a", 0, wanted=1, tickets=[])
    assert len(run.wire("a")) == 1, "it may still be under way"
    run.now += 0.1
    run.report("a", 0, wanted=1, tickets=[])
    assert run.wire("a")[0] == run.wire("a")[1]
    assert run.issued() == [0], "sending again is no new attempt"


def test_a_ticket_that_its_actor_reports_is_not_sent_again() -> None:
    run = started()
    run.actor("a", 0, wanted=1)
    run.now += 5 * RESEND_SECONDS
    run.report("a", 0, wanted=1, tickets=[0])
    assert len(run.wire("a")) == 1


def test_a_newer_process_of_an_actor_takes_its_place_and_its_tickets_are_issued_again() -> None:
    run = started()
    run.actor("a", 0, epoch="old")
    run.actor("a", 0, epoch="new")
    assert [(fact.ticket, fact.epoch, fact.attempt) for fact in run.recorded(facts.TicketIssued)] == [
        (0, "old", 1),
        (1, "old", 1),
        (0, "new", 2),
        (1, "new", 2),
    ]
    run.do(ev.GroupArrived("a", "old", 1, 0, 1, 0, 0, 4, 0.5))
    assert not run.recorded(facts.GroupAccepted), "an epoch that was replaced is not listened to"
    assert run.sent(messages.HelloWanted, "a")


def test_an_actor_that_leaves_gives_its_tickets_back() -> None:
    run = started()
    run.actor("a", 0)
    run.actor("b", 0)
    run.do(ev.ActorGone("a", "e"))
    assert [ticket.number for ticket in run.wire("b")] == [0, 1]
    assert run.recorded(facts.ActorLeft)[0].reason == "left"


def test_an_actor_that_says_hello_again_learns_what_is_in_the_journal() -> None:
    run = started()
    run.actor("a", 0)
    run.group("a", 0, 0)
    effects = run.do(ev.ActorHere("a", "e", "fake", "here"))
    assert ev.WelcomeActor("a", "e", 1) in effects
    assert not run.recorded(facts.ActorJoined, effects)


def test_tickets_go_to_the_actors_with_the_fewest_in_hand() -> None:
    run = Run(max_lag=1, size=2)
    run.actor("a", 0)
    run.actor("b", 0)
    run.learner()
    run.publish(0)
    assert len(run.wire("a")) == len(run.wire("b")) == 2


def test_an_actor_is_never_given_more_than_it_wants() -> None:
    run = started(max_lag=4, size=4)
    run.actor("a", 0, wanted=3)
    assert run.issued() == [0, 1, 2]


# --- results


def test_a_late_group_for_a_revoked_ticket_is_accepted_while_the_ticket_is_open() -> None:
    run = started(size=1)
    run.actor("a", 0)
    run.now += LEASE_SECONDS + 1
    run.do(ev.Tick())
    run.actor("b", 0)
    assert run.ledger.tickets.open[0].actor == "b"
    run.actor("a", 0)
    run.group("a", 0, 0, attempt=1)
    (accepted,) = run.recorded(facts.GroupAccepted)
    assert (accepted.actor, accepted.ticket, accepted.attempt) == ("a", 0, 1)


def test_a_second_group_for_a_ticket_is_refused() -> None:
    run = started(size=1)
    run.actor("a", 0)
    run.actor("b", 0)
    run.group("a", 0, 0)
    run.group("b", 0, 0)
    assert [fact.reason for fact in run.recorded(facts.ResultRefused)] == ["already done"]
    run.want(0)
    run.commit(0)
    run.group("b", 0, 0)
    assert [fact.reason for fact in run.recorded(facts.ResultRefused)] == ["already done", "already ended"]
    assert len(run.recorded(facts.GroupAccepted)) == 1


def test_a_group_for_a_ticket_or_attempt_that_was_never_issued_is_refused() -> None:
    run = started()
    run.actor("a", 0)
    run.group("a", 99, 0)
    run.group("a", 0, 0, attempt=2)
    assert [fact.reason for fact in run.recorded(facts.ResultRefused)] == ["not issued", "not issued"]


def test_a_group_from_a_version_nobody_published_is_refused_and_its_ticket_sampled_again() -> None:
    run = started()
    run.actor("a", 0)
    run.group("a", 0, 0, newest=7)
    run.group("a", 1, 7)
    assert len(run.recorded(facts.ResultRefused)) == 2
    assert run.ledger.tickets.open[0].attempt == run.ledger.tickets.open[1].attempt == 2


def test_a_result_that_comes_twice_is_acknowledged_and_counted_once() -> None:
    run = started()
    run.actor("a", 0)
    run.group("a", 0, 0)
    effects = run.do(ev.GroupArrived("a", "e", 1, 0, 1, 0, 0, 4, 0.5))
    assert not run.recorded(facts.Fact, effects)
    assert run.sent(messages.Ack, effects=effects) == [messages.Ack(1)]
    assert run.ledger.noise == {"duplicate": 1}


def test_a_result_that_overtook_another_waits_for_it() -> None:
    run = started()
    run.actor("a", 0)
    effects = run.do(ev.GroupArrived("a", "e", 2, 1, 1, 0, 0, 4, 0.5))
    assert not run.recorded(facts.Fact, effects)
    assert run.sent(messages.Ack, effects=effects) == [messages.Ack(0)]
    assert run.ledger.noise == {"gap": 1}


def test_an_invalid_group_is_refused_with_its_reason_and_counts_as_a_failed_attempt() -> None:
    run = started()
    run.actor("a", 0)
    run.do(ev.GroupArrived("a", "e", 1, 0, 1, invalid="invalid: lengths"))
    assert run.sent(messages.Refused) == [messages.Refused(1, 0, "invalid: lengths")]
    assert run.recorded(facts.AttemptFailed)[0].reason == "invalid: lengths"
    assert run.ledger.tickets.open[0].attempt == 2
    assert not run.recorded(facts.GroupAccepted)


def test_three_failed_attempts_end_a_ticket_and_the_next_takes_its_place_in_the_batch() -> None:
    run = started(size=2)
    run.actor("a", 0)
    for attempt in range(1, MAX_FAILURES + 1):
        run.give_up("a", 0, attempt)
    assert [(fact.ticket, fact.outcome) for fact in run.recorded(facts.TicketEnded)] == [(0, "failed")]
    assert run.issued()[-1] == 2, "ticket 2 was due in batch 1 before"
    run.group("a", 1, 0)
    run.group("a", 2, 0)
    run.want(0)
    assert run.recorded(facts.BatchFormed) == [facts.BatchFormed(0, 0, [1, 2])]


def test_a_failure_of_an_attempt_that_was_revoked_does_not_end_the_attempt_under_way() -> None:
    run = started(size=1)
    run.actor("a", 0)
    run.now += LEASE_SECONDS + 1
    run.do(ev.Tick())
    run.actor("b", 0)
    run.actor("a", 0)
    run.give_up("a", 0, attempt=1)
    ticket = run.ledger.tickets.open[0]
    assert (ticket.actor, ticket.attempt) == ("b", 2)


def test_a_row_of_failed_tickets_halts_the_run_and_says_why() -> None:
    run = started(size=2)
    run.actor("a", 0)
    for ticket in (0, 1):
        for attempt in range(1, MAX_FAILURES + 1):
            run.give_up("a", ticket, attempt)
    assert "2 tickets in a row failed 3 times each" in run.ledger.progress.halted
    assert "the engine broke" in run.ledger.progress.halted
    assert run.ledger.progress.ended and run.sent(messages.Stop)
    run.report("a", 0)
    assert run.ledger.tickets.counts.outstanding == 0


def test_a_success_between_failures_keeps_the_run_going() -> None:
    run = started(size=2)
    run.actor("a", 0)
    for attempt in range(1, MAX_FAILURES + 1):
        run.give_up("a", 0, attempt)
    run.group("a", 1, 0)
    for attempt in range(1, MAX_FAILURES + 1):
        run.give_up("a", 2, attempt)
    assert not run.ledger.progress.halted


def test_a_run_that_was_halted_and_started_again_is_not_called_halted_while_it_goes_on() -> None:
    run = started(size=2)
    run.actor("a", 0)
    for ticket in (0, 1):
        for attempt in range(1, MAX_FAILURES + 1):
            run.give_up("a", ticket, attempt)
    run.learner("t", 0)
    assert not run.ledger.progress.ended
    assert run.ledger.progress.halted == ""


def test_a_run_that_was_halted_and_started_again_gets_a_full_row_of_failures_before_it_halts_again() -> None:
    run = started(size=2)
    run.actor("a", 0)
    for ticket in (0, 1):
        for attempt in range(1, MAX_FAILURES + 1):
            run.give_up("a", ticket, attempt)
    run.learner("t", 0)
    run.report("a", 0)
    first = run.ledger.tickets.missing()[0].number
    for attempt in range(1, MAX_FAILURES + 1):
        run.give_up("a", first, attempt)
    assert run.recorded(facts.TicketEnded)[-1].ticket == first
    assert not run.ledger.progress.ended, "one ticket is no row"


# --- the bound


def test_max_lag_0_issues_nothing_of_a_batch_before_its_version() -> None:
    run = started(max_lag=0, size=2, steps=4)
    run.actor("a", 0)
    for step in range(4):
        assert run.issued() == list(range(2 * (step + 1)))
        run.one_step(step)
    assert {fact.step for fact in run.recorded(facts.TicketIssued) if fact.ticket >= 6} == {3}


@pytest.mark.parametrize("max_lag", [0, 1, 2, 4])
def test_the_queue_pipeline_issues_exactly_up_to_the_bound(max_lag: int) -> None:
    run = started(max_lag=max_lag, size=3, steps=20)
    run.actor("a", 0)
    assert run.issued() == list(range(3 * (max_lag + 1)))
    run.one_step(0)
    assert run.issued() == list(range(3 * (max_lag + 2)))


@pytest.mark.parametrize("cycle", [1, 2, 4])
def test_the_papers_pipeline_issues_exactly_one_batch_per_cycle(cycle: int) -> None:
    run = started(max_lag=cycle - 1, reuse=cycle, sync_every=cycle, size=3, steps=3 * cycle)
    run.actor("a", 0)
    for step in range(2 * cycle):
        assert run.issued() == list(range(3 * (step // cycle + 1)))
        run.one_step(step)
    assert run.ledger.progress.lags == dict.fromkeys(range(cycle), 6)


def test_no_ticket_is_issued_before_a_learner_has_come() -> None:
    run = Run()
    run.actor("a", 0)
    assert run.issued() == []


def test_an_actor_that_holds_no_verified_version_gets_no_ticket() -> None:
    run = started()
    run.actor("a", -1)
    run.actor("b", 5)
    assert run.issued() == []


def test_a_group_too_old_for_its_batch_is_refused_and_its_ticket_expires() -> None:
    run = started(max_lag=0, size=1)
    run.actor("a", 0)
    run.one_step(0)
    assert run.issued() == [0, 1]
    run.group("a", 1, 0)
    assert [fact.reason for fact in run.recorded(facts.ResultRefused)] == ["stale"]
    assert [(fact.ticket, fact.outcome) for fact in run.recorded(facts.TicketEnded)] == [(1, "expired")]
    assert run.issued() == [0, 1, 2], "the next ticket takes its place"


def test_the_oldest_token_decides_how_old_a_group_is() -> None:
    run = started(max_lag=1, size=1)
    run.actor("a", 0)
    run.one_step(0)
    run.one_step(1)
    assert 3 in run.issued()
    run.group("a", 3, oldest=1, newest=2)
    assert [fact.reason for fact in run.recorded(facts.ResultRefused)] == ["stale"]


def test_a_window_lets_later_batches_overtake_a_straggler_which_then_expires_if_it_is_too_old() -> None:
    run = started(max_lag=1, size=1, window=2, steps=6)
    run.actor("a", 0)
    run.group("a", 1, 0)
    run.want(0)
    assert run.recorded(facts.BatchFormed) == [facts.BatchFormed(0, 0, [1])]
    run.publish(1)
    run.commit(0)
    run.report("a", 1)
    run.group("a", 2, 1)
    run.want(1)
    assert run.recorded(facts.BatchFormed)[-1] == facts.BatchFormed(1, 1, [2])
    run.group("a", 0, 0)
    assert run.recorded(facts.ResultRefused)[-1].reason == "stale", "due in batch 2 now, at most 1 step old"
    assert run.ledger.tickets.counts.expired == 1


def test_a_window_of_one_batch_keeps_exact_ticket_order() -> None:
    run = started(max_lag=1, size=1, window=1)
    run.actor("a", 0)
    run.group("a", 1, 0)
    effects = run.want(0)
    assert not run.recorded(facts.BatchFormed)
    assert run.sent(messages.BatchPending, effects=effects)[0].num_missing == 1


# --- the learner


def test_the_learner_is_refused_a_step_that_is_over_and_told_to_commit_before_a_later_one() -> None:
    run = started(max_lag=1)
    run.actor("a", 0)
    run.one_step(0)
    over = run.want(0)
    assert run.sent(messages.LearnerRefused, effects=over)
    early = run.want(2)
    (pending,) = run.sent(messages.BatchPending, effects=early)
    assert pending.waiting_for == "the commit of step 1"
    assert not run.sent(messages.BatchReady, effects=[*over, *early])


def test_a_commit_that_comes_before_the_one_that_was_lost_waits_for_it() -> None:
    run = started(max_lag=1, reuse=2, sync_every=2)
    run.actor("a", 0)
    run.group("a", 0, 0)
    run.group("a", 1, 0)
    run.want(0)
    early = run.commit(1)
    (pending,) = run.sent(messages.BatchPending, effects=early)
    assert pending.waiting_for == "the commit of step 0"
    assert not run.recorded(facts.StepCommitted) and not run.sent(messages.LearnerRefused)
    run.commit(0)
    run.commit(1)
    assert [fact.step for fact in run.recorded(facts.StepCommitted)] == [0, 1]


def test_the_learner_cannot_commit_a_step_without_a_batch_or_on_another_one() -> None:
    run = started()
    run.actor("a", 0)
    assert run.sent(messages.LearnerRefused, effects=run.commit(0)), "there is no batch yet"
    run.group("a", 0, 0)
    run.group("a", 1, 0)
    run.want(0)
    assert run.sent(messages.LearnerRefused, effects=run.do(ev.StepDone("s", 0, 1, [0, 0], {})))
    assert not run.recorded(facts.StepCommitted)


def test_a_commit_said_twice_has_the_effect_of_one() -> None:
    run = started()
    run.actor("a", 0)
    run.one_step(0)
    effects = run.commit(0)
    assert run.sent(messages.Committed, effects=effects) == [messages.Committed(0)]
    assert not run.recorded(facts.Fact, effects)
    assert run.ledger.progress.lags == {0: 2}


def test_a_publication_said_twice_has_the_effect_of_one() -> None:
    run = started()
    effects = run.do(ev.VersionReady("s", PolicyVersion(0, 0, 0, "root-0"), -1, None, SNAPSHOT, 1, 1))
    assert run.sent(messages.Published, effects=effects) == [messages.Published(0, 0, 1)]
    assert not run.recorded(facts.Fact, effects)


def test_a_publication_under_a_wrong_number_is_refused() -> None:
    run = started()
    effects = run.do(ev.VersionReady("s", PolicyVersion(5, 1, 0, "new"), 0, None, SNAPSHOT, 1, 1))
    assert run.sent(messages.LearnerRefused, effects=effects) and not run.recorded(facts.Fact, effects)


def test_lags_that_the_learner_counts_otherwise_halt_the_run() -> None:
    run = started()
    run.actor("a", 0)
    run.group("a", 0, 0)
    run.group("a", 1, 0)
    run.want(0)
    run.do(ev.StepDone("s", 0, 0, [0, 1], {}))
    assert "by the learner" in run.ledger.progress.halted


def test_a_learner_from_another_run_is_refused() -> None:
    run = Run()
    effects = run.do(ev.LearnerHere("s", 3, 1))
    assert run.sent(messages.LearnerRefused, effects=effects) and run.ledger.learner is None


def test_a_learner_that_was_replaced_is_not_listened_to() -> None:
    run = started()
    run.learner("t")
    for event in (ev.BatchWanted("s", 0), ev.StepDone("s", 0, 0, [], {}), ev.LearnerGone("s", 0, {}), ev.EvaluationDone("s", 0, 1.0, 1)):
        effects = run.do(event)
        assert run.sent(messages.LearnerRefused, effects=effects) and not run.recorded(facts.Fact, effects)


def test_a_resumed_learner_is_given_the_same_batches_again_and_no_group_is_used_up_twice() -> None:
    run = started(max_lag=1, steps=4)
    run.actor("a", 0)
    run.one_step(0)
    run.one_step(1)
    before = run.ledger.tickets.counts.consumed
    run.learner("t", 0)
    run.publish(0)
    again = run.sent(messages.BatchReady, effects=run.want(0))
    assert again[0].tickets == run.recorded(facts.BatchFormed)[0].tickets
    run.publish(1)
    run.commit(0)
    assert run.ledger.tickets.counts.consumed == before


def test_a_resumed_learner_that_stands_inside_a_batch_gets_that_batch() -> None:
    run = started(max_lag=2, reuse=3, sync_every=3, size=1)
    run.actor("a", 0)
    run.one_step(0)
    run.one_step(1)
    run.learner("t", 1)
    ready = run.sent(messages.BatchReady, effects=run.want(1))
    assert [(message.step, message.batch) for message in ready] == [(1, 0)]


# --- versions


def two_steps_then_resumed_at_1() -> Run:
    """Steps 0 and 1 done, versions 0, 1, 2 published, batch 2 due; then the learner begins again at step 1."""
    run = started(max_lag=1, size=2, steps=6)
    run.actor("a", 0)
    run.one_step(0)
    run.one_step(1)
    run.learner("t", 1)
    return run


def test_versions_that_a_resumed_learner_reproduces_stay_good() -> None:
    run = two_steps_then_resumed_at_1()
    run.group("a", 4, 2)
    run.want(1)
    effects = run.publish(2)
    assert run.recorded(facts.VersionReproduced, effects) == [facts.VersionReproduced(2, 1)]
    assert run.sent(messages.Published, effects=effects) == [messages.Published(2, 2, 3)]
    assert not run.recorded(facts.VersionOrphaned)
    assert run.ledger.tickets.open[4].state.value == "queued"


def test_queued_groups_of_an_orphaned_version_are_sampled_again() -> None:
    run = two_steps_then_resumed_at_1()
    run.group("a", 4, 2)
    run.group("a", 5, 1)
    run.want(1)
    effects = run.publish(2, root="elsewhere")
    assert run.recorded(facts.VersionOrphaned, effects) == [facts.VersionOrphaned(2, 1)]
    assert [(fact.ticket, fact.reason) for fact in run.recorded(facts.TicketRevoked, effects)] == [(4, "orphaned")]
    assert run.ledger.versions.newest == PolicyVersion(3, 2, 1, "elsewhere-2")
    assert run.ledger.tickets.counts.conserved


def test_groups_of_an_orphaned_version_are_refused_and_sampled_again() -> None:
    run = two_steps_then_resumed_at_1()
    run.want(1)
    run.publish(2, root="elsewhere")
    run.group("a", 4, 2)
    assert [fact.reason for fact in run.recorded(facts.ResultRefused)] == ["orphaned"]
    assert [(fact.ticket, fact.reason) for fact in run.recorded(facts.TicketRevoked)] == [(4, "orphaned")]
    run.report("a", 3)
    assert run.recorded(facts.TicketIssued)[-1].version == 3


def test_a_group_refused_as_orphaned_is_counted_once() -> None:
    run = two_steps_then_resumed_at_1()
    run.want(1)
    run.publish(2, root="elsewhere")
    run.group("a", 4, 2)
    assert run.ledger.progress.refused["orphaned"] == 1


def test_an_actor_on_an_orphaned_version_gets_no_tickets() -> None:
    run = two_steps_then_resumed_at_1()
    run.want(1)
    run.publish(2, root="elsewhere")
    count = len(run.issued())
    run.actor("b", 2)
    run.do(ev.ActorGone("a", "e"))
    assert len(run.issued()) == count


def test_a_group_whose_middle_was_sampled_from_an_orphaned_version_is_refused() -> None:
    """The generation began under version 1, went on under 2, which is orphaned now, and ended under 3."""
    run = two_steps_then_resumed_at_1()
    run.want(1)
    run.publish(2, root="elsewhere")
    run.group("a", 4, oldest=1, newest=3)
    assert [fact.reason for fact in run.recorded(facts.ResultRefused)] == ["orphaned"]


def test_a_batch_that_was_formed_is_given_to_a_resumed_learner_as_it_was_even_if_its_version_is_orphaned_by_then() -> None:
    """Batch 2 was formed from version 2 before the crash; the resumed learner arrives elsewhere at step 2. See docs/decisions/002."""
    run = started(max_lag=0, size=1, steps=6)
    run.actor("a", 0)
    for step in range(3):
        run.one_step(step)
    run.learner("t", 1)
    run.want(1)
    run.publish(2, root="elsewhere")
    run.commit(1)
    (ready,) = run.sent(messages.BatchReady, effects=run.want(2))
    assert ready.tickets == [2]
    assert ready.version_steps[2] == 2, "its lag is still counted from the step it was sampled at"


# --- ends


def test_no_ticket_is_issued_after_a_stop() -> None:
    run = started(max_lag=4)
    run.actor("a", 0, wanted=1)
    run.do(ev.StopWanted("enough"))
    run.report("a", 0, wanted=100)
    run.actor("b", 0)
    assert run.issued() == [0]
    assert set(run.sent(messages.Stop, "b")) == {messages.Stop("enough")}


def test_a_lost_announcement_is_said_again_with_every_report_until_it_is_acted_on() -> None:
    run = started(max_lag=0)
    run.actor("a", 0)
    run.one_step(0)
    assert run.sent(messages.NewVersion, "a", effects=run.report("a", 0))[0].version.step == 1
    assert not run.sent(messages.NewVersion, "a", effects=run.report("a", 1))
    run.do(ev.StopWanted("enough"))
    for _ in range(2):
        assert run.sent(messages.Stop, "a", effects=run.report("a", 1)) == [messages.Stop("enough")]


@pytest.mark.parametrize(
    ("step", "lineage", "parent", "delta", "snapshot"),
    [(5, 0, -1, None, SNAPSHOT), (1, 7, -1, None, SNAPSHOT), (1, 0, 0, None, None), (1, 0, 1, SNAPSHOT, None), (1, 0, 9, SNAPSHOT, None)],
)
def test_a_publication_that_cannot_be_is_refused(
    step: int, lineage: int, parent: int, delta: BlobRef | None, snapshot: BlobRef | None
) -> None:
    run = started()
    effects = run.do(ev.VersionReady("s", PolicyVersion(1, step, lineage, "new"), parent, delta, snapshot, 1, 1))
    assert run.sent(messages.LearnerRefused, effects=effects)
    assert len(run.recorded(facts.VersionPublished)) == 1


def test_one_actor_cannot_fail_the_tickets_of_another() -> None:
    run = started(max_lag=0)
    run.actor("a", 0)
    run.actor("b", 0, wanted=0)
    for _ in range(5):
        run.give_up("b", 0, 1)
    assert not run.recorded(facts.TicketRevoked)
    assert not run.recorded(facts.TicketEnded)


def test_whatever_the_ledger_says_fits_into_a_message() -> None:
    run = started(max_lag=0)
    run.do(ev.StopWanted("x" * 10_000))
    (stop,) = set(run.sent(messages.Stop))
    assert codec.to_actor.decode(codec.encode(stop))[0] == stop


def test_a_learner_that_asks_for_a_batch_after_a_stop_is_told_to_stop() -> None:
    run = started()
    run.do(ev.StopWanted("enough"))
    assert run.sent(messages.Stop, effects=run.want(0)) == [messages.Stop("enough")]


def test_a_second_stop_has_no_effect() -> None:
    run = started()
    run.do(ev.StopWanted("enough"))
    assert run.do(ev.StopWanted("more than enough")) == []


def test_a_stop_outlives_a_crash_of_the_learner() -> None:
    run = started()
    run.do(ev.StopWanted("enough"))
    run.learner("t")
    run.publish(0)
    run.actor("a", 0)
    assert run.issued() == []


def test_what_is_outstanding_at_the_end_becomes_void() -> None:
    run = started(max_lag=1, size=2, steps=6)
    run.actor("a", 0)
    run.group("a", 0, 0)
    run.do(ev.StopWanted("enough"))
    run.do(ev.LearnerGone("s", 0, {"seconds": 1.0}))
    counts = run.ledger.tickets.counts
    assert (counts.issued, counts.outstanding, counts.queued, counts.void) == (4, 0, 1, 3)
    assert run.recorded(facts.RunEnded) == [facts.RunEnded("")]


def test_a_finished_run_has_no_open_ticket() -> None:
    run = started(max_lag=0, size=2, steps=3)
    run.actor("a", 0)
    for step in range(3):
        run.one_step(step)
    run.do(ev.LearnerGone("s", 3, {}))
    counts = run.ledger.tickets.counts
    assert (counts.issued, counts.consumed, counts.queued, counts.outstanding, counts.void) == (6, 6, 0, 0, 0)
    assert run.recorded(facts.RunStopping)[0].reason == "the last step is done"


def test_a_last_batch_that_is_used_for_fewer_steps_is_consumed_too() -> None:
    run = started(max_lag=2, reuse=3, sync_every=3, size=1, steps=4)
    run.actor("a", 0)
    for step in range(4):
        run.one_step(step)
    assert run.issued() == [0, 1] and run.ledger.tickets.counts.consumed == 2


def test_an_early_end_keeps_what_is_queued_for_the_day_the_run_goes_on() -> None:
    run = started(max_lag=0, size=2, steps=3)
    run.actor("a", 0)
    run.group("a", 0, 0)
    run.do(ev.LearnerGone("s", 0, {}))
    run.learner("t", 0)
    run.publish(0)
    run.report("a", 0)
    for ticket in run.ledger.tickets.missing():
        run.group("a", ticket.number, 0)
    run.want(0)
    assert run.recorded(facts.BatchFormed) == [facts.BatchFormed(0, 0, [0, 2])], "ticket 1 became void"


def test_whoever_waits_is_told_for_whom() -> None:
    run = started(size=3)
    run.actor("a", 0, wanted=2)
    run.report("a", 0, wanted=1)
    run.group("a", 0, 0)
    run.now += 2
    (pending,) = run.sent(messages.BatchPending, effects=run.want(0))
    assert pending.num_missing == 2
    assert "1 with a (seen 2.0 s ago)" in pending.waiting_for and "1 not issued" in pending.waiting_for
