"""A run recorded by an earlier version: it replays as it is, unchanged, and a broker that goes on with it brings it up to date."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from analysis.recount import recount
from broker.journal import Journal
from deploy.rundir import RunDirectory
from deploy.wiring import make_broker
from protocol.errors import JournalError
from protocol.journal import FORMAT_VERSION, MIGRATIONS, migrate, open_read_only, read_facts
from tests.replay.recording import listing

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_run_of_format_1_replays_elsewhere_within_its_tolerance_and_is_not_changed(
    archived: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """As a user types it, with a process for the rank."""
    before = listing(archived)
    done = cli("replay", str(archived))
    assert done.returncode == 0, done.stderr
    assert "the run did not record what its learner ran on" in done.stdout
    assert "within a drift of 100.0%" in done.stdout
    assert "of 25 versions have the recorded root" in done.stdout or "all 25 versions have the recorded root" in done.stdout
    assert listing(archived) == before


def test_a_run_of_format_1_replays_from_its_checkpoint(archived: Path, replay: Callable[..., Any], capsys: Any) -> None:
    found, _ = replay(archived, first=20)
    assert found.first == 8
    assert found.results[0].end == 24 and found.results[0].difference is None
    assert "the run did not record what its learner ran on" in capsys.readouterr().out


@pytest.mark.parametrize("is_recent", [False, True], ids=["format-1", "now"])
def test_a_run_on_a_medium_that_cannot_be_written_replays(is_recent: bool, archived: Path, recording: Path) -> None:
    """A journal that is read in WAL mode wants files beside it."""
    run = recording if is_recent else archived
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom broker.history import read_history\n"
        f"print(read_history(Path({str(run / 'journal.sqlite')!r})).num_steps)"
    )
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x" 2>/dev/null && exec "$1" -c "$2"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(run), sys.executable, code]
    if subprocess.run(["unshare", "--mount", "--map-root-user", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount anything")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "10\n" if is_recent else "24\n"), done.stderr


def test_reading_leaves_no_file_beside_a_journal_and_sees_what_a_writer_has_committed(tmp_path: Path) -> None:
    from protocol import facts

    path = tmp_path / "a folder?with#signs" / "journal.sqlite"
    path.parent.mkdir()
    journal = Journal(path, "run", "{}")
    journal.append(facts.RunStarted("run", 0), b"", 1.0)
    journal.commit()
    with closing(open_read_only(path)) as reader:
        assert len(list(read_facts(reader, path))) == 1
        journal.append(facts.RunEnded(""), b"", 2.0)
        journal.commit()
        assert len(list(read_facts(reader, path))) == 2
    journal.close()
    with closing(open_read_only(path)) as reader:
        assert len(list(read_facts(reader, path))) == 2
        with pytest.raises(sqlite3.OperationalError):
            reader.execute("DELETE FROM events")
    assert [file.name for file in path.parent.iterdir() if file.name.endswith(("-wal", "-shm"))] == []


def rows(path: Path, table: str) -> list[tuple[Any, ...]]:
    with closing(open_read_only(path)) as journal:
        return journal.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()


def test_a_broker_that_goes_on_with_format_1_brings_it_up_to_date_with_everything_in_it(archived: Path) -> None:
    path = archived / "journal.sqlite"
    tables = ("events", "groups", "batches", "versions", "steps")
    before, counted = {table: rows(path, table) for table in tables}, recount(path)
    assert dict(rows(path, "meta"))["format"] == "1"
    make_broker(RunDirectory(archived)).close()
    assert dict(rows(path, "meta"))["format"] == str(FORMAT_VERSION)
    for table in tables:
        assert rows(path, table)[: len(before[table])] == before[table]
    assert {row[2] for row in rows(path, "events")[len(before["events"]) :]} <= {"RunStarted"}
    with closing(open_read_only(path)) as journal:
        started = journal.execute("SELECT lsn, body ->> 'session', 0, 0, 1 FROM events WHERE fact = 'LearnerStarted'").fetchall()
    assert [row[:5] for row in rows(path, "sessions")] == started != []
    assert {row[5] for row in rows(path, "sessions")} == {"{}"}
    again = recount(path)
    assert (again.broken, again.lags, again.issued, again.consumed) == ([], counted.lags, counted.issued, counted.consumed)


def test_a_format_from_the_future_is_refused_and_left_as_it_is(archived: Path) -> None:
    path = archived / "journal.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as journal:
        journal.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    with pytest.raises(JournalError, match=f"has format 99, this program reads 1 to {FORMAT_VERSION}"):
        open_read_only(path)
    with pytest.raises(JournalError, match="format 99"):
        Journal(path, "recorded", "{}")
    with closing(sqlite3.connect(path)) as journal:
        assert journal.execute("SELECT value FROM meta WHERE key = 'format'").fetchone() == ("99",)
        assert journal.execute("SELECT count(*) FROM sqlite_master WHERE name = 'sessions'").fetchone() == (0,)


@pytest.mark.parametrize("num_statements", range(len(MIGRATIONS[1]) + 3))
def test_a_migration_that_is_cut_short_leaves_format_1_whole(num_statements: int, archived: Path) -> None:
    """The process dies without a word after so many statements: BEGIN, those of the migration, the format, before the COMMIT."""
    path = archived / "journal.sqlite"
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import sqlite3\nfrom pathlib import Path\nfrom protocol.journal import migrate\n"
        "class Dying:\n"
        "    left = int(sys.argv[2])\n"
        "    connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "    def execute(self, statement, *values):\n"
        "        if not statement.startswith('SELECT'):\n"
        "            if not self.left: os._exit(9)\n"
        "            self.left -= 1\n"
        "        return self.connection.execute(statement, *values)\n"
        "migrate(Dying(), Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(num_statements)], check=False, timeout=60)
    assert done.returncode == 9
    assert len(rows(path, "events")) > 0
    with closing(sqlite3.connect(path, isolation_level=None)) as journal:
        assert journal.execute("SELECT value FROM meta WHERE key = 'format'").fetchone() == ("1",)
        assert journal.execute("SELECT count(*) FROM sqlite_master WHERE name = 'sessions'").fetchone() == (0,)
        migrate(journal, path)
        assert journal.execute("SELECT count(*) FROM sessions").fetchone() == (1,)
