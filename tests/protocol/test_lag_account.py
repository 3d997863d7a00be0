"""The account of lag adds up to the lag, group by group and step by step, whatever happened before."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import facts
from protocol.lag_account import NUM_RECENT, LagAccount, LagParts
from tests.simulation.run import simulate

Facts = list[facts.AnyFact]
SEEDS = range(40)
POINTS = st.integers(0, 12)
TICKETS = st.integers(0, 5)


def issued(ticket: int, attempt: int = 1) -> facts.TicketIssued:
    return facts.TicketIssued(ticket, attempt, "a", "e", 0, 0)


def accepted(ticket: int, oldest_step: int, attempt: int = 1) -> facts.GroupAccepted:
    return facts.GroupAccepted("a", "e", 1, ticket, attempt, [0], oldest_step, 3, 0.5)


def committed(step: int, batch: int = 0, lags: tuple[int, ...] = ()) -> facts.StepCommitted:
    return facts.StepCommitted(step, batch, 0, list(lags), {})


def resumed(step: int) -> facts.LearnerStarted:
    return facts.LearnerStarted("s", 0, step, 1)


def fed(history: Iterable[facts.AnyFact]) -> LagAccount:
    account = LagAccount()
    for fact in history:
        account.add(fact)
    return account


def parts_of(*history: facts.AnyFact) -> LagParts | None:
    """Of the step that a history ends with."""
    account = fed(history[:-1])
    return account.add(history[-1])


def test_a_lag_is_told_apart_into_where_it_arose() -> None:
    history: Facts = [resumed(5), issued(0), resumed(7), accepted(0, 3), facts.BatchFormed(0, 10, [0])]
    assert parts_of(*history, committed(10)) == LagParts(publish=2, in_flight=2, queued=3, reuse=0)
    assert parts_of(*history, committed(10), committed(11)) == (2, 2, 3, 1)


def test_it_is_put_into_words_on_one_line() -> None:
    assert LagParts(0.4, 1.2, 1.0, 0.5).in_words() == "lag 3.1 = 0.4 publishing + 1.2 in flight + 1.0 queued + 0.5 reuse"


def test_the_attempt_that_was_accepted_counts_not_the_last_one() -> None:
    history: Facts = [issued(0), committed(1), issued(0, attempt=2)]
    assert parts_of(*history, accepted(0, 0, attempt=1), facts.BatchFormed(0, 2, [0]), committed(2)) == (0, 2, 0, 0)
    assert parts_of(*history, accepted(0, 0, attempt=2), facts.BatchFormed(0, 2, [0]), committed(2)) == (2, 0, 0, 0)


def test_a_group_that_is_sampled_again_counts_from_its_second_arrival() -> None:
    history: Facts = [
        issued(0),
        accepted(0, 0),
        facts.TicketRevoked(0, 1, "orphaned"),
        committed(1),
        issued(0, 2),
        committed(2),
        accepted(0, 1, 2),
    ]
    assert parts_of(*history, facts.BatchFormed(0, 4, [0]), committed(4)) == (1, 1, 1, 0)


def test_weights_newer_than_the_ticket_leave_nothing_to_publishing() -> None:
    history: Facts = [resumed(5), issued(0), resumed(8)]
    assert parts_of(*history, accepted(0, 6), facts.BatchFormed(0, 9, [0]), committed(9)) == (0, 2, 1, 0)
    assert parts_of(*history, accepted(0, 9), facts.BatchFormed(0, 9, [0]), committed(9)) == (0, 0, 0, 0), "newer than the last commit"


def test_a_learner_that_goes_back_makes_no_part_negative() -> None:
    issued_ahead: Facts = [resumed(5), issued(0), resumed(3), accepted(0, 2)]
    assert parts_of(*issued_ahead, facts.BatchFormed(0, 6, [0]), committed(6)) == (3, 0, 1, 0)
    arrived_ahead: Facts = [resumed(2), issued(0), resumed(9), accepted(0, 2), resumed(4)]
    assert parts_of(*arrived_ahead, facts.BatchFormed(0, 4, [0]), committed(4)) == (0, 2, 0, 0)


def test_steps_done_again_are_accounted_for_and_counted_again() -> None:
    first: Facts = [issued(0), accepted(0, 0), facts.BatchFormed(0, 1, [0]), committed(1), committed(2)]
    second: Facts = [issued(1), accepted(1, 2), facts.BatchFormed(1, 3, [1]), committed(3, 1)]
    account = fed([*first, *second, resumed(1)])
    assert account.add(committed(1)) == (0, 0, 1, 0)
    assert account.add(committed(2)) == (0, 0, 1, 1)
    assert account.total == (5, (1, 0, 4, 2))
    assert account.total.mean == pytest.approx((0.2, 0, 0.8, 0.4))


def test_what_is_recent_is_the_mean_over_the_groups_of_the_last_steps() -> None:
    account = fed([issued(0), accepted(0, 0), facts.BatchFormed(0, 0, [0])])
    assert account.recent is None
    for step in range(2 * NUM_RECENT):
        account.add(committed(step))
    assert account.recent == (0, 0, 0, NUM_RECENT + (NUM_RECENT - 1) / 2)


@st.composite
def histories(draw: st.DrawFn) -> list[facts.AnyFact]:
    """Any facts in any order: learners that jump, tickets that were never issued, batches that share tickets."""
    batches = draw(st.lists(st.builds(facts.BatchFormed, st.integers(0, 3), POINTS, st.lists(TICKETS, unique=True))))
    return draw(
        st.lists(
            st.one_of(
                st.builds(issued, TICKETS, st.integers(1, 3)),
                st.builds(accepted, TICKETS, POINTS, st.integers(1, 3)),
                st.builds(facts.TicketEnded, TICKETS, st.just("expired"), st.just("")),
                st.builds(committed, POINTS, st.integers(0, 3)),
                st.builds(resumed, POINTS),
                st.sampled_from(batches) if batches else st.nothing(),
            ),
            max_size=60,
        )
    )


@given(histories())
def test_the_parts_add_up_to_the_lag_after_any_facts_and_are_not_negative(history: list[facts.AnyFact]) -> None:
    account = LagAccount()
    oldest: dict[int, int] = {}
    formed: dict[int, tuple[int, list[int]]] = {}
    num_groups, lags = 0, 0
    for fact in history:
        mean = account.add(fact)
        match fact:
            case facts.GroupAccepted():
                oldest[fact.ticket] = fact.oldest_step
            case facts.TicketEnded():
                oldest.pop(fact.ticket, None)
            case facts.BatchFormed():
                formed[fact.batch] = fact.step, [oldest.pop(ticket) for ticket in fact.tickets if ticket in oldest]
            case facts.StepCommitted() if fact.batch in formed:
                first, versions = formed[fact.batch]
                expected = [fact.step - version for version in versions]
                assert mean is None if not versions else mean is not None and mean.total == pytest.approx(sum(expected) / len(expected))
                groups = account.groups_at(fact)
                assert [parts.total for parts in groups] == (expected if groups else [])
                for parts, version in zip(groups, versions, strict=False):
                    assert parts.reuse == fact.step - first
                    assert version > first or min(parts[:3]) >= 0
                num_groups, lags = num_groups + len(versions), lags + sum(expected)
        assert (account.total.num_groups, account.total.parts.total) == (num_groups, lags)


def test_in_runs_with_faults_the_parts_add_up_to_the_lags_that_the_ledger_recorded_group_by_group() -> None:
    num_repeated = num_compared = 0
    seen = LagParts(0, 0, 0, 0)
    for seed in SEEDS:
        world, account = simulate(seed), LagAccount()
        for fact in world.checks.facts:
            mean = account.add(fact)
            assert len(account._tickets) <= world.plan.pacing.run_ahead
            assert len(account._newest[1]) <= world.plan.pacing.groups_per_batch
            if not isinstance(fact, facts.StepCommitted):
                continue
            assert mean is not None and min(mean) >= 0
            assert mean.total == pytest.approx(sum(fact.lags) / len(fact.lags))
            if groups := account.groups_at(fact):
                assert [parts.total for parts in groups] == fact.lags
                assert all(min(parts) >= 0 for parts in groups)
                num_compared += 1
            else:
                num_repeated += 1
        seen = LagParts(*map(max, seen, account.total.parts))
    assert num_repeated and num_compared > 10 * num_repeated
    assert min(seen) > 0, "every part occurs"
