"""The recount trusts nobody: it derives lags from the tokens, and finds each kind of broken promise in a journal that was tampered with."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from analysis.recount import recount
from analysis.report import finish_run
from analysis.summary import lines, summarize
from broker.journal import Journal
from protocol import facts
from protocol.config import config_json, parse_config
from protocol.errors import ConfigError, PromisesBroken
from protocol.groups import STOPPED, Group, encode_group
from protocol.weights import BlobRef, PolicyVersion

SETTINGS = {"run": {"steps": 2}, "policy": {"max_lag": 1}, "rollout": {"group_size": 2, "groups_per_batch": 2}}


def payload(ticket: int, versions: list[int]) -> bytes:
    return encode_group(
        Group(
            ticket=ticket,
            prompt=0,
            seed=1,
            actor="a",
            engine="fake",
            prompt_ids=np.array([1], np.int32),
            num_tokens=np.array([1, 2], np.int32),
            token_ids=np.array([1, 2, 3], np.int32),
            logprobs=np.zeros(3, np.float32),
            versions=np.array(versions, np.int32),
            rewards=np.array([0, 1], np.float32),
            finish=np.full(2, STOPPED, np.uint8),
        )
    )


def history() -> list[tuple[facts.AnyFact, bytes]]:
    """Two steps of two groups; ticket 3 began under version 0 and ended under version 1."""
    blob = BlobRef("ab" * 32, 10)
    made: list[tuple[facts.AnyFact, bytes]] = [
        (facts.ActorJoined("a", "e", "fake", "host"), b""),
        (facts.LearnerStarted("s", 0, 0, 1), b""),
        (facts.VersionPublished(PolicyVersion(0, 0, 0, "r0"), -1, None, blob, 100, 100), b""),
        (facts.Evaluated(0, 0.25, 8), b""),
    ]
    made += [(facts.TicketIssued(ticket, 1, "a", "e", 0, 0), b"") for ticket in range(4)]
    accepted = {0: [0, 0, 0], 1: [0, 0, 0], 2: [1, 1, 1], 3: [0, 1, 1]}
    for ticket in (0, 1):
        made.append((facts.GroupAccepted("a", "e", ticket + 1, ticket, 1, [0], 0, 3, 0.5), payload(ticket, accepted[ticket])))
    made += [
        (facts.BatchFormed(0, 0, [0, 1]), b""),
        (facts.VersionPublished(PolicyVersion(1, 1, 0, "r1"), 0, BlobRef("cd" * 32, 20), None, 100, 9), b""),
        (facts.StepCommitted(0, 0, 0, [0, 0], {"reward": 0.5, "lag_max": 0.0}), b""),
    ]
    for ticket in (2, 3):
        versions = sorted(set(accepted[ticket]))
        made.append(
            (facts.GroupAccepted("a", "e", ticket + 1, ticket, 1, versions, versions[0], 3, 0.5), payload(ticket, accepted[ticket]))
        )
    made += [
        (facts.BatchFormed(1, 1, [2, 3]), b""),
        (facts.StepCommitted(1, 1, 0, [0, 1], {"reward": None, "lag_max": 1.0}), b""),
        (facts.Evaluated(2, 0.75, 8), b""),
        (facts.LearnerFinished(2, {"busy_seconds": 1.0, "elapsed_seconds": 2.0}), b""),
        (facts.RunStopping("the last step is done"), b""),
        (facts.RunEnded(""), b""),
        (facts.ActorLeft("a", "e", "left", 3.0, 4.0, 12), b""),
    ]
    return made


def write(folder: Path, made: list[tuple[facts.AnyFact, bytes]]) -> Path:
    journal = Journal(folder / "journal.sqlite", "run", config_json(parse_config(SETTINGS)))
    for place, (fact, data) in enumerate(made):
        journal.append(fact, data, float(place))
    journal.commit()
    journal.close()
    return folder / "journal.sqlite"


def test_a_kept_journal_is_counted_from_its_tokens(tmp_path: Path) -> None:
    count = recount(write(tmp_path, history()))
    assert count.broken == []
    assert count.lags == count.ledger_lags == {0: 3, 1: 1}
    assert count.learner_largest_lag == 1
    assert (count.issued, count.consumed, count.num_open) == ({0, 1, 2, 3}, {0, 1, 2, 3}, 0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            facts.StepCommitted(1, 1, 0, [0, 1], {"reward": None, "lag_max": 1.0}),
            facts.StepCommitted(1, 1, 0, [0, 0], {}),
            "the tokens say",
        ),
        (
            facts.StepCommitted(1, 1, 0, [0, 1], {"reward": None, "lag_max": 1.0}),
            facts.StepCommitted(1, 1, 0, [0, 1], {"reward": None, "lag_max": 0.0}),
            "the learner's largest lag is 0.0",
        ),
        (facts.BatchFormed(1, 1, [2, 3]), facts.BatchFormed(1, 1, [2, 1]), "ticket 1 is in 2 batches"),
        (facts.TicketIssued(3, 1, "a", "e", 0, 0), facts.TicketIssued(9, 1, "a", "e", 0, 0), "ticket 3 was never issued"),
        (facts.RunStopping("the last step is done"), facts.TicketEnded(2, "void", ""), "ticket 2 ended as void and is in a batch"),
    ],
)
def test_each_broken_promise_is_found(tmp_path: Path, old: facts.AnyFact, new: facts.AnyFact, said: str) -> None:
    made = [(new if fact == old else fact, data) for fact, data in history()]
    assert made != history()
    assert any(said in text for text in recount(write(tmp_path, made)).broken)


def test_a_lag_above_the_bound_is_found(tmp_path: Path) -> None:
    made = [
        (fact, payload(3, [0, 1, 1]) if isinstance(fact, facts.GroupAccepted) and fact.ticket == 3 else data) for fact, data in history()
    ]
    made = [
        (facts.VersionPublished(PolicyVersion(0, -1, 0, "r0"), -1, None, None, 100, 100), data)
        if isinstance(fact, facts.VersionPublished) and fact.version.number == 0
        else (fact, data)
        for fact, data in made
    ]
    assert any("lag 2, max_lag is 1" in text for text in recount(write(tmp_path, made)).broken)


def test_the_summary_says_what_the_journal_says(tmp_path: Path) -> None:
    write(tmp_path, history())
    summary = summarize(tmp_path)
    assert summary.outcome == "the last step is done"
    assert (summary.steps, summary.wall_seconds) == (2, len(history()) - 1)
    assert (summary.heldout_reward_before, summary.heldout_reward_after) == (0.25, 0.75)
    assert (summary.publications, summary.publication_bytes, summary.publication_bytes_full) == (2, 20.0, 100)
    assert (summary.learner_busy_share, summary.actor_busy_share) == (0.5, 0.75)
    assert summary.num_sampled_tokens == 12
    finished = finish_run(tmp_path)
    assert any("0.250 -> 0.750 (+0.500)" in line for line in finished.lines)
    finished.check()
    assert {path.name for path in tmp_path.iterdir()} >= {"summary.json", "reward.png", "lag.png"}


@pytest.mark.parametrize("num_first", [1, 2])
def test_a_run_that_was_evaluated_at_one_step_only_has_no_reward_after(tmp_path: Path, num_first: int) -> None:
    evaluated: list[tuple[facts.AnyFact, bytes]] = [(facts.Evaluated(0, 0.6, 8), b"")] * num_first
    others = [entry for entry in history() if not isinstance(entry[0], facts.Evaluated)]
    write(tmp_path, [*others[:3], *evaluated, *others[3:]])
    summary = summarize(tmp_path)
    assert (summary.heldout_reward_before, summary.heldout_reward_after) == (0.6, None)
    assert "held-out reward  0.600 at first, not evaluated again" in lines(summary)


def test_a_journal_of_a_run_that_never_began_has_a_summary_too(tmp_path: Path) -> None:
    write(tmp_path, [(facts.RunStarted("run", 0), b"")])
    summary = summarize(tmp_path)
    assert (summary.steps, summary.outcome, summary.heldout_reward_after) == (0, "not ended", None)
    finish_run(tmp_path)


def test_a_run_that_breaks_a_promise_is_an_error_with_its_own_exit_code_and_the_lines(tmp_path: Path) -> None:
    made = [(fact, data) for fact, data in history() if not isinstance(fact, facts.TicketIssued)]
    write(tmp_path, made)
    finished = finish_run(tmp_path)
    assert any(line.startswith("BROKEN PROMISE") for line in finished.lines)
    with pytest.raises(PromisesBroken, match=re.escape(f"the first: {finished.broken_promises[0]}")) as caught:
        finished.check()
    assert caught.value.exit_code == 7


def test_a_directory_where_the_summary_cannot_be_written_is_named(tmp_path: Path) -> None:
    write(tmp_path, history())
    (tmp_path / "summary.json").mkdir()  # nobody can open it to write, not even root
    with pytest.raises(ConfigError, match="its summary cannot be written there") as caught:
        finish_run(tmp_path)
    assert caught.value.value == str(tmp_path)
