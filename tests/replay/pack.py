"""Pack a recorded run into a small archive that tests replay: `python -m tests.replay.pack RUN ARCHIVE.zip`.

What names the machine (host names, folders) is replaced, and what a replay does not need (keys, logs) is left out.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
import zipfile
from contextlib import closing
from pathlib import Path

TAKEN = ("blobs/*", "checkpoints/step-00000008/**/*")
"""One checkpoint is enough to begin at."""


def pack(run: Path, archive: Path) -> None:
    """Write the archive."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        journal = Path(folder) / "journal.sqlite"
        with closing(sqlite3.connect(run / "journal.sqlite")) as source, closing(sqlite3.connect(journal, isolation_level=None)) as copy:
            source.backup(copy)
            _neutralise(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
            copy.execute("VACUUM")
        packed.write(journal, "journal.sqlite")
        packed.writestr("config.json", json.dumps(_without_folders(json.loads((run / "config.json").read_text())), indent=2))
        manifest = json.loads((run / "run.json").read_text()) | {"policy": "policy", "source": {}}
        packed.writestr("run.json", json.dumps(manifest, indent=2))
        for pattern in TAKEN:
            for path in sorted(run.glob(pattern)):
                if path.is_file():
                    packed.write(path, str(path.relative_to(run)))


def _without_folders(config: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    config["run"]["directory"] = "runs"
    return config


def _neutralise(journal: sqlite3.Connection) -> None:
    (text,) = journal.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
    journal.execute("UPDATE meta SET value = ? WHERE key = 'config'", (json.dumps(_without_folders(json.loads(text)), indent=2),))
    for lsn, body in journal.execute("SELECT lsn, body FROM events WHERE fact IN ('ActorJoined', 'RunStarted')").fetchall():
        fact = json.loads(body)
        if "host" in fact:
            fact["host"] = "machine"
        if fact.get("config"):
            fact["config"] = json.dumps(_without_folders(json.loads(fact["config"])), indent=2)
        journal.execute("UPDATE events SET body = ? WHERE lsn = ?", (json.dumps(fact, separators=(",", ":")), lsn))


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
