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
    assert found.presences == [Presence("a", "e", 1.0, math.inf, 2, 0.5, 1)]
