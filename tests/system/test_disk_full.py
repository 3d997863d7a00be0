"""Durable: a disk that fills up stops tickets, then everything, and says so; one that breaks ends the broker. Nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from broker.actor_client import ActorClient
from broker.control import ControlClient
from broker.downloads import Sources
from broker.keys import load_key, make_keys
from broker.learner_client import LearnerClient
from broker.room import MIB, reserves
from deploy.rundir import RunDirectory, RunManifest
from protocol.config import Config, parse_config
from protocol.errors import RequestRefused
from protocol.groups import FULL, Group, decode_group, encode_group
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts, read_payload
from protocol.messages import ActorReport, Publish, RunStatus, WireTicket
from protocol.weights import PolicyVersion

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS = 60
POLL_SECONDS = 0.05
"""Status, acknowledgements and logs have no event to wait for."""
NUM_STEPS, MAX_LAG = 12, 3
CONFIG: Config = parse_config(
    {
        "run": {"steps": NUM_STEPS},
        "policy": {"max_lag": MAX_LAG},
        "rollout": {"group_size": 2, "groups_per_batch": 2, "max_tokens": 8192},
        "broker": {"address": "tcp://127.0.0.1:0"},
    }
)


class SmallDisk:
    """A file system of a few MiB in a mount namespace of its own, which a process in it keeps."""

    def __init__(self, mount_point: Path, num_bytes: int) -> None:
        mount_point.mkdir()
        script = f'mount -t tmpfs -o size={num_bytes} tmpfs "$1" && echo ready && exec cat'
        command = ["unshare", "--mount", "sh", "-c", script, "sh", str(mount_point)]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._keeper.stdout is not None
        self.is_there = self._keeper.stdout.readline() == "ready\n"
        self.path = Path(f"/proc/{self._keeper.pid}/root{mount_point}")
        """The same place as seen from outside."""
        self.enter = ["nsenter", f"--mount=/proc/{self._keeper.pid}/ns/mnt", "--"]

    def leave_free(self, num_bytes: int) -> None:
        """Put a file on it, so that this much is free."""
        with (self.path / "filler").open("ab") as file:
            more = shutil.disk_usage(self.path).free - num_bytes
            os.posix_fallocate(file.fileno(), file.tell(), more)

    def make_room(self) -> None:
        (self.path / "filler").unlink()

    def close(self) -> None:
        self._keeper.kill()
        self._keeper.communicate()


class BrokerProcess:
    """`cli.py broker` on a run that exists already, started as often as need be."""

    def __init__(self, directory: Path, log: Path, before: list[str] | None = None) -> None:
        self._directory, self._log, self._before = directory, log, before or []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [*self._before, sys.executable, str(ROOT / "cli.py"), "broker", "--run", str(self._directory)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    async def says(self, text: str) -> None:
        await until(lambda: text in self._log.read_text())

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)


class Toys:
    """An actor and a learner that do next to nothing, through the real clients; the actor hands in as many groups as it is allowed to."""

    def __init__(self, address: str, keys: Path, cache: Path) -> None:
        self.learner = LearnerClient(address, load_key(keys / "learner.key"))
        self.control = ControlClient(address, load_key(keys / "admin.key"))
        self._actor = ActorClient(address, load_key(keys / "actor.key"), "toy", Sources(cache=cache))
        self._allowed = asyncio.Semaphore(0)
        self.handed_in: dict[int, bytes] = {}

    def allow(self, num_groups: int) -> None:
        for _ in range(num_groups):
            self._allowed.release()

    def acknowledged(self) -> dict[int, bytes]:
        held = self._actor.held_tickets()
        return {number: payload for number, payload in self.handed_in.items() if number not in held}

    def status(self) -> RunStatus:
        return self.control.status()

    async def act(self) -> None:
        await self._actor.join("toy", self._report)
        following = asyncio.create_task(self._follow())
        while (ticket := await self._actor.next_ticket()) is not None:
            version = self._version()
            await self._allowed.acquire()
            group = full_group(ticket, version)
            self.handed_in[ticket.number] = encode_group(group)
            await self._actor.submit(group, ticket.attempt)
        await following
        await self._actor.leave()

    async def _follow(self) -> None:
        """Say at once that a new version is held."""
        version = await self._actor.new_version(-1)
        while version is not None:
            self._actor.report_now()
            version = await self._actor.new_version(version.number)

    def _version(self) -> int:
        return self._actor.newest.number if self._actor.newest is not None else -1

    def _report(self) -> ActorReport:
        return ActorReport(self._version(), 4, self._actor.held_tickets(), 0.0, 0.0, 0, "playing")

    def begin(self) -> None:
        self.learner.join(0, 1, {})
        self._publish(0)

    def learn(self) -> None:
        for step in range(NUM_STEPS):
            batch = self.learner.next_batch(step, lambda: None)
            assert batch is not None
            oldest = [decode_group(payload).oldest_version for payload in batch.payloads]
            self.learner.commit(step, batch.number, [step - batch.version_steps[number] for number in oldest], {})
            self._publish(step + 1)
        self.learner.evaluated(NUM_STEPS, 0.5, 8)
        self.learner.done(NUM_STEPS, {})

    def _publish(self, step: int) -> None:
        blob = self.learner.put_blob(f"weights of step {step}".encode() * 1000)
        self.learner.publish(Publish(PolicyVersion(step, step, 0, blob.digest), step - 1, None, blob, blob.size, blob.size))

    def close(self) -> None:
        self.learner.close()
        self.control.close()


def full_group(ticket: WireTicket, version: int) -> Group:
    rollout = CONFIG.rollout
    total = rollout.group_size * rollout.max_tokens
    return Group(
        ticket=ticket.number,
        prompt=ticket.prompt,
        seed=ticket.seed,
        actor="toy",
        engine="toy",
        prompt_ids=np.array([1], np.int32),
        num_tokens=np.full(rollout.group_size, rollout.max_tokens, np.int32),
        token_ids=np.full(total, ticket.number, np.int32),
        logprobs=np.full(total, -1.0, np.float32),
        versions=np.full(total, version, np.int32),
        rewards=np.array([0.0, 1.0], np.float32),
        finish=np.full(rollout.group_size, FULL, np.uint8),
    )


def make_run(directory: Path) -> Path:
    """A run's directory without a policy; its keys."""
    RunDirectory(directory).create(CONFIG, RunManifest("full", "", "", 16, [], {}, {}))
    make_keys(directory / "keys")
    return directory / "keys"


def journalled(directory: Path, copy_to: Path) -> dict[int, bytes]:
    """The payload of every accepted group, from a copy of the journal."""
    copy_to.mkdir()
    for path in directory.glob(f"{JOURNAL_NAME}*"):
        shutil.copyfile(path, copy_to / path.name)
    path = copy_to / JOURNAL_NAME
    with closing(open_read_only(path)) as journal:
        names = [type(entry.fact).__name__ for entry in read_facts(journal, path)]
        numbers = [number for (number,) in journal.execute("SELECT ticket FROM groups")]
        found = {number: read_payload(journal, path, number) for number in numbers}
    assert names.count("GroupAccepted") == len(found) == len(numbers), "a group was accepted twice"
    return {number: payload for number, payload in found.items() if payload is not None}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("there are no unshare and nsenter here")
    disk = SmallDisk(tmp_path / "disk", reserves(CONFIG, 0).credit * 5 // 4)
    try:
        if not disk.is_there:
            pytest.skip("mount namespaces are not allowed here")
        yield disk
    finally:
        disk.close()


@pytest.fixture
def brokers() -> Iterator[list[BrokerProcess]]:
    """Whatever is put in here is killed at the end."""
    made: list[BrokerProcess] = []
    yield made
    for broker in made:
        if broker.process is not None and broker.process.poll() is None:
            os.killpg(broker.process.pid, signal.SIGKILL)
            broker.process.wait()


async def test_a_disk_that_fills_up_stops_tickets_first_then_everything_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: SmallDisk, brokers: list[BrokerProcess]
) -> None:
    keys = make_run(tmp_path / "prepared")
    shutil.copytree(tmp_path / "prepared", small_disk.path / "run")
    outside = small_disk.path / "run"
    broker = BrokerProcess(tmp_path / "disk" / "run", tmp_path / "broker.log", small_disk.enter)
    brokers.append(broker)
    broker.start()
    await broker.says("listening at")
    address = RunDirectory(outside).broker_address()
    assert address is not None
    toys = Toys(address, keys, tmp_path / "cache")
    await asyncio.to_thread(toys.begin)
    acting, learning = asyncio.create_task(toys.act()), asyncio.create_task(asyncio.to_thread(toys.learn))
    marks = reserves(CONFIG, 0)

    # Room for everything.
    toys.allow(4)
    await until(lambda: (status := toys.status()).step == 2 and status.outstanding == 4)

    # Room for what is out, and for no more.
    small_disk.leave_free(marks.credit - MIB)
    await until(lambda: any("MiB needed to issue tickets" in wait for wait in toys.status().waits))
    issued, num_acknowledged = toys.status().issued, len(toys.acknowledged())
    toys.allow(3)
    await until(lambda: len(toys.acknowledged()) == num_acknowledged + 3)
    await until(lambda: toys.status().step == 3)
    assert toys.status().issued == issued

    # Room for nothing.
    small_disk.leave_free(marks.commit - MIB)
    await until(lambda: any("MiB needed to journal anything" in wait for wait in toys.status().waits))
    toys.allow(1)
    await until(lambda: "no room" in (learner.doing if (learner := toys.status().learner) else ""))
    with pytest.raises(RequestRefused, match="no room"):
        toys.control.stop("enough")
    assert len(toys.handed_in) == num_acknowledged + 4
    assert len(toys.acknowledged()) == num_acknowledged + 3, "what cannot be journalled is not acknowledged"
    assert toys.status().issued == issued

    # Room again.
    small_disk.make_room()
    await until(lambda: len(toys.acknowledged()) == num_acknowledged + 4 and toys.status().outstanding == 4)
    await broker.says("there is room on the broker's disk again")

    # A broker that dies of anything while there is none waits before it opens the journal.
    small_disk.leave_free(marks.commit - MIB)
    await until(lambda: any("MiB needed to journal anything" in wait for wait in toys.status().waits))
    assert broker.end(signal.SIGKILL) == -signal.SIGKILL
    broker.start()
    await broker.says("waiting for room before the journal is opened")
    toys.allow(1000)
    small_disk.make_room()
    await asyncio.wait_for(learning, DEADLINE_SECONDS)
    await asyncio.wait_for(acting, DEADLINE_SECONDS)
    assert toys.status().phase == "finished"
    toys.close()
    assert broker.end(signal.SIGTERM) == 0
    found = journalled(outside, tmp_path / "copy")
    lost = {number for number, payload in toys.acknowledged().items() if found.get(number) != payload}
    assert lost == set() and len(found) == NUM_STEPS * CONFIG.rollout.groups_per_batch


@pytest.fixture
def break_disk(tmp_path: Path) -> Iterator[Callable[[BrokerProcess], None]]:
    """Let the next fsync of a broker's journal fail, whatever thread makes it; where tracing is not allowed, its next write."""
    tracers: list[subprocess.Popen[str]] = []

    def break_it(broker: BrokerProcess) -> None:
        assert broker.process is not None
        command = ["strace", "--follow-forks", "--output=/dev/null", "--inject=fdatasync,fsync:error=EIO", f"--attach={broker.process.pid}"]
        if shutil.which("strace"):
            tracers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
            assert tracers[-1].stderr is not None
            if "attached" in tracers[-1].stderr.readline():
                return
        journal = tmp_path / "run" / f"{JOURNAL_NAME}-wal"
        resource.prlimit(broker.process.pid, resource.RLIMIT_FSIZE, (journal.stat().st_size, resource.RLIM_INFINITY))

    yield break_it
    for tracer in tracers:
        tracer.terminate()
        tracer.communicate()


async def test_a_commit_that_fails_ends_the_broker_with_a_message_and_the_next_one_has_whatever_was_acknowledged(
    tmp_path: Path, brokers: list[BrokerProcess], break_disk: Callable[[BrokerProcess], None]
) -> None:
    keys = make_run(tmp_path / "run")
    broker = BrokerProcess(tmp_path / "run", tmp_path / "broker.log")
    brokers.append(broker)
    broker.start()
    await broker.says("listening at")
    address = RunDirectory(tmp_path / "run").broker_address()
    assert address is not None and broker.process is not None
    toys = Toys(address, keys, tmp_path / "cache")
    await asyncio.to_thread(toys.begin)
    acting = asyncio.create_task(toys.act())
    toys.allow(4)
    await until(lambda: len(toys.acknowledged()) == 4)
    await asyncio.to_thread(break_disk, broker)
    toys.allow(1000)
    assert await asyncio.to_thread(broker.process.wait, DEADLINE_SECONDS) == 4
    assert "commit failed" in (tmp_path / "broker.log").read_text()
    safe = toys.acknowledged()
    assert 4 <= len(safe) < len(toys.handed_in)
    found = journalled(tmp_path / "run", tmp_path / "copy")
    assert {number for number, payload in safe.items() if found.get(number) != payload} == set()
    broker.start()
    await asyncio.wait_for(asyncio.to_thread(toys.learn), DEADLINE_SECONDS)
    await asyncio.wait_for(acting, DEADLINE_SECONDS)
    toys.close()
    assert broker.end(signal.SIGTERM) == 0
    assert len(journalled(tmp_path / "run", tmp_path / "copy at the end")) == NUM_STEPS * CONFIG.rollout.groups_per_batch


def test_a_log_without_room_does_not_change_what_a_process_ends_with(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, str(ROOT / "cli.py"), "broker", "--run", str(tmp_path / "no run")]
        ended = subprocess.run(command, stdout=full, stderr=full, timeout=DEADLINE_SECONDS, check=False)
    assert ended.returncode == 2
