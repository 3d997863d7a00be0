"""A run under random fire: real processes with traffic that checks itself, killed and stopped at random, and the checker over what is left.

By hand: `python -m tests.faults.chaos --seconds 600 --seed 7`. The directory of the run stays where `--directory` says.

A broker (`cli.py broker`), a toy learner and toy actors work on a run that never comes to its end. A seeded random generator picks what happens to
whom and when; every process that ended is started again after a short random delay. Then the firing ends, the run is stopped in order, and the
checker goes over the history. Processes that end by themselves, and a run that stands still though everything is up, are findings too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from broker.control import ControlClient
from broker.keys import load_key
from deploy.rundir import RunDirectory
from protocol.errors import PeerError
from protocol.messages import RunStatus
from tests.faults.checker import LAG, LOST, check
from tests.faults.history import read_history
from tests.faults.nursery import Forked, Nursery
from tests.faults.run_directory import TEMPORARY, compile_loops, make_run
from tests.faults.ticket_account import TRAINED_TWICE
from tests.faults.watch import CEASEFIRE_SECONDS, Watch

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_ACTORS: Final = 4
MEAN_PAUSE_SECONDS: Final = 0.6
"""Between two shots, on average, where nothing has to be waited for."""
HASTY_SHARE: Final = 0.4
"""Of the shots, those that follow the one before whether the run has moved or not."""
PATIENCE_SECONDS: Final = 3.0
"""What the others wait for the run to move."""
TURN_SECONDS: Final = 0.02
STATUS_SECONDS: Final = 0.25
ANSWER_SECONDS: Final = 0.1
"""What a broker is given to answer; one that was just killed must not hold up the next shot."""
PATIENT_SECONDS: Final = 2.0
"""The same, once the run seems to stand still: a machine may just be busy."""
END_SECONDS: Final = 60.0
READY_SECONDS: Final = 30.0
MAX_FINDINGS: Final = 5
"""Of those made while the run goes on; then it ends."""
BROKER, LEARNER = "broker", "learner"
SHOTS: Final = {
    "kill actor": 9,
    "kill learner": 3,
    "kill broker": 3,
    "kill everything": 0.4,
    "stop actor beyond its lease": 1.2,
    "stop broker": 1.5,
    "stop learner": 0.7,
}
"""How often each happens, relative to the others."""
DEADLOCK: Final = "no progress though everything is up"
ENDED_BY_ITSELF: Final = "a process ended by itself"
STATUS_WRONG: Final = "the broker's account does not add up"


class Report(NamedTuple):
    """What a run of chaos came to. `findings` are empty if every promise was kept."""

    seed: int
    seconds: float
    pipeline: str
    fired: dict[str, int]
    figures: dict[str, int]
    findings: list[tuple[str, str]]

    def text(self) -> str:
        """For a person."""
        lines = [f"chaos, seed {self.seed}, {self.seconds:.0f} s, {self.pipeline}"]
        lines += [f"  {number:8d}  {name}" for name, number in sorted(self.fired.items())]
        lines += [f"  {number:8d}  {name.replace('_', ' ')}" for name, number in self.figures.items()]
        counts = Counter(kind for kind, _ in self.findings)
        lines += [f"  FOUND {number} times: {kind}" for kind, number in counts.items()]
        lines += [f"    {kind}: {text}" for kind, text in self.findings[:20]]
        return "\n".join(lines) if self.findings else "\n".join([*lines, "  nothing found"])

    def json(self) -> str:
        """For a program."""
        return json.dumps(self._asdict(), indent=2)


@dataclass(slots=True)
class Child:
    """A process that is kept running. `due_at` is when it is started next, if it is not running."""

    name: str
    process: subprocess.Popen[bytes] | Forked | None = None
    incarnation: int = 0
    due_at: float = 0.0
    resume_at: float = 0.0
    """When it is let go on, if it is stopped."""

    @property
    def is_up(self) -> bool:
        """Whether it runs, as far as is known, and is not stopped."""
        return self.process is not None and self.resume_at == 0.0


@dataclass(slots=True)
class Chaos:
    """One run.

    Invariant: whatever is running was started here, and dies with this process.
    """

    run: RunDirectory
    seed: int
    random: random.Random = field(init=False)
    children: dict[str, Child] = field(default_factory=dict)
    fired: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[str, str]] = field(default_factory=list)
    status: RunStatus | None = None
    _control: ControlClient | None = None
    _nursery: Nursery | None = None
    _watch: Watch = field(init=False)
    _status_at: float = 0.0
    _next_shot_at: float = 0.0
    _fired_at: float = 0.0
    _is_hasty: bool = False
    _is_ending: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        names = (BROKER, LEARNER, *(f"toy-{number}" for number in range(NUM_ACTORS)))
        self.children = {name: Child(name, due_at=float("inf")) for name in names}

    def go(self, seconds: float) -> None:
        """Fire for `seconds`, then stop the run in order. Nothing is left running in any case."""
        try:
            self._watch = Watch(time.monotonic())
            self._nursery = Nursery(ROOT, self._environment(), self.run.logs / "nursery.log")
            self._start(self.children[BROKER])
            self._wait(lambda: self.run.broker_address() is not None, READY_SECONDS, "the broker is ready")
            self._control = ControlClient(self._address(), load_key(self.run.keys / "admin.key"), READY_SECONDS)
            for child in self.children.values():
                child.due_at = 0.0
            self._watch = Watch(time.monotonic())
            until, self._next_shot_at = time.monotonic() + seconds, time.monotonic() + 1.0
            while time.monotonic() < until and not self._is_hopeless():
                self._turn()
                self._consider_shot(time.monotonic())
            if not self._is_hopeless():
                self._end()
        finally:
            for child in self.children.values():
                if child.process is not None:
                    child.process.kill()
                    child.process.wait()
            if self._nursery is not None:
                self._nursery.close()
            if self._control is not None:
                self._control.close()

    # --- watching

    def _turn(self) -> None:
        """Notice what ended, start and let go on what is due, and look whether the run moves."""
        now = time.monotonic()
        for child in self.children.values():
            if child.process is not None and child.process.poll() is not None:
                has_left = self._is_ending and child.process.returncode == 0
                if not has_left:
                    self._note_end(child)
                child.process = None
                child.due_at, child.resume_at = float("inf") if has_left else now + self.random.uniform(0.05, 0.5), 0.0
            if child.resume_at and now >= child.resume_at:
                self._signal(child, signal.SIGCONT)
                child.resume_at = 0.0
            if child.process is None and now >= child.due_at:
                self._start(child)
        if self._control is not None and now - self._status_at >= STATUS_SECONDS and self.children[BROKER].is_up:
            self._status_at = now
            self._ask_status()
        self._watch.up(all(child.is_up for child in self.children.values()), now)
        time.sleep(TURN_SECONDS)  # a process that ends, or a run that moves, gives no sign that could be waited for together with time

    def _note_end(self, child: Child) -> None:
        assert child.process is not None
        log = (self.run.logs / f"{child.name}.log").read_text(errors="replace")[-1500:]
        self.findings.append((ENDED_BY_ITSELF, f"{child.name}.{child.incarnation} with code {child.process.returncode}: {log}"))

    def _ask_status(self) -> None:
        assert self._control is not None
        try:
            is_late = self._watch.still_for(time.monotonic()) > CEASEFIRE_SECONDS / 2
            self.status = status = self._control.status(PATIENT_SECONDS if is_late else ANSWER_SECONDS)
        except PeerError:
            return  # it was killed a moment ago, or stopped
        ended = status.consumed + status.expired + status.failed + status.void
        if status.issued != status.outstanding + status.queued + ended:
            self.findings.append((STATUS_WRONG, str(status)))
        self._watch.at_step(status.step, time.monotonic())
        if status.halted:
            self.findings.append((ENDED_BY_ITSELF, f"the broker halted the run: {status.halted}"))

    def _is_over(self) -> bool:
        return self.status is not None and self.status.phase in ("finished", "halted")

    def _is_hopeless(self) -> bool:
        """Whether there is no point in going on; why is a finding."""
        if len(self.findings) >= MAX_FINDINGS or any(kind == DEADLOCK for kind, _ in self.findings):
            return True
        now = time.monotonic()
        if self._watch.is_deadlocked(now):
            self.findings.append((DEADLOCK, f"for {self._watch.still_for(now):.0f} s; the broker says {self.status}"))
            return True
        return bool(self.status and self.status.halted)

    # --- firing

    def _consider_shot(self, now: float) -> None:
        """Fire if it is time. Some shots wait until the run has moved since the last one, or it would never get anywhere on a busy machine."""
        if now < self._next_shot_at:
            return
        if self._watch.holds_fire(now):
            self.fired["ceasefire"] += 1
            self._next_shot_at = now + CEASEFIRE_SECONDS
        elif self._is_hasty or self._watch.still_for(now) < now - self._fired_at or now - self._fired_at > PATIENCE_SECONDS:
            self._fire()
            self._fired_at, self._is_hasty = now, self.random.random() < HASTY_SHARE
            self._next_shot_at = now + self.random.expovariate(1 / MEAN_PAUSE_SECONDS)

    def _fire(self) -> None:
        shot = self.random.choices(list(SHOTS), list(SHOTS.values()))[0]
        role = shot.split()[1]
        names = [
            name for name in self.children if role == "everything" or (name not in (BROKER, LEARNER) if role == "actor" else name == role)
        ]
        targets = [self.children[name] for name in names if self.children[name].process is not None]
        if shot.startswith("stop"):
            targets = [child for child in targets if child.is_up]
        if role == "actor" and targets:
            targets = [self.random.choice(targets)]
        if not targets:
            return
        self.fired[shot] += 1
        for child in targets:
            if shot.startswith("kill"):
                self._kill(child)
            else:
                self._signal(child, signal.SIGSTOP)
                pause = self.random.uniform(6.5, 9.0) if role == "actor" else self.random.uniform(0.1, 2.5)
                child.resume_at = time.monotonic() + pause

    def _kill(self, child: Child) -> None:
        assert child.process is not None
        if child.process.poll() is not None:
            return  # it ended by itself a moment before: the next turn notices
        child.process.kill()
        child.process.wait()
        self.fired["processes killed"] += 1
        child.process = None
        child.resume_at = 0.0
        child.due_at = time.monotonic() + self.random.uniform(0.0, 0.6) ** 2

    @staticmethod
    def _signal(child: Child, number: signal.Signals) -> None:
        if child.process is not None:
            child.process.send_signal(number)

    # --- processes

    def _start(self, child: Child) -> None:
        child.incarnation += 1
        log = self.run.logs / f"{child.name}.log"
        with log.open("ab") as file:
            file.write(f"--- {child.name}.{child.incarnation}\n".encode())
            file.flush()
            if child.name == BROKER:
                command = [sys.executable, str(ROOT / "cli.py"), "broker", "--run", str(self.run.path), "--parent", str(os.getpid())]
                child.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, env=self._environment()
                )
        if child.name != BROKER:
            assert self._nursery is not None
            role = LEARNER if child.name == LEARNER else "actor"
            child.process = self._nursery.start(role, self._arguments(child), log)

    def _environment(self) -> dict[str, str]:
        temporary = str(self.run.path / TEMPORARY)
        return os.environ | {"TMPDIR": temporary, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def _arguments(self, child: Child) -> list[str]:
        arguments = ["--run", str(self.run.path), "--incarnation", str(child.incarnation), "--seed", str(self.seed)]
        if child.name != LEARNER:
            return [*arguments, "--name", child.name]
        if self.random.random() < 0.3:
            arguments += ["--salt", f"salt-{child.incarnation}"]
        if self.random.random() < 0.2:
            arguments += ["--lose-newest"]
        return arguments

    def _address(self) -> str:
        address = self.run.broker_address()
        assert address is not None
        return address

    # --- ending

    def _end(self) -> None:
        """No more shots: let everything go on until the run has moved again, stop it, and wait until it is over."""
        for child in self.children.values():
            child.resume_at = min(child.resume_at, time.monotonic())
        before = self.status.step if self.status else 0
        self._wait(lambda: self.status is not None and self.status.step != before, END_SECONDS, "the run moves again")
        if self._is_hopeless():
            return
        self._is_ending = True
        self._wait(self._has_stopped, END_SECONDS, "the run is over")
        self._wait(
            lambda: all(child.process is None for child in self.children.values() if child.name != BROKER), END_SECONDS, "all have left"
        )
        self._ask_status()
        assert self._control is not None
        with contextlib.suppress(PeerError):
            self._control.shut_down()

    def _has_stopped(self) -> bool:
        assert self._control is not None
        if self._is_over():
            return True
        if self.status is None or self.status.phase != "stopping":
            with contextlib.suppress(PeerError):
                self._control.stop("the chaos is over")
        return False

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and len(self.findings) < MAX_FINDINGS:
            if time.monotonic() > deadline:
                self.findings.append((DEADLOCK, f"waited {seconds:.0f} s until {what}; the broker says {self.status}"))
                return
            self._turn()


def run_chaos(directory: Path, seed: int, seconds: float) -> Report:
    """Make a run in `directory`, fire at it for `seconds`, and check what is left."""
    compile_loops()
    run = make_run(directory, seed)
    chaos = Chaos(run, seed)
    chaos.go(seconds)
    verdict = check(read_history(directory))
    figures = verdict.figures | {
        "groups_lost": len(verdict.of(LOST)),
        "trained_twice": len(verdict.of(TRAINED_TWICE)),
        "groups_above_max_lag": len(verdict.of(LAG)),
        "starts": sum(child.incarnation for child in chaos.children.values()),
    }
    findings = [*chaos.findings, *((finding.kind, finding.text) for finding in verdict.findings)]
    if chaos.status is not None and not chaos.findings:  # it has ended in order, so this is the account in the end
        findings += _compare(chaos.status, figures)
    return Report(seed, seconds, str(run.config().policy), dict(chaos.fired), figures, findings)


def _compare(status: RunStatus, figures: dict[str, int]) -> list[tuple[str, str]]:
    """Whether the broker's account in the end is what the checker counts from the journal."""
    told = [status.issued, status.consumed, status.expired, status.failed, status.void]
    counted = [figures[name] for name in ("tickets_issued", "consumed", "tickets_expired", "tickets_failed", "tickets_void")]
    words = "issued, consumed, expired, failed, void"
    return [(STATUS_WRONG, f"{words}: the broker says {told}, its journal {counted}")] if told != counted else []


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill and stop the processes of a run at random, and check what is left.")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"))
    parser.add_argument("--directory", type=Path, help="an empty or new folder for the run. Default: a temporary one")
    given = parser.parse_args()
    directory = given.directory or Path(tempfile.mkdtemp(prefix="chaos-"))
    report = run_chaos(directory.absolute(), given.seed, given.seconds)
    (directory / "chaos.json").write_text(report.json())
    sys.stdout.write(f"{report.text()}\n  all of it: {directory}\n")
    sys.exit(bool(report.findings))


if __name__ == "__main__":
    main()
