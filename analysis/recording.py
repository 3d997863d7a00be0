"""A run's recording, opened to be looked at: its journal up to one moment, whether the run has ended or goes on.

Invariant: rows are only ever added to a journal, so what is read with lsn up to `last_lsn` is the same however often it is read, and the
tables agree with one another there. Nothing is locked between two questions.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, get_args

import msgspec

from analysis.rows import last_readable
from protocol.config import Config, parse_config
from protocol.errors import JournalDamaged
from protocol.facts import AnyFact
from protocol.journal import JOURNAL_NAME, JournalEntry, open_read_only
from protocol.messages import NamedBlob

FACT_NAMES: Final = tuple(kind.__name__ for kind in get_args(AnyFact))
_decoder: Final = msgspec.json.Decoder[AnyFact](AnyFact)


class _Manifest(msgspec.Struct, frozen=True):
    """The part of run.json that leads to the policy's files."""

    policy_files: list[NamedBlob]


class Recording:
    """The recording in a run's directory. Needs journal.sqlite; run.json and blobs/ only for what they hold."""

    def __init__(self, run: Path) -> None:
        """Open it. Raises JournalError if there is none, or one that this program cannot read."""
        self.run, self.path, self.blobs = run, run / JOURNAL_NAME, run / "blobs"
        self.connection = open_read_only(self.path)
        self.last_lsn = 0
        try:
            self.refresh()
        except BaseException:
            self.connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.connection.close()

    def refresh(self) -> None:
        """Move on to what is in the journal now. Facts and their tables are committed together, so the last row of any table counts."""
        # `events` comes last: a fact that is committed meanwhile may be in it and not in the others, never the other way round.
        self.last_lsn = max(last_readable(self.connection, name) for name in sorted(self.tables(), key="events".__eq__))

    def is_at_its_end(self) -> bool:
        """Whether nothing has come since it was opened or refreshed."""
        return last_readable(self.connection, "events") <= self.last_lsn

    def tables(self) -> list[str]:
        """The tables that have an lsn, by name."""
        return [name for (name,) in self.ask("SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'meta' ORDER BY name")]

    def meta(self, key: str) -> str:
        """A line of the table meta. Raises JournalDamaged if it is not there."""
        found = self.ask("SELECT value FROM meta WHERE key = ?", key)
        if not found:
            raise JournalDamaged(self.path, "table meta", f"there is no {key!r}")
        return str(found[0][0])

    def config(self) -> Config:
        """The run's configuration as the broker recorded it."""
        try:
            data = json.loads(self.meta("config"))
        except ValueError as error:
            raise JournalDamaged(self.path, "table meta", f"the configuration is not JSON ({error})") from None
        return parse_config(data)

    def policy_files(self) -> list[NamedBlob]:
        """The policy's files as run.json lists them; empty if it is not here."""
        try:
            return msgspec.json.decode((self.run / "run.json").read_bytes(), type=_Manifest).policy_files
        except (OSError, msgspec.DecodeError):
            return []

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a short answer. Raises JournalDamaged."""
        return list(self.each(query, *values))

    def each(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of an answer of any length, one at a time. Raises JournalDamaged."""
        try:
            yield from self.connection.execute(query, values)
        except sqlite3.DatabaseError as error:
            raise JournalDamaged(self.path, "where the rows for this command are", f"{error}; `inspect verify` says more") from None

    def facts(self, *kinds: type[AnyFact], ticket: int | None = None, since: int = 1, until: int | None = None) -> Iterator[JournalEntry]:
        """The facts of these kinds (all, if none is named) with lsn from `since` to `until`, about one ticket if it is given.

        Unlike `read_facts` this does not stop at a gap; `inspect verify` finds those. Raises JournalDamaged for a row that does not decode.
        """
        last = self.last_lsn if until is None else min(until, self.last_lsn)
        conditions, values = ["lsn BETWEEN ? AND ?"], [since, last]
        if kinds:
            conditions.append(f"fact IN ({', '.join(repr(kind.__name__) for kind in kinds)})")
        if ticket is not None:
            conditions.append("(body ->> 'ticket' = ? OR EXISTS (SELECT 1 FROM json_each(body, '$.tickets') WHERE value = ?))")
            values += [ticket, ticket]
        query = f"SELECT lsn, time, body FROM events WHERE {' AND '.join(conditions)} ORDER BY lsn"
        for lsn, time, body in self.each(query, *values):
            yield JournalEntry(lsn, time, self.decode(lsn, body))

    def decode(self, lsn: int, body: str) -> AnyFact:
        """A fact from its row. Raises JournalDamaged."""
        try:
            return decode_fact(body)
        except msgspec.DecodeError as error:
            raise JournalDamaged(self.path, f"event {lsn}", str(error)) from None


def decode_fact(body: str) -> AnyFact:
    """A fact from its JSON. Raises msgspec.DecodeError."""
    fact: AnyFact = _decoder.decode(body)
    return fact
