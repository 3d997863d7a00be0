"""The fake disk loses what a disk may lose, and nothing else; and the simulated journal makes of that what SQLite does."""

from __future__ import annotations

from random import Random

import pytest

from protocol import facts
from protocol.errors import JournalCommitFailed, JournalDamaged
from tests.simulation.disk import FakeDisk, PowerLost
from tests.simulation.journal import NAME, SimulatedJournal


def test_what_was_synced_survives_and_what_was_not_may_vanish_or_tear() -> None:
    outcomes = set()
    for seed in range(200):
        disk = FakeDisk(Random(seed))
        file = disk.open("file")
        file.write(0, b"a" * 1000)
        file.sync()
        file.write(1000, b"b" * 1000)
        disk.lose_power()
        assert file.read(0, 1000) == b"a" * 1000
        outcomes.add(file.read(1000, 2000))
    assert b"" in outcomes and b"b" * 1000 in outcomes
    assert any(0 < outcome.count(b"b") < 1000 for outcome in outcomes)


def test_a_sync_that_failed_does_not_make_the_next_one_keep_what_it_lost() -> None:
    lost = False
    for seed in range(50):
        disk = FakeDisk(Random(seed))
        file = disk.open("file")
        file.write(0, b"a" * 600)
        disk.sync_failures = 1.0
        with pytest.raises(OSError, match="input/output"):
            file.sync()
        disk.sync_failures = 0.0
        file.sync()
        assert file.read(0, 600) == b"a" * 600, "the cache still has it"
        disk.lose_power()
        lost = lost or file.read(0, 600) != b"a" * 600
    assert lost


def test_a_full_disk_takes_no_more_and_keeps_what_it_has() -> None:
    disk = FakeDisk(Random(0))
    file = disk.open("file")
    disk.capacity = 100
    file.write(0, b"a" * 100)
    with pytest.raises(OSError, match="no space"):
        file.write(50, b"b" * 51)
    file.write(50, b"b" * 50)
    assert len(file) == 100


def test_a_journal_comes_back_up_to_a_whole_transaction_wherever_the_power_goes() -> None:
    halves = 0
    for seed in range(300):
        random = Random(seed)
        disk = FakeDisk(random)
        journal, num_committed = SimulatedJournal(disk), 0
        disk.operations_left = random.randint(1, 12)
        try:
            while True:
                for number in range(3):
                    journal.append(facts.ActorsDesired(number), b"payload" * 500, 0.0)
                journal.commit()
                num_committed += 3
        except PowerLost:
            disk.lose_power()
        found = len(SimulatedJournal(disk).entries())
        assert found in (num_committed, num_committed + 3)
        halves += found > num_committed
    assert halves, "now and then the disk has a commit of which nobody knows that it returned"


def test_a_flipped_bit_is_damage_unless_it_is_in_the_last_transaction_which_may_be_torn() -> None:
    for seed in range(100):
        disk = FakeDisk(Random(seed))
        journal = SimulatedJournal(disk)
        for number in range(4):
            journal.append(facts.ActorsDesired(number), b"", 0.0)
            journal.commit()
        disk.open(NAME).flip(disk.random.randrange(journal.transactions[-1]), disk.random.randrange(8))
        with pytest.raises(JournalDamaged, match=r"event [1-3] and after"):
            SimulatedJournal(disk)


def test_a_commit_on_a_full_disk_fails_and_what_was_committed_is_there() -> None:
    disk = FakeDisk(Random(0))
    journal = SimulatedJournal(disk)
    journal.append(facts.ActorsDesired(1), b"", 0.0)
    journal.commit()
    disk.capacity = len(disk.open(NAME)) + 10
    journal.append(facts.ActorsDesired(2), b"", 0.0)
    with pytest.raises(JournalCommitFailed, match="no space"):
        journal.commit()
    assert [entry.fact for entry in SimulatedJournal(disk).entries()] == [facts.ActorsDesired(1)]
