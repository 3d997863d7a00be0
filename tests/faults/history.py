"""What a run of chaos left behind: the journal, and what the processes wrote down themselves."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from protocol.config import parse_config_json
from protocol.journal import JOURNAL_NAME, JournalEntry, open_read_only, read_facts
from protocol.pacing import Pacing
from tests.faults.records import AnyRecord, read_log
from tests.faults.run_directory import RECORDS


class History(NamedTuple):
    """Everything the checker looks at."""

    pacing: Pacing
    entries: list[JournalEntry]
    payloads: dict[int, tuple[bytes, bytes]]
    """By the place of its fact: a group's payload, and its BLAKE3 as the journal has it."""
    actors: list[list[AnyRecord]]
    """The records of each process of an actor, in order."""
    learners: list[list[AnyRecord]]
    """The records of each learner process; the processes in order."""


def read_history(run: Path) -> History:
    """The history of the run in directory `run`. Raises JournalError if the journal is not whole."""
    path = run / JOURNAL_NAME
    with closing(open_read_only(path)) as connection:
        (config,) = connection.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
        entries = list(read_facts(connection, path))
        payloads = {
            lsn: (bytes(data), bytes(digest)) for lsn, data, digest in connection.execute("SELECT lsn, payload, digest FROM groups")
        }
    logs = {file.name: read_log(file) for file in sorted((run / RECORDS).glob("*.jsonl"))}
    actors = [records for name, records in logs.items() if not name.startswith("learner.")]
    learners = [records for name, records in logs.items() if name.startswith("learner.")]
    return History(parse_config_json(config).pacing, entries, payloads, actors, learners)
