"""A whole run from a second terminal: scaling, stopping, and what happens when processes are killed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.system
LONG = {"steps": 100_000}


def check_kept(summary: dict[str, Any]) -> None:
    assert summary["broken_promises"] == []
    assert summary["largest_lag"] <= summary["max_lag"]
    ended = sum(summary[f"tickets_{way}"] for way in ("consumed", "expired", "failed", "void", "open"))
    assert summary["tickets_issued"] == ended


def assert_all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, f"left running: {[process.cmdline() for process in alive]}"


def test_actors_join_and_leave_while_it_runs_and_nothing_is_lost(start: Callable[..., Any], settings: Callable[..., Any], cli: Any) -> None:
    run = start(settings(run=LONG, policy={"max_lag": 2}))
    run.until(lambda status: status["step"] >= 2)
    assert cli("scale", "actors=3", "--run", str(run.directory)).returncode == 0
    run.until(lambda status: len(status["actors"]) == 3 and all(actor["version"] >= 0 for actor in status["actors"]))
    assert '"desired_actors":' in cli("status", "--run", str(run.directory), "--json").stdout
    assert "tickets" in cli("status", "--run", str(run.directory)).stdout
    assert cli("scale", "actors=1", "--run", str(run.directory)).returncode == 0
    at = run.until(lambda status: len(status["actors"]) == 1)["step"]
    run.until(lambda status: status["step"] > at + 2)
    everything = run.everything()
    assert cli("down", "--run", str(run.directory)).returncode == 0
    assert run.wait() == 0, run.output()
    assert_all_gone(everything)
    check_kept(run.summary())
    assert run.summary()["num_actors_seen"] == 3


def test_one_interrupt_ends_in_order_with_a_checkpoint_and_says_so(start: Callable[..., Any], settings: Callable[..., Any]) -> None:
    run = start(settings(run=LONG, policy={"max_lag": 1}, learner={"ranks": 2}))
    run.until(lambda status: status["step"] >= 1)
    everything = run.everything()
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 0, run.output()
    assert "stopping" in run.output()
    assert_all_gone(everything)
    check_kept(run.summary())
    steps = run.summary()["steps"]
    assert (run.directory / "checkpoints" / f"step-{steps:08d}" / "policy" / "model.safetensors").exists()


def test_two_interrupts_end_it_now_and_leave_nothing(start: Callable[..., Any], settings: Callable[..., Any]) -> None:
    run = start(settings(run=LONG, policy={"max_lag": 1}))
    run.until(lambda status: status["step"] >= 1)
    everything = run.everything()
    run.process.send_signal(signal.SIGINT)
    run.wait_for_output("stopping")  # two signals at once would be one
    run.process.send_signal(signal.SIGINT)
    assert run.wait() != 0
    assert_all_gone(everything)


def test_a_killed_up_takes_everything_with_it(start: Callable[..., Any], settings: Callable[..., Any]) -> None:
    run = start(settings(run=LONG, policy={"max_lag": 1}, learner={"ranks": 2}))
    run.until(lambda status: status["step"] >= 1)
    everything = run.everything()
    run.process.kill()
    run.wait()
    assert_all_gone(everything)


def test_killed_actor_broker_and_rank_are_replaced_and_every_promise_is_kept(
    start: Callable[..., Any], settings: Callable[..., Any]
) -> None:
    run = start(settings(run={"steps": 100_000}, policy={"max_lag": 2}, actor={"num_actors": 2}, learner={"checkpoint_every": 5}))
    at = run.until(lambda status: status["step"] >= 6)["step"]
    run.roles("actor")[0].kill()
    at = run.until(lambda status: status["step"] > at + 2)["step"]
    run.roles("broker")[0].kill()
    at = run.until(lambda status: status["step"] > at + 2)["step"]
    (rank,) = run.roles("learner-rank")[-1:]
    rank.kill()
    assert psutil.wait_procs([rank], timeout=20)[0]
    at = run.until(lambda status: status["step"] > at + 2)["step"]
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 0, run.output()
    check_kept(run.summary())
    assert run.summary()["steps"] >= at
