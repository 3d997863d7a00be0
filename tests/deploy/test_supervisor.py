"""Children are watched, restarted with growing pauses, given up with their log, and always ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.supervisor import CRASH_LOOP_COUNT, Child, Crashes, Supervisor
from protocol.errors import ConfigError, JournalCommitFailed, JournalDamaged, RoleEnded, RunHalted, SlipstreamError

DEADLINE_SECONDS = 20.0


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, clock: Clock, said: list[str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path, tmp_path / "commands.sh", said.append, clock)
    yield supervisor
    for child in supervisor.children.values():
        if child.process is not None:
            child.process.kill()
            child.process.wait()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # the end of a process that is not waited for has no event


def ended(supervisor: Supervisor, name: str) -> None:
    process = supervisor.children[name].process
    assert process is not None
    until(lambda: process.poll() is not None)


def test_a_child_that_ends_badly_is_started_again_with_growing_pauses(supervisor: Supervisor, clock: Clock, said: list[str]) -> None:
    supervisor.start(Child("actor-0", python("raise SystemExit(1)"), restarts=True))
    pauses = []
    for _ in range(CRASH_LOOP_COUNT - 1):
        ended(supervisor, "actor-0")
        supervisor.poll()
        restart_at = supervisor.children["actor-0"].restart_at
        assert restart_at is not None
        pauses.append(restart_at - clock.now)
        clock.now = restart_at
        supervisor.poll()
    assert pauses == [0.5, 1.0, 2.0, 4.0]
    assert any("exit code 1" in line for line in said)


def test_a_crash_loop_is_given_up_with_the_child_s_own_words(supervisor: Supervisor, clock: Clock) -> None:
    supervisor.start(Child("actor-0", python("print('error: the reason'); raise SystemExit(1)"), restarts=True))
    with pytest.raises(SlipstreamError, match=r"(?s)5 times in a row.*error: the reason"):
        for _ in range(CRASH_LOOP_COUNT):
            ended(supervisor, "actor-0")
            supervisor.poll()
            clock.now = supervisor.children["actor-0"].restart_at or clock.now
            supervisor.poll()


@pytest.mark.parametrize("error", [ConfigError, RunHalted, JournalDamaged])
def test_an_error_that_a_restart_cannot_mend_is_not_tried_again(error: type[SlipstreamError], supervisor: Supervisor) -> None:
    code = error.exit_code
    supervisor.start(Child("broker", python(f"print('error: the reason'); raise SystemExit({code})"), restarts=True))
    ended(supervisor, "broker")
    with pytest.raises(RoleEnded, match=rf"(?s)exit code {code}\..*the reason") as caught:
        supervisor.poll()
    assert caught.value.exit_code == code


def test_a_commit_that_failed_is_tried_again(supervisor: Supervisor) -> None:
    supervisor.start(Child("broker", python(f"raise SystemExit({JournalCommitFailed.exit_code})"), restarts=True))
    ended(supervisor, "broker")
    supervisor.poll()
    assert supervisor.children["broker"].restart_at is not None


def test_a_child_that_gets_on_between_its_deaths_is_never_given_up(supervisor: Supervisor, clock: Clock) -> None:
    progress = iter(range(100))
    supervisor.start(Child("learner", python("raise SystemExit(1)"), restarts=True, crashes=Crashes(lambda: next(progress))))
    for _ in range(2 * CRASH_LOOP_COUNT):
        ended(supervisor, "learner")
        supervisor.poll()
        clock.now = supervisor.children["learner"].restart_at or clock.now
        supervisor.poll()


def test_a_child_that_does_not_work_is_killed_and_started_again(supervisor: Supervisor, clock: Clock, said: list[str]) -> None:
    supervisor.start(Child("actor-0", python("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"), restarts=True))
    before = supervisor.process_id("actor-0")
    supervisor.end_now("actor-0")
    supervisor.poll()
    clock.now += 1.0
    supervisor.poll()
    assert supervisor.process_id("actor-0") not in (None, before)
    assert any("SIGKILL" in line for line in said)


def test_an_orderly_end_and_an_unwanted_child_are_left_alone(supervisor: Supervisor) -> None:
    supervisor.start(Child("learner", python("pass"), restarts=False))
    supervisor.start(Child("actor-0", python("import time; time.sleep(60)"), restarts=True))
    ended(supervisor, "learner")
    supervisor.ask_to_end("actor-0")
    ended(supervisor, "actor-0")
    supervisor.poll()
    assert supervisor.children["learner"].exit_code == 0
    assert supervisor.children["actor-0"].restart_at is None


def test_everything_is_ended_even_what_ignores_the_request_and_what_it_started(supervisor: Supervisor, tmp_path: Path) -> None:
    stubborn = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid) + ' ')\n"
        "time.sleep(600)"
    )
    supervisor.start(Child("stubborn", python(stubborn), restarts=True))
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith(" "))
    grandchild = int((tmp_path / "pid").read_text())
    parent = supervisor.children["stubborn"].process
    assert parent is not None
    supervisor.end_all(0.0)
    assert parent.poll() is not None
    until(lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE)


def test_the_exact_command_and_the_output_of_each_child_are_kept(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(Child("actor-0", python("print('hello')"), restarts=False, environment={"A": "b c"}))
    ended(supervisor, "actor-0")
    supervisor.poll()
    assert (tmp_path / "actor-0.log").read_text() == "hello\n"
    assert "A='b c' " in (tmp_path / "commands.sh").read_text()
