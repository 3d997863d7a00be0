"""Going back after a collapse: what is set aside, what is recorded, and what the learning rate is from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.checkpoint import NUM_KEPT, list_checkpoints, load_optimizer, save_checkpoint
from learner.publish import Published
from learner.ranks import OneRank
from learner.rollback import (
    FILE,
    MAX_ROLLBACKS,
    last_good_checkpoint,
    next_rollback,
    read_rollbacks,
    recorded_as,
    recorded_in,
    roll_back,
    step_of,
    write_rollbacks,
)
from learner.stability.monitor import BatchSeen, Monitor, Moved, Rollback, Signal
from learner.step import Trainer
from learner.supervised import character_tokenizer
from protocol.config import LearnerConfig, LossConfig, parse_config
from protocol.errors import CheckpointError
from protocol.weights import PolicyVersion

MAX_LABEL = 256
"""Characters of a value in a session's environment."""


def make_checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"step-{step:08d}").mkdir(parents=True)
        (folder / f"step-{step:08d}" / "state.json").write_text(f"written at {step}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def all_rollbacks(step: int, level: float = 1 / 3) -> list[Rollback]:
    """As many as there can be."""
    found: list[Rollback] = []
    while (back := next_rollback(found, step, step + 100, level)) is not None:
        found.append(back)
    return found


# --- what is on the disk


def test_a_folder_from_an_earlier_version_has_gone_back_nowhere(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 2, 4)
    assert read_rollbacks(tmp_path) == read_rollbacks(tmp_path / "not there") == []


def test_rollbacks_are_read_as_they_were_written_and_a_half_written_file_is_not_seen(tmp_path: Path) -> None:
    written = all_rollbacks(7)
    write_rollbacks(tmp_path / "checkpoints", written)
    (tmp_path / "checkpoints" / f".{FILE}.partial").write_text("[{")
    assert read_rollbacks(tmp_path / "checkpoints") == written


def test_damaged_rollbacks_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("[{")
    with pytest.raises(CheckpointError, match=FILE):
        read_rollbacks(tmp_path)


def test_the_last_good_checkpoint_is_the_newest_that_is_not_after_the_step(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 32, 64, 96)
    found = [step_of(last_good_checkpoint(tmp_path, step)) for step in (-3, 0, 31, 32, 63, 64, 1000)]
    assert found == [0, 0, 0, 32, 32, 64, 96]


def test_checkpoints_after_the_start_are_set_aside_and_none_is_deleted_or_replaced(tmp_path: Path) -> None:
    said: list[str] = []
    make_checkpoints(tmp_path, 2, 4, 6, 8)
    roll_back(tmp_path, [Rollback(4, 9, 0.5)], said.append)
    assert names(tmp_path) == ["collapsed-0-step-00000006", "collapsed-0-step-00000008", "step-00000002", "step-00000004"]
    make_checkpoints(tmp_path, 6, 8)
    roll_back(tmp_path, [Rollback(4, 9, 0.5), Rollback(2, 11, 0.25)], said.append)
    kept = [f"collapsed-{count}-step-{step:08d}" for count in (0, 1) for step in (4, 6, 8) if (count, step) != (1, 4)]
    assert names(tmp_path) == sorted([*kept, "step-00000002"])
    assert all((tmp_path / name / "state.json").read_text() == f"written at {step_of(Path(name[-13:]))}" for name in names(tmp_path))
    assert [step_of(Path(text.split()[1])) for text in said] == [8, 6, 8, 6, 4], "the newest first: what is left has no gap"
    assert read_rollbacks(tmp_path) == [Rollback(4, 9, 0.5), Rollback(2, 11, 0.25)]


def test_nothing_is_recorded_before_all_is_set_aside(tmp_path: Path) -> None:
    class Died(Exception):
        pass

    def die(text: str) -> None:
        raise Died(text)

    make_checkpoints(tmp_path, 2, 4, 6)
    with pytest.raises(Died):
        roll_back(tmp_path, [Rollback(2, 9, 0.5)], die)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2, 4]
    assert read_rollbacks(tmp_path) == []


def test_going_back_to_the_policy_itself_sets_everything_aside(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 2)
    roll_back(tmp_path, [Rollback(0, 9, 0.5)], lambda text: None)
    assert list_checkpoints(tmp_path) == []
    roll_back(tmp_path / "not there yet", [Rollback(0, 9, 0.5)], lambda text: None)
    assert read_rollbacks(tmp_path / "not there yet") == [Rollback(0, 9, 0.5)]


# --- what a session records


def test_a_session_records_what_it_goes_by(tmp_path: Path) -> None:
    assert recorded_as([]) == {}, "sessions that have not gone back look as they always did"
    assert recorded_in({"torch": "2"}) == []
    whole = all_rollbacks(10**6)
    assert recorded_in({"torch": "2"} | recorded_as(whole)) == whole
    assert all(len(text) <= MAX_LABEL for item in recorded_as(whole).items() for text in item)


# --- what follows from it


def test_each_time_the_learning_rate_is_halved_and_after_the_last_time_there_is_no_more(tmp_path: Path) -> None:
    assert [back.lr_scale for back in all_rollbacks(3)] == [0.5, 0.25, 0.125]
    assert len(all_rollbacks(3)) == MAX_ROLLBACKS


def monitor(*rollbacks: Rollback) -> Monitor:
    return Monitor(parse_config({"run": {"steps": 1000}, "stability": {"governor": "warn"}}), None, None, rollbacks)


def seen(reward: float) -> BatchSeen:
    return BatchSeen(True, reward, 64, 0, 0.0, 0.0, 10.0)


SIGNAL = Signal(0.0, 1.0)
FALL = [0.0] * 8
"""Rewards that are surely a collapse after a level of 1."""


def feed(watched: Monitor, first: int, rewards: list[float]) -> list[str]:
    """Steps of these rewards from `first` on; the kinds of the notes."""
    for step, reward in enumerate(rewards, first):
        lr = watched.govern(step, 1.0, seen(reward), SIGNAL)
        watched.moved(step, lr, seen(reward), SIGNAL, Moved(0.0, None, 0.0, {}))
    return [note.kind for note in watched.take_notes()]


def lrs(watched: Monitor, steps: range) -> list[float]:
    return [watched.govern(step, 1.0, seen(1.0), SIGNAL) for step in steps]


def test_steps_that_are_done_again_leave_the_weights_and_those_after_them_have_the_lower_learning_rate() -> None:
    assert lrs(monitor(Rollback(3, 6, 0.5)), range(9)) == [1, 1, 1, 0, 0, 0, 0.5, 0.5, 0.5]
    twice = monitor(Rollback(3, 6, 0.5), Rollback(8, 10, 0.25))
    assert lrs(twice, range(12)) == [1, 1, 1, 0, 0, 0, 0.5, 0.5, 0, 0, 0.25, 0.25]
    behind = monitor(Rollback(3, 6, 0.5), Rollback(2, 8, 0.25))
    assert lrs(behind, range(10)) == [1, 1, 0, 0, 0, 0, 0, 0, 0.25, 0.25]


def test_batches_that_are_used_again_are_no_collapse() -> None:
    rewards = [1.0] * 8 + FALL
    assert "collapse" in feed(monitor(), 0, rewards)
    gone_back = monitor(Rollback(0, len(rewards), 0.5, 1.0))
    assert "collapse" not in feed(gone_back, 0, rewards)
    assert feed(gone_back, len(rewards), [1.0] * 8) == []
    assert "collapse" in feed(gone_back, len(rewards) + 8, FALL)


def test_a_run_that_does_not_come_back_to_its_level_collapses_again() -> None:
    assert "collapse" in feed(monitor(Rollback(0, 12, 0.5, 0.5)), 12, [0.01] * 8)
    assert "collapse" not in feed(monitor(Rollback(0, 12, 0.5, 0.01)), 12, [0.01] * 8)


def test_a_run_whose_reward_was_never_above_zero_does_not_collapse() -> None:
    assert feed(monitor(), 0, [0.0] * 50) == feed(monitor(Rollback(2, 4, 0.5)), 0, [0.0] * 50) == []


# --- at a learning rate of zero


@pytest.fixture
def make_trainer(make_llama: Callable[..., Any]) -> Callable[[], Trainer]:
    return lambda: Trainer(make_llama(), None, LearnerConfig(lr=1e-2), LossConfig(), 10, 1.0, OneRank())


def moments(trainer: Trainer) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = trainer.optimizer.state_dict()["state"]
    return {index: {name: value.clone() for name, value in found.items()} for index, found in state.items()}


def test_a_learning_rate_of_zero_leaves_weights_and_moments_as_they_were(
    make_trainer: Callable[[], Trainer], make_training_batch: Callable[..., Any]
) -> None:
    trainer = make_trainer()
    trainer.apply(make_training_batch(), 0)
    weights, before = [p.clone() for p in trainer.model.parameters()], moments(trainer)
    metrics = trainer.apply(make_training_batch(1), 1, lambda lr, _: 0.0)
    assert metrics["lr"] == 0.0 and metrics["grad_norm"] > 0
    assert all(torch.equal(old, new) for old, new in zip(weights, trainer.model.parameters(), strict=True))
    assert all(torch.equal(value, moments(trainer)[index][name]) for index, found in before.items() for name, value in found.items())


def test_a_checkpoint_from_before_the_first_update_can_be_gone_on_from(
    make_trainer: Callable[[], Trainer], make_training_batch: Callable[..., Any], tmp_path: Path
) -> None:
    trainer, again = make_trainer(), make_trainer()
    trainer.apply(make_training_batch(), 0, lambda lr, _: 0.0)
    save(tmp_path, 1, trainer)
    load_optimizer(tmp_path / "step-00000001", again)
    for each in (trainer, again):
        each.apply(make_training_batch(1), 1)
    assert all(torch.equal(old, new) for old, new in zip(trainer.model.parameters(), again.model.parameters(), strict=True))


def save(folder: Path, step: int, trainer: Trainer, keep: Path | None = None) -> None:
    published = Published(PolicyVersion(0, step, 0, ""), {})
    tokenizer = character_tokenizer(["0123456789"])
    save_checkpoint(folder, "run", step, step, trainer, published, tokenizer, OneRank(), keep=keep, wait=pytest.fail)


def test_the_last_good_checkpoint_is_not_removed_as_an_old_one(
    make_trainer: Callable[[], Trainer], make_training_batch: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.apply(make_training_batch(), 0)
    for step in range(1, NUM_KEPT + 4):
        save(tmp_path, step, trainer, keep=last_good_checkpoint(tmp_path, 2))
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2, *range(4, NUM_KEPT + 4)]
