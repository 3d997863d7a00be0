"""The journal's format: a SQLite database in the run's directory, and how to read it.

`events` is the whole truth: facts in order, as JSON. The other tables are the same facts laid out for questions, plus the groups' payloads.
The file opens read-only in sqlite3, DuckDB and pandas while the run goes on.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

import blake3
import msgspec

from protocol.errors import JournalDamaged, JournalError
from protocol.facts import AnyFact

JOURNAL_NAME: Final = "journal.sqlite"
MARK_SUFFIX: Final = "-mark"
"""Of the file beside the journal that says how far it went; see broker/journal_files.py."""
FORMAT_VERSION: Final = 2
"""What is written. Format 1 has no `sessions`; it is read as it is, and a broker that goes on with such a journal brings it up to date."""

_SESSIONS: Final = """
CREATE TABLE sessions (
    lsn INTEGER PRIMARY KEY, session TEXT NOT NULL, lineage INTEGER NOT NULL, step INTEGER NOT NULL, world_size INTEGER NOT NULL,
    environment TEXT NOT NULL
) STRICT
"""

SCHEMA: Final = (
    """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT
""",
    """
CREATE TABLE events (
    lsn INTEGER PRIMARY KEY,        -- order of the facts, from 1 without a gap
    time REAL NOT NULL,             -- wall clock, seconds since 1970
    fact TEXT NOT NULL,             -- what happened (see protocol/facts.py)
    body TEXT NOT NULL              -- the fact as JSON
) STRICT
""",
    """
CREATE TABLE groups (
    lsn INTEGER PRIMARY KEY REFERENCES events (lsn),
    ticket INTEGER NOT NULL, attempt INTEGER NOT NULL,
    actor TEXT NOT NULL, epoch TEXT NOT NULL,
    oldest_version INTEGER NOT NULL, newest_version INTEGER NOT NULL, oldest_step INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL, reward REAL NOT NULL,
    payload BLOB NOT NULL,          -- msgpack, see protocol/groups.py
    digest BLOB NOT NULL            -- BLAKE3 of the payload
) STRICT
""",
    """
CREATE INDEX groups_by_ticket ON groups (ticket)
""",
    """
CREATE TABLE batches (batch INTEGER PRIMARY KEY, lsn INTEGER NOT NULL, step INTEGER NOT NULL, tickets TEXT NOT NULL) STRICT
""",
    """
CREATE TABLE versions (
    number INTEGER PRIMARY KEY, lsn INTEGER NOT NULL, step INTEGER NOT NULL, lineage INTEGER NOT NULL, root TEXT NOT NULL,
    parent INTEGER NOT NULL, delta TEXT, delta_bytes INTEGER, snapshot TEXT, snapshot_bytes INTEGER,
    full_bytes INTEGER NOT NULL, bound_bytes INTEGER NOT NULL
) STRICT
""",
    """
CREATE TABLE steps (
    lsn INTEGER PRIMARY KEY, step INTEGER NOT NULL, lineage INTEGER NOT NULL, batch INTEGER NOT NULL, largest_lag INTEGER NOT NULL,
    lags TEXT NOT NULL, metrics TEXT NOT NULL
) STRICT
""",
    _SESSIONS,
)
"""The statements that make an empty journal."""

MIGRATIONS: Final = {
    1: (
        _SESSIONS,
        """
INSERT INTO sessions SELECT lsn, body ->> 'session', body ->> 'lineage', body ->> 'step', body ->> 'world_size', '{}'
FROM events WHERE fact = 'LearnerStarted' ORDER BY lsn
""",
    )
}
"""For each earlier format, the statements that make it the next one."""


class JournalEntry(NamedTuple):
    """One fact with its place and wall-clock time."""

    lsn: int
    time: float
    fact: AnyFact


UNREADABLE: Final = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What SQLite's module raises on bytes that are not a journal; the second where its message would quote them."""
_fact_decoder: Final = msgspec.json.Decoder[AnyFact](AnyFact)


def has_begun(path: Path) -> bool:
    """Whether there is a journal: one whose making was cut off has no tables, and is made anew by the next broker. Raises JournalError."""
    if path.exists():
        with closing(_connect(path)) as connection:
            try:
                (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            except UNREADABLE as error:
                raise JournalDamaged(path, "on opening", str(error)) from None
        if num_tables:
            return True
    if marked := read_mark(path):
        raise JournalDamaged(path, f"events 1 to {marked}", "they were committed and are not there")
    return False


def open_read_only(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, and leaves no file behind. Raises JournalError for a missing file or another format version."""
    if not path.exists():
        raise JournalError(f"there is no journal at {path}. Give the directory of a run.")
    connection = _connect(path)
    try:
        format_of(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def encode_mark(lsn: int) -> bytes:
    """A line with the number and its checksum; always as long, so that one is written over the other."""
    number = f"{lsn:020d}"
    return f"{number} {blake3.blake3(number.encode()).hexdigest(length=8)}\n".encode()


def decode_mark(data: bytes) -> int:
    """The number of a mark, 0 if the mark itself is damaged."""
    number = data[:20]
    return int(number) if number.isdigit() and data == encode_mark(int(number)) else 0


def read_mark(path: Path) -> int:
    """The last event of the journal at `path` that is known to have been durable; 0 if nothing is known."""
    try:
        return decode_mark(path.with_name(path.name + MARK_SUFFIX).read_bytes())
    except OSError:
        return 0


def check_end(connection: sqlite3.Connection, path: Path) -> None:
    """Raise JournalDamaged if the journal ends before its mark. May be asked while the run goes on."""
    marked = read_mark(path)  # first: the journal only grows
    try:
        (last,) = connection.execute("SELECT coalesce(max(lsn), 0) FROM events").fetchone()
    except UNREADABLE as error:
        raise JournalDamaged(path, "table events", str(error)) from None
    if last < marked:
        raise JournalDamaged(path, f"events {last + 1} to {marked}", "they were committed and are not there")


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?{_how_to_read(path)}", uri=True, timeout=30)


def _how_to_read(path: Path) -> str:
    """SQLite's parameters for reading. To read a journal in WAL mode it makes files beside it, unless it is told that nobody writes.

    Whoever has a journal open to write has a `-wal` beside it. Raises JournalError for one with such a log where no file can be made.
    """
    log = path.with_name(f"{path.name}-wal")
    if not log.exists():
        return "mode=ro&immutable=1"
    if os.access(path.parent, os.W_OK):
        return "mode=ro"
    if log.stat().st_size:
        raise JournalError(
            f"the end of journal {path} is in {log.name}, and {path.parent} cannot be written. Copy the directory and read the copy."
        )
    return "mode=ro&immutable=1"


def format_of(connection: sqlite3.Connection, path: Path) -> int:
    """The format version of a journal. Raises JournalError for one that this program cannot read."""
    try:
        (found,) = connection.execute("SELECT value FROM meta WHERE key = 'format'").fetchone() or ("none",)
    except UNREADABLE as error:
        raise JournalDamaged(path, "table meta", str(error)) from None
    known = {str(version): version for version in (*MIGRATIONS, FORMAT_VERSION)}
    if found not in known:
        raise JournalError(
            f"journal {path} has format {found}, this program reads {min(known)} to {FORMAT_VERSION}. Use the version that wrote it."
        )
    return known[found]


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring a journal up to FORMAT_VERSION, in one transaction for each step. Raises JournalError for one that this program cannot read."""
    while (found := format_of(connection, path)) < FORMAT_VERSION:
        connection.execute("BEGIN IMMEDIATE")
        for statement in MIGRATIONS[found]:
            connection.execute(statement)
        connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (str(found + 1),))
        connection.execute("COMMIT")


def read_facts(connection: sqlite3.Connection, path: Path) -> Iterator[JournalEntry]:
    """All facts in order. Raises JournalDamaged, with the place, for a gap or a row that does not decode."""
    expected = 1
    try:
        for lsn, time, body in connection.execute("SELECT lsn, time, body FROM events ORDER BY lsn"):
            if lsn != expected:
                raise JournalDamaged(path, f"events {expected} to {lsn - 1}", "rows are missing")
            expected += 1
            if not isinstance(time, float) or not isinstance(body, str):  # as in a file whose bytes have changed
                raise JournalDamaged(path, f"event {lsn}", f"time is of type {type(time).__name__}, body of type {type(body).__name__}")
            try:
                fact = _fact_decoder.decode(body)
            except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
                raise JournalDamaged(path, f"event {lsn}", str(error)) from None
            yield JournalEntry(lsn, time, fact)
    except UNREADABLE as error:
        raise JournalDamaged(path, f"event {expected} and after", str(error)) from None


def read_payload(connection: sqlite3.Connection, path: Path, ticket: int) -> bytes | None:
    """The payload of the group that was accepted last for `ticket`, None if there is none.

    Raises JournalDamaged if it cannot be read or its checksum is wrong.
    """
    where = f"the group of ticket {ticket}"
    try:
        row = connection.execute("SELECT payload, digest FROM groups WHERE ticket = ? ORDER BY lsn DESC LIMIT 1", (ticket,)).fetchone()
    except UNREADABLE as error:
        raise JournalDamaged(path, where, str(error)) from None
    if row is None:
        return None
    payload, digest = row
    if not isinstance(payload, bytes) or blake3.blake3(payload).digest() != digest:
        raise JournalDamaged(path, where, "its checksum does not match")
    return payload
