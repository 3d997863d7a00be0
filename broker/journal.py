"""Writing the journal: facts and payloads into SQLite, committed together.

Invariant: what `commit` has returned from survives a crash of process and machine (WAL, synchronous=FULL); nothing is acknowledged before that.
A failed commit is never retried: the exception ends the process, and the next one starts from what is on the disk.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any, Protocol

import blake3
import msgspec

from broker.journal_files import JournalFiles
from protocol import facts
from protocol.errors import JournalCommitFailed, JournalDamaged
from protocol.journal import FORMAT_VERSION, SCHEMA, UNREADABLE, JournalEntry, migrate, read_facts, read_payload

CACHE_KIB = 32 << 10
"""Pages that SQLite holds until the commit; of a larger transaction the rest is written to the log while it is put together."""


class RunJournal(Protocol):
    """What a broker asks of the record of its run."""

    def entries(self) -> list[JournalEntry]:
        """All facts that were committed, in order."""

    def append(self, fact: facts.AnyFact, payload: bytes, wall: float) -> None:
        """Add a fact (and a group's payload) to what the next commit makes durable. Raises JournalCommitFailed."""

    def commit(self) -> None:
        """Make everything appended durable. Raises JournalCommitFailed, after which this object is of no more use."""

    def payload(self, ticket: int) -> bytes | None:
        """The payload of the group committed last for `ticket`, None if there is none. May be called while another thread commits."""

    def close(self) -> None:
        """Release it. What was appended and not committed is forgotten."""


class Journal:
    """The journal of one run, open for writing by one process."""

    def __init__(self, path: Path, run: str, config: str, files: JournalFiles | None = None) -> None:
        """Open the journal at `path`, or make it for `run` with its resolved configuration. Raises JournalError."""
        self.path, self._files = path, files or JournalFiles(path)
        self._connection, self._reader = self._files.connect(), self._files.connect()
        """Sees what is committed, and waits for no commit."""
        self._pending = False
        try:
            (num_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not num_tables:
                self._connection.execute("PRAGMA page_size = 16384")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self._connection.execute("BEGIN IMMEDIATE")
            self._files.write_log_again()
            self._connection.execute("ROLLBACK")
            if not num_tables:
                self._create(run, config)
            migrate(self._connection, path)
            (self._lsn,) = self._connection.execute("SELECT coalesce(max(lsn), 0) FROM events").fetchone()
            if (marked := self._files.read_mark()) > self._lsn:
                raise JournalDamaged(path, f"events {self._lsn + 1} to {marked}", "they were committed and are not there")
        except BaseException as error:
            self.close()
            if isinstance(error, sqlite3.OperationalError | OSError):
                raise JournalCommitFailed(path, str(error)) from error
            if isinstance(error, UNREADABLE):
                raise JournalDamaged(path, "on opening", str(error)) from error
            raise

    def _create(self, run: str, config: str) -> None:
        """Tables and description in one transaction: a journal that was not finished is an empty file to the next start."""
        self._connection.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA:
            self._connection.execute(statement)
        values = [("format", str(FORMAT_VERSION)), ("run", run), ("config", config)]
        self._connection.executemany("INSERT INTO meta VALUES (?, ?)", values)
        self._connection.execute("COMMIT")

    def entries(self) -> list[JournalEntry]:
        """All facts written before, in order."""
        return list(read_facts(self._connection, self.path))

    def append(self, fact: facts.AnyFact, payload: bytes, wall: float) -> None:
        """Add a fact (and a group's payload) to the open transaction. `wall` is seconds since 1970."""
        try:
            if not self._pending:
                self._connection.execute("BEGIN IMMEDIATE")
                self._pending = True
            self._lsn += 1
            body = msgspec.json.encode(fact).decode()
            self._connection.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (self._lsn, wall, type(fact).__name__, body))
            self._lay_out(fact, payload)
        except (sqlite3.Error, OverflowError) as error:
            raise JournalCommitFailed(self.path, str(error)) from error

    def commit(self) -> None:
        """Make everything appended durable. Raises JournalCommitFailed, after which this object is of no more use."""
        if not self._pending:
            return
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise JournalCommitFailed(self.path, str(error)) from error
        self._pending = False
        self._files.write_mark(self._lsn)

    def payload(self, ticket: int) -> bytes | None:
        """The payload of the group committed last for `ticket`, None if there is none. May be called while another thread commits."""
        return read_payload(self._reader, self.path, ticket)

    def close(self) -> None:
        """Release the file. What was appended and not committed is forgotten."""
        with contextlib.suppress(sqlite3.Error):
            self._reader.close()
            self._connection.close()

    def _lay_out(self, fact: facts.AnyFact, payload: bytes) -> None:
        """The same fact in the table that is made for questions about it."""
        row: tuple[Any, ...]
        match fact:
            case facts.GroupAccepted():
                row = (
                    self._lsn, fact.ticket, fact.attempt, fact.actor, fact.epoch, fact.versions[0], fact.versions[-1],
                    fact.oldest_step, fact.num_tokens, fact.reward, payload, blake3.blake3(payload).digest(),
                )  # fmt: skip
                self._insert("groups", row)
            case facts.BatchFormed():
                self._insert("batches", (fact.batch, self._lsn, fact.step, _json(fact.tickets)))
            case facts.StepCommitted():
                row = (self._lsn, fact.step, fact.lineage, fact.batch, max(fact.lags), _json(fact.lags), _json(fact.metrics))
                self._insert("steps", row)
            case facts.LearnerStarted():
                self._insert("sessions", (self._lsn, fact.session, fact.lineage, fact.step, fact.world_size, _json(fact.environment)))
            case facts.VersionPublished(version=version, delta=delta, snapshot=snapshot):
                row = (
                    version.number, self._lsn, version.step, version.lineage, version.root, fact.parent,
                    delta and delta.digest, delta and delta.size, snapshot and snapshot.digest, snapshot and snapshot.size,
                    fact.full_bytes, fact.bound_bytes,
                )  # fmt: skip
                self._insert("versions", row)

    def _insert(self, table: str, row: tuple[Any, ...]) -> None:
        self._connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
