"""A disk that forgets what was not synced, tears writes, flips bits, fills up, and fails.

Invariant: what was written before a `sync` that returned is there after a power loss, unless a bit was flipped. Of everything later each
sector is there, or is what it was before, or (the last one that reaches the disk) is torn.
"""

from __future__ import annotations

import errno
from random import Random

SECTOR = 512
PLENTY = 1 << 40


class PowerLost(BaseException):
    """The machine stops in the middle of an operation on the disk."""


class FakeFile:
    """One file: `content` is what the system shows, `durable` what is on the disk."""

    def __init__(self, disk: FakeDisk) -> None:
        self._disk = disk
        self.content, self.durable = bytearray(), bytearray()
        self.unsynced: list[tuple[int, bytes]] = []
        """Writes in order; a length is a write of nothing, see `truncate`."""

    def __len__(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes."""
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Write; durable after the next sync. Raises OSError when the disk is full or broken, PowerLost."""
        self._disk.operate()
        growth = max(0, offset + len(data) - len(self.content))
        if growth > self._disk.room():
            raise OSError(errno.ENOSPC, "no space left on device")
        _put(self.content, offset, data)
        self.unsynced.append((offset, data))

    def truncate(self, length: int) -> None:
        """Cut or extend; durable after the next sync."""
        self._disk.operate()
        _resize(self.content, length)
        self.unsynced.append((-1 - length, b""))

    def sync(self) -> None:
        """Make everything written durable. Raises OSError: then nobody knows what is, and nobody ever will."""
        self._disk.operate()
        if self._disk.random.random() < self._disk.sync_failures:
            self._lose(self._disk.random)
            raise OSError(errno.EIO, "input/output error")
        for offset, data in self.unsynced:
            _apply(self.durable, offset, data)
        self.unsynced.clear()

    def lose_power(self, random: Random) -> None:
        """The system forgets everything but what is on the disk."""
        self._lose(random)
        self.content = bytearray(self.durable)

    def flip(self, offset: int, bit: int) -> None:
        """Flip one bit on the disk."""
        for place in (self.content, self.durable):
            if offset < len(place):
                place[offset] ^= 1 << bit

    def _lose(self, random: Random) -> None:
        """Of the writes that were not synced, some sectors reach the disk, at most one of them in part."""
        share = random.choice([0.0, 0.3, 0.7, 1.0])
        torn = random.random() < 0.5
        for offset, data in self.unsynced:
            if offset < 0:
                if random.random() < share:
                    _resize(self.durable, -1 - offset)
                continue
            start = offset
            while start < offset + len(data):
                end = min(offset + len(data), (start // SECTOR + 1) * SECTOR)
                piece = data[start - offset : end - offset]
                if random.random() < share:
                    _put(self.durable, start, piece)
                elif torn:
                    _put(self.durable, start, piece[: random.randrange(len(piece))])
                    torn = False
                start = end
        self.unsynced.clear()


class FakeDisk:
    """Files by name, and what is the matter with the disk."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.files: dict[str, FakeFile] = {}
        self.capacity = PLENTY
        """Bytes of all files together."""
        self.sync_failures = 0.0
        self.operations_left: int | None = None
        """How many more operations there are before the power goes; None: it stays."""

    def open(self, name: str) -> FakeFile:
        """The file of that name, made if it is not there. Making and removing files is durable at once."""
        if name not in self.files:
            self.files[name] = FakeFile(self)
        return self.files[name]

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        self.files.pop(name, None)

    def room(self) -> int:
        """Bytes that may still be written."""
        return self.capacity - sum(len(file) for file in self.files.values())

    def operate(self) -> None:
        """Count an operation. Raises PowerLost when it is the one that does not come to its end."""
        if self.operations_left is not None:
            self.operations_left -= 1
            if self.operations_left <= 0:
                self.operations_left = None
                raise PowerLost

    def lose_power(self) -> None:
        """Forget what is not on the disk."""
        self.operations_left = None
        for file in self.files.values():
            file.lose_power(self.random)


def _apply(place: bytearray, offset: int, data: bytes) -> None:
    if offset < 0:
        _resize(place, -1 - offset)
    else:
        _put(place, offset, data)


def _put(place: bytearray, offset: int, data: bytes) -> None:
    if data:
        if len(place) < offset:
            place.extend(bytes(offset - len(place)))
        place[offset : offset + len(data)] = data


def _resize(place: bytearray, length: int) -> None:
    del place[length:]
    place.extend(bytes(length - len(place)))
