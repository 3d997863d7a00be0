"""`replay --broker`: the recorded arrivals through the ledger alone, under another pacing."""

from __future__ import annotations

from pathlib import Path

from broker.repacing import course_of, lines, repace
from protocol.config import overridden, parse_config_json
from protocol.errors import ConfigError
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts

CHANGEABLE = ("policy.max_lag", "policy.window")


def repace_run(directory: Path, overrides: list[str]) -> list[str]:
    """Lines that set the run beside what another pacing would have made of it. Raises ConfigError, JournalError."""
    for override in overrides:
        if override.partition("=")[0].strip() not in CHANGEABLE:
            raise ConfigError("--set", override, "is not pacing", f"with --broker, set {' or '.join(CHANGEABLE)}")
    path = directory / JOURNAL_NAME
    connection = open_read_only(path)
    try:
        (text,) = connection.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
        course = course_of(read_facts(connection, path))
    finally:
        connection.close()
    if not course.num_steps:
        raise ConfigError("RUN", str(directory), "has no step in its journal", "let it train first")
    config = parse_config_json(text)
    recorded = repace(course, config)
    return lines(course, recorded, repace(course, overridden(config, overrides)) if overrides else recorded)
