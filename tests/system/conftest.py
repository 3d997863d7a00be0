"""A run in the background, as a user sees it from a second terminal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from broker.control import ControlClient
from broker.keys import load_key
from protocol.errors import BrokerUnreachable
from protocol.journal import JOURNAL_NAME, open_read_only

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS = 180.0


class Background:
    """`cli.py up` going on, and what a second terminal can ask."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process, self.directory = process, directory
        self._control: ControlClient | None = None

    def status(self) -> dict[str, Any] | None:
        """What the broker says; None while there is no answer."""
        try:
            if self._control is None:
                self._control = ControlClient(self.address(), load_key(self.directory / "keys" / "admin.key"))
            found: dict[str, Any] = msgspec.to_builtins(self._control.status(2.0))
        except (FileNotFoundError, BrokerUnreachable):
            return None
        return found

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a status; fails with everything known when the run ends or the deadline passes first."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        last = None
        while time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.1)  # a status that changes has no event to wait for
            status = self.status()
            if status is not None:
                last = status
                if condition(status):
                    return status
        pytest.fail(f"the run did not get there; last status {last}\n{self.output()}")

    def roles(self, name: str) -> list[psutil.Process]:
        """The processes of a role, found below the `up` process."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in found if name in _arguments(process)]

    def everything(self) -> list[psutil.Process]:
        """Every process of the run."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(DEADLINE_SECONDS)

    def wait_for_output(self, text: str) -> None:
        """Wait until `up` has printed `text`."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while text not in (self.directory.parent / "up.txt").read_text():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)  # a file that grows has no event to wait for

    def until_version(self, name: str, number: int) -> dict[str, Any]:
        """Wait until an actor samples from version `number` or a later one."""
        return self.until(lambda status: version_of(status, name) >= number)

    def until_sampled(self, name: str, number: int) -> int:
        """Wait for a group of an actor with no token of a version before `number`; the version of its oldest token."""
        found = -1

        def is_there(_: object) -> bool:
            nonlocal found
            with closing(open_read_only(self.directory / JOURNAL_NAME)) as journal:
                (newest,) = journal.execute("SELECT max(oldest_version) FROM groups WHERE actor = ?", (name,)).fetchone()
            found = -1 if newest is None else newest
            return found >= number

        self.until(is_there)
        return found

    def address(self) -> str:
        """Where the broker listens."""
        found: str = json.loads((self.directory / "broker.json").read_bytes())["address"]
        return found

    def close(self) -> None:
        if self._control is not None:
            self._control.close()

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "summary.json").read_bytes())
        return found

    def output(self) -> str:
        logs = "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.directory / "logs").glob("*.log")))
        return (self.directory.parent / "up.txt").read_text() + logs


def version_of(status: dict[str, Any], name: str) -> int:
    """The version that an actor samples from by a status; -1 if it has none."""
    versions: list[int] = [actor["version"] for actor in status["actors"] if actor["name"] == name]
    return versions[0] if versions else -1


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """The process stands still meanwhile."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@pytest.fixture
def start(
    environment: dict[str, str], write_config: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[[dict[str, Any]], Background]]:
    """Start `cli.py up` in the background; whatever is left at the end of the test is killed."""
    started: list[Background] = []

    def run(config: dict[str, Any]) -> Background:
        directory = tmp_path / "run"
        command = [sys.executable, str(ROOT / "cli.py"), "up", str(write_config(config)), "--directory", str(directory)]
        with (tmp_path / "up.txt").open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        started.append(Background(process, directory))
        return started[-1]

    yield run
    for background in started:
        background.close()
        if background.process.poll() is None:
            for process in background.everything():
                process.kill()
            os.killpg(background.process.pid, signal.SIGKILL)
            background.process.wait()


@pytest.fixture
def join(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., psutil.Popen]]:
    """Start `cli.py actor` by itself, as on another machine: by a broker's address and the run's key, with a cache of its own."""
    started: list[psutil.Popen] = []

    def run(background: Background, name: str, address: str, *flags: str, before: Sequence[str] = ()) -> psutil.Popen:
        command = [*before, sys.executable, str(ROOT / "cli.py"), "actor", "--name", name, "--broker", address]
        command += ["--key", str(background.directory / "keys" / "actor.key"), *flags]
        with (background.directory / "logs" / f"{name}.log").open("w") as log:
            started.append(
                psutil.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | {"XDG_CACHE_HOME": str(tmp_path / f"cache-{name}"), "OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
