"""What a recording says happened, seen from its end: the steps that count, what each used and what came of it.

A run whose learner died has steps that were done again. Of every step only the last time counts; the learner session that did it then, with its
world size and what it ran on, is the segment that the step belongs to. Pure: facts in, history out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from broker.publications import Publications, Standing
from protocol import facts
from protocol.journal import check_end, open_read_only, read_facts


class Segment(NamedTuple):
    """Steps `first` to `end` (exclusive), done by one learner session, or by several in a row that were alike."""

    first: int
    end: int
    lineage: int
    world_size: int
    environment: dict[str, str]
    config: str
    """The resolved configuration then, as JSON."""


class Step(NamedTuple):
    """A step that counts: the batch it used, its metrics, and the lineage it was done in."""

    batch: int
    lineage: int
    metrics: dict[str, float | None]


@dataclass(slots=True)
class History:
    """A run from its facts."""

    run: str
    config: str
    """The resolved configuration, as JSON; a resumed run may have changed it."""
    steps: dict[int, Step] = field(default_factory=dict)
    batches: dict[int, list[int]] = field(default_factory=dict)
    """The tickets of each batch."""
    publications: Publications = field(default_factory=Publications)
    evaluations: dict[int, float] = field(default_factory=dict)
    """Held-out reward by step."""
    busy_seconds: float | None = None
    """How long the learner was busy, if one session did the whole run and ended in order."""
    _sessions: list[tuple[facts.LearnerStarted, str]] = field(default_factory=list)
    """Learner sessions, each with the configuration that it began with."""
    _versions: dict[tuple[int, int], int] = field(default_factory=dict)
    """The version that a lineage published, or arrived at again, at a step."""

    def add(self, fact: facts.AnyFact) -> None:
        """Take in the next fact."""
        match fact:
            case facts.RunStarted():
                self.config = fact.config or self.config
            case facts.LearnerStarted():
                self._sessions.append((fact, self.config))
                self.steps = {step: done for step, done in self.steps.items() if step < fact.step}
                self.publications.suspect_after(fact.step)
            case facts.BatchFormed():
                self.batches[fact.batch] = fact.tickets
            case facts.StepCommitted():
                self.steps[fact.step] = Step(fact.batch, fact.lineage, fact.metrics)
            case facts.Evaluated():
                self.evaluations[fact.step] = fact.reward
            case facts.LearnerFinished():
                self.busy_seconds = fact.summary.get("busy_seconds") if len(self._sessions) == 1 else None
            case _:
                self._add_version(fact)

    def _add_version(self, fact: facts.AnyFact) -> None:
        versions = self.publications
        match fact:
            case facts.VersionPublished():
                versions.add(fact)
                self._versions[fact.version.lineage, fact.version.step] = fact.version.number
            case facts.VersionReproduced():
                versions.by_number[fact.number].standing = Standing.GOOD
                self._versions[fact.lineage, versions.by_number[fact.number].version.step] = fact.number
            case facts.VersionOrphaned():
                versions.by_number[fact.number].standing = Standing.ORPHANED
            case facts.VersionAnchored():
                versions.set_anchor(fact)
            case facts.DeltasDropped():
                versions.drop(fact)

    @property
    def num_steps(self) -> int:
        """Steps that were done."""
        return len(self.steps)

    @property
    def segments(self) -> list[Segment]:
        """The sessions whose steps count, in order of the steps; neighbours that were alike are one."""
        found: list[Segment] = []
        for session, config in self._sessions:
            end = 1 + max((step for step, done in self.steps.items() if done.lineage == session.lineage), default=-1)
            if end <= session.step:
                continue
            last = found[-1] if found else None
            segment = Segment(session.step, end, session.lineage, session.world_size, session.environment, config)
            if last is not None and last[3:] == segment[3:]:
                found[-1] = last._replace(end=end)
            else:
                found.append(segment)
        return found

    def version_at(self, step: int) -> int | None:
        """The number of the version that was taken at `step` by the session whose step led there, None if none was."""
        if step:
            return self._versions.get((self.steps[step - 1].lineage, step)) if step - 1 in self.steps else None
        return max((number for (_, at), number in self._versions.items() if at == 0), default=None)

    def newest_version_at(self, step: int) -> int | None:
        """The number of the version that was the newest when theta_step was there: taken at `step`, or at the last step before with a version."""
        return next((number for at in range(step, -1, -1) if (number := self.version_at(at)) is not None), None)


def history_of(run: str, config: str, entries: Iterable[facts.AnyFact]) -> History:
    """The history that facts in order tell, of a run that began with `config`."""
    history = History(run, config)
    for fact in entries:
        history.add(fact)
    return history


def read_history(path: Path) -> History:
    """The history in a journal. Raises JournalError."""
    connection = open_read_only(path)
    try:
        check_end(connection, path)
        settings = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        return history_of(settings["run"], settings["config"], (entry.fact for entry in read_facts(connection, path)))
    finally:
        connection.close()
