"""Durable: what was committed comes back, in order, and damage is an error that says where."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from broker.journal import Journal
from protocol import facts
from protocol.errors import JournalCommitFailed, JournalDamaged, JournalError
from protocol.journal import open_read_only, read_facts, read_payload


def accepted(ticket: int, seq: int) -> facts.GroupAccepted:
    return facts.GroupAccepted("a", "e", seq, ticket, 1, [0, 2], 0, 12, 0.5)


def test_committed_facts_and_payloads_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path, "run", "{}")
    journal.append(facts.RunStarted("run", 0), b"", 1.0)
    journal.append(accepted(7, 1), b"payload", 2.0)
    journal.commit()
    journal.close()
    again = Journal(path, "run", "{}")
    assert [entry.fact for entry in again.entries()] == [facts.RunStarted("run", 0), accepted(7, 1)]
    assert [entry.time for entry in again.entries()] == [1.0, 2.0]
    assert again.payload(7) == b"payload"
    assert again.payload(8) is None
    again.append(facts.RunStarted("run", 2), b"", 3.0)
    again.commit()
    assert [entry.lsn for entry in again.entries()] == [1, 2, 3]
    again.close()


def test_what_was_not_committed_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", "run", "{}")
    journal.append(facts.RunStarted("run", 0), b"", 1.0)
    journal.commit()
    journal.append(accepted(7, 1), b"payload", 2.0)
    journal.close()
    again = Journal(tmp_path / "journal.sqlite", "run", "{}")
    assert len(again.entries()) == 1
    again.close()


def test_a_reader_sees_the_committed_facts_while_the_run_goes_on_and_cannot_write(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", "run", "{}")
    journal.append(accepted(7, 1), b"payload", 2.0)
    journal.commit()
    reader = open_read_only(tmp_path / "journal.sqlite")
    assert reader.execute("SELECT ticket, oldest_version, newest_version FROM groups").fetchall() == [(7, 0, 2)]
    with pytest.raises(sqlite3.OperationalError):
        reader.execute("DELETE FROM groups")
    reader.close()
    journal.close()


def test_a_missing_row_and_a_row_that_does_not_decode_are_damage_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path, "run", "{}")
    for number in range(5):
        journal.append(facts.ActorsDesired(number), b"", 0.0)
    journal.append(accepted(7, 1), b"payload", 2.0)
    journal.commit()
    journal.close()
    damaged = sqlite3.connect(path)
    damaged.execute("UPDATE groups SET payload = x'00' WHERE ticket = 7")
    damaged.execute('UPDATE events SET body = \'{"fact":"Nonsense"}\' WHERE lsn = 4')
    damaged.commit()
    with pytest.raises(JournalDamaged, match="event 4"):
        list(read_facts(damaged, path))
    damaged.execute("DELETE FROM events WHERE lsn = 2")
    damaged.commit()
    with pytest.raises(JournalDamaged, match="events 2 to 2"):
        list(read_facts(damaged, path))
    with pytest.raises(JournalDamaged, match="ticket 7"):
        read_payload(damaged, path, 7)
    damaged.close()


def test_another_format_and_no_journal_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    Journal(path, "run", "{}").close()
    changed = sqlite3.connect(path)
    changed.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    changed.commit()
    changed.close()
    with pytest.raises(JournalError, match="format 99"):
        open_read_only(path)
    with pytest.raises(JournalError, match="no journal"):
        open_read_only(tmp_path / "nothing.sqlite")


def test_a_commit_that_fails_is_an_error_that_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", "run", "{}")
    blocker = sqlite3.connect(tmp_path / "journal.sqlite", isolation_level=None)
    journal._connection.execute("PRAGMA busy_timeout = 0")
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(JournalCommitFailed, match="recovers from the journal"):
        journal.append(accepted(7, 1), b"payload", 2.0)
    blocker.close()
    journal.close()


def test_values_of_another_type_than_was_written_are_damage(tmp_path: Path) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE events (lsn INTEGER PRIMARY KEY, time, fact, body)")
    connection.execute("CREATE TABLE groups (lsn, ticket, payload, digest)")
    body = '{"fact":"ActorsDesired","num_actors":1}'
    for time, found in ((None, body), (1.0, None), (1.0, 5), (1.0, body.encode()), (1.0, "[" * 10_000), (1.0, '{"fact":' * 10_000)):
        connection.execute("DELETE FROM events")
        connection.execute("INSERT INTO events VALUES (1, ?, '', ?)", (time, found))
        with pytest.raises(JournalDamaged, match="event 1"):
            list(read_facts(connection, tmp_path))
    for ticket, payload in enumerate(("text", None, 7)):
        connection.execute("INSERT INTO groups VALUES (?, ?, ?, x'00')", (ticket, ticket, payload))
        with pytest.raises(JournalDamaged, match=f"ticket {ticket}"):
            read_payload(connection, tmp_path, ticket)
    connection.close()


def test_a_file_that_is_no_journal_is_damage_and_is_let_go_of(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path, "run", "{}")
    journal.close()
    whole = path.read_bytes()
    for damaged in (b"SQLite format 3\0" + b"\xff" * 5000, whole.replace(b"CREATE TABLE events", b"CREATE \xfe\xfeBLE events")):
        path.write_bytes(damaged)
        for opened in (lambda: Journal(path, "run", "{}"), lambda: open_read_only(path)):
            with pytest.raises(JournalDamaged, match=r"journal\.sqlite"):
                opened()
        with sqlite3.connect(path, timeout=0.0) as free:  # nobody holds a lock
            assert free.total_changes == 0
        free.close()
