"""Child processes: started, watched, restarted with backoff, given up with an explanation, and always ended.

Invariant: every process started here is ended here, its whole process group with it, whatever happens to this one.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from protocol.errors import ConfigError, JournalDamaged, RoleEnded, RunHalted, SlipstreamError

CRASH_LOOP_COUNT = 5
HEALTHY_SECONDS = 60.0
"""A process that ran this long has not crashed in a row with what came before, unless something better shows its progress."""
MAX_BACKOFF_SECONDS = 30.0
TAIL_LINES = 15
PARENT = "--parent"
"""The flag that ties a child to this process; left out of commands.sh, so that its lines can be run by hand."""
HOPELESS = frozenset({ConfigError.exit_code, RunHalted.exit_code, JournalDamaged.exit_code})
"""Exit codes of errors that a restart cannot mend."""


class Crashes:
    """The ends of one process in a row: how long to pause before it is started again, and when to give it up. Pure.

    In a row means without progress in between. `progress` gives something that differs once there is some, as the name of a learner's newest
    checkpoint does: a run of weeks is not ended by its deaths, and one that dies of the same batch again and again is.
    """

    def __init__(self, progress: Callable[[], object] | None = None) -> None:
        self._progress, self._seen = progress, progress() if progress is not None else None
        self.count = 0

    def pause(self, code: int, seconds: float) -> float | None:
        """Seconds to wait after a process that ran for `seconds` ended with `code`; None to give it up."""
        seen = self._progress() if self._progress is not None else None
        if (seen != self._seen) if self._progress is not None else seconds >= HEALTHY_SECONDS:
            self.count = 0
        self._seen = seen
        self.count += 1
        if code in HOPELESS or self.count >= CRASH_LOOP_COUNT:
            return None
        return float(min(MAX_BACKOFF_SECONDS, 0.5 * 2 ** (self.count - 1)))


@dataclass(slots=True)
class Child:
    """One supervised process. `restarts` says whether it is started again when it ends on its own."""

    name: str
    command: list[str]
    restarts: bool
    environment: dict[str, str] = field(default_factory=dict)
    crashes: Crashes = field(default_factory=Crashes)
    process: subprocess.Popen[bytes] | None = None
    exit_code: int | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    is_wanted: bool = True


class Supervisor:
    """The children of one `up`."""

    def __init__(self, logs: Path, commands: Path, say: Callable[[str], None], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._logs, self._commands, self._say, self._monotonic = logs, commands, say, monotonic
        self.children: dict[str, Child] = {}

    def start(self, child: Child) -> None:
        """Start a child; its output goes to a log file of its name, its exact command to commands.sh."""
        self.children[child.name] = child
        child.is_wanted = True
        with contextlib.suppress(OSError), self._commands.open("a", encoding="utf-8") as file:  # on a full disk the run matters more
            settings = [f"{key}={shlex.quote(value)}" for key, value in child.environment.items()]
            command = [part for part in child.command if part != PARENT and part != str(os.getpid())]
            file.write(f"# {child.name}\n{' '.join([*settings, shlex.join(command)])}\n")
        self._spawn(child)

    def _spawn(self, child: Child) -> None:
        with (self._logs / f"{child.name}.log").open("ab") as log:
            child.process = subprocess.Popen(
                child.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | child.environment,
                start_new_session=True,
            )
        child.exit_code, child.restart_at, child.started_at = None, None, self._monotonic()

    def poll(self) -> None:
        """Notice ends, and restart what is due. Raises RoleEnded when a child cannot be kept running."""
        for child in list(self.children.values()):
            if child.process is not None and child.process.poll() is not None:
                self._ended(child, child.process.returncode)
            if child.restart_at is not None and self._monotonic() >= child.restart_at and child.is_wanted:
                self._say(f"{child.name}: starting again")
                self._spawn(child)

    def _ended(self, child: Child, code: int) -> None:
        end_group(child.process)
        child.process, child.exit_code = None, code
        if not child.is_wanted or code == 0 or not child.restarts:
            return
        now, what = self._monotonic(), how_ended(code)
        pause = child.crashes.pause(code, now - child.started_at)
        if pause is None:
            times = "" if code in HOPELESS else f", {child.crashes.count} times in a row"
            message = f"{child.name} ended with {what}{times}. Its log says:\n{self.explain(child.name)}"
            raise RoleEnded(message, code if code in HOPELESS else SlipstreamError.exit_code)
        child.restart_at = now + pause
        self._say(f"{child.name}: ended with {what}, starting again in {pause:.1f} s")

    def is_running(self, name: str) -> bool:
        """Whether a child's process is there."""
        child = self.children.get(name)
        return child is not None and child.process is not None and child.process.poll() is None

    def process_id(self, name: str) -> int | None:
        """The id of a child's process, None if there is none."""
        process = self.children[name].process
        return process.pid if process is not None else None

    def tail(self, name: str) -> str:
        """The last lines of a child's log."""
        try:
            lines = (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return "(no log)"
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])

    def explain(self, name: str) -> str:
        """Why a child ended, by its log: the last message meant for a person, or else the last lines."""
        log = self._logs / f"{name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        errors = [line for line in lines if line.startswith("error: ")]
        return f"    {errors[-1]}\n    (all of it: {log})" if errors else self.tail(name)

    def end_now(self, name: str) -> None:
        """Kill a child that does not do its work; the next `poll` notices its end, and starts it again if it is to be."""
        end_group(self.children[name].process)

    def ask_to_end(self, name: str) -> None:
        """Send SIGTERM and do not restart."""
        child = self.children[name]
        child.is_wanted, child.restart_at = False, None
        if child.process is not None and child.process.poll() is None:
            child.process.send_signal(signal.SIGTERM)

    def restart_nothing(self, keep: Container[str]) -> None:
        """From now on only the children in `keep` are started again when they end."""
        for child in self.children.values():
            if child.name not in keep:
                child.restarts, child.restart_at = False, None

    def wait(self, names: list[str], seconds: float) -> list[str]:
        """Wait for children to end on their own; returns those that did not within `seconds`."""
        deadline = self._monotonic() + seconds
        for name in names:
            process = self.children[name].process
            if process is not None:
                try:
                    process.wait(max(0.01, deadline - self._monotonic()))
                except subprocess.TimeoutExpired:
                    continue
                self.children[name].exit_code = process.returncode
                end_group(process)
        return [name for name in names if self.is_running(name)]

    def end_all(self, seconds: float) -> None:
        """End every child: SIGTERM, `seconds` of patience together, then SIGKILL to the whole process group."""
        for name in self.children:
            self.ask_to_end(name)
        self.wait(list(self.children), seconds)
        for child in self.children.values():
            end_group(child.process)


def how_ended(code: int) -> str:
    """A process's exit code in words; negative for a signal."""
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def end_group(process: subprocess.Popen[bytes] | None) -> None:
    """Kill what is left of a process's tree and group. The group is the process's own, by start_new_session."""
    if process is None:
        return
    if process.poll() is None:
        try:
            for descendant in psutil.Process(process.pid).children(recursive=True):
                descendant.kill()
        except psutil.NoSuchProcess:
            pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
