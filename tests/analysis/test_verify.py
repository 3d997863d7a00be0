"""`inspect verify` finds what was done to a journal and names the place; a recording that is whole passes."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import Result

from analysis.account import Account
from analysis.verify import verify
from protocol import facts
from protocol.errors import JournalError
from protocol.journal import encode_mark
from protocol.pacing import Pacing
from tests.analysis.recorded import start

Inspect = Callable[..., Result]


def damage(run: Path, *statements: str) -> None:
    """Change a journal as nobody should."""
    with closing(sqlite3.connect(run / "journal.sqlite")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def ask(run: Path, query: str) -> int:
    with closing(sqlite3.connect(run / "journal.sqlite")) as connection:
        found: int = connection.execute(query).fetchone()[0]
        return found


def broken(run: Path) -> dict[str, list[str]]:
    """What is found, by check."""
    return {check.name: check.findings for check in verify(run) if check.num_findings}


def test_a_whole_recording_passes_with_figures(eventful: Path, inspect: Inspect) -> None:
    lines = inspect("verify", eventful, code=0).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", name] for name in ("sqlite", "events", "tables", "groups", "versions", "tickets", "lags", "blobs")
    ]
    assert "18 issued = 0 outstanding + 0 queued + 16 consumed + 1 expired + 1 failed + 0 void" in lines[5]
    assert "18 groups, 8 batches, 9 steps, 10 versions" in lines[2]
    assert "S = 2" in lines[6]


def test_a_journal_of_the_format_before_passes(copy: Path) -> None:
    damage(copy, "DROP TABLE sessions", "UPDATE meta SET value = '1' WHERE key = 'format'")
    assert broken(copy) == {}


def test_a_run_that_goes_on_passes_at_every_moment(tmp_path: Path) -> None:
    run = start(tmp_path / "run", 6)
    for step in range(4):
        assert broken(tmp_path / "run") == {}
        run.step(step)
        run.serve()
    run.broker.close()


def test_a_flipped_bit_in_a_payload_names_its_ticket_and_ends_with_4(copy: Path, inspect: Inspect) -> None:
    damage(copy, "UPDATE groups SET payload = cast(substr(payload, 1, 100) || x'ff' || substr(payload, 102) AS BLOB) WHERE ticket = 9")
    assert "BROKEN groups" in inspect("verify", copy, code=4).stdout
    assert broken(copy) == {"groups": ["group of ticket 9, attempt 1: its payload does not match its checksum"]}


@pytest.mark.parametrize(
    ("statement", "check", "said"),
    [
        ("DELETE FROM events WHERE lsn BETWEEN 20 AND 22", "events", "events 20 to 22 are missing"),
        ("DELETE FROM events WHERE lsn > 60", "events", "are missing, but tables have rows of them"),
        ("UPDATE events SET body = replace(body, '}', '') WHERE lsn = 30", "events", "events 30 to 30 do not decode"),
        (
            "UPDATE events SET fact = 'RunEnded' WHERE fact = 'RunStopping'",
            "events",
            "is RunStopping in its body and RunEnded in column fact",
        ),
        ("DELETE FROM groups WHERE ticket = 9", "tables", "has no row"),
        ("UPDATE groups SET reward = 0.25 WHERE ticket = 9", "tables", "reward is 0.25, the event says 1.0"),
        ("UPDATE batches SET tickets = '[0,2]' WHERE batch = 0", "tables", "tickets is [0,2], the event says [0, 1]"),
        ("UPDATE steps SET lags = '[0,0]' WHERE step = 2", "tables", "lags is [0,0]"),
        ("UPDATE steps SET metrics = replace(metrics, '0.03', '0.04') WHERE step = 2", "tables", "metrics is"),
        ("UPDATE versions SET step = 9 WHERE number = 3", "tables", "step is 9, the event says 3"),
        ("DELETE FROM versions WHERE number = 3", "tables", "has no row"),
        ("UPDATE sessions SET world_size = 4", "tables", "world_size is 4, the event says 1"),
        ("INSERT INTO batches VALUES (99, 3, 9, '[]')", "tables", "the row of event 3 has no event of its kind"),
        ("DROP TABLE steps", "tables", "table steps is not there"),
    ],
)
def test_what_was_changed_is_found_and_named(copy: Path, statement: str, check: str, said: str) -> None:
    damage(copy, statement)
    found = broken(copy)
    assert any(said in text for text in found[check]), found


@pytest.mark.parametrize(
    ("fact", "old", "new", "check", "said"),
    [
        ("StepCommitted", '"step":5', '"step":6', "lags", "the tokens say"),
        ("StepCommitted", '"lag_max":2.0', '"lag_max":1.0', "lags", "the learner's largest lag is 1.0"),
        ("BatchFormed", '"tickets":[9,10]', '"tickets":[9,7]', "tickets", "ticket 7 becomes batched, but it is ended already"),
        ("TicketEnded", '"ticket":14', '"ticket":2', "tickets", "ticket 2 becomes expired, but it is ended already"),
        ("TicketIssued", '"ticket":12,"attempt":1', '"ticket":12,"attempt":2', "tickets", "issued as attempt 2, after attempt 0"),
        ("VersionPublished", '"version":[3,3', '"version":[7,3', "versions", "version 7 was published where 3 is the next number"),
        ("GroupAccepted", '"versions":[2,3]', '"versions":[3]', "groups", "versions are [2, 3] in the payload, [3] in its event"),
        ("RunStarted", '"recovered_facts":0', '"recovered_facts":3', "events", "the broker started after 3 facts, 0 are before it"),
    ],
)
def test_a_fact_that_says_something_else_is_contradicted(copy: Path, fact: str, old: str, new: str, check: str, said: str) -> None:
    assert ask(copy, f"SELECT count(*) FROM events WHERE fact = '{fact}' AND instr(body, '{old}')") >= 1
    damage(copy, f"UPDATE events SET body = replace(body, '{old}', '{new}') WHERE fact = '{fact}'")
    found = broken(copy)
    assert any(said in text for text in found[check]), found


def test_events_behind_a_gap_are_still_compared_and_the_promises_counted_up_to_it(copy: Path) -> None:
    damage(copy, "DELETE FROM events WHERE lsn = 20", "UPDATE groups SET num_tokens = 1 WHERE ticket = 15 AND attempt = 2")
    checks = {check.name: check for check in verify(copy)}
    assert any("num_tokens is 1" in text for text in checks["tables"].findings)
    assert "only up to event 19, where the damage begins" in checks["lags"].figures
    assert not checks["lags"].findings


def test_many_findings_are_counted_and_the_first_are_told(copy: Path) -> None:
    damage(copy, "DELETE FROM events WHERE lsn % 2 = 0 AND lsn < (SELECT max(lsn) FROM events)")
    events = next(check for check in verify(copy) if check.name == "events")
    assert events.num_findings == (ask(copy, "SELECT max(lsn) FROM events") - 1) // 2 > len(events.findings)
    assert events.lines()[-1] == f"  and {events.num_findings - len(events.findings)} more"


def test_a_journal_that_ends_before_its_mark_has_lost_its_end(copy: Path) -> None:
    (copy / "journal.sqlite-mark").write_bytes(encode_mark(100_000))
    events = next(check for check in verify(copy) if check.name == "events")
    assert "to 100000 were committed and are not there (the end of the journal is lost)" in " ".join(events.findings)


def test_a_blob_that_must_be_kept_is_missed_and_a_changed_one_is_named(copy: Path) -> None:
    with closing(sqlite3.connect(copy / "journal.sqlite")) as connection:
        deltas = dict(connection.execute("SELECT number, delta FROM versions WHERE delta IS NOT NULL"))
    (copy / "blobs" / deltas[2]).unlink()
    (copy / "blobs" / deltas[3]).write_bytes(b"other")
    found = broken(copy)["blobs"]
    assert any("delta of version 2" in text and "is not in the store" in text for text in found)
    assert any("delta of version 3" in text and "does not have the bytes" in text for text in found)


def test_a_blob_that_was_dropped_is_not_missed(copy: Path) -> None:
    with closing(sqlite3.connect(copy / "journal.sqlite")) as connection, connection:
        (delta,) = connection.execute("SELECT delta FROM versions WHERE number = 2").fetchone()
        connection.execute(
            "INSERT INTO events SELECT max(lsn) + 1, 0, 'DeltasDropped', ? FROM events",
            (json.dumps({"fact": "DeltasDropped", "through": 2}),),
        )
    (copy / "blobs" / delta).unlink()
    assert broken(copy) == {}


def test_pages_that_are_lost_are_told_with_their_range(copy: Path) -> None:
    damage(copy, "PRAGMA wal_checkpoint(TRUNCATE)")
    with closing(sqlite3.connect(copy / "journal.sqlite")) as connection:
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
        pages = [n for (n,) in connection.execute("SELECT pageno FROM dbstat WHERE name = 'events' AND pagetype = 'leaf' ORDER BY path")]
    with (copy / "journal.sqlite").open("r+b") as file:
        file.seek((pages[0] - 1) * page_size)
        file.write(bytes(page_size))
    found = broken(copy)
    assert found["sqlite"]
    assert any("cannot be read" in text and text.startswith("events 1 to ") for text in found["events"]), found


def test_no_damage_makes_it_fall_over(copy: Path) -> None:
    damage(copy, "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA journal_mode = DELETE")
    whole = (copy / "journal.sqlite").read_bytes()
    used = [place for place in range(16384, len(whole)) if whole[place]]
    num_found = 0
    for seed in range(40):
        choose = random.Random(seed)
        data, place = bytearray(whole), choose.choice(used)
        size = choose.choice([1, 64, 16384])
        data[place : place + size] = choose.randbytes(len(data[place : place + size]))
        (copy / "journal.sqlite").write_bytes(data)
        try:
            num_found += bool(broken(copy))
        except JournalError:
            num_found += 1
    assert num_found >= 30, "what is left over in a page belongs to nobody"


# --- the account


def test_the_account_holds_after_every_change_and_tells_the_first_that_is_impossible() -> None:
    said: list[str] = []
    account = Account(Pacing(max_lag=1, reuse=2, sync_every=1, groups_per_batch=1, num_steps=4), said.append)
    issued = facts.TicketIssued(0, 1, "a", "e", 0, 0)
    accepted = facts.GroupAccepted("a", "e", 1, 0, 1, [0], 0, 3, 0.5)
    account.add(1, issued)
    account.add(2, facts.TicketRevoked(0, 1, "left"))
    account.add(3, accepted)
    account.add(4, facts.BatchFormed(0, 0, [0]))
    account.add(5, facts.StepCommitted(0, 0, 0, [0], {}))
    assert account.counts["batched"] == 1, "the batch has another use"
    account.add(6, facts.StepCommitted(1, 0, 0, [1], {}))
    account.add(7, facts.StepCommitted(1, 0, 1, [1], {}))
    assert account.figures() == "1 issued = 0 outstanding + 0 queued + 1 consumed + 0 expired + 0 failed + 0 void"
    assert said == []
    account.add(8, facts.TicketEnded(0, "void", ""))
    account.add(9, facts.TicketIssued(4, 1, "a", "e", 0, 0))
    account.add(10, facts.BatchFormed(1, 2, [4, 5]))
    assert said == [
        "event 8: ticket 0 becomes void, but it is ended already",
        "event 9: ticket 4 is issued where 1 is the next number",
        "event 10: batch 1 has 2 groups, 1 make one",
        "event 10: ticket 4 becomes batched, but it is outstanding",
        "event 10: ticket 5 becomes batched, but it is never issued",
    ]
