"""Whatever is killed, training goes on: ranks, torchrun, actors, the whole machine; and a run that was left is taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from analysis.recount import recount
from protocol import facts
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parent.parent.parent
LONG = {"steps": 100_000}
DEADLINE_SECONDS = 120.0


@pytest.fixture
def resume(environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Go on with a run in the background, by `cli.py up --resume`."""
    started: list[Any] = []

    def run(before: Any, *flags: str) -> Any:
        before.close()
        command = [sys.executable, str(ROOT / "cli.py"), "up", "--resume", str(before.directory), *flags]
        with (before.directory.parent / "up.txt").open("a") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        started.append(type(before)(process, before.directory))
        return started[-1]

    yield run
    for background in started:
        background.close()
        if background.process.poll() is None:
            for process in background.everything():
                process.kill()
            os.killpg(background.process.pid, signal.SIGKILL)
            background.process.wait()


def all_facts(run: Any) -> list[facts.AnyFact]:
    path = run.directory / JOURNAL_NAME
    connection = open_read_only(path)
    try:
        return [entry.fact for entry in read_facts(connection, path)]
    finally:
        connection.close()


def check_journal(run: Any, max_lag: int) -> None:
    """Every promise that a journal can be asked about: the bound, conservation, and no group lost that was acknowledged."""
    count = recount(run.directory / JOURNAL_NAME)
    assert count.broken == []
    assert count.largest_lag <= max_lag
    ends = sum(count.num_ended(outcome) for outcome in ("expired", "failed", "void"))
    assert len(count.issued) == len(count.consumed) + ends + count.num_open
    assert count.num_ended("failed") == 0


def lineage(status: dict[str, Any]) -> int:
    found: int = status["lineage"]
    return found


def gone(*processes: psutil.Process) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, f"left running: {[process.cmdline() for process in alive]}"


def kill_and_train_on(run: Any, processes: list[psutil.Process], *, new_lineage: bool = True) -> float:
    """Kill processes; seconds until the learner has trained beyond where it was."""
    before = run.status()
    started = time.monotonic()
    for process in processes:
        process.kill()
    run.until(lambda status: lineage(status) > before["lineage"] or not new_lineage)
    run.until(lambda status: status["step"] > before["step"])
    return time.monotonic() - started


def power_cut(run: Any) -> list[facts.AnyFact]:
    """Kill `up`, and with it everything, as when the machine goes down; what the journal then holds."""
    everything = run.everything()
    run.process.kill()
    run.process.wait()
    gone(*everything)
    return all_facts(run)


def trains_on(run: Any, past: list[facts.AnyFact]) -> dict[str, Any]:
    """Wait until a learner that joined after `past` has gone beyond it."""
    last_lineage = max((fact.lineage for fact in past if isinstance(fact, facts.LearnerStarted)), default=-1)
    last_step = max((fact.step + 1 for fact in past if isinstance(fact, facts.StepCommitted)), default=0)
    found: dict[str, Any] = run.until(lambda status: lineage(status) > last_lineage and status["step"] > last_step)
    return found


def ends_in_order(run: Any, past: list[facts.AnyFact], max_lag: int) -> None:
    """Interrupt it; nothing that was recorded is lost, and every promise is kept."""
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 0, run.output()
    assert all_facts(run)[: len(past)] == past
    check_journal(run, max_lag)


def damage_newest_checkpoint(run: Any) -> str:
    newest = max((run.directory / "checkpoints").glob("step-*"))
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "optimizer.safetensors").write_bytes(bytes(data))
    return str(newest.name)


def test_when_a_rank_torchrun_or_the_machine_dies_training_goes_on_from_the_newest_sound_checkpoint(
    start: Callable[..., Any], settings: Callable[..., Any], resume: Callable[..., Any], cli: Callable[..., Any]
) -> None:
    run = start(settings(run=LONG, policy={"max_lag": 2}, learner={"ranks": 2, "checkpoint_every": 2}))
    run.until(lambda status: status["step"] >= 3)
    kill_and_train_on(run, run.roles("learner-rank")[1:])
    ranks = run.roles("learner-rank")
    kill_and_train_on(run, run.roles("learner"))
    gone(*ranks)
    refused = cli("up", "--resume", str(run.directory))
    assert refused.returncode == 2
    assert "another `up` is at work on it" in refused.stderr
    run.until(lambda status: len(list((run.directory / "checkpoints").glob("step-*"))) >= 2)
    past = power_cut(run)
    damaged = damage_newest_checkpoint(run)
    again = resume(run, "--set", "learner.ranks=1")
    trains_on(again, past)
    ends_in_order(again, past, max_lag=2)
    assert f"checkpoint {damaged} is damaged: optimizer.safetensors is not what was written" in again.output()
    assert "changed: learner.ranks: 2 -> 1" in again.output()
    assert [fact.world_size for fact in all_facts(again) if isinstance(fact, facts.LearnerStarted)] == [2, 2, 2, 1]


def test_an_error_that_a_restart_cannot_mend_ends_the_run_at_once_with_the_rank_s_own_words(
    start: Callable[..., Any], settings: Callable[..., Any]
) -> None:
    run = start(settings(learner={"ranks": 2, "device": "cuda:99"}))
    assert run.wait() == 2
    printed = (run.directory.parent / "up.txt").read_text()
    assert "learner ended with exit code 2." in printed
    assert "learner.device = 'cuda:99'" in printed
    assert "starting again" not in printed


# --- what takes longer


@pytest.mark.timeout(1200)
def test_a_run_goes_on_after_it_was_ended_with_other_ranks_and_more_steps(
    start: Callable[..., Any], settings: Callable[..., Any], resume: Callable[..., Any], cli: Callable[..., Any], *, soak: bool
) -> None:
    if not soak:
        pytest.skip("--soak")
    run = start(settings(run={"steps": 300}, policy={"max_lag": 1}, learner={"ranks": 2, "checkpoint_every": 100}))
    run.until(lambda status: status["step"] >= 3)
    assert cli("down", "--run", str(run.directory)).returncode == 0
    assert run.wait() == 0
    past = all_facts(run)
    run = resume(run, "--set", "learner.ranks=1")
    at = trains_on(run, past)["step"]
    run.until(lambda status: status["step"] >= at + 5)  # versions beyond the last checkpoint are out
    past = power_cut(run)
    run = resume(run, "--set", "learner.ranks=2", "--set", "actor.num_actors=2")
    assert run.wait() == 0, run.output()
    assert run.summary()["steps"] == 300
    past = all_facts(run)
    assert [fact.world_size for fact in past if isinstance(fact, facts.LearnerStarted)] == [2, 1, 2]
    done = cli("up", "--resume", str(run.directory))
    assert done.returncode == 0
    assert "nothing to do: all 300 steps are done" in done.stdout
    refused = cli("up", "--resume", str(run.directory), "--set", "rollout.group_size=8")
    assert refused.returncode == 2
    assert "rollout.group_size" in refused.stderr
    run = resume(run, "--set", "run.steps=310")
    assert run.wait() == 0, run.output()
    assert run.summary()["steps"] == 310
    assert all_facts(run)[: len(past)] == past
    check_journal(run, 1)
    orphaned = sum(isinstance(fact, facts.VersionOrphaned) for fact in past)
    reproduced = sum(isinstance(fact, facts.VersionReproduced) for fact in past)
    assert orphaned + reproduced > 0, "the steps after the checkpoint were done again, the same or another way"


@pytest.mark.timeout(1200)
def test_a_stop_that_the_machine_did_not_survive_is_finished_and_the_run_goes_on(
    start: Callable[..., Any], settings: Callable[..., Any], resume: Callable[..., Any], cli: Callable[..., Any], *, soak: bool
) -> None:
    if not soak:
        pytest.skip("--soak")
    run = start(settings(run=LONG, policy={"max_lag": 1}))
    run.until(lambda status: status["step"] >= 3)
    for rank in run.roles("learner-rank"):
        rank.suspend()  # it cannot finish what it is told to
    assert cli("down", "--run", str(run.directory)).returncode == 0
    run.until(lambda status: status["phase"] == "stopping")
    past = power_cut(run)
    run = resume(run)
    run.wait_for_output("the stop from before is done; going on")
    trains_on(run, past)
    ends_in_order(run, past, max_lag=1)


@pytest.mark.timeout(1200)
def test_a_halted_run_says_why_and_is_tried_again(
    start: Callable[..., Any], settings: Callable[..., Any], resume: Callable[..., Any], *, soak: bool
) -> None:
    if not soak:
        pytest.skip("--soak")
    run = start(settings(task={"name": "tests.system.broken_tasks:Raises"}))
    assert run.wait() == 5
    past = all_facts(run)
    run = resume(run)
    assert run.wait() == 5
    assert "it was halted (" in run.output()
    assert "it was halted (" in run.output()
    assert "the scorer broke" in run.output()
    assert all_facts(run)[: len(past)] == past
    assert recount(run.directory / JOURNAL_NAME).broken == []


@pytest.mark.timeout(1200)
def test_without_any_sound_checkpoint_it_starts_from_the_policy_and_the_recorded_batches(
    start: Callable[..., Any], settings: Callable[..., Any], resume: Callable[..., Any], *, soak: bool
) -> None:
    if not soak:
        pytest.skip("--soak")
    run = start(settings(run=LONG, policy={"max_lag": 2}))
    run.until(lambda status: status["step"] >= 7)
    past = power_cut(run)
    for checkpoint in (run.directory / "checkpoints").glob("step-*"):
        (checkpoint / "state.json").write_bytes(b"{")
    run = resume(run)
    trains_on(run, past)
    ends_in_order(run, past, max_lag=2)
    assert "going on from the policy, with the journalled batches again" in run.output()
    found = all_facts(run)
    assert not any(isinstance(fact, facts.VersionOrphaned) for fact in found), "the same batches give the same weights"
    (again,) = [fact for fact in found[len(past) :] if isinstance(fact, facts.LearnerStarted)]
    assert again.step == 0


@pytest.mark.timeout(1200)
def test_ranks_that_die_again_and_again_are_started_again_every_time(
    start: Callable[..., Any], settings: Callable[..., Any], *, soak: bool
) -> None:
    if not soak:
        pytest.skip("--soak")
    run = start(settings(run=LONG, policy={"max_lag": 2}, learner={"ranks": 2, "checkpoint_every": 1}))
    run.until(lambda status: status["step"] >= 2)
    for turn in range(6):
        kill_and_train_on(run, run.roles("learner-rank")[: 1 + turn % 2])
        at = run.status()["step"]
        run.until(lambda status, at=at: status["step"] >= at + 2)
    ends_in_order(run, all_facts(run)[:10], max_lag=2)


@pytest.mark.timeout(1200)
def test_a_stopped_actor_loses_its_tickets_at_once_and_is_replaced(
    start: Callable[..., Any], settings: Callable[..., Any], *, soak: bool
) -> None:
    if not soak:
        pytest.skip("--soak")
    run = start(settings(run=LONG, policy={"max_lag": 2}, actor={"num_actors": 1}))
    run.until(lambda status: status["step"] >= 3)
    (actor,) = run.roles("actor")
    actor.suspend()
    run.wait_for_output("actor-0: its process is there, but it has not been heard")
    run.wait_for_output("ending it, it is hung or stopped")
    gone(actor)
    at = run.status()["step"]
    run.until(lambda status: status["step"] > at + 3)
    ends_in_order(run, all_facts(run)[:10], max_lag=2)


@pytest.mark.timeout(1200)
def test_a_stopped_rank_is_noticed_by_the_others(start: Callable[..., Any], settings: Callable[..., Any], *, soak: bool) -> None:
    if not soak:
        pytest.skip("--soak")
    run = start(settings(run=LONG, policy={"max_lag": 2}, learner={"ranks": 2}))
    run.until(lambda status: status["step"] >= 3)
    before = run.status()
    ranks = run.roles("learner-rank")
    ranks[-1].suspend()
    waited = run.until(lambda status: "last heard" in (status["learner"] or {}).get("doing", ""))
    assert "rank" in waited["learner"]["doing"]
    gone_or_waiting(ranks)
    run.until(lambda status: lineage(status) > before["lineage"])
    ends_in_order(run, all_facts(run)[:10], max_lag=2)


def gone_or_waiting(ranks: list[psutil.Process]) -> None:
    """A stopped rank is ended 300 s later by the one that waits for it, with torchrun's help."""
    _, alive = psutil.wait_procs(ranks, timeout=420)
    assert not alive
