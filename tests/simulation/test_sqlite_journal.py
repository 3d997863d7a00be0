"""Durable: the real journal on a fake disk. What was committed survives power losses, failing syncs and full disks, and damage is an alarm."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from broker.journal import Journal
from broker.journal_files import JournalFiles
from protocol import facts
from protocol.errors import JournalCommitFailed, JournalDamaged, JournalError
from protocol.journal import decode_mark, encode_mark
from tests.simulation.disk import PLENTY
from tests.simulation.sqlite_disk import FakeJournalFiles, Machine

# SQLite goes on after the first error, to clean up, and meets others; apsw can raise one of them only and tells of the rest.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

Row = tuple[facts.GroupAccepted, bytes]
NUM_SEEDS, NUM_SEEDS_LONG = 120, 3000


@dataclass
class Machines:
    """Makes machines with disks of their own."""

    folder: Path
    made: list[Machine] = field(default_factory=list)

    def make(self, seed: int) -> tuple[Machine, Path]:
        """A machine, and where its journal is."""
        folder = self.folder / str(seed)
        folder.mkdir()
        self.made.append(Machine(folder, Random(f"disk {seed}")))
        return self.made[-1], folder / "journal.sqlite"


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """Machines, gone afterwards."""
    machines = Machines(tmp_path)
    yield machines
    for machine in machines.made:
        machine.stop(power=False)
        machine.unregister()


def a_group(number: int, random: Random) -> Row:
    return facts.GroupAccepted("a", "e", number, number, 1, [0, 2], 0, 12, 0.5), random.randbytes(random.choice([10, 3000, 40000]))


class LivesOfAJournal:
    """One process after the other writes to the same journal, each until something happens."""

    def __init__(self, machine: Machine, path: Path, seed: int, files: type[FakeJournalFiles] = FakeJournalFiles) -> None:
        self._machine, self._path, self._random, self._files = machine, path, Random(seed), files
        self._committed: list[Row] = []
        self._pending: list[Row] = []
        self.outcomes: Counter[str] = Counter()

    def live(self) -> None:
        """One process, from opening the journal to its end."""
        random, disk = self._random, self._machine.disk
        kind = random.choice(["power", "power", "kill", "sync", "full"])
        if kind == "power":
            disk.operations_left = random.randint(1, int(10 ** random.uniform(0, 4)))
        try:
            journal = Journal(self._path, "run", "{}", self._files(self._machine, self._path))
            self._compare(journal)
            disk.sync_failures = random.choice([0.2, 0.5]) if kind == "sync" else 0.0
            disk.capacity = PLENTY - disk.room() + random.randint(0, 200_000) if kind == "full" else PLENTY
            self._write(journal)
        except JournalCommitFailed:
            self.outcomes[f"failed, {kind}"] += 1
        disk.capacity = PLENTY
        self._machine.stop(power=random.random() < (0.9 if kind == "power" else 0.3))

    def _write(self, journal: Journal) -> None:
        for _ in range(self._random.randint(1, 15)):
            for _ in range(self._random.randint(1, 3)):
                self._append(journal)
            journal.commit()
            self._committed, self._pending = self._committed + self._pending, []
            self.outcomes["commits"] += 1
        if self._random.random() < 0.3:
            self._append(journal)

    def _append(self, journal: Journal) -> None:
        self._pending.append(a_group(len(self._committed) + len(self._pending), self._random))
        journal.append(*self._pending[-1], 1.0)

    def _compare(self, journal: Journal) -> None:
        found = [entry.fact for entry in journal.entries()]
        if found != [fact for fact, _ in self._committed]:
            assert found == [fact for fact, _ in self._committed + self._pending], "neither what was committed nor a whole transaction more"
            self._committed += self._pending
            self.outcomes["commits of which nobody was told"] += 1
        self._pending = []
        for fact, payload in self._committed:
            assert journal.payload(fact.ticket) == payload


def test_what_was_committed_is_there_and_half_a_transaction_never(machines: Machines, soak: bool) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(NUM_SEEDS_LONG if soak else NUM_SEEDS):
        journal = LivesOfAJournal(*machines.make(seed), seed)
        for _ in range(2 + seed % 6):
            journal.live()
        outcomes += journal.outcomes
    for outcome in ("commits", "failed, power", "failed, sync", "failed, full", "commits of which nobody was told"):
        assert outcomes[outcome] > 5, outcomes


class LogIsNotWrittenAgain(FakeJournalFiles):
    """Believes what the system shows after a sync has failed."""

    def write_log_again(self) -> None:
        pass


def test_without_writing_the_log_again_a_failed_sync_would_lose_what_is_committed_later(machines: Machines) -> None:
    with pytest.raises((AssertionError, JournalDamaged)):
        for seed in range(300):
            journal = LivesOfAJournal(*machines.make(seed), seed, LogIsNotWrittenAgain)
            for _ in range(2 + seed % 6):
                journal.live()


@pytest.mark.parametrize("power", [False, True])
def test_a_flipped_bit_is_an_alarm_or_harms_nothing(machines: Machines, power: bool, soak: bool) -> None:
    outcomes: Counter[tuple[str, str]] = Counter()
    for seed in range(600 if soak else 60):
        machine, path = machines.make(seed)
        committed = _written(machine, path, Random(seed))
        machine.stop(power=power)
        mark = decode_mark(bytes(machine.disk.open("journal.sqlite-mark").content))
        where = _flip(machine, Random(seed))
        try:
            journal = Journal(path, "run", "{}", FakeJournalFiles(machine, path))
            found = [entry.fact for entry in journal.entries()]
            payloads = [journal.payload(fact.ticket) for fact in found if isinstance(fact, facts.GroupAccepted)]
        except JournalError:
            outcomes[where, "alarm"] += 1
            continue
        assert list(zip(found, payloads, strict=True)) == committed[: len(found)]
        if len(found) < len(committed):
            # Only after a power loss: the mark is not synced, so it may have been lost, and then nothing is known.
            assert power and mark <= len(found)
        outcomes[where, "harmless" if len(found) == len(committed) else "not noticed"] += 1
    assert outcomes["journal.sqlite", "alarm"] and outcomes["journal.sqlite-wal", "alarm"], outcomes


def _written(machine: Machine, path: Path, random: Random) -> list[Row]:
    """A journal of some commits, in the log or (half the time) in the database; closed by nobody."""
    journal = Journal(path, "run", "{}", FakeJournalFiles(machine, path))
    committed: list[Row] = []
    for _ in range(random.randint(3, 40)):
        for _ in range(random.randint(1, 3)):
            committed.append(a_group(len(committed), random))
            journal.append(*committed[-1], 1.0)
        journal.commit()
    if random.random() < 0.5:
        journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return committed


def _flip(machine: Machine, random: Random) -> str:
    names = [name for name, file in machine.disk.files.items() if len(file) and not name.endswith("-mark")]
    name = random.choice(names)
    machine.disk.files[name].flip(random.randrange(len(machine.disk.files[name])), random.randrange(8))
    machine.write_out()
    return name


def test_a_journal_that_ends_before_its_mark_is_damaged_and_the_range_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path, "run", "{}")
    for number in range(5):
        journal.append(facts.ActorsDesired(number), b"", 0.0)
        journal.commit()
    journal.close()
    shortened = sqlite3.connect(path)
    shortened.execute("DELETE FROM events WHERE lsn > 3")
    shortened.commit()
    shortened.close()
    with pytest.raises(JournalDamaged, match="events 4 to 5: they were committed and are not there"):
        Journal(path, "run", "{}")


def test_a_mark_that_is_missing_or_damaged_says_nothing(tmp_path: Path) -> None:
    files = JournalFiles(tmp_path / "journal.sqlite")
    assert files.read_mark() == 0
    files.write_mark(41)
    files.write_mark(42)
    assert files.read_mark() == 42
    mark = encode_mark(42)
    for position in range(len(mark)):
        for bit in range(8):
            flipped = bytearray(mark)
            flipped[position] ^= 1 << bit
            assert decode_mark(bytes(flipped)) == 0
    assert decode_mark(mark[:-1]) == decode_mark(b"") == decode_mark(b"\xff" * 40) == 0


def test_writing_the_log_again_changes_nothing_in_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", "run", "{}")
    for number in range(50):
        journal.append(a_group(number, Random(number))[0], bytes(50_000), 0.0)
    journal.commit()
    log = tmp_path / "journal.sqlite-wal"
    before = log.read_bytes()
    JournalFiles(tmp_path / "journal.sqlite").write_log_again()
    assert log.read_bytes() == before and len(before) > 1 << 20
    assert len(journal.entries()) == 50
    journal.close()
