"""docs/recording.md is right: its queries run as they stand, in sqlite3 and in DuckDB, while another process goes on writing."""

from __future__ import annotations

import math
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import duckdb_extension_sqlite_scanner
import pyarrow as pa
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = (ROOT / "docs" / "recording.md").read_text()
LIVE_STEPS = 60


def blocks(section: str) -> dict[str, str]:
    """The queries of a section of the document, by their headings."""
    text = DOCUMENT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"\n### (.+?)\n.*?```sql\n(.+?)```", text, re.DOTALL))


QUERIES = blocks("Queries")


def by_sqlite(path: Path, queries: dict[str, str]) -> dict[str, list[tuple[Any, ...]]]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return {name: connection.execute(query).fetchall() for name, query in queries.items()}
    finally:
        connection.close()


def by_duckdb(path: Path, queries: dict[str, str]) -> dict[str, list[tuple[Any, ...]]]:
    connection = duckdb.connect()
    try:
        file = next(Path(duckdb_extension_sqlite_scanner.__file__).parent.rglob("*.duckdb_extension"))
        connection.execute(f"LOAD '{file}'")
        connection.execute(f"ATTACH '{path}' AS journal (TYPE sqlite, READ_ONLY)")
        connection.execute("USE journal")
        return {name: connection.execute(query).fetchall() for name, query in queries.items()}
    finally:
        connection.close()


class Writer:
    """A broker in another process that goes on recording."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.analysis.recorded", str(folder)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.path = folder / "journal.sqlite"

    def until(self, step: int) -> int:
        """Wait until the steps up to `step` are committed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if int(line) >= step:
                return int(line)
        pytest.fail("the writer ended")

    def stop(self) -> int:
        """End it; how many steps it came to."""
        last = 0
        if self._process.poll() is None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            last = max(map(int, self._process.stdout), default=0)
            self._process.wait(30)
            self._process.stdout.close()
        return last


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writer]:
    """A writer that has come some way."""
    started = Writer(tmp_path_factory.mktemp("live") / "run")
    started.until(LIVE_STEPS)
    yield started
    started.stop()


def test_the_document_has_ten_queries_and_more() -> None:
    assert len(QUERIES) >= 10
    assert len(blocks("Queries on an export")) == DOCUMENT.split("\n## Queries on an export\n")[1].count("```sql")
    assert len(QUERIES) + len(blocks("Queries on an export")) == DOCUMENT.count("```sql")


@pytest.mark.parametrize("read", [by_sqlite, by_duckdb], ids=["sqlite3", "DuckDB"])
def test_every_query_runs_while_the_run_goes_on_and_sees_what_was_just_committed(writer: Writer, read: Callable[..., Any]) -> None:
    before = writer.until(1)
    count = {"steps": "SELECT count(*) FROM steps"}
    first = read(writer.path, count)["steps"][0][0]
    found = read(writer.path, QUERIES)
    after = writer.until(first + 1)
    assert before <= first < after, "the writer was writing all the time"
    waited = sum(row[1] for row in found["What the learner waited, by 50 steps"])
    assert waited >= first
    assert sum(row[2] for row in found["Lag of the groups that each step used"]) >= 2 * first


def test_both_give_the_same_answers_and_the_right_ones(eventful: Path) -> None:
    path = eventful / "journal.sqlite"
    in_sqlite, in_duckdb = by_sqlite(path, QUERIES), by_duckdb(path, QUERIES)
    for name in QUERIES:
        assert len(in_sqlite[name]) == len(in_duckdb[name]) > 0, name
        for ours, theirs in zip(in_sqlite[name], in_duckdb[name], strict=True):
            assert all(a == b or math.isclose(a, b) for a, b in zip(ours, theirs, strict=True)), (name, ours, theirs)
    answer = in_sqlite
    assert sum(num for _, _, num in answer["Lag of the groups that each step used"]) == 2 * 9, "eight steps, one of them twice"
    assert sum(num for _, num, _ in answer["Reward by the age of the version"]) == 16
    assert answer["Slowest tickets"][0][4] > 0
    assert {row[0]: row[3] for row in answer["Actors by tokens and share of time"]} == pytest.approx({"a": 0.5, "b": 0.5})
    assert {row[1:3] for row in answer["Expired, failed, void and refused, by reason"]} == {
        ("expired", "its group arrived too old for its batch"),
        ("failed", "reward raised"),
        ("refused", "already ended"),
        ("refused", "invalid: malformed"),
        ("refused", "stale"),
    }
    assert sum(row[4] for row in answer["Tokens sampled per policy version"]) == 18 * 7
    assert answer["What the learner waited, by 50 steps"] == [(0, 9, pytest.approx(0.27), pytest.approx(0.18))]
    assert [row[0] for row in answer["Groups whose tokens span versions"]] == [9, 15]
    assert answer["Delta bytes against full bytes"][0][0] == 9
    assert 0 < answer["Groups without an advantage"][0][1] < 1
    assert ("orphaned", 2) in answer["Tickets that were sampled more than once, and why"]


def test_duckdb_queries_tables_that_python_has_read(eventful: Path) -> None:
    journal = sqlite3.connect(f"file:{eventful / 'journal.sqlite'}?mode=ro", uri=True)
    journal.row_factory = sqlite3.Row
    steps = pa.Table.from_pylist([dict(row) for row in journal.execute("SELECT * FROM steps")])
    journal.close()
    with duckdb.connect() as connection:
        connection.register("steps", steps)
        assert connection.execute("SELECT max(step), max(largest_lag) FROM steps").fetchall() == [(7, 2)]


def test_queries_on_an_export(eventful: Path, inspect: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inspect("export", eventful, "run.parquet")
    with duckdb.connect() as connection:
        found = {name: connection.execute(query).fetchall() for name, query in blocks("Queries on an export").items()}
    per_version = found["Tokens by the version that each was sampled from"]
    assert sum(num for _, num in per_version) == 18 * 7
    assert dict(per_version)[2] == 4, "the older half of the group that spans versions 2 and 3"
    assert all(text.endswith("+3=") for _, text, _, _ in found["Prompts whose completions always had the same reward"])
