"""Going on with a run: what it had come to, what may change, and that only one goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.journal import Journal
from deploy.resume import NOTHING, Past, change_settings, go_on, look_back, open_run, sole_supervisor, wanted_actors
from deploy.rundir import RunDirectory, RunManifest
from protocol import facts
from protocol.config import Config, config_json, parse_config
from protocol.errors import ConfigError
from protocol.journal import JOURNAL_NAME

STARTED = facts.LearnerStarted("s", 0, 0, 1)
STEPS = [facts.StepCommitted(step, step, 0, [0], {}) for step in range(4)]
STOP, END = facts.RunStopping("asked to stop"), facts.RunEnded("")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    found = RunDirectory(tmp_path / "run")
    found.create(parse_config({"run": {"steps": 4}}), RunManifest("run", "", str(policy), 8, [], {}, {}))
    return found


def record(run: RunDirectory, *history: facts.AnyFact) -> RunDirectory:
    journal = Journal(run.path / JOURNAL_NAME, "run", config_json(Config()))
    for fact in history:
        journal.append(fact, b"", 1.0)
    journal.commit()
    journal.close()
    return run


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
    (line,) = change_settings(run, [override], NOTHING)
    name, _, value = override.partition("=")
    assert line.startswith(f"{name}: ")
    assert value in line
    assert change_settings(run, [override], NOTHING) == [], "it is kept"


@pytest.mark.parametrize(
    "override",
    ["task.name=gym", "task.length=3", "policy.max_lag=9", "policy.reuse=2", "rollout.group_size=4", "run.seed=1", "run.name=x",
     "supervised.lr=1.0"],
)  # fmt: skip
def test_what_is_recorded_cannot_be_made_untrue(override: str, run: RunDirectory) -> None:
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="cannot change when a run goes on") as caught:
        change_settings(run, ["learner.lr=0.5", override], NOTHING)
    assert caught.value.field == override.partition("=")[0]
    assert (run.path / "config.json").read_bytes() == before


def test_steps_can_only_be_added_and_not_in_the_middle_of_a_batch(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match="can only be given more"):
        change_settings(run, ["run.steps=3"], NOTHING)
    run.change_config(parse_config({"run": {"steps": 5}, "policy": {"reuse": 2}}))
    with pytest.raises(ConfigError, match="in the middle of a batch"):
        change_settings(run, ["run.steps=8"], Past(step=5))
    assert change_settings(run, ["run.steps=8"], Past(step=4)) == ["run.steps: 5 -> 8"]


def test_another_address_replaces_the_one_that_was_listened_at(run: RunDirectory) -> None:
    run.announce_broker("tcp://127.0.0.1:7000")
    change_settings(run, ["learner.lr=0.5"], NOTHING)
    assert run.broker_address() == "tcp://127.0.0.1:7000"
    change_settings(run, ["broker.address=tcp://127.0.0.1:8000"], NOTHING)
    assert run.broker_address() is None


def test_only_one_supervisor_at_a_time(run: RunDirectory) -> None:
    with sole_supervisor(run), pytest.raises(ConfigError, match="another `up` is at work") as caught, sole_supervisor(run):
        pass
    assert "process" in str(caught.value)
    with sole_supervisor(run):
        pass


def test_what_is_no_run_and_a_policy_that_is_gone_are_said(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        open_run(tmp_path)
    (tmp_path / "policy" / "config.json").unlink()
    with pytest.raises(ConfigError, match="is gone"):
        go_on(run, [], lambda _: None)


def test_a_number_of_actors_that_is_given_stands_above_an_earlier_one(run: RunDirectory) -> None:
    assert wanted_actors(run, ["learner.lr=0.5"]) is None
    change_settings(run, ["actor.num_actors=5"], NOTHING)
    assert wanted_actors(run, ["actor.num_actors=5"]) == 5
