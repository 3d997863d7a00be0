"""Whether long completions are lost on the way to the learner is seen in the lengths, over the run and over a window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.lengths import WINDOW, Lengths
from analysis.summary import lines, summarize
from broker.journal import Journal
from protocol import facts
from protocol.config import config_json, parse_config
from protocol.groups import STOPPED, Group, encode_group
from protocol.weights import BlobRef, PolicyVersion

SHORT, LONG = 20, 100
"""Tokens of a group of two completions."""


def accepted(ticket: int, tokens: int) -> list[facts.AnyFact]:
    group = facts.GroupAccepted("a", "e", ticket + 1, ticket, 1, [0], 0, tokens, 0.5)
    return [facts.TicketIssued(ticket, 1, "a", "e", 0, 0), group]


def steps(first: int, num_steps: int, *, lose_long: bool) -> list[facts.AnyFact]:
    """At each step two groups arrive, a short and a long one; both are trained on, or the long one expires."""
    made: list[facts.AnyFact] = []
    for step in range(first, first + num_steps):
        short, long = 2 * step, 2 * step + 1
        made += [*accepted(short, SHORT), *accepted(long, LONG)]
        if lose_long:
            made.append(facts.TicketEnded(long, "expired", "older than max_lag at delivery"))
        batch = [short] if lose_long else [short, long]
        made += [facts.BatchFormed(step, step, batch), facts.StepCommitted(step, step, 0, [step] * len(batch), {})]
    return made


def lengths_of(history: list[facts.AnyFact]) -> Lengths:
    lengths = Lengths(2)
    for fact in history:
        lengths.add(fact)
    return lengths


def test_where_nothing_is_lost_both_lengths_are_the_same_at_every_step() -> None:
    lengths = Lengths(2)
    for fact in [*steps(0, 2 * WINDOW, lose_long=False), *accepted(999, LONG)]:
        lengths.add(fact)
        assert lengths.all.mean_trained == lengths.all.mean_all, "also while groups wait for their batch"
    assert (lengths.all.mean_trained, lengths.recent.mean_trained, lengths.lowest_ratio) == (30.0, 30.0, 1.0)


def test_long_groups_that_expire_are_missing_in_what_is_trained_on() -> None:
    lengths = lengths_of(steps(0, 4, lose_long=True))
    assert (lengths.all.mean_trained, lengths.all.mean_all) == (10.0, 30.0)
    assert lengths.all.ratio == pytest.approx(1 / 3)
    assert lengths.lowest_ratio is None, "the run is shorter than the window"


@pytest.mark.parametrize("loss", [facts.TicketEnded(1, "void", ""), facts.TicketRevoked(1, 1, "orphaned")])
def test_however_a_group_is_lost_it_was_dispatched(loss: facts.AnyFact) -> None:
    step: list[facts.AnyFact] = [facts.BatchFormed(0, 0, [0]), facts.StepCommitted(0, 0, 0, [0], {})]
    lengths = lengths_of([*accepted(0, SHORT), *accepted(1, LONG), loss, *step])
    assert (lengths.all.mean_trained, lengths.all.mean_all) == (10.0, 30.0)


def test_a_stretch_of_losses_shows_in_the_window_and_passes_out_of_it() -> None:
    lengths = lengths_of([*steps(0, WINDOW, lose_long=True), *steps(WINDOW, WINDOW, lose_long=False)])
    assert lengths.lowest_ratio == pytest.approx(1 / 3)
    assert lengths.recent.ratio == 1.0
    assert lengths.all.ratio == pytest.approx((140 / 6) / 30)


def test_a_batch_used_again_is_counted_once() -> None:
    lengths = lengths_of(steps(0, 3, lose_long=True))
    for again in (facts.LearnerStarted("s", 1, 2, 1), facts.StepCommitted(2, 2, 1, [0], {}), facts.StepCommitted(3, 2, 1, [1], {})):
        lengths.add(again)
    assert lengths.all.num_trained == 6


def test_tickets_without_a_group_are_counted_by_whether_they_are_open() -> None:
    stale: list[facts.AnyFact] = [
        facts.TicketIssued(2, 1, "a", "e", 0, 0),
        facts.TicketEnded(2, "expired", "its group arrived too old for its batch"),
    ]
    waiting: list[facts.AnyFact] = [
        facts.TicketIssued(3, 1, "a", "e", 0, 0),
        facts.TicketIssued(4, 1, "a", "e", 0, 0),
        facts.TicketRevoked(4, 1, "left"),
    ]
    lengths = lengths_of([*steps(0, 1, lose_long=True), *stale, *waiting])
    assert (lengths.num_ended_without_group, lengths.num_open_without_group) == (1, 2)
    assert lengths.all.num_all == 4, "their length is not known"


def payload(ticket: int, tokens: int) -> bytes:
    """A group of two completions of `tokens` tokens in all."""
    return encode_group(
        Group(
            ticket=ticket,
            prompt=0,
            seed=1,
            actor="a",
            engine="fake",
            prompt_ids=np.array([1], np.int32),
            num_tokens=np.full(2, tokens // 2, np.int32),
            token_ids=np.ones(tokens, np.int32),
            logprobs=np.zeros(tokens, np.float32),
            versions=np.zeros(tokens, np.int32),
            rewards=np.zeros(2, np.float32),
            finish=np.full(2, STOPPED, np.uint8),
        )
    )


@pytest.mark.parametrize(
    ("lose_long", "said"), [(False, "30.0 tokens a completion trained on, 30.0"), (True, "10.0 tokens a completion trained on, 30.0")]
)
def test_the_summary_shows_the_difference_that_losses_make(tmp_path: Path, lose_long: bool, said: str) -> None:
    rollout = {"group_size": 2, "groups_per_batch": 1 if lose_long else 2}
    journal = Journal(
        tmp_path / "journal.sqlite", "run", config_json(parse_config({"run": {"steps": 4}, "policy": {"max_lag": 3}, "rollout": rollout}))
    )
    base = facts.VersionPublished(PolicyVersion(0, 0, 0, "r0"), -1, None, BlobRef("ab" * 32, 10), 100, 100)
    for fact in [facts.LearnerStarted("s", 0, 0, 1), base, *steps(0, 4, lose_long=lose_long)]:
        journal.append(fact, payload(fact.ticket, fact.num_tokens) if isinstance(fact, facts.GroupAccepted) else b"", 0.0)
    journal.commit()
    journal.close()
    summary = summarize(tmp_path)
    assert not summary.broken_promises
    assert summary.completion_length_dispatched == summary.completion_length_dispatched_recent == 30.0
    assert summary.completion_length_trained == summary.completion_length_trained_recent == (10.0 if lose_long else 30.0)
    assert any(said in line for line in lines(summary))
