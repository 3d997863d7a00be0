"""A recorded course through the ledger under other pacings: with made-up durations the outcome can be worked out by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from broker.repacing import Course, Presence, course_of, repace
from protocol import facts
from protocol.config import Config, parse_config
from protocol.journal import JournalEntry
from protocol.weights import PolicyVersion

NUM_STEPS = 10


def config(max_lag: int, groups: int = 1) -> Config:
    return parse_config({"run": {"steps": NUM_STEPS}, "policy": {"max_lag": max_lag}, "rollout": {"groups_per_batch": groups}})


def course(ticket_seconds: float, step_seconds: float, num_actors: int = 1, capacity: int = 1) -> Course:
    """Every ticket and every step takes the same time; publishing and taking over take none."""
    actors = [Presence(f"actor-{index}", "epoch", 0.0, math.inf, capacity, 0.0, capacity) for index in range(num_actors)]
    tickets = dict.fromkeys(range(1000), ticket_seconds)
    return Course(tickets, step_seconds=dict.fromkeys(range(NUM_STEPS), step_seconds), presences=actors, num_steps=NUM_STEPS)


def test_without_lag_generation_and_training_take_turns() -> None:
    account = repace(course(1.0, 1.0), config(0))
    assert account.elapsed == pytest.approx(NUM_STEPS * 2.0)
    assert account.waiting == pytest.approx(NUM_STEPS * 1.0)
    assert account.lags == Counter({0: NUM_STEPS})
    assert account.idle_share == pytest.approx(0.5)


def test_with_a_lag_of_one_they_overlap() -> None:
    account = repace(course(1.0, 1.0), config(1))
    assert account.elapsed == pytest.approx(NUM_STEPS + 1.0)
    assert account.waiting == pytest.approx(1.0)
    assert account.lags == Counter({0: 1, 1: NUM_STEPS - 1})


def test_slow_actors_make_the_learner_wait_whatever_the_lag() -> None:
    account = repace(course(2.0, 1.0), config(4))
    assert account.elapsed == pytest.approx(NUM_STEPS * 2.0 + 1.0)
    assert account.waiting == pytest.approx(NUM_STEPS * 2.0 + 1.0 - NUM_STEPS * 1.0)
    assert account.num_held_back == 0


def test_fast_actors_are_held_back_and_no_group_is_above_the_bound() -> None:
    account = repace(course(0.1, 1.0, num_actors=2, capacity=2), config(2))
    assert account.waiting == pytest.approx(0.1)
    assert max(account.lags) == 2
    assert account.num_held_back > 0
    assert account.held_back_seconds > NUM_STEPS


def test_the_same_course_gives_the_same_account() -> None:
    assert repace(course(0.7, 1.0, 3, 2), config(3, 4)) == repace(course(0.7, 1.0, 3, 2), config(3, 4))


def test_durations_are_read_from_the_facts() -> None:
    entries = [
        JournalEntry(lsn, time, fact)
        for lsn, (time, fact) in enumerate(
            [
                (100.0, facts.RunStarted("run", 0)),
                (101.0, facts.ActorJoined("a", "e", "", "")),
                (102.0, facts.LearnerStarted("s", 0, 0, 1)),
                (102.5, facts.VersionPublished(PolicyVersion(0, 0, 0, "r"), -1, None, None, 1, 1, is_base=True)),
                (103.0, facts.TicketIssued(0, 1, "a", "e", 0, 0)),
                (103.0, facts.TicketIssued(1, 1, "a", "e", 0, 0)),
                (105.0, facts.GroupAccepted("a", "e", 1, 0, 1, [0], 0, 5, 1.0)),
                (106.0, facts.GroupAccepted("a", "e", 2, 1, 1, [0], 0, 5, 1.0)),
                (106.0, facts.BatchFormed(0, 0, [0, 1])),
                (108.0, facts.StepCommitted(0, 0, 0, [0, 0], {"seconds_waiting": 4.0})),
                (120.0, facts.ActorLeft("a", "e", "left")),
            ],
            start=1,
        )
    ]
    found = course_of(entries)
    assert found.ticket_seconds == {0: 2.0, 1: 1.0}
    assert found.step_seconds == {0: pytest.approx(2.0)}
    assert (found.learner_came, found.waiting, found.num_steps, found.elapsed) == (2.0, 4.0, 1, 8.0)
    assert found.presences == [Presence("a", "e", 2.5, math.inf, 2, 0.5, 1)]


def recorded(*what: tuple[float, facts.AnyFact]) -> Course:
    return course_of(JournalEntry(lsn, time, fact) for lsn, (time, fact) in enumerate(what, start=1))


def issued(ticket: int, actor: str = "a") -> facts.TicketIssued:
    return facts.TicketIssued(ticket, 1, actor, "e", 0, 0)


def accepted(ticket: int, actor: str = "a") -> facts.GroupAccepted:
    return facts.GroupAccepted(actor, "e", ticket + 1, ticket, 1, [0], 0, 5, 1.0)


def stepped(step: int, lineage: int = 0, **seconds: float) -> facts.StepCommitted:
    return facts.StepCommitted(step, step, lineage, [0], {f"seconds_{name}": value for name, value in seconds.items()})


START = (
    (0.0, facts.RunStarted("run", 0)),
    (0.0, facts.ActorJoined("a", "e", "", "")),
    (0.0, facts.LearnerStarted("s", 0, 0, 1)),
)


def test_a_ticket_that_waits_behind_others_in_its_actor_is_not_worked_on_meanwhile() -> None:
    found = recorded(*START, *((1.0, issued(n)) for n in range(3)), *((2.0 + n, accepted(n)) for n in range(3)), (9.0, stepped(0)))
    assert found.ticket_seconds == {0: 1.0, 1: 1.0, 2: 1.0}
    assert (found.presences[0].capacity, found.presences[0].at_a_time) == (3, 1)


def test_tickets_that_overtake_others_were_worked_on_beside_them() -> None:
    found = recorded(
        *START, *((1.0, issued(n)) for n in range(3)), (3.0, accepted(2)), (4.0, accepted(0)), (5.0, accepted(1)), (9.0, stepped(0))
    )
    assert found.ticket_seconds == {0: 3.0, 1: 4.0, 2: 2.0}
    assert found.presences[0].at_a_time == 3


def test_what_an_actor_works_on_at_a_time_is_what_it_works_on_in_the_model() -> None:
    one_by_one, beside = course(1.0, 0.0, 1, 4), course(1.0, 0.0, 1, 4)
    one_by_one.presences = [presence._replace(at_a_time=1) for presence in one_by_one.presences]
    assert repace(one_by_one, config(9)).elapsed == pytest.approx(NUM_STEPS * 1.0)
    assert repace(beside, config(9)).elapsed == pytest.approx(math.ceil(NUM_STEPS / 4) * 1.0)


def test_a_batch_on_its_way_to_the_learner_is_waited_for() -> None:
    found = recorded(
        *START, (1.0, issued(0)), (2.0, accepted(0)), (2.0, facts.BatchFormed(0, 0, [0])), (5.5, stepped(0, waiting=2.5, training=3.0))
    )
    assert found.delivery_seconds == {0: pytest.approx(0.5)}
    made = course(0.0, 1.0)
    made.delivery_seconds = dict.fromkeys(range(NUM_STEPS), 0.25)
    account = repace(made, config(9))
    assert account.waiting == pytest.approx(NUM_STEPS * 0.25)
    assert account.elapsed == pytest.approx(NUM_STEPS * 1.25)


def test_steps_that_were_done_again_count_once_and_what_was_lost_is_time_at_the_step_that_was_resumed() -> None:
    found = recorded(
        *START, (0.5, issued(0)), (0.5, accepted(0)), (1.0, stepped(0, waiting=0.5)), (2.0, stepped(1, waiting=0.5)), (3.0, stepped(2, waiting=0.5)),
        (10.0, facts.RunStarted("run", 7)), (11.0, facts.LearnerStarted("t", 1, 1, 1)),
        (12.0, stepped(1, 1, waiting=0.1)), (13.0, stepped(2, 1, waiting=0.1)), (14.0, stepped(3, 1, waiting=0.1)),
    )  # fmt: skip
    assert found.lost_seconds == {1: 10.0}
    assert (found.num_steps, found.elapsed, found.learner_came) == (4, 14.0, 0.0)
    assert found.waiting == pytest.approx(0.8)
    assert sum(found.lags.values()) == 4
    account = repace(found, config(2))
    assert account.elapsed == pytest.approx(sum(found.step_seconds.values()) + 10.0, abs=1.0)


def test_an_actor_that_dies_and_comes_again_has_its_tickets_issued_again_and_a_presence_for_each_life() -> None:
    found = recorded(
        *START, (1.0, issued(0)), (1.0, issued(1)), (2.0, facts.ActorLeft("a", "e", "silent")), (2.0, facts.TicketRevoked(0, 1, "")),
        (3.0, facts.ActorJoined("a", "f", "", "")), (4.0, facts.TicketIssued(0, 2, "a", "f", 0, 0)),
        (5.0, facts.GroupAccepted("a", "f", 1, 0, 2, [0], 0, 5, 1.0)), (9.0, stepped(0)),
    )  # fmt: skip
    assert found.ticket_seconds == {0: 1.0}
    assert [(one.epoch, one.came, one.went, one.capacity) for one in found.presences] == [("e", 1.0, 2.0, 2), ("f", 4.0, math.inf, 1)]
    account = repace(found, config(2))
    assert account.elapsed > 3.0
