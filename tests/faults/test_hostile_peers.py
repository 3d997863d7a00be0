"""Closed: whatever peers send, with a key or without, the broker's memory stays bounded, everybody else goes on, and who was turned away is counted.

A real broker process, and a learner and actors with real clients that work meanwhile. What each attack cost is printed (pytest -s).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from broker.accounts import KNOCKING, REPLACED, STRUCK, TOO_MUCH
from broker.control import ControlClient
from broker.keys import load_key
from protocol.messages import RunStatus
from tests.faults import hostile
from tests.faults.checker import check
from tests.faults.history import read_history
from tests.faults.hostile import Target
from tests.faults.run_directory import make_run

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS = 40
MAX_GROWTH = 64 << 20
NUM_ACTORS = 2
"""Libzmq asserts in a client whose connection ends in the middle of a message; only the broker's own end matters here."""
Attack = Callable[[Target, float], None]


class Watch(threading.Thread):
    """Samples a process's resident memory until stopped."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process, self._stopped = process, threading.Event()
        self.before = self.peak = process.memory_info().rss

    def run(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # whoever watches it finds that out otherwise
            while not self._stopped.wait(0.005):
                self.peak = max(self.peak, self._process.memory_info().rss)

    def stop(self) -> int:
        """How many bytes the process had at most beyond those that it started with."""
        self._stopped.set()
        self.join()
        return self.peak - self.before


class Cost(NamedTuple):
    """What an attack did to the others: consumed groups and answered status requests a second, before and during; and to the broker's memory."""

    groups_before: float
    groups_during: float
    answers_during: float
    longest_answer: float
    growth: int


class Field:
    """A run that goes on, and what becomes of it under attack."""

    def __init__(self, path: Path) -> None:
        self.run = make_run(path, 0)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.broker = psutil.Process(self._start("broker", str(ROOT / "cli.py"), "broker", "--run", str(path)).pid)
        self._wait(lambda: self.run.broker_address() is not None, "the broker listens")
        address = self.run.broker_address()
        assert address is not None
        self.target = Target(address, path)
        self.control = ControlClient(address, load_key(path / "keys" / "admin.key"), DEADLINE_SECONDS)
        arguments = ("--run", str(path), "--incarnation", "1", "--seed", "0")
        self._start("learner", "-m", "tests.faults.learner_process", *arguments)
        for number in range(NUM_ACTORS):
            self._start(f"toy-{number}", "-m", "tests.faults.actor_process", "--name", f"toy-{number}", *arguments)
        self._wait(lambda: self.control.status().consumed >= 80, "the run gets going")
        self.resident = self.broker.memory_info().rss

    def attack(self, attack: Attack, counted: set[str], seconds: float) -> tuple[Cost, dict[str, int]]:
        """Attack for so long, and until the others have got further meanwhile and everything in `counted` was turned away. What it cost, and who was
        turned away."""
        arguments = [attack.__name__, "--address", self.target.address, "--run", str(self.target.run), "--seconds", str(seconds)]
        attacker = self._start("attacker", "-m", "tests.faults.hostile", *arguments, pipes=True)
        self._processes.remove(attacker)
        assert attacker.stdout is not None
        assert attacker.stdin is not None
        begun, before = time.monotonic(), self.control.status()
        assert attacker.stdout.readline() == b"ready\n"
        calm, calm_seconds = self.control.status(), time.monotonic() - begun
        watch = Watch(self.broker)
        watch.start()
        begun = time.monotonic()
        attacker.stdin.write(b"!")
        attacker.stdin.flush()
        is_told = False
        num_answers, longest, status = 0, 0.0, calm
        while attacker.poll() is None:
            asked = time.monotonic()
            status = self.control.status(DEADLINE_SECONDS)
            longest = max(longest, time.monotonic() - asked)
            num_answers += 1
            is_enough = (
                time.monotonic() - begun > seconds and status.consumed >= calm.consumed + 8 and counted <= _growth(calm, status).keys()
            )
            if is_enough and not is_told:
                attacker.stdin.close()
                is_told = True
            assert time.monotonic() < begun + seconds + DEADLINE_SECONDS, (
                f"the run does not go on, or {counted - _growth(calm, status).keys()} were not turned away: "
                f"{calm.consumed} groups consumed before, now {status}"
            )
            time.sleep(0.02)  # fifty questions a second
        lasted = time.monotonic() - begun
        growth = watch.stop()
        attacker.stdin.close()
        attacker.stdout.close()
        assert attacker.returncode in (0, -signal.SIGABRT), (self.run.logs / "attacker.log").read_text()[-2000:]
        found = _growth(calm, self.control.status())
        groups_before = (calm.consumed - before.consumed) / calm_seconds
        cost = Cost(groups_before, (status.consumed - calm.consumed) / lasted, num_answers / lasted, longest, growth)
        say(
            f"{attack.__name__}: {lasted:.1f} s, memory +{growth / 1e6:.1f} MB ({(watch.peak - self.resident) / 1e6:.1f} MB since the start), "
            f"{cost.groups_during:.0f} groups/s (before {groups_before:.0f}), {cost.answers_during:.0f} answers/s, slowest {longest:.2f} s, {found}"
        )
        for process in self._processes:
            assert process.poll() is None, f"{process.args} ended"
        return cost, found

    def stop(self) -> None:
        """End the run in order; the broker last."""
        self.control.stop("the test is over")
        for process in self._processes[1:]:
            assert process.wait(DEADLINE_SECONDS) == 0
        self.control.shut_down()
        assert self._processes[0].wait(DEADLINE_SECONDS) == 0

    def close(self) -> None:
        self.control.close()
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, name: str, *arguments: str, pipes: bool = False) -> subprocess.Popen[bytes]:
        environment = os.environ | {"TMPDIR": str(self.run.path / "tmp"), "OMP_NUM_THREADS": "1"}
        with (self.run.logs / f"{name}.log").open("ab") as log:
            command = [sys.executable, *arguments, "--parent", str(os.getpid())]
            ends = (subprocess.PIPE, subprocess.PIPE) if pipes else (subprocess.DEVNULL, log)
            self._processes.append(subprocess.Popen(command, stdin=ends[0], stdout=ends[1], stderr=log, cwd=ROOT, env=environment))
        return self._processes[-1]

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS} s: {what}"
            for process in self._processes:
                assert process.poll() is None, f"{process.args} ended"
            time.sleep(0.02)  # another process's progress: there is nothing to wait for but to ask


def say(line: str) -> None:
    """What an attack cost, for people: pytest -s."""
    sys.stdout.write(f"\n{line}\n")


def _growth(before: RunStatus, after: RunStatus) -> dict[str, int]:
    grown = {kind: count - before.turned_away.get(kind, 0) for kind, count in after.turned_away.items()}
    return {kind: count for kind, count in grown.items() if count}


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    made = Field(tmp_path_factory.mktemp("hostile") / "run")
    yield made
    made.close()


@pytest.fixture
def seconds(soak: bool) -> float:
    """How long an attack lasts."""
    return 20.0 if soak else 0.8


CHANNELS = ("control", "actors", "learner", "blobs")
ATTACKS: list[tuple[Attack, set[str]]] = [
    (hostile.strangers, {f"{channel}: {reason}" for channel in CHANNELS for reason in ("no key", "key refused", "broken handshake")}),
    (hostile.with_garbage, {f"{channel}: not this protocol" for channel in CHANNELS}),
    (hostile.saying_nothing, {f"{channel}: {KNOCKING}" for channel in CHANNELS}),
    (hostile.oversized_frames, {f"{channel}: oversized or broken frame" for channel in CHANNELS}),
    (hostile.messages_of_100_000_frames, {"actors: frames"}),
    (hostile.endless_messages, {f"{channel}: {TOO_MUCH}" for channel in CHANNELS}),
    (hostile.endless_messages_of_tiny_frames, {f"actors: {TOO_MUCH}"}),
    (hostile.malformed_messages, {f"{channel}: {reason}" for channel in CHANNELS for reason in ("frames", "header", STRUCK)}),
    (hostile.heartbeats, {"actors: answer not taken"}),
    (hostile.blobs_never_read, {"blobs: answer not taken"}),
    (hostile.replays, {f"actors: {REPLACED}"}),
]


@pytest.mark.system
@pytest.mark.parametrize(("attack", "counted"), ATTACKS, ids=[attack.__name__ for attack, _ in ATTACKS])
def test_an_attack_costs_neither_memory_nor_the_others_work_and_is_counted(
    field: Field, attack: Attack, counted: set[str], seconds: float
) -> None:
    cost, found = field.attack(attack, counted, seconds)
    assert cost.growth < MAX_GROWTH
    assert counted <= found.keys(), counted - found.keys()


@pytest.mark.system
def test_refusals_are_shown_by_status_and_logged_once_in_ten_seconds_each(field: Field) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "status", "--run", str(field.run.path)]
    shown = [
        subprocess.run([*command, *more], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=True).stdout
        for more in ([], ["--json"])
    ]
    counts = json.loads(shown[1])["turned_away"]
    assert counts == field.control.status().turned_away | counts
    assert "turned away" in shown[0]
    assert "no key" in shown[0]
    lines = [line for line in (field.run.logs / "broker.log").read_text().splitlines() if "turned away on" in line]
    lasted = time.time() - field.broker.create_time()
    assert 0 < len(lines) <= len(counts) * (1 + lasted / 10)
    assert sum(counts.values()) > 10 * len(lines)


@pytest.mark.system
def test_after_all_that_the_run_ends_in_order_and_its_history_has_every_result_once(field: Field) -> None:
    field.stop()
    verdict = check(read_history(field.run.path))
    assert not verdict.findings
