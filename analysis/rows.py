"""Reading a table that may be damaged: what can be read is given, and what cannot is named with its range."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

PAGE_ROWS: Final = 1000
"""More rows than a page of the journal holds."""


class Unreadable(NamedTuple):
    """SQLite cannot give the rows with lsn `first` to `last`."""

    first: int
    last: int
    problem: str


Row = tuple[Any, ...]


def readable_rows(connection: sqlite3.Connection, table: str, columns: str, last: int) -> Iterator[Row | Unreadable]:
    """The rows of a table with lsn up to `last`, in that order; `columns` begin with lsn. Reading goes on behind what is unreadable."""
    after = 0
    while after < last:
        try:
            for row in connection.execute(f"SELECT {columns} FROM {table} WHERE lsn > ? AND lsn <= ? ORDER BY lsn", (after, last)):
                yield row
                after = max(after, row[0])  # where pages are damaged, rows can come in any order
            return
        except sqlite3.DatabaseError as error:
            behind = _behind(connection, f"SELECT {columns} FROM {table} WHERE lsn > ? AND lsn <= ? ORDER BY lsn LIMIT 1", after, last)
            yield Unreadable(after + 1, behind, str(error))
            after = behind


def last_readable(connection: sqlite3.Connection, table: str) -> int:
    """The largest lsn of a table, 0 if it is empty; where its end cannot be read, the number behind the last row that can be."""
    found = 0
    try:
        ((found,),) = connection.execute(f"SELECT coalesce(max(lsn), 0) FROM {table}").fetchall()
    except sqlite3.DatabaseError:
        try:
            for (lsn,) in connection.execute(f"SELECT lsn FROM {table} ORDER BY lsn"):
                found = max(found, lsn)
        except sqlite3.DatabaseError:
            found += 1
    return found


def _behind(connection: sqlite3.Connection, query: str, after: int, last: int) -> int:
    """The lsn behind which rows can be read again; `last` if there are none.

    Looked for one by one at first, because damage is mostly that of one page; then in growing strides, because a damaged number can be
    astronomical, and exactly within the last stride.
    """

    def can_be_read(bound: int) -> bool:
        try:
            connection.execute(query, (bound, last)).fetchone()
        except sqlite3.DatabaseError:
            return False
        return True

    low, stride = after, 1
    while low + stride < last and not can_be_read(low + stride):
        low += stride
        stride = 1 if low - after < PAGE_ROWS else 2 * stride
    high = min(low + stride, last)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if can_be_read(middle) else (middle, high)
    return high
