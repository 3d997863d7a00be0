"""The journal's files, as far as SQLite alone does not keep them honest.

Invariant: the mark beside the journal is never ahead of what is durable, so a journal that ends before its mark has lost what was committed.

SQLite takes a flipped bit in its write-ahead log for the end of the log: what was committed after it would silently be missing. The mark says
how far the journal went. It is written after each commit and not synced: after a power loss it may be behind, and then says nothing.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from protocol.journal import MARK_SUFFIX, encode_mark, read_mark

LOG_SUFFIX = "-wal"


class JournalFiles:
    """The files of the journal at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark, self._log = path.with_name(path.name + MARK_SUFFIX), path.with_name(path.name + LOG_SUFFIX)

    def connect(self) -> sqlite3.Connection:
        """A connection to the database."""
        return sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)

    def write_log_again(self) -> None:
        """Write the bytes of the write-ahead log once more, and sync them. Raises OSError.

        After a sync that failed, the system shows what was written and may never write it to the disk, not even at the next sync.
        """
        file = os.open(self._log, os.O_RDWR)
        try:
            offset = 0
            while block := os.pread(file, 1 << 20, offset):
                offset += os.pwrite(file, block, offset)
            os.fsync(file)
        finally:
            os.close(file)

    def write_mark(self, lsn: int) -> None:
        """The journal is durable up to event `lsn`. A mark that cannot be written stays behind."""
        with contextlib.suppress(OSError):
            file = os.open(self._mark, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, encode_mark(lsn), 0)
            finally:
                os.close(file)

    def read_mark(self) -> int:
        """The last event that is known to have been durable; 0 if nothing is known."""
        return read_mark(self.path)
