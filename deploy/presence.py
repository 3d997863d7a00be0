"""Whether processes that are there are also heard: one whose process is there and whose heartbeat is not is hung or stopped.

Invariant: only time in which somebody listened counts. While the broker is away or puts everybody off, nobody's silence grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SAY_SECONDS: Final = 10.0


@dataclass(slots=True)
class Patience:
    """How long a role may be silent: `joined` once it was heard, `starting` from the start of its process until then."""

    starting: float
    joined: float


ACTOR: Final = Patience(starting=300.0, joined=30.0)
"""Imports come before an actor joins; after that its event loop is never busy for long. Its lease ends after 6 s."""
LEARNER: Final = Patience(starting=1800.0, joined=300.0)
"""Loading a large policy comes before a learner joins; after that a library may hold the interpreter for a while, as in writing a checkpoint."""


@dataclass(slots=True)
class _Record:
    started_at: float
    since: float
    has_joined: bool = False
    said: bool = False


class Presence:
    """The processes of one supervisor. All times are its monotonic seconds."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def nobody_listened(self, now: float) -> None:
        """Until now nobody could be heard."""
        for record in self._records.values():
            record.since = now

    def observe(self, name: str, started_at: float, last_seen: float | None, now: float) -> None:
        """The process `name`, started at `started_at`, was heard `last_seen` seconds ago; None if the broker does not know it."""
        record = self._records.get(name)
        if record is None or record.started_at != started_at:
            record = self._records[name] = _Record(started_at, now)
        if last_seen is not None and now - last_seen >= started_at:
            record.has_joined = True
            record.since = max(record.since, now - last_seen)
            record.said = record.said and now - record.since > SAY_SECONDS

    def silence(self, name: str, now: float) -> float:
        """For how many seconds it has not been heard."""
        return now - self._records[name].since

    def is_lost(self, name: str, patience: Patience, now: float) -> bool:
        """Whether it has been silent for longer than it may."""
        record = self._records[name]
        return self.silence(name, now) > (patience.joined if record.has_joined else patience.starting)

    def is_news(self, name: str, now: float) -> bool:
        """Whether its silence is to be told now: once, when one that had joined has not been heard for SAY_SECONDS."""
        record = self._records[name]
        news = record.has_joined and not record.said and self.silence(name, now) > SAY_SECONDS
        record.said = record.said or news
        return news
