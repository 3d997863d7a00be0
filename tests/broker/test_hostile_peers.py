"""What a peer that is let in may say, and a journal may hold, without harm to anybody else."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import pytest

from broker.core import Broker
from protocol import facts, messages
from protocol.config import parse_config
from protocol.errors import JournalDamaged
from protocol.journal import JOURNAL_NAME
from protocol.messages import PROTOCOL_VERSION, NamedBlob
from protocol.weights import BlobRef, PolicyVersion


def make_broker(directory: Path, policy_files: list[NamedBlob] | None = None) -> Broker:
    return Broker(directory, "hostile", parse_config({}), 5, policy_files or [], now=0.0, wall=0.0)


def publish(
    broker: Broker, number: int, root: str, snapshot: BlobRef | None = None, delta: BlobRef | None = None, parent: int = -1
) -> None:
    message = messages.Publish(PolicyVersion(number, 0, 0, root), parent, delta, snapshot, 1, 1, is_base=snapshot is None and delta is None)
    broker.learner_message("s", message, 0.0, 0.0)
    broker.flush()


def test_a_learner_cannot_have_a_file_of_the_policy_removed_by_publishing_it_again(tmp_path: Path) -> None:
    broker = make_broker(tmp_path)
    config = broker.blobs.add(b"{}")
    broker.close()
    broker = make_broker(tmp_path, [NamedBlob("config.json", config)])
    broker.learner_message("s", messages.LearnerHello(PROTOCOL_VERSION, "s", 0, 1), 0.0, 0.0)
    publish(broker, 0, "root")
    other = broker.blobs.add(b"other")
    for blob in (config, other):
        publish(broker, 1, "root", snapshot=blob)
    assert broker.blobs.size(config.digest) == config.size
    assert broker.blobs.size(other.digest) is None, "what nothing leads to is removed"
    broker.close()


def test_two_versions_by_the_same_delta_both_have_a_parent(tmp_path: Path) -> None:
    broker = make_broker(tmp_path)
    broker.learner_message("s", messages.LearnerHello(PROTOCOL_VERSION, "s", 0, 1), 0.0, 0.0)
    publish(broker, 0, "root")
    delta = broker.blobs.add(b"delta")
    for number in (1, 2):
        publish(broker, number, f"root {number}", delta=delta, parent=0)
    way = broker.ledger.versions.way_from(0)
    assert way is not None
    assert broker.ledger.versions.before(way.hops[0]).number == 0
    broker.close()


def test_a_stop_without_a_reason_stops_the_run(tmp_path: Path) -> None:
    broker = make_broker(tmp_path)
    for _ in range(2):
        broker.control_message(messages.StopRun(""), 0.0, 0.0)
    broker.flush()
    assert broker.status(0.0).phase == "stopping"
    broker.close()
    with sqlite3.connect(tmp_path / JOURNAL_NAME) as journal:
        assert journal.execute("SELECT count(*) FROM events WHERE fact = 'RunStopping'").fetchall() == [(1,)]
    journal.close()


@pytest.mark.parametrize(
    "fact",
    [
        facts.TicketIssued(0, 1, "nobody", "e", 0, 0),
        facts.TicketRevoked(7, 1, "why"),
        facts.GroupAccepted("a", "e", 1, 7, 1, [0], 0, 1, 0.0),
        facts.BatchFormed(0, 0, [7]),
        facts.BatchFormed(0, 0, []),
        facts.StepCommitted(3, 3, 0, [0], {}),
        facts.VersionOrphaned(7, 0),
    ],
    ids=lambda fact: type(fact).__name__,
)
def test_a_fact_that_contradicts_the_ones_before_it_is_damage_with_its_place(tmp_path: Path, fact: facts.AnyFact) -> None:
    broker = make_broker(tmp_path)
    broker.control_message(messages.SetActors(1), 0.0, 0.0)
    broker.flush()
    broker.close()
    with sqlite3.connect(tmp_path / JOURNAL_NAME) as journal:
        journal.execute("UPDATE events SET body = ? WHERE lsn = 2", (msgspec.json.encode(fact).decode(),))
    journal.close()
    with pytest.raises(JournalDamaged, match="event 2"):
        make_broker(tmp_path)
