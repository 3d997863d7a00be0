"""A disk that fills up or breaks under a broker, and a learner that stands still: nothing acknowledged is lost, nothing grows without bound."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import blake3
import pytest
import zmq

from broker.actor_client import ActorClient
from broker.blob_client import BlobClient
from broker.blobs import BlobStore
from broker.core import Broker, Outgoing
from broker.downloads import Sources
from broker.journal import Journal
from broker.keys import allowed_keys, load_key
from broker.learner_client import LearnerClient
from broker.server import Server, Wakeup
from protocol import facts, messages
from protocol.codec import encode
from protocol.config import Config, config_json, parse_config
from protocol.errors import JournalCommitFailed
from protocol.groups import decode_group
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts
from protocol.messages import CHUNK_BYTES, PROTOCOL_VERSION, ActorReport, IssueTicket, Publish
from protocol.ports import ActorPort
from protocol.weights import BlobRef, PolicyVersion
from tests.broker.conftest import full_group

DEADLINE_SECONDS = 20
NUM_PROMPTS = 16
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


# --- a store without room


class CrampedStore(BlobStore):
    """Takes half of a piece, and then there is no room, so many times. The last piece it takes whole, and has no room for the name."""

    def __init__(self, folder: Path, num_failures: int) -> None:
        super().__init__(folder)
        self.num_failures = num_failures

    def put_chunk(self, digest: str, size: int, offset: int, data: bytes | memoryview) -> tuple[int, bool]:
        if self.num_failures and offset:
            self.num_failures -= 1
            is_last = offset + len(data) == size
            with (self._folder / f"{digest}.partial").open("ab") as file:
                if file.tell() == offset:
                    file.write(data if is_last else data[: len(data) // 2])
            raise NO_SPACE
        return super().put_chunk(digest, size, offset, data)


def test_an_upload_that_meets_a_full_disk_waits_and_goes_on_with_what_there_is(tmp_path: Path, keys: Path) -> None:
    broker = Broker(tmp_path / "run", "full", parse_config({}), NUM_PROMPTS, [], time.monotonic(), time.time())
    broker.blobs = store = CrampedStore(tmp_path / "run" / "blobs", 3)
    data = bytes(range(256)) * (3 * CHUNK_BYTES // 256)
    with Served(broker, keys) as served:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        client = BlobClient(context, served.address, load_key(keys / "learner.key"), b"l/1")
        blob = client.put(data)
        client.close()
        context.term()
    assert store.num_failures == 0
    assert store.read(blob.digest) == data


def test_a_whole_upload_that_could_not_be_named_is_named_by_whatever_piece_comes_next(tmp_path: Path) -> None:
    data = b"x" * 1000
    digest = blake3.blake3(data).hexdigest()
    store = BlobStore(tmp_path)
    (tmp_path / f"{digest}.partial").write_bytes(data)
    assert store.put_chunk(digest, 1000, 900, data[900:]) == (1000, True)
    assert store.read(digest) == data


def test_what_there_was_no_room_for_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise NO_SPACE

    store = BlobStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            store.add(b"weights")
    assert list(tmp_path.iterdir()) == []


# --- a disk that breaks


class BreakingJournal(Journal):
    """The run's journal on a disk whose fsync fails once it is told to: before the data are on it, or after."""

    breaks = ""

    def commit(self) -> None:
        if self.breaks == "after":
            super().commit()
        if self.breaks:
            raise JournalCommitFailed(self.path, "disk I/O error")
        super().commit()


class Served:
    """A broker served by a thread, and the error that ended it."""

    def __init__(self, broker: Broker, keys: Path, address: str = "tcp://127.0.0.1:0") -> None:
        self._server = Server(broker, address, load_key(keys / "broker.key"), allowed_keys(keys), Wakeup())
        self.address = self._server.address
        self.error: JournalCommitFailed | None = None
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        try:
            self._server.serve()
        except JournalCommitFailed as error:
            self.error = error

    def __enter__(self) -> Served:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self.thread.join(DEADLINE_SECONDS)
        assert not self.thread.is_alive()


CONFIG = parse_config({"run": {"steps": 1}, "policy": {"max_lag": 0}, "rollout": {"group_size": 2, "groups_per_batch": 2, "max_tokens": 4}})


def make_broker(directory: Path, journal: Journal | None = None, config: Config = CONFIG) -> Broker:
    return Broker(directory, "full", config, NUM_PROMPTS, [], time.monotonic(), time.time(), journal)


@pytest.mark.parametrize("breaks", ["before", "after"])
async def test_a_failed_fsync_ends_the_broker_and_the_next_one_has_every_acknowledged_group_once(
    tmp_path: Path, keys: Path, breaks: str
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    journal = BreakingJournal(directory / JOURNAL_NAME, "full", config_json(CONFIG))
    with Served(make_broker(directory, journal), keys) as served:
        learner = LearnerClient(served.address, load_key(keys / "learner.key"))
        await asyncio.to_thread(start_run, learner)
        actor = ActorClient(served.address, load_key(keys / "actor.key"), "a", Sources(cache=tmp_path / "cache"))
        await actor.join("fake", lambda: ActorReport(0, 2, actor.held_tickets(), 0.0, 0.0, 0, "testing"))
        first, second = await actor.next_ticket(), await actor.next_ticket()
        assert first is not None and second is not None
        await submit(actor, first)
        await until(lambda: actor.held_tickets() == [second.number])
        journal.breaks = breaks
        await submit(actor, second)
        await asyncio.to_thread(served.thread.join, DEADLINE_SECONDS)
    assert isinstance(served.error, JournalCommitFailed) and served.error.exit_code == 4
    assert actor.held_tickets() == [second.number], "what did not reach the disk is not acknowledged"
    with Served(make_broker(directory), keys, served.address):
        batch = await asyncio.to_thread(learner.next_batch, 0, lambda: None)
        assert batch is not None
        assert [decode_group(payload).ticket for payload in batch.payloads] == [first.number, second.number]
        await until(lambda: actor.held_tickets() == [])
        await actor.leave()
        await asyncio.to_thread(learner.close)
    assert [fact.ticket for fact in journalled(directory) if isinstance(fact, facts.GroupAccepted)] == [first.number, second.number]


def start_run(learner: LearnerClient) -> None:
    learner.join(0, 1, {})
    blob = learner.put_blob(b"weights")
    learner.publish(Publish(PolicyVersion(0, 0, 0, blob.digest), -1, None, blob, 7, 7))


async def submit(actor: ActorPort, ticket: messages.WireTicket) -> None:
    await actor.submit(decode_group(full_group(2, 4, ticket=ticket.number, prompt=ticket.prompt, seed=ticket.seed)), ticket.attempt)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # acknowledgements have no event to wait for


def journalled(directory: Path) -> list[facts.AnyFact]:
    with closing(open_read_only(directory / JOURNAL_NAME)) as journal:
        return [entry.fact for entry in read_facts(journal, directory)]


# --- a learner that stands still

LARGE = parse_config(
    {"run": {"steps": 100}, "policy": {"max_lag": 3}, "rollout": {"group_size": 8, "groups_per_batch": 8, "max_tokens": 2048}}
)


class Peers:
    """An actor and a learner of a broker without sockets."""

    def __init__(self, broker: Broker) -> None:
        self.broker, self.acked, self.seq = broker, 0, 0
        self.tickets: list[messages.WireTicket] = []
        self.now = 100.0

    def actor(self, message: messages.ActorMessage, payload: bytes = b"") -> None:
        self.broker.actor_message("a", "e", message, payload, self.now, self.now)
        for outgoing in self._flush():
            if isinstance(outgoing.message, IssueTicket):
                self.tickets.append(outgoing.message.ticket)
            if isinstance(outgoing.message, messages.Ack):
                self.acked = outgoing.message.seq

    def learner(self, message: messages.LearnerMessage) -> list[tuple[messages.Message, bytes]]:
        self.broker.learner_message("s", message, self.now, self.now)
        return [(outgoing.message, outgoing.payload) for outgoing in self._flush() if not isinstance(outgoing.message, IssueTicket)]

    def _flush(self) -> list[Outgoing]:
        outgoing = self.broker.flush()
        for message in outgoing:
            encode(message.message, message.payload)
        return outgoing

    def report(self) -> None:
        held = [ticket.number for ticket in self.tickets]
        self.actor(ActorReport(0, 4096, held, 0.0, 0.0, 0, ""))

    def payload(self, number: int) -> bytes:
        rollout = LARGE.rollout
        (ticket,) = [ticket for ticket in self.tickets if ticket.number == number]
        return full_group(rollout.group_size, rollout.max_tokens, ticket=number, prompt=ticket.prompt, seed=ticket.seed)


def test_while_the_learner_stands_still_queued_groups_are_on_the_disk_alone_and_tickets_stop_and_none_is_lost(tmp_path: Path) -> None:
    broker = make_broker(tmp_path, config=LARGE)
    peers = Peers(broker)
    peers.learner(messages.LearnerHello(PROTOCOL_VERSION, "s", 0, 1))
    blob: BlobRef = broker.blobs.add(b"weights")
    peers.learner(Publish(PolicyVersion(0, 0, 0, blob.digest), -1, None, blob, 7, 7))
    peers.actor(messages.ActorHello(PROTOCOL_VERSION, "a", "e", "fake", "here", 1, []))
    peers.report()
    num_tickets = len(peers.tickets)
    assert num_tickets == (LARGE.pacing.max_lag + 1) * LARGE.pacing.groups_per_batch

    queued_bytes = largest = 0
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for ticket in list(peers.tickets):
            payload = peers.payload(ticket.number)
            peers.seq += 1
            peers.actor(messages.SubmitGroup(peers.seq, ticket.number, ticket.attempt), payload)
            queued_bytes, largest = queued_bytes + len(payload), max(largest, len(payload))
        del payload
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    peers.report()
    assert peers.acked == num_tickets
    assert broker.ledger.tickets.counts.queued == num_tickets
    assert len(peers.tickets) == num_tickets, "pacing allows no more before there is a newer version"
    assert after - before < 3 * largest < queued_bytes / 8, "payloads that are queued are not kept in memory"

    step, found = 0, []
    while len(found) < num_tickets:
        ((ready, _),) = peers.learner(messages.NextBatch(step))
        assert isinstance(ready, messages.BatchReady)
        for number in ready.tickets:
            ((_, payload),) = peers.learner(messages.GetGroup(number))
            assert payload == peers.payload(number)
            found.append(number)
        lags = [step] * len(ready.tickets)
        peers.learner(messages.CommitStep(step, ready.batch, lags, {}))
        step += 1
    assert found == list(range(num_tickets))
    assert broker.ledger.tickets.counts.conserved
    broker.close()
