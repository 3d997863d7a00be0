"""What the toy processes write down for the checker: each record is on the disk before the process goes on.

One file for each process that ever ran, so only the last line of a file can be cut short by a kill, and such a line says nothing.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec
from msgspec import Struct


class Record(Struct, frozen=True, tag=True):
    """Base of all records."""


class Submitting(Record, frozen=True):
    """An actor is about to hand in a group, as result `seq` of this process; `digest` is the BLAKE3 of its payload, `versions` are those
    of its tokens."""

    actor: str
    incarnation: int
    seq: int
    ticket: int
    attempt: int
    digest: str
    versions: list[int]


class GivingUp(Record, frozen=True):
    """An actor is about to give up a ticket, as result `seq` of this process."""

    actor: str
    incarnation: int
    seq: int
    ticket: int
    attempt: int


class Acknowledged(Record, frozen=True):
    """The broker has acknowledged result `seq` of this process of the actor."""

    actor: str
    incarnation: int
    seq: int


class Resumed(Record, frozen=True):
    """A learner session began as `lineage` with theta_step. Its steps mix `salt` into the chain: not empty means it is not deterministic."""

    incarnation: int
    lineage: int
    step: int
    chain: str
    salt: str


class Trained(Record, frozen=True):
    """theta_{step+1} was computed. `digests` and `tickets` are those of the groups, as the payloads themselves have them."""

    lineage: int
    step: int
    batch: int
    tickets: list[int]
    digests: list[str]
    lags: list[int]
    chain: str
    """The chain of theta_{step+1}."""


class Confirmed(Record, frozen=True):
    """The broker has answered that all steps before `step` of this lineage are in the journal."""

    lineage: int
    step: int


class Announcing(Record, frozen=True):
    """The learner is about to publish theta_step."""

    lineage: int
    number: int
    step: int
    root: str
    chain: str


class Announced(Record, frozen=True):
    """The broker has answered that theta_step is published under `number`."""

    lineage: int
    number: int
    step: int
    root: str


class Saved(Record, frozen=True):
    """The checkpoint of theta_step is on the disk."""

    step: int


class Complaint(Record, frozen=True):
    """A process found a contradiction itself."""

    text: str


AnyRecord = Submitting | GivingUp | Acknowledged | Resumed | Trained | Confirmed | Announcing | Announced | Saved | Complaint
_decoder = msgspec.json.Decoder[AnyRecord](AnyRecord)


def engine_name(incarnation: int) -> str:
    """What a process of an actor tells the broker about itself, so that the journal links its epoch to this incarnation."""
    return f"toy/{incarnation}"


class Log:
    """The records of one process. May be used by several threads."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._lock = threading.Lock()

    def write(self, record: AnyRecord) -> None:
        """Returns once the record is on the disk."""
        with self._lock:
            self._file.write(msgspec.json.encode(record) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def read_log(path: Path) -> list[AnyRecord]:
    """All whole records of a process."""
    lines = path.read_bytes().split(b"\n")
    return [_decoder.decode(line) for line in lines[:-1]]
