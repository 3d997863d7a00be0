"""A journal on the fake disk, with the promises of SQLite's write-ahead log that the broker relies on.

Invariant: after any crash it holds the transactions of a prefix of the commits, whole, and every commit that returned is among them.

A transaction is one record: magic, length, checksum, body. A record that is not whole ends the journal if nothing whole follows it, for then it
was torn by a crash; if something whole follows, it is damage.
"""

from __future__ import annotations

import zlib
from struct import Struct
from typing import NamedTuple

import msgspec

from protocol import facts
from protocol.errors import JournalCommitFailed, JournalDamaged
from protocol.journal import JournalEntry
from tests.simulation.disk import FakeDisk, FakeFile

NAME = "journal"
_HEAD = Struct("<8sII")
_MAGIC = b"\x89records"
_fact_decoder = msgspec.json.Decoder[facts.AnyFact](facts.AnyFact)


class _Row(NamedTuple):
    time: float
    fact: bytes
    payload: bytes


_rows_decoder = msgspec.msgpack.Decoder(list[_Row])


class SimulatedJournal:
    """Implements broker.journal.RunJournal."""

    def __init__(self, disk: FakeDisk) -> None:
        """Open and recover. Raises JournalCommitFailed, JournalDamaged, PowerLost."""
        self._file: FakeFile = disk.open(NAME)
        self._entries: list[JournalEntry] = []
        self._payloads: dict[int, bytes] = {}
        self.pending: list[_Row] = []
        self.transactions: list[int] = []
        """Where each transaction begins."""
        self._end = self._recover()

    def entries(self) -> list[JournalEntry]:
        return list(self._entries)

    def append(self, fact: facts.AnyFact, payload: bytes, wall: float) -> None:
        self.pending.append(_Row(wall, msgspec.json.encode(fact), payload))

    def commit(self) -> None:
        if not self.pending:
            return
        record = _record(self.pending)
        try:
            for start in range(0, len(record), 2048):  # several writes, so that any part can be missing
                self._file.write(self._end + start, record[start : start + 2048])
            self._sync()
        except OSError as error:
            raise JournalCommitFailed(NAME, str(error)) from None
        self.transactions.append(self._end)
        self._take_in(self.pending)
        self._end += len(record)
        self.pending = []

    def payload(self, ticket: int) -> bytes | None:
        return self._payloads.get(ticket)

    def close(self) -> None:
        self.pending = []

    def _sync(self) -> None:
        self._file.sync()

    def _take_in(self, rows: list[_Row]) -> None:
        for row in rows:
            fact = _fact_decoder.decode(row.fact)
            self._entries.append(JournalEntry(len(self._entries) + 1, row.time, fact))
            if isinstance(fact, facts.GroupAccepted):
                self._payloads[fact.ticket] = row.payload

    def _recover(self) -> int:
        """Take in what is whole, cut off what is torn, and write it all anew: a sync that failed may have left what only the cache has."""
        data, offset = bytes(self._file.content), 0
        while (body := _body(data, offset)) is not None:
            self.transactions.append(offset)
            self._take_in(_rows_decoder.decode(body))
            offset += _HEAD.size + len(body)
        later = data.find(_MAGIC, offset + 1)
        while later >= 0:
            if _body(data, later) is not None:
                raise JournalDamaged(NAME, f"event {len(self._entries) + 1} and after", f"bytes {offset} to {later} are not a record")
            later = data.find(_MAGIC, later + 1)
        try:
            if data[offset:]:
                self._file.truncate(offset)
            if offset:
                self._file.write(0, data[:offset])
                self._sync()
        except OSError as error:
            raise JournalCommitFailed(NAME, str(error)) from None
        return offset


def _record(rows: list[_Row]) -> bytes:
    body = msgspec.msgpack.encode(rows)
    return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def _body(data: bytes, offset: int) -> bytes | None:
    """The body of the record at `offset`, None if there is no whole one."""
    if offset + _HEAD.size > len(data):
        return None
    magic, length, checksum = _HEAD.unpack_from(data, offset)
    body = data[offset + _HEAD.size : offset + _HEAD.size + length]
    # A torn head whose length and checksum were never written would pass as a record of nothing.
    return body if magic == _MAGIC and len(body) == length > 0 and zlib.crc32(body) == checksum else None
