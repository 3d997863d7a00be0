"""Which pieces of a file to ask for next. Pure: no sockets, no clock, no files.

Invariant: every byte of the file has been received, is asked for, or is missing; at most CREDIT pieces are asked for at a time.

A piece that takes long holds up heartbeats behind it and is lost whole when the connection is cut, so pieces are cut to what the link carries in
PIECE_SECONDS: small at first, up to CHUNK_BYTES.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from protocol.messages import CHUNK_BYTES

CREDIT: Final = 8
SMALLEST_BYTES: Final = 1 << 16
PIECE_SECONDS: Final = 0.25


class Piece(NamedTuple):
    """A part of a file."""

    offset: int
    length: int


class Pieces:
    """The state of one download."""

    def __init__(self, size: int) -> None:
        self._missing = [Piece(0, size)]
        self._asked: dict[int, Piece] = {}
        self._length = 2 * SMALLEST_BYTES

    @property
    def is_complete(self) -> bool:
        """Whether everything has been received."""
        return not self._missing and not self._asked

    @property
    def num_asked(self) -> int:
        """Pieces under way."""
        return len(self._asked)

    def ask(self) -> list[Piece]:
        """The pieces to ask for now."""
        wanted: list[Piece] = []
        while self._missing and len(self._asked) < CREDIT:
            offset, length = self._missing.pop(0)
            piece = Piece(offset, min(length, self._length))
            if piece.length < length:
                self._missing.insert(0, Piece(offset + piece.length, length - piece.length))
            self._asked[piece.offset] = piece
            wanted.append(piece)
        return wanted

    def receive(self, offset: int, length: int) -> bool:
        """A piece came; whether it was one asked for. Whatever else comes is an answer to a question asked before a cut."""
        if self._asked.get(offset) != Piece(offset, length):
            return False
        del self._asked[offset]
        return True

    def adapt(self, bytes_per_second: float) -> None:
        """Cut pieces to what the link carries, at most twice as long as before."""
        fitting = min(CHUNK_BYTES, 2 * self._length, int(bytes_per_second * PIECE_SECONDS))
        self._length = max(SMALLEST_BYTES, fitting)

    def lose(self) -> None:
        """The connection was cut: what was asked for is missing again."""
        self._missing = sorted([*self._asked.values(), *self._missing])
        self._asked.clear()
