"""The journal's tables against its events: every row must say what the fact with its lsn says, and every such fact must have its row."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any, Final

import blake3

from analysis.rows import Row, Unreadable, readable_rows
from protocol import facts
from protocol.errors import InvalidGroup
from protocol.groups import Group, decode_group

COLUMNS: Final = {
    "groups": ("lsn", "ticket", "attempt", "actor", "epoch", "oldest_version", "newest_version", "oldest_step", "num_tokens", "reward"),
    "batches": ("lsn", "batch", "step", "tickets"),
    "steps": ("lsn", "step", "lineage", "batch", "largest_lag", "lags", "metrics"),
    "versions": (
        "lsn", "number", "step", "lineage", "root", "parent", "delta", "delta_bytes", "snapshot", "snapshot_bytes", "full_bytes", "bound_bytes",
    ),
    "sessions": ("lsn", "session", "lineage", "step", "world_size", "environment"),
}  # fmt: skip
"""The columns that repeat a fact, by table. Those that hold JSON are compared as what they mean."""
JSON: Final = {"tickets", "lags", "metrics", "environment"}


def row_of(lsn: int, fact: facts.AnyFact) -> tuple[str, Row] | None:
    """The table and row that a fact is laid out as, columns as in COLUMNS; None for facts that stand in `events` alone."""
    match fact:
        case facts.GroupAccepted():
            oldest, newest = fact.versions[0], fact.versions[-1]
            place = (lsn, fact.ticket, fact.attempt, fact.actor, fact.epoch)
            return "groups", (*place, oldest, newest, fact.oldest_step, fact.num_tokens, fact.reward)
        case facts.BatchFormed():
            return "batches", (lsn, fact.batch, fact.step, fact.tickets)
        case facts.StepCommitted():
            return "steps", (lsn, fact.step, fact.lineage, fact.batch, max(fact.lags, default=None), fact.lags, fact.metrics)
        case facts.VersionPublished(version=version, delta=delta, snapshot=snapshot):
            files = tuple(part for blob in (delta, snapshot) for part in ((blob.digest, blob.size) if blob is not None else (None, None)))
            numbers = (version.number, version.step, version.lineage, version.root)
            return "versions", (lsn, *numbers, fact.parent, *files, fact.full_bytes, fact.bound_bytes)
        case facts.LearnerStarted():
            return "sessions", (lsn, fact.session, fact.lineage, fact.step, fact.world_size, fact.environment)
    return None


class TableReader:
    """One table read beside the events, both in order of lsn. `broken` is called with each difference, in words."""

    def __init__(self, connection: sqlite3.Connection, name: str, last: int, broken: Callable[[str], None], extra: str = "") -> None:
        """`extra` names more columns to be read; they follow those of COLUMNS in what `match` returns."""
        self.name, self.num_rows, self._broken = name, 0, broken
        self._rows = readable_rows(connection, name, ", ".join(COLUMNS[name]) + extra, last)
        self._unreadable = Unreadable(0, -1, "")
        self._next: Row | None = self._advance()

    def match(self, expected: Row) -> Row | None:
        """The row of a fact that is laid out as `expected`, whose lsn is above that of the last call; None if there is none."""
        lsn = expected[0]
        self._skip(lsn)
        row = self._next
        if row is None or row[0] != lsn:
            if not self._unreadable.first <= lsn <= self._unreadable.last:
                self._broken(f"table {self.name}: event {lsn} has no row")
            return None
        for column, found, wanted in zip(COLUMNS[self.name], row, expected, strict=False):
            if (_decoded(found) if column in JSON else found) != wanted:
                self._broken(f"table {self.name}, row of event {lsn}: {column} is {str(found)[:80]}, the event says {str(wanted)[:80]}")
        self._next = self._advance()
        return row

    def finish(self) -> None:
        """Read what is left: rows that no event stands behind."""
        self._skip(None)

    def _skip(self, lsn: int | None) -> None:
        while self._next is not None and (lsn is None or self._next[0] < lsn):
            self._broken(f"table {self.name}: the row of event {self._next[0]} has no event of its kind")
            self._next = self._advance()

    def _advance(self) -> Row | None:
        for row in self._rows:
            if not isinstance(row, Unreadable):
                self.num_rows += 1
                return row
            self._unreadable = row
            self._broken(f"table {self.name}: rows of events {row.first} to {row.last} cannot be read: {row.problem}")
        return None


def check_payload(fact: facts.GroupAccepted, payload: Any, digest: Any, broken: Callable[[str], None]) -> Group | None:
    """The group of an accepted fact, None if its payload is damaged; contradictions between the two are told to `broken`."""
    name = f"group of ticket {fact.ticket}, attempt {fact.attempt}"
    if not isinstance(payload, bytes) or blake3.blake3(payload).digest() != digest:
        broken(f"{name}: its payload does not match its checksum")
        return None
    try:
        group = decode_group(payload)
    except InvalidGroup as error:
        broken(f"{name}: its payload does not decode ({error})")
        return None
    versions = sorted(set(group.versions.tolist()))
    for what, found, wanted in (
        ("ticket", group.ticket, fact.ticket),
        ("tokens", group.token_ids.size, fact.num_tokens),
        ("versions", versions, fact.versions),
        ("mean reward", float(group.rewards.mean(dtype="float64")), fact.reward),
    ):
        if found != wanted:
            broken(f"{name}: {what} are {found} in the payload, {wanted} in its event")
    return group


def _decoded(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text
