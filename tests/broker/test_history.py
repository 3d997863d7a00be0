"""A recording seen from its end: of steps that were done again, the last time counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.history import History, Segment, history_of, read_history
from broker.journal import Journal
from protocol import facts
from protocol.config import Config, config_json
from protocol.errors import JournalDamaged
from protocol.journal import JOURNAL_NAME, MARK_SUFFIX, encode_mark
from protocol.weights import PolicyVersion

HERE, THERE = {"torch": "1"}, {"torch": "2"}


def started(lineage: int, step: int, world_size: int = 1, environment: dict[str, str] = HERE) -> facts.LearnerStarted:
    return facts.LearnerStarted(f"session-{lineage}", lineage, step, world_size, environment)


def stepped(*steps: int, lineage: int) -> list[facts.StepCommitted]:
    return [facts.StepCommitted(step, step, lineage, [0], {"from": float(lineage)}) for step in steps]


def published(number: int, step: int, lineage: int, root: str = "") -> facts.VersionPublished:
    version = PolicyVersion(number, step, lineage, root or f"root-{number}")
    return facts.VersionPublished(version, number - 1, None, None, 1, 1, is_base=True)


def told(*what: facts.AnyFact | list[facts.StepCommitted]) -> History:
    """The history of these facts in order."""
    flat = [fact for one in what for fact in (one if isinstance(one, list) else [one])]
    return history_of("run", "config-0", flat)


def test_a_run_without_interruption_is_one_segment() -> None:
    history = told(facts.RunStarted("run", 0, "config-0"), started(0, 0), stepped(0, 1, 2, lineage=0))
    assert history.segments == [Segment(0, 3, 0, 1, HERE, "config-0")]
    assert history.num_steps == 3


def test_steps_that_were_done_again_count_as_they_were_done_last() -> None:
    history = told(started(0, 0), stepped(0, 1, 2, 3, lineage=0), started(1, 2, 2), stepped(2, 3, 4, lineage=1))
    assert history.segments == [Segment(0, 2, 0, 1, HERE, "config-0"), Segment(2, 5, 1, 2, HERE, "config-0")]
    assert [history.steps[step].lineage for step in range(5)] == [0, 0, 1, 1, 1]


def test_sessions_that_ran_alike_are_one_segment() -> None:
    history = told(started(0, 0), stepped(0, 1, 2, lineage=0), started(1, 1), stepped(1, 2, 3, lineage=1))
    assert history.segments == [Segment(0, 4, 0, 1, HERE, "config-0")]


def test_another_world_size_machine_or_configuration_begins_a_segment() -> None:
    history = told(
        started(0, 0),
        stepped(0, lineage=0),
        started(1, 1, 2),
        stepped(1, lineage=1),
        started(2, 2, 2, THERE),
        stepped(2, lineage=2),
        facts.RunStarted("run", 9, "config-1"),
        started(3, 3, 2, THERE),
        stepped(3, lineage=3),
    )
    assert [(s.first, s.end, s.world_size, s.environment, s.config) for s in history.segments] == [
        (0, 1, 1, HERE, "config-0"),
        (1, 2, 2, HERE, "config-0"),
        (2, 3, 2, THERE, "config-0"),
        (3, 4, 2, THERE, "config-1"),
    ]


def test_a_session_none_of_whose_steps_counts_is_no_segment() -> None:
    history = told(started(0, 0), started(1, 0, 2), stepped(0, 1, lineage=1), started(2, 0, 3), stepped(0, 1, lineage=2), started(3, 2))
    assert [segment.lineage for segment in history.segments] == [2]


def test_the_version_of_a_step_is_that_of_the_session_whose_step_led_there() -> None:
    history = told(
        started(0, 0), published(0, 0, 0), stepped(0, lineage=0), published(1, 1, 0), stepped(1, lineage=0), published(2, 2, 0),
        started(1, 1), facts.VersionOrphaned(2, 1), stepped(1, lineage=1), published(3, 2, 1),
    )  # fmt: skip
    assert [history.version_at(step) for step in range(4)] == [0, 1, 3, None]


def test_a_version_that_a_later_session_arrived_at_again_is_its_version_too() -> None:
    history = told(
        started(0, 0), published(0, 0, 0), stepped(0, lineage=0), published(1, 1, 0),
        started(1, 0), stepped(0, lineage=1), facts.VersionReproduced(1, 1),
    )  # fmt: skip
    assert history.version_at(1) == 1


def test_what_was_evaluated_and_how_long_the_learner_was_busy_are_kept() -> None:
    history = told(started(0, 0), facts.Evaluated(0, 0.25, 8), stepped(0, lineage=0), facts.LearnerFinished(1, {"busy_seconds": 2.5}))
    assert (history.evaluations, history.busy_seconds) == ({0: 0.25}, 2.5)


def test_a_journal_that_ends_before_its_mark_is_no_history(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    journal = Journal(path, "run", config_json(Config()))
    journal.append(facts.RunStarted("run", 0), b"", 1.0)
    journal.commit()
    journal.close()
    assert read_history(path).run == "run"
    path.with_name(path.name + MARK_SUFFIX).write_bytes(encode_mark(7))
    with pytest.raises(JournalDamaged, match="events 2 to 7: they were committed and are not there"):
        read_history(path)
