"""Going on with a run: what it had come to, what may change, and that only one goes on with it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from broker.blobs import BlobStore
from broker.journal import Journal
from deploy.resume import (
    NOTHING,
    Past,
    check_config,
    go_on,
    keep_settings,
    look_back,
    new_settings,
    open_run,
    sole_supervisor,
    wanted_actors,
)
from deploy.rundir import RunDirectory, RunManifest, policy_files
from deploy.wiring import make_broker, serve_broker
from protocol import facts
from protocol.config import config_json, overridden, parse_config
from protocol.errors import ConfigError, JournalDamaged
from protocol.journal import JOURNAL_NAME

STARTED = facts.LearnerStarted("s", 0, 0, 1)
STEPS = [facts.StepCommitted(step, step, 0, [0], {}) for step in range(4)]
STOP, END = facts.RunStopping("asked to stop"), facts.RunEnded("")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    (policy / "model.safetensors").write_text("weights")
    found = RunDirectory(tmp_path / "run")
    files = policy_files(policy, BlobStore(tmp_path / "run" / "blobs"))
    found.create(parse_config({"run": {"steps": 4}}), RunManifest("run", "", str(policy), 8, files, {}, {}))
    return found


def record(run: RunDirectory, *history: facts.AnyFact) -> RunDirectory:
    journal = Journal(run.path / JOURNAL_NAME, "run", config_json(run.config()))
    for fact in history:
        journal.append(fact, b"", 1.0)
    journal.commit()
    journal.close()
    return run


def change(run: RunDirectory, overrides: list[str], past: Past) -> list[str]:
    settings = new_settings(run, overrides, past)
    keep_settings(run, settings)
    return settings.lines()


def edit(run: RunDirectory, *overrides: str) -> None:
    """As by hand, in the file."""
    run.change_config(overridden(run.config(), overrides))


def test_a_run_whose_broker_never_started_has_not_begun(run: RunDirectory) -> None:
    assert look_back(run) == NOTHING


def test_a_run_that_was_cut_off_is_under_way(run: RunDirectory) -> None:
    assert look_back(record(run, STARTED, *STEPS[:2])) == Past(step=2, lineage=0)


def test_a_learner_that_went_back_to_a_checkpoint_is_where_it_went(run: RunDirectory) -> None:
    again = facts.LearnerStarted("t", 1, 1, 1)
    assert look_back(record(run, STARTED, *STEPS[:3], again)) == Past(step=1, lineage=1)


def test_stopped_ended_and_halted_runs_are_told_apart(run: RunDirectory) -> None:
    assert look_back(record(run, STARTED, STEPS[0], STOP)) == Past(1, 0, "asked to stop")
    assert look_back(record(run, END)) == Past(1, 0, "asked to stop", has_ended=True)
    assert look_back(record(run, facts.LearnerStarted("t", 1, 1, 1))) == Past(1, 1), "it went on after that"
    halted = record(run, facts.RunStopping("no good"), facts.RunEnded("no good"))
    assert look_back(halted) == Past(1, 1, "no good", has_ended=True, halted="no good")


def test_a_halted_run_says_why_it_was(run: RunDirectory) -> None:
    said: list[str] = []
    assert go_on(record(run, STARTED, facts.RunStopping("no good"), facts.RunEnded("no good")), [], said.append) is not None
    assert "it was halted (no good)" in said[0]


def test_after_the_last_step_there_is_nothing_to_do_unless_it_is_given_more(run: RunDirectory) -> None:
    said: list[str] = []
    record(run, STARTED, *STEPS, STOP, END)
    assert go_on(run, [], said.append) is None
    assert said == ["nothing to do: all 4 steps are done; --set run.steps=N gives it more"]
    assert go_on(run, ["run.steps=6"], said.append) is not None
    assert run.config().run.steps == 6


@pytest.mark.parametrize(
    "override",
    ["learner.lr=0.5", "learner.ranks=2", "loss.clip_high=0.3", "actor.num_actors=5", "actor.engine=transformers", "run.steps=9",
     "broker.address=tcp://10.0.0.5:7000"],
)  # fmt: skip
def test_what_nothing_recorded_rests_on_may_change(override: str, run: RunDirectory) -> None:
    (line,) = change(run, [override], NOTHING)
    name, _, value = override.partition("=")
    assert line.startswith(f"{name}: ")
    assert value in line
    assert change(run, [override], NOTHING) == [], "it is kept"


@pytest.mark.parametrize(
    "override",
    ["task.name=gym", "task.length=3", "policy.max_lag=9", "policy.reuse=2", "rollout.group_size=4", "run.seed=1", "run.name=x",
     "supervised.lr=1.0"],
)  # fmt: skip
def test_what_is_recorded_cannot_be_made_untrue(override: str, run: RunDirectory) -> None:
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="cannot change when a run goes on") as caught:
        change(run, ["learner.lr=0.5", override], NOTHING)
    assert caught.value.field == override.partition("=")[0]
    assert (run.path / "config.json").read_bytes() == before


def test_steps_can_only_be_added_and_not_in_the_middle_of_a_batch(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match="can only be given more"):
        change(run, ["run.steps=3"], NOTHING)
    run.change_config(parse_config({"run": {"steps": 5}, "policy": {"reuse": 2}}))
    with pytest.raises(ConfigError, match="in the middle of a batch"):
        change(run, ["run.steps=8"], Past(step=5))
    assert change(run, ["run.steps=8"], Past(step=4)) == ["run.steps: 5 -> 8"]


def test_another_address_replaces_the_one_that_was_listened_at(run: RunDirectory) -> None:
    run.announce_broker("tcp://127.0.0.1:7000")
    change(run, ["learner.lr=0.5"], NOTHING)
    assert run.broker_address() == "tcp://127.0.0.1:7000"
    change(run, ["broker.address=tcp://127.0.0.1:8000"], NOTHING)
    assert run.broker_address() is None


def test_only_one_supervisor_at_a_time(run: RunDirectory) -> None:
    with sole_supervisor(run), pytest.raises(ConfigError, match="another `up` is at work") as caught, sole_supervisor(run):
        pass
    assert "process" in str(caught.value)
    with sole_supervisor(run):
        pass


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        open_run(tmp_path)


def test_a_number_of_actors_that_is_given_stands_above_an_earlier_one(run: RunDirectory) -> None:
    assert wanted_actors(run, ["learner.lr=0.5"]) is None
    change(run, ["actor.num_actors=5"], NOTHING)
    assert wanted_actors(run, ["actor.num_actors=5"]) == 5


# --- a configuration that was edited by hand


def test_a_file_that_contradicts_the_journal_is_refused_by_up_and_by_the_broker(run: RunDirectory) -> None:
    edit(run, "policy.max_lag=4")
    make_broker(run).close()
    edit(run, "policy.max_lag=12")
    for start in (lambda: go_on(run, [], pytest.fail), lambda: serve_broker(run, None)):
        with pytest.raises(ConfigError, match="cannot change when a run goes on") as caught:
            start()
        assert (caught.value.field, caught.value.value) == ("policy.max_lag", 12)
        assert caught.value.fix.startswith("put 4 back")
    edit(run, "policy.max_lag=4")
    make_broker(run).close()


def test_a_file_may_change_what_nothing_rests_on_and_the_journal_has_it_from_then_on(run: RunDirectory) -> None:
    make_broker(run).close()
    edit(run, "learner.lr=0.5", "run.steps=6")
    said: list[str] = []
    go_on(run, [], said.append)
    assert [line for line in said if line.startswith("changed: ")][1].startswith("changed: run.steps: 4 -> 6")
    make_broker(run).close()
    edit(run, "run.steps=5")
    with pytest.raises(ConfigError, match="can only be given more"):
        check_config(run)


def test_a_journal_that_has_no_configuration_of_its_starts_goes_by_the_one_it_was_made_with(run: RunDirectory) -> None:
    record(run, facts.RunStarted("run", 0), STARTED)
    edit(run, "rollout.group_size=64")
    with pytest.raises(ConfigError, match=r"rollout\.group_size"):
        check_config(run)


# --- a run that does not go on


def test_a_run_that_does_not_go_on_keeps_its_configuration(run: RunDirectory, tmp_path: Path) -> None:
    record(run, STARTED, *STEPS, STOP, END)
    before = (run.path / "config.json").read_bytes()
    assert go_on(run, ["learner.lr=0.5"], lambda _: None) is None
    assert (run.path / "config.json").read_bytes() == before
    forget(run, tmp_path, "model.safetensors")
    with pytest.raises(ConfigError, match=r"is gone, and model\.safetensors is not whole"):
        go_on(run, ["learner.lr=0.5", "run.steps=9"], lambda _: None)
    assert (run.path / "config.json").read_bytes() == before


def forget(run: RunDirectory, tmp_path: Path, *blobs: str) -> None:
    """The policy's folder is gone, and these of its files are gone from the blobs."""
    (tmp_path / "policy").rename(tmp_path / "elsewhere")
    for file in run.manifest().policy_files:
        if file.name in blobs:
            BlobStore(run.path / "blobs").remove(file.blob.digest)


def test_a_damaged_journal_is_told_with_its_place_before_anything_is_changed(run: RunDirectory) -> None:
    record(run, STARTED, *STEPS[:2])
    with closing(sqlite3.connect(run.path / JOURNAL_NAME, isolation_level=None)) as damaging:
        damaging.execute("DELETE FROM events WHERE lsn = 2")
    (run.checkpoints / "step-00000009").mkdir()
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(JournalDamaged, match="events 2 to 2: rows are missing"):
        go_on(run, ["learner.lr=0.5"], pytest.fail)
    assert (run.path / "config.json").read_bytes() == before
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000009"]


# --- another machine, and files that are gone


def test_a_policy_whose_folder_is_gone_is_put_together_below_the_run_and_moves_with_it(run: RunDirectory, tmp_path: Path) -> None:
    forget(run, tmp_path)
    said: list[str] = []
    assert go_on(run, [], said.append) is not None
    assert any("put together again" in line for line in said)
    moved = RunDirectory(run.path.rename(tmp_path / "moved"))
    assert moved.policy() == moved.path / "policy"
    assert {path.name: path.read_text() for path in moved.policy().iterdir()} == {"config.json": "{}", "model.safetensors": "weights"}
    go_on(moved, [], said.append)
    assert sum("put together again" in line for line in said) == 1


def test_a_blob_of_the_policy_that_is_gone_is_linked_again_from_its_folder(run: RunDirectory, tmp_path: Path) -> None:
    blobs, (_, weights) = BlobStore(run.path / "blobs"), run.manifest().policy_files
    said: list[str] = []
    blobs.path(weights.blob.digest).unlink()
    go_on(run, [], said.append)
    assert blobs.holds(weights.blob)
    assert any("model.safetensors was missing among the run's blobs: linked again" in line for line in said)
    blobs.path(weights.blob.digest).unlink()
    (tmp_path / "policy" / "model.safetensors").write_text("others")
    with pytest.raises(ConfigError, match="is not the one that the run was started from"):
        go_on(run, [], said.append)


def test_checkpoints_ahead_of_the_journal_are_set_aside_and_said(run: RunDirectory) -> None:
    record(run, STARTED, *STEPS[:2])
    for step in (2, 3, 4):
        (run.checkpoints / f"step-{step:08d}").mkdir()
    said: list[str] = []
    go_on(run, [], said.append)
    kept = {path.name for path in run.checkpoints.iterdir()}
    assert {"ahead-0-step-00000003", "ahead-0-step-00000004"} < kept
    assert "step-00000003" not in kept and "step-00000004" not in kept
    assert any("step-00000004 is ahead of the run's journal, which ends at step 2" in line for line in said)


def test_a_journal_whose_making_was_cut_off_is_of_a_run_that_has_not_begun(run: RunDirectory) -> None:
    path = run.path / JOURNAL_NAME
    path.touch()
    assert look_back(run) == NOTHING
    with closing(sqlite3.connect(path, isolation_level=None)) as making:
        making.execute("PRAGMA journal_mode = WAL")
        making.execute("BEGIN IMMEDIATE")
        making.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
        assert look_back(run) == NOTHING
    said: list[str] = []
    assert go_on(run, [], said.append) == NOTHING
    assert said[0] == "going on from step 0 of 4: it had not begun"
    make_broker(run).close()
    assert look_back(run) == NOTHING


def test_a_journal_that_lost_what_was_committed_is_not_taken_for_one_that_has_not_begun(run: RunDirectory) -> None:
    record(run, STARTED, *STEPS)
    (run.path / JOURNAL_NAME).write_bytes(b"")
    with pytest.raises(JournalDamaged, match="events 1 to 5: they were committed"):
        go_on(run, [], pytest.fail)


def test_a_directory_that_cannot_be_written_is_named(run: RunDirectory) -> None:
    (run.path / "up.lock").mkdir()  # nobody can open it to write, not even root
    with pytest.raises(ConfigError, match=r"up\.lock cannot be written there") as caught, sole_supervisor(run):
        pass
    assert caught.value.value == str(run.path)
    (run.path / "broker.lock").mkdir()
    with pytest.raises(ConfigError, match=r"broker\.lock cannot be written there"):
        serve_broker(run, None)
