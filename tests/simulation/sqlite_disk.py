"""SQLite on the fake disk: real files, of which the fake disk knows what a power loss would leave.

Invariant: outside a power loss the real files have the fake files' content; after one they have what was durable.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import apsw

from broker.journal_files import JournalFiles
from protocol.journal import decode_mark, encode_mark
from tests.simulation.disk import SECTOR, FakeDisk, PowerLost

_numbers = itertools.count()


class _TrackedFile(apsw.VFSFile):
    """An open file whose changes the fake disk takes in first."""

    def __init__(self, machine: Machine, name: Any, flags: list[int]) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        super().__init__("", name, flags)
        self._machine, self._fake = machine, machine.disk.open(Path(path).name)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        with self._machine.operation():
            self._fake.write(offset, bytes(data))
            super().xWrite(data, offset)

    def xTruncate(self, length: int) -> None:  # noqa: N802
        with self._machine.operation():
            self._fake.truncate(length)
            super().xTruncate(length)

    def xSync(self, flags: int) -> None:  # noqa: N802
        with self._machine.operation():
            self._fake.sync()


class _Operation:
    """One operation on the disk: what goes wrong becomes what SQLite expects."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __enter__(self) -> None:
        if not self._machine.is_on:
            raise apsw.IOError("the machine is off")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PowerLost):
            self._machine.is_on = False
            raise apsw.IOError("the power is gone") from None
        if isinstance(error, OSError):
            raise (apsw.FullError if "no space" in str(error) else apsw.IOError)(str(error)) from None


class Machine(apsw.VFS):
    """A machine with one fake disk, whose processes open databases in `folder`."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.folder, self.disk, self.is_on = folder, FakeDisk(random), True
        self._name = f"fake-{next(_numbers)}"
        self._open: list[Connection] = []
        super().__init__(self._name, "")

    def operation(self) -> _Operation:
        """The guard around an operation."""
        return _Operation(self)

    def xOpen(self, name: Any, flags: list[int]) -> _TrackedFile:  # noqa: N802
        return _TrackedFile(self, name, flags)

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802
        with self.operation():
            super().xDelete(name, sync)
            self.disk.remove(Path(name).name)

    def connect(self, path: Path) -> Connection:
        """A connection as broker.journal opens one."""
        self._open.append(Connection(apsw.Connection(str(path), vfs=self._name)))
        return self._open[-1]

    def stop(self, *, power: bool) -> None:
        """The process ends at once, and with `power` the machine; then it is there again, and the disk works."""
        self.is_on = False
        for connection in self._open:
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        self._open.clear()
        if power:
            self.disk.lose_power()
        for path in self.folder.iterdir():
            if path.name not in self.disk.files:
                path.unlink()
        self.write_out()
        self.is_on, self.disk.operations_left, self.disk.sync_failures = True, None, 0.0

    def write_out(self) -> None:
        """Make the real files what the fake ones are."""
        for name, file in self.disk.files.items():
            (self.folder / name).write_bytes(file.content)


class FakeJournalFiles(JournalFiles):
    """The journal's files on the disk of a machine."""

    def __init__(self, machine: Machine, path: Path) -> None:
        super().__init__(path)
        self._machine = machine

    def connect(self) -> Any:
        return self._machine.connect(self.path)

    def write_log_again(self) -> None:
        file = self._machine.disk.open(self._log.name)
        try:
            with self._machine.operation():
                for start in range(0, len(file), SECTOR):
                    file.write(start, file.read(start, SECTOR))
                file.sync()
        except apsw.Error as error:
            raise OSError(str(error)) from None

    def write_mark(self, lsn: int) -> None:
        with contextlib.suppress(apsw.Error), self._machine.operation():
            self._machine.disk.open(self._mark.name).write(0, encode_mark(lsn))

    def read_mark(self) -> int:
        return decode_mark(bytes(self._machine.disk.open(self._mark.name).content))


class Connection:
    """What the journal uses of sqlite3.Connection, in terms of apsw."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[Any] = ()) -> _Rows:
        return _Rows(self._run(lambda: self._connection.execute(statement, values)))

    def executemany(self, statement: str, values: Sequence[Sequence[Any]]) -> None:
        self._run(lambda: self._connection.executemany(statement, values))

    def close(self) -> None:
        self._run(lambda: self._connection.close(True))

    @staticmethod
    def _run(work: Any) -> Any:
        return _translated(work)


class _Rows:
    """What the journal uses of sqlite3.Cursor."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def fetchone(self) -> Any:
        return _translated(self._cursor.fetchone)

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row


def _translated(work: Any) -> Any:
    """The result of `work`, with errors as sqlite3 has them."""
    try:
        return work()
    except (apsw.CorruptError, apsw.NotADBError, apsw.FormatError) as error:
        raise sqlite3.DatabaseError(str(error)) from None
    except apsw.ConstraintError as error:
        raise sqlite3.IntegrityError(str(error)) from None
    except apsw.Error as error:
        raise sqlite3.OperationalError(str(error)) from None
