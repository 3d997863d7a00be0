"""A run whose processes are reached by networks that fail: who noticed what when, and how long it took until work went on.

Invariant: what is measured is read afterwards from what the processes wrote themselves (the journal, their logs), on this machine's one clock.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from broker.control import ControlClient
from broker.keys import load_key
from protocol.errors import PeerError
from protocol.journal import JOURNAL_NAME, open_read_only
from protocol.messages import RunStatus
from tests.faults.checker import LAG, LOST, Verdict, check
from tests.faults.history import read_history
from tests.faults.link import Link
from tests.faults.nursery import Forked, Nursery
from tests.faults.run_directory import TEMPORARY, make_run
from tests.faults.ticket_account import TRAINED_TWICE

ROOT: Final = Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS: Final = 60.0
LEARNER: Final = "learner"
_WAITS: Final = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*waiting for .*last heard", re.MULTILINE)


class Event(NamedTuple):
    """A row of the journal: `time` in seconds since 1970."""

    time: float
    fact: str
    body: dict[str, Any]


class Noticed(NamedTuple):
    """What became of one fault for one process, in seconds; None if it did not happen."""

    fault: str
    peer: str
    lasted: float
    peer_said: float | None
    """From the beginning of the fault until the process says in its log that it waits for the broker."""
    broker_said: float | None
    """Until the broker gives up the actor, or its status says that the learner is not heard."""
    reissued: float | None
    """Until the last ticket that was taken from the actor was with another."""
    reconnected: float | None
    """Until the process had another connection."""
    rejoined: float | None
    """From the end of the fault until the broker knew the actor again."""
    went_on: float | None
    """From the end of the fault to the first group of this actor, or step of this learner, that the broker took."""
    late: dict[str, int]
    """Results for tickets that had been taken away: how many were accepted, how many refused."""


class Site:
    """A run and its processes; each may be anywhere.

    Invariant: what was started here is killed in `close`.
    """

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.run = make_run(path, seed)
        self._environment = os.environ | {"TMPDIR": str(self.run.path / TEMPORARY), "OMP_NUM_THREADS": "1"}
        self._nursery = Nursery(ROOT, self._environment, self.run.logs / "nursery.log")
        self.processes: dict[str, subprocess.Popen[bytes] | Forked] = {}
        self.control: ControlClient | None = None
        self.events: list[Event] = []
        self.silences: dict[str, list[float]] = {}
        """When the broker's status first said that it waits for somebody, since it last did not."""
        self._is_silent: set[str] = set()
        self._incarnations: dict[str, int] = {}
        self._journal: sqlite3.Connection | None = None

    def start_broker(self, before: Sequence[str] = (), address: str | None = None, host: str | None = None) -> int:
        """Start it, with `before` in front of its command, and wait until it listens; its first port. `host` is where it is reached from here."""
        command = [*before, sys.executable, str(ROOT / "cli.py"), "broker", "--run", str(self.run.path), "--parent", str(os.getpid())]
        command += ["--address", address] if address else []
        with (self.run.logs / "broker.log").open("ab") as log:
            broker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=self._environment)
        self.processes["broker"] = broker
        self.until(lambda: self.run.broker_address() is not None, "the broker listens")
        found = self.run.broker_address()
        assert found is not None
        port = int(found.rpartition(":")[2])
        where = f"tcp://{host}:{port}" if host else found
        self.control = ControlClient(where, load_key(self.run.keys / "admin.key"), DEADLINE_SECONDS)
        self._journal = open_read_only(self.run.path / JOURNAL_NAME)
        return port

    def start(self, name: str, address: str, namespace: str = "") -> None:
        """The learner, or an actor."""
        self._incarnations[name] = number = self._incarnations.get(name, 0) + 1
        arguments = ["--run", str(self.run.path), "--incarnation", str(number), "--seed", "0", "--broker", address]
        arguments += [] if name == LEARNER else ["--name", name]
        role = LEARNER if name == LEARNER else "actor"
        self.processes[name] = self._nursery.start(role, arguments, self.run.logs / f"{name}.log", namespace)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
        """Wait for a condition. Fails after `seconds`, or when a process ends by itself."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}; {self.log_ends()}"
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended with {process.returncode}; {self.log_ends(name)}"
            time.sleep(0.05)  # another process's progress: there is nothing to wait for but to ask
            if self.control is not None:
                self.look()

    def pass_time(self, seconds: float) -> None:
        """Let a fault last."""
        until = time.time() + seconds
        self.until(lambda: time.time() >= until, "time passes")

    def look(self) -> None:
        """Take in what is new in the journal, and whom the broker waits for."""
        assert self._journal is not None
        begun = self.events[-1].body["lsn"] if self.events else 0
        for lsn, at, fact, body in self._journal.execute("SELECT lsn, time, fact, body FROM events WHERE lsn > ? ORDER BY lsn", (begun,)):
            self.events.append(Event(at, fact, msgspec.json.decode(body) | {"lsn": lsn}))
        status = self.status()
        silence = ("everybody waits for the learner, last heard", "everybody waits for the learner, not heard")
        silent = {LEARNER} if status is not None and any(text.startswith(silence) for text in status.waits) else set()
        for name in silent - self._is_silent:
            self.silences.setdefault(name, []).append(time.time())
        self._is_silent = silent

    def status(self) -> RunStatus | None:
        """What the broker says, None if it does not answer at once."""
        assert self.control is not None
        try:
            return self.control.status(2.0)
        except PeerError:
            return None

    def first(self, name: str, since: float) -> float | None:
        """When after `since` the broker first took a group of this actor, or a step of the learner."""
        for event in reversed(self.events):
            if event.time < since:
                break
        return next((event.time for event in self.events if event.time > since and _is_work_of(event, name)), None)

    def wait_until_heard(self) -> None:
        """Wait until the broker's status does not say that it waits for the learner: only then can it say so again."""
        self.until(lambda: LEARNER not in self._is_silent, "the broker hears the learner")

    def left(self, name: str, since: float) -> float | None:
        """When after `since` the broker gave up an actor."""
        times = (event.time for event in self.events if event.fact == "ActorLeft" and event.body["actor"] == name)
        return next((at for at in times if at > since), None)

    def wait_for_work(self, names: Sequence[str], since: float, seconds: float = DEADLINE_SECONDS) -> None:
        """Wait until each has got something done after `since`."""
        self.until(lambda: all(self.first(name, since) is not None for name in names), f"{names} go on", seconds)

    def noticed(self, fault: str, name: str, begun: float, healed: float, link: Link | None = None) -> Noticed:
        """What a fault came to for a process; call it after its work has gone on."""
        until = max(healed + 30, time.time())
        log = (self.run.logs / f"{name}.log").read_text(errors="replace")
        said = [datetime.strptime(found, "%Y-%m-%d %H:%M:%S,%f").timestamp() for found in _WAITS.findall(log)]
        left = [event.time for event in self.events if event.fact == "ActorLeft" and event.body["actor"] == name]
        joined = [event.time for event in self.events if event.fact == "ActorJoined" and event.body["actor"] == name]
        first = self.first(name, healed)
        reissued, late = self._taken_away(name, begun, until)
        return Noticed(
            fault,
            name,
            healed - begun,
            _after(begun, until, said),
            _after(begun, until, self.silences.get(name, []) if name == LEARNER else left),
            reissued,
            _after(begun, until, [at for at, _ in link.opened]) if link is not None else None,
            _after(healed, until, joined),
            None if first is None else first - healed,
            late,
        )

    def _taken_away(self, name: str, begun: float, until: float) -> tuple[float | None, dict[str, int]]:
        """The tickets that the broker took from an actor for its silence: until when after `begun` the last of them was issued again, and what
        became of results for them that came from this actor all the same."""
        holders: dict[int, tuple[str, int]] = {}
        taken: dict[int, int] = {}
        reissued, late = None, {"accepted": 0, "refused": 0}
        for event in (event for event in self.events if event.time < until and "ticket" in event.body):
            ticket, attempt, actor = event.body["ticket"], event.body.get("attempt", 0), event.body.get("actor")
            if event.fact == "TicketIssued":
                holders[ticket] = actor, attempt
                if taken.get(ticket) == attempt - 1:
                    reissued = event.time - begun
            elif event.fact == "TicketRevoked" and event.time > begun and "silent" in event.body["reason"]:
                if holders[ticket][0] == name:
                    taken[ticket] = attempt
            elif event.fact == "GroupAccepted" and actor == name and taken.get(ticket) == attempt:
                late["accepted"] += 1
            elif event.fact == "ResultRefused" and actor == name and ticket in taken:
                late["refused"] += 1
        return reissued, late

    def finish(self) -> Verdict:
        """End the run in order, and check its history."""
        assert self.control is not None
        self.control.stop("the test is over")
        self._wait_for_the_end([name for name in self.processes if name != "broker"])
        self.look()
        with contextlib.suppress(PeerError):  # its answer may be lost with the broker's end, which is waited for
            self.control.shut_down()
        self._wait_for_the_end(["broker"])
        return check(read_history(self.run.path))

    def stop_with_tickets(self, name: str) -> None:
        """Stop an actor's process at a moment at which it has tickets, and nothing for them is under way."""

        def is_caught() -> bool:
            if not self._has_tickets(name):
                return False
            self.processes[name].send_signal(signal.SIGSTOP)
            until = time.time() + 0.5
            self.until(lambda: time.time() > until, "what is under way arrives")
            if self._has_tickets(name):
                return True
            self.processes[name].send_signal(signal.SIGCONT)
            return False

        self.until(is_caught, f"{name} is stopped with tickets in hand")

    def _has_tickets(self, name: str) -> bool:
        status = self.status()
        return status is not None and any(actor.name == name and actor.tickets for actor in status.actors)

    def _wait_for_the_end(self, names: Sequence[str]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        for name in names:
            while (code := self.processes[name].poll()) is None:
                assert time.monotonic() < deadline, f"{name} does not end; {self.log_ends(name)}"
                time.sleep(0.02)  # it is not this process's child
            assert code == 0, self.log_ends(name)

    def kill(self, name: str) -> None:
        """End a process without a word."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)
        self._nursery.close()
        if self.control is not None:
            self.control.close()
        if self._journal is not None:
            self._journal.close()

    def log_ends(self, *names: str) -> str:
        """The last lines of logs, for a failed assertion."""
        paths = [self.run.logs / f"{name}.log" for name in names or self.processes]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1200:]}" for path in paths if path.exists())


def _is_work_of(event: Event, name: str) -> bool:
    if name == LEARNER:
        return event.fact == "StepCommitted"
    return event.fact == "GroupAccepted" and bool(event.body["actor"] == name)


def _after(begun: float, until: float, times: Sequence[float]) -> float | None:
    return min((at - begun for at in times if begun <= at <= until), default=None)


def table(rows: Sequence[Noticed], verdict: Verdict) -> str:
    """For a person."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    names = ("lasted", "peer", "broker", "reissd", "reconn", "rejoin", "work")
    lines = [f"{'fault':<36} {'peer':<8} {' '.join(f'{name:>6}' for name in names)}  late: taken, refused"]
    for row in rows:
        cells = [row.lasted, row.peer_said, row.broker_said, row.reissued, row.reconnected, row.rejoined, row.went_on]
        late = f"{row.late['accepted']}, {row.late['refused']}"
        lines.append(f"{row.fault:<36} {row.peer:<8} {' '.join(f'{number(cell):>6}' for cell in cells)}  {late}")
    figures = {name: verdict.figures[name] for name in ("groups_acknowledged", "steps_committed", "largest_lag", "max_lag")}
    lines.append(f"lost {len(verdict.of(LOST))}, trained twice {len(verdict.of(TRAINED_TWICE))}, above S {len(verdict.of(LAG))}; {figures}")
    return "\n".join(lines)
