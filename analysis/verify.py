"""Checking a recording as a whole: what is on the disk is what was written, and what was written keeps the run's promises.

One pass over the events, with the tables read beside them, so memory does not grow with the payloads. Events are checked to the end,
whatever is missing between; the promises are counted up to the first damage, because what follows it cannot be told.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

import blake3
import msgspec

from analysis.account import Account
from analysis.recording import Recording, decode_fact
from analysis.recount import Recount, Recounter
from analysis.rows import Unreadable, readable_rows
from analysis.tables import COLUMNS, TableReader, check_payload, row_of
from protocol import facts
from protocol.journal import read_mark
from protocol.messages import CHUNK_BYTES
from protocol.weights import BlobRef

MAX_FINDINGS = 20
"""Of each check, as many are told in words; the rest is counted."""


@dataclass(slots=True)
class Check:
    """One check: its figures in words, and what it found wrong."""

    name: str
    figures: str = ""
    findings: list[str] = field(default_factory=list)
    num_findings: int = 0

    def broken(self, text: str) -> None:
        """Note a finding."""
        self.num_findings += 1
        if self.num_findings <= MAX_FINDINGS:
            self.findings.append(text)

    def lines(self) -> list[str]:
        """The check for a person: one line, and one more for each finding."""
        rest = self.num_findings - len(self.findings)
        more = [f"  and {rest} more"] if rest else []
        return [
            f"{'BROKEN' if self.num_findings else 'ok':<7}{self.name:<10}{self.figures}",
            *(f"  {text}" for text in self.findings),
            *more,
        ]


def verify(run: Path) -> list[Check]:
    """Check the recording of a run, which may still be going on. Raises JournalError if it cannot be opened at all."""
    with Recording(run) as recording:
        return [_sqlite(recording), *_Pass(recording).checks()]


def _sqlite(recording: Recording) -> Check:
    check = Check("sqlite")
    try:
        found = [str(text) for (text,) in recording.connection.execute("PRAGMA integrity_check")]
    except sqlite3.DatabaseError as error:
        found = [str(error)]
    for text in found:
        if text != "ok":
            check.broken(text)
    check.figures = f"integrity_check: {'ok' if not check.num_findings else 'see below'}, {recording.path.stat().st_size} bytes"
    return check


class _Pass:
    """The one pass over events and tables, and what is known of the run while it goes on."""

    def __init__(self, recording: Recording) -> None:
        self._recording, pacing = recording, recording.config().pacing
        self._events, self._tables, self._groups = Check("events"), Check("tables"), Check("groups")
        self._tickets, self._lags, self._versions = Check("tickets"), Check("lags"), Check("versions")
        tables = [name for name in COLUMNS if name in recording.tables()]
        for name in sorted(set(COLUMNS) - {"sessions"} - set(tables)):
            self._tables.broken(f"table {name} is not there")
        self._readers = {
            name: TableReader(
                recording.connection, name, recording.last_lsn, self._tables.broken, ", payload, digest" if name == "groups" else ""
            )
            for name in tables
        }
        self._account = Account(pacing, self._tickets.broken)
        self._recounter = Recounter(pacing, self._versions_of)
        self._open_versions: dict[int, list[int]] = {}
        """The versions in the group of every ticket that has one and is in no batch yet."""
        self._blobs = KeptBlobs()
        self._num_events = self._num_versions = self._num_payload_bytes = self._num_groups = 0
        self._whole_until: int | None = None
        """The last event before the first damage; None if there is none."""

    def checks(self) -> list[Check]:
        """Run the pass; what each check found."""
        expected = 1
        for row in readable_rows(self._recording.connection, "events", "lsn, time, fact, body", self._recording.last_lsn):
            if isinstance(row, Unreadable):
                self._damage(row.first, row.last, f"cannot be read: {row.problem}")
                expected = row.last + 1
                continue
            lsn, _, name, body = row
            if lsn < expected:
                self._damage(lsn, lsn, "stand in the wrong place")
                continue
            if lsn > expected:
                self._damage(expected, lsn - 1, "are missing")
            expected = lsn + 1
            self._event(lsn, name, body)
        if expected <= self._recording.last_lsn:
            self._damage(expected, self._recording.last_lsn, "are missing, but tables have rows of them")
        if (marked := read_mark(self._recording.path)) > self._recording.last_lsn and self._recording.is_at_its_end():
            self._damage(self._recording.last_lsn + 1, marked, "were committed and are not there (the end of the journal is lost)")
        for reader in self._readers.values():
            reader.finish()
        self._tell()
        return [
            self._events, self._tables, self._groups, self._versions, self._tickets, self._lags,
            check_blobs(self._recording, self._blobs),
        ]  # fmt: skip

    def _damage(self, first: int, last: int, problem: str) -> None:
        self._events.broken(f"events {first} to {last} {problem}")
        if self._whole_until is None:
            self._whole_until = first - 1

    def _event(self, lsn: int, name: str, body: str) -> None:
        self._num_events += 1
        try:
            fact = decode_fact(body)
        except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as error:
            self._damage(lsn, lsn, f"do not decode: {error}")
            return
        if type(fact).__name__ != name:
            self._events.broken(f"event {lsn} is {type(fact).__name__} in its body and {name} in column fact")
        if isinstance(fact, facts.RunStarted) and fact.recovered_facts != lsn - 1:
            self._events.broken(f"event {lsn}: the broker started after {fact.recovered_facts} facts, {lsn - 1} are before it")
        self._laid_out(lsn, fact)
        self._blobs.add(fact)
        if isinstance(fact, facts.VersionPublished):
            self._version(fact)
        if self._whole_until is None:
            self._account.add(lsn, fact)
            self._recounter.add(fact)

    def _laid_out(self, lsn: int, fact: facts.AnyFact) -> None:
        """Compare a fact with its row, and a group with its payload."""
        expected = row_of(lsn, fact)
        reader = self._readers.get(expected[0]) if expected is not None else None
        row = reader.match(expected[1]) if reader is not None and expected is not None else None
        if isinstance(fact, facts.GroupAccepted):
            self._open_versions[fact.ticket] = fact.versions
            if row is not None:
                self._num_groups += 1
                group = check_payload(fact, row[-2], row[-1], self._groups.broken)
                if group is not None:
                    self._num_payload_bytes += len(row[-2])
                    self._open_versions[fact.ticket] = sorted(set(group.versions.tolist()))
        elif isinstance(fact, facts.TicketEnded):
            self._open_versions.pop(fact.ticket, None)

    def _versions_of(self, ticket: int) -> list[int]:
        """The versions of a ticket's tokens as its payload has them (a damaged one is told by itself: then as its event has them)."""
        return self._open_versions.pop(ticket, [])

    def _version(self, fact: facts.VersionPublished) -> None:
        number = fact.version.number
        if number != self._num_versions and self._whole_until is None:
            self._versions.broken(f"version {number} was published where {self._num_versions} is the next number")
        if fact.delta is not None and not 0 <= fact.parent < number:
            self._versions.broken(f"version {number} is a delta against version {fact.parent}, which is no earlier one")
        self._num_versions = number + 1

    def _tell(self) -> None:
        """Put the figures of the pass into words."""
        upto = "" if self._whole_until is None else f"; only up to event {self._whole_until}, where the damage begins"
        self._events.figures = f"{self._num_events} events, numbers 1 to {self._recording.last_lsn}"
        rows = ", ".join(f"{reader.num_rows} {name}" for name, reader in self._readers.items())
        self._tables.figures = f"compared row for row with the events: {rows}"
        self._groups.figures = f"{self._num_groups} payloads against their checksums and events, {self._num_payload_bytes} bytes"
        self._versions.figures = f"{self._num_versions} versions, each a delta from an earlier one, a snapshot or the base"
        self._tickets.figures = f"conserved after every event: {self._account.figures()}{upto}"
        count = self._recounter.finish()
        for text in count.broken:
            self._lags.broken(text)
        self._compare(count)
        self._lags.figures = (
            f"from the tokens {dict(sorted(count.lags.items()))}, by the ledger {dict(sorted(count.ledger_lags.items()))}, largest by the "
            f"learner {count.learner_largest_lag}, S = {count.pacing.max_lag}{upto}"
        )

    def _compare(self, count: Recount) -> None:
        """The same numbers must come out of the two counts, and of ledger, learner and tokens."""
        if count.lags != count.ledger_lags or count.learner_largest_lag != count.largest_lag:
            self._lags.broken("the counts of ledger, learner and journal do not agree")
        counts = self._account.counts
        pairs = {
            "issued": (len(count.issued), self._account.num_issued),
            "consumed": (len(count.consumed), counts["consumed"]),
            "ended unused": (len(count.ended), counts["expired"] + counts["failed"] + counts["void"]),
        }
        for name, (found, kept) in pairs.items():
            if found != kept:
                self._tickets.broken(f"{found} tickets were {name} by their facts, {kept} by the account")


# --- blobs


class KeptBlobs:
    """The files that the store must still hold, by the facts so far: as the broker decides it, in broker/publications.py."""

    def __init__(self) -> None:
        self._deltas: dict[int, list[BlobRef]] = {}
        self._snapshots: list[BlobRef] = []
        self._anchor: list[BlobRef] = []

    def add(self, fact: facts.AnyFact) -> None:
        """Take the next fact into account."""
        match fact:
            case facts.VersionPublished():
                self._deltas[fact.version.number] = [blob for blob in (fact.delta, fact.compact) if blob is not None]
                self._snapshots += [fact.snapshot] if fact.snapshot is not None else []
            case facts.VersionAnchored():
                self._anchor = [fact.delta]
            case facts.DeltasDropped():
                self._deltas = {number: blobs for number, blobs in self._deltas.items() if number > fact.through}

    def files(self) -> dict[str, str]:
        """What each kept file is for, by digest."""
        named = {blob.digest: f"delta of version {number}" for number, blobs in self._deltas.items() for blob in blobs}
        named |= {blob.digest: "snapshot" for blob in self._snapshots}
        return named | {blob.digest: "anchor" for blob in self._anchor}


def check_blobs(recording: Recording, kept: KeptBlobs) -> Check:
    """Whether the files that must still be in the store are, with the bytes that their names say."""
    check = Check("blobs")
    if not recording.blobs.is_dir():
        check.figures = "there is no folder blobs/ here: not checked"
        return check
    policy = {file.blob.digest: f"policy file {file.name}" for file in recording.policy_files()}
    num_bytes, missing, checked = 0, [], 0
    for digest, name in (policy | kept.files()).items():
        size = _check_blob(recording.blobs / digest, digest, name, check)
        if size is None:
            missing.append(digest)
        else:
            num_bytes, checked = num_bytes + size, checked + 1
    if missing:
        _excuse(recording, kept)
        for digest in missing:
            purpose = (policy | kept.files()).get(digest)
            if purpose is not None:
                check.broken(f"{purpose}: blob {digest[:16]} is not in the store")
    known = f"{len(policy)} policy files" if policy else "no run.json: policy files not checked"
    check.figures = f"{checked} files kept, {num_bytes} bytes ({known})"
    return check


def _check_blob(path: Path, digest: str, name: str, check: Check) -> int | None:
    """The size of a blob, None if it is not there."""
    hasher, size = blake3.blake3(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                hasher.update(block)
                size += len(block)
    except FileNotFoundError:
        return None
    except OSError as error:
        check.broken(f"{name}: blob {digest[:16]} cannot be read: {error.strerror}")
        return size
    if hasher.hexdigest() != digest:
        check.broken(f"{name}: blob {digest[:16]} does not have the bytes that its name says")
    return size


def _excuse(recording: Recording, kept: KeptBlobs) -> None:
    """A run that goes on drops files, and says so in the journal before it does: read what it has written since."""
    since = recording.last_lsn + 1
    recording.refresh()
    for entry in recording.facts(facts.VersionAnchored, facts.DeltasDropped, since=since):
        kept.add(entry.fact)
