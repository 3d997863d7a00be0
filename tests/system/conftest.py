"""A run in the background, as a user sees it from a second terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from broker.control import ControlClient
from broker.keys import load_key
from protocol.errors import BrokerUnreachable

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
            address = json.loads((self.directory / "broker.json").read_bytes())["address"]
            if self._control is None:
                self._control = ControlClient(address, load_key(self.directory / "keys" / "admin.key"))
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

    def close(self) -> None:
        if self._control is not None:
            self._control.close()

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "summary.json").read_bytes())
        return found

    def output(self) -> str:
        logs = "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.directory / "logs").glob("*.log")))
        return (self.directory.parent / "up.txt").read_text() + logs


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


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
