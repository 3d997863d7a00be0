"""How much of a channel's traffic libzmq may hold for one peer, in bytes. Derived, never configured.

Invariant: a peer that keeps to the protocol does not reach `Limits.held` as long as the broker takes in messages several times a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from protocol.config import Config
from protocol.groups import MAX_GROUP_BYTES
from protocol.messages import CHUNK_BYTES

REQUEST_BYTES: Final = 1 << 20
"""The longest lists a peer may send (65,536 tickets or lags of nine bytes), texts and metrics included."""
HEADER_BYTES: Final = 1 << 16
"""What goes with a payload, and everything on channels without lists."""
PROMPT_BYTES: Final = 1 << 20
"""A group's prompt (262,144 tokens), its names and msgpack's own bytes."""
NUM_AHEAD: Final = 4
"""The largest messages of one peer that may wait or be on their way; the broker takes them in every few milliseconds."""
SLACK_BYTES: Final = 1 << 16
"""Handshake, encryption (33 bytes a frame) and the frames' own headers."""
NUM_ANSWERS: Final = 256
"""Small ones; an actor may have 64 results under way, each of which may be followed by a ticket, and libzmq counts half a mark late."""
NUM_STATUSES: Final = 4
NUM_GROUPS: Final = 40
"""A learner keeps at most 16 groups asked for; twice that and some, as libzmq counts half a mark late."""
NUM_PIECES: Final = 20
"""A client keeps at most eight pieces asked for; a relay also says that a file is coming. Twice that, as above."""
SHARE_OF_MEMORY: Final = 8


class Limits(NamedTuple):
    """What one channel takes and gives: bytes of a frame, bytes of one connection that libzmq may have read and not handed over, answers."""

    frame: int
    held: int
    num_answers: int


def limits(header: int, payload: int, num_answers: int, num_ahead: int = NUM_AHEAD) -> Limits:
    """The limits of a channel whose messages have at most so many bytes; a message with a payload has a header of HEADER_BYTES at most."""
    return Limits(max(header, payload), num_ahead * max(header, payload + HEADER_BYTES) + SLACK_BYTES, num_answers)


def control() -> Limits:
    """Small questions, and answers of up to megabytes."""
    return limits(HEADER_BYTES, 0, NUM_STATUSES)


def actors(config: Config) -> Limits:
    """Reports, and groups as large as the run's configuration lets them be."""
    return limits(REQUEST_BYTES, largest_group(config), NUM_ANSWERS)


def learner() -> Limits:
    """Requests without payloads; the answers carry groups."""
    return limits(REQUEST_BYTES, 0, NUM_GROUPS)


def blobs() -> Limits:
    """Pieces, both ways."""
    return limits(HEADER_BYTES, CHUNK_BYTES, NUM_PIECES, NUM_PIECES)


def relay() -> Limits:
    """Questions for pieces."""
    return limits(HEADER_BYTES, 0, NUM_PIECES)


def largest_group(config: Config) -> int:
    """Bytes of the largest group that a run can produce: 12 for a token (id, log-probability, version), 9 more for a completion."""
    rollout = config.rollout
    return min(MAX_GROUP_BYTES, rollout.group_size * (12 * rollout.max_tokens + 9) + PROMPT_BYTES)


def room_for_all() -> int:
    """Bytes that libzmq may hold for all peers together: an eighth of the memory that this process can have."""
    total = _number(Path("/proc/meminfo"), "MemTotal:") * 1024
    found = [size for size in (total, _number(Path("/sys/fs/cgroup/memory.max"))) if size]
    return min(found, default=1 << 32) // SHARE_OF_MEMORY


def _number(path: Path, after: str = "") -> int:
    """The number behind a word in a file of the kernel's, 0 if there is none."""
    try:
        words = path.read_text(encoding="ascii").split()
        return int(words[words.index(after) + 1 if after else 0])
    except (OSError, ValueError, IndexError):
        return 0
