"""Durable, with the disk beside the loop: while a commit is under way messages are taken in, and nothing that rests on it goes out."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from broker.core import Broker
from broker.journal import Journal
from broker.keys import allowed_keys, load_key
from broker.server import Server, Wakeup
from broker.sockets import Channel, client_socket, endpoint
from protocol import codec, facts, messages
from protocol.config import config_json, parse_config
from protocol.errors import JournalCommitFailed
from protocol.journal import JOURNAL_NAME, JournalEntry

DEADLINE_SECONDS = 20


class SlowDisk:
    """A journal whose commits wait until they are let through, or are to fail."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.begun, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self.is_slow = self.is_broken = False

    def entries(self) -> list[JournalEntry]:
        return self._journal.entries()

    def append(self, fact: facts.AnyFact, payload: bytes, wall: float) -> None:
        self._journal.append(fact, payload, wall)

    def commit(self) -> None:
        if self.is_slow:
            self.begun.release()
            assert self.may_end.acquire(timeout=DEADLINE_SECONDS)
        if self.is_broken:
            raise JournalCommitFailed(Path("journal"), "the disk is gone")
        self._journal.commit()

    def payload(self, ticket: int) -> bytes | None:
        return self._journal.payload(ticket)

    def close(self) -> None:
        self._journal.close()


class Run:
    """A served broker on a slow disk, and actors that say hello."""

    def __init__(self, folder: Path, keys: Path) -> None:
        config = parse_config({})
        (folder / "run").mkdir()
        self.path = folder / "run" / JOURNAL_NAME
        self.disk = SlowDisk(Journal(self.path, "slow", config_json(config)))
        broker = Broker(folder / "run", "slow", config, 16, [], time.monotonic(), time.time(), journal=self.disk)
        self.server = Server(broker, "tcp://127.0.0.1:0", load_key(keys / "broker.key"), allowed_keys(keys), Wakeup())
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._serve)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._key = load_key(keys / "actor.key")

    def _serve(self) -> None:
        try:
            self.server.serve()
        except JournalCommitFailed as error:
            self.failure = error

    def hello(self, name: str) -> zmq.Socket[bytes]:
        """The connection of a new actor, which has said hello: a fact to journal, and a welcome that rests on it."""
        opened = client_socket(self._context, self.server.address, Channel.ACTORS, self._key, f"{name}/epoch".encode())
        opened.connect(endpoint(self.server.address, Channel.ACTORS))
        assert opened.poll(DEADLINE_SECONDS * 1000, zmq.POLLOUT)
        opened.send_multipart(codec.encode(messages.ActorHello(messages.PROTOCOL_VERSION, name, "epoch", "none", "here", 1, [])))
        return opened

    def num_joined(self) -> int:
        """Actors that a reader of the journal finds."""
        reader = sqlite3.connect(self.path)
        try:
            (found,) = reader.execute("SELECT count(*) FROM events WHERE fact = 'ActorJoined'").fetchone()
        finally:
            reader.close()
        return int(found)

    def close(self, *sockets: zmq.Socket[bytes]) -> None:
        self.disk.is_slow = False
        self.disk.may_end.release()
        self.server.stop()
        self.thread.join(DEADLINE_SECONDS)
        for opened in sockets:
            opened.close(linger=0)
        self._context.term()


@pytest.fixture
def make_run(tmp_path: Path, keys: Path) -> Callable[[], Run]:
    def make() -> Run:
        run = Run(tmp_path, keys)
        run.disk.is_slow = True
        run.thread.start()
        return run

    return make


def welcome(opened: zmq.Socket[bytes]) -> messages.Message:
    """The next message of the broker."""
    assert opened.poll(DEADLINE_SECONDS * 1000)
    return codec.to_actor.decode(opened.recv_multipart())[0]


def test_while_a_commit_is_under_way_messages_are_taken_in_and_each_is_answered_once_its_own_commit_has_ended(
    make_run: Callable[[], Run],
) -> None:
    run = make_run()
    first = run.hello("first")
    assert run.disk.begun.acquire(timeout=DEADLINE_SECONDS)
    second = run.hello("second")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while "second" not in run.server._broker.ledger.actors:
        assert time.monotonic() < deadline, "the loop waits for the disk"
    assert not first.poll(0)
    assert run.num_joined() == 0
    run.disk.may_end.release()
    assert isinstance(welcome(first), messages.ActorWelcome)
    assert run.disk.begun.acquire(timeout=DEADLINE_SECONDS)
    assert not second.poll(0)
    assert run.num_joined() == 1
    run.disk.may_end.release()
    assert isinstance(welcome(second), messages.ActorWelcome)
    assert run.num_joined() == 2
    run.close(first, second)
    assert run.failure is None


def test_a_commit_that_fails_beside_the_loop_ends_the_server_and_nothing_that_rested_on_it_is_sent(make_run: Callable[[], Run]) -> None:
    run = make_run()
    opened = run.hello("first")
    assert run.disk.begun.acquire(timeout=DEADLINE_SECONDS)
    run.disk.is_broken = True
    run.disk.may_end.release()
    run.thread.join(DEADLINE_SECONDS)
    assert isinstance(run.failure, JournalCommitFailed)
    assert not opened.poll(0)
    assert run.num_joined() == 0
    run.close(opened)
