"""`sweep`: many runs, one after another or beside one another, each an ordinary recorded run in a folder of its own.

Invariant: a run's folder has its final name only if that run came to its end, its last step or a collapse. A sweep that is started again does
what is left. Runs in progress end with the process that started them, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deploy.local import math_threads
from deploy.prepare import CLI, resolve_policy
from deploy.rundir import RunDirectory
from learner.stability.files import with_calibration
from protocol.config import Config, config_json
from protocol.errors import Collapsed, ConfigError, SlipstreamError
from protocol.sweep import CellPlan, SweepConfig

POLL_SECONDS = 0.1
END_SECONDS = 10.0


class Running(NamedTuple):
    """A run in progress."""

    plan: CellPlan
    partial: Path
    process: subprocess.Popen[bytes]
    begun: float


class Sweep:
    """The runs of one sweep on this machine."""

    def __init__(self, sweep: SweepConfig, plans: list[CellPlan], folder: Path, say: Callable[[str], None]) -> None:
        self._sweep, self._plans, self._folder, self._say = sweep, plans, folder, say
        self._failed: list[str] = []
        self._seconds: list[float] = []
        self._told: set[str] = set()

    def go(self) -> None:
        """Do all runs that are not done. Raises SlipstreamError that names those that failed, after all others were tried; ConfigError.

        consumes:     plans
        produces:     run folders
          waits for:    the runs, by their processes
          unblocked by: a run's end, or an interrupt, which ends them all
        """
        with _alone(self._folder):
            self._go()

    def _go(self) -> None:
        for left_over in (*self._folder.glob(".*.partial"), *self._folder.glob(".*.json")):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        left = [plan for plan in self._plans if not self._is_done(plan)]
        self._say(f"{len(self._plans)} runs, {len(self._plans) - len(left)} of them done; {self.parallel} at a time in {self._folder}")
        self._prepare_policies(left)
        running: list[Running] = []
        try:
            while left or running:
                while left and len(running) < self.parallel:
                    running.append(self._start(left.pop(0)))
                time.sleep(POLL_SECONDS)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    self._end(run, len(left) + len(running))
        finally:
            for run in running:
                run.process.terminate()
            for run in running:
                _wait(run.process)
        if self._failed:
            raise SlipstreamError(
                f"{len(self._failed)} of {len(self._plans)} runs failed: {', '.join(self._failed)}. Their logs are beside their folders; "
                "start the sweep again to try only these"
            )

    @property
    def parallel(self) -> int:
        """Runs at a time. A run of processes uses at least two cores."""
        cores = len(os.sched_getaffinity(0))
        return self._sweep.parallel or max(1, cores if self._sweep.mode == "serial" else cores // 2)

    def _is_done(self, plan: CellPlan) -> bool:
        """Raises ConfigError for a run of another configuration under this name."""
        run = RunDirectory(self._folder / plan.name)
        if not run.summary.exists():
            return False
        if (changed := difference(run.config(), with_calibration(plan.config))) is not None:
            field, then, now = changed
            fix = "give the sweep another name, or remove that folder to have the run done again"
            raise ConfigError(field, now, f"{run.path} was done with another configuration, with {then!r} in this place", fix)
        return True

    def _prepare_policies(self, plans: list[CellPlan]) -> None:
        """Train what supervised policies the runs start from, once, before they start beside one another."""
        for plan in plans:
            resolve_policy(plan.config, self._say_once)

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)

    def _start(self, plan: CellPlan) -> Running:
        partial = self._folder / f".{plan.name}.partial"
        settings = self._folder / f".{plan.name}.json"
        settings.write_text(config_json(plan.config))
        # The run's id is its folder's name, which is its final name.
        command = [sys.executable, str(CLI), "up", str(settings), "--directory", str(partial / plan.name), "--parent", str(os.getpid())]
        if self._sweep.mode == "serial":
            command.append("--serial")
        with (self._folder / f"{plan.name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | math_threads(1))
        return Running(plan, partial, process, time.monotonic())

    def _end(self, run: Running, num_left: int) -> None:
        seconds, name = time.monotonic() - run.begun, run.plan.name
        (self._folder / f".{name}.json").unlink()
        problem = _why_not_done(run)
        if problem is None:
            final = self._folder / name
            shutil.rmtree(final, ignore_errors=True)
            (self._folder / f"{name}.log").replace(run.partial / name / "sweep.log")
            (run.partial / name).rename(final)
            run.partial.rmdir()
            self._seconds.append(seconds)
            outcome = f"{seconds:.0f} s{', collapsed' if run.process.returncode == Collapsed.exit_code else ''}"
        else:
            self._failed.append(name)
            outcome = f"FAILED: {problem}, see {self._folder / name}.log"
        done = len(self._plans) - num_left
        self._say(f"{done}/{len(self._plans)} {name}: {outcome}{self._time_left(num_left)}")

    def _time_left(self, num_left: int) -> str:
        if not self._seconds or not num_left:
            return ""
        minutes = num_left * sum(self._seconds) / len(self._seconds) / self.parallel / 60
        return f"; about {minutes:.0f} min left"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else makes runs in this folder meanwhile; the kernel gives the lock back however this process ends. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "sweep.lock").open("a+")
    except OSError as error:
        raise ConfigError("directory", str(folder), f"cannot be written ({error.strerror})", "name a folder that can be made") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("sweep", str(folder), "another `sweep` is at work on it", "wait for it, or end that one first") from None
        yield


def difference(there: Config, here: Config) -> tuple[str, Any, Any] | None:
    """The first field in which two configurations differ, with its values; None if there is none."""
    ours, theirs = json.loads(config_json(here)), json.loads(config_json(there))
    for section, values in ours.items():
        for field in sorted(values.keys() | theirs[section].keys()):
            then, now = theirs[section].get(field), values.get(field)
            if then != now:
                return f"{section}.{field}", then, now
    return None


def _why_not_done(run: Running) -> str | None:
    """Why a run that has ended is none that came to its end; None if it did."""
    code, directory = run.process.returncode, RunDirectory(run.partial / run.plan.name)
    if code not in (0, Collapsed.exit_code):
        return f"exit code {code}"
    if not directory.summary.exists():
        return "it left no summary"
    num_steps, wanted = json.loads(directory.summary.read_bytes())["steps"], run.plan.config.run.steps
    return f"ended after {num_steps} of {wanted} steps" if code == 0 and num_steps < wanted else None


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
