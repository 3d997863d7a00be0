"""The policy versions of a run: which are good, and how to get from one to another.

Invariant: the newest good version is never older than any version an actor may still be told to fetch.
A version is good, suspect (a resumed learner has gone back behind its step and may or may not arrive there again) or orphaned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from protocol.facts import VersionPublished
from protocol.weights import BlobRef, PolicyVersion


class Standing(Enum):
    """Whether groups sampled from a version may be trained on."""

    GOOD = "good"
    SUSPECT = "suspect"
    ORPHANED = "orphaned"


@dataclass(slots=True)
class Publication:
    """A published version and the files that lead to it."""

    version: PolicyVersion
    parent: int
    delta: BlobRef | None
    snapshot: BlobRef | None
    full_bytes: int
    standing: Standing = Standing.GOOD


@dataclass(slots=True)
class Publications:
    """All versions by number, in order."""

    by_number: dict[int, Publication] = field(default_factory=dict)

    @property
    def next_number(self) -> int:
        """The number that the next publication takes."""
        return max(self.by_number, default=-1) + 1

    @property
    def newest(self) -> PolicyVersion | None:
        """The newest version that is not orphaned."""
        for publication in reversed(self.by_number.values()):
            if publication.standing is not Standing.ORPHANED:
                return publication.version
        return None

    def add(self, fact: VersionPublished) -> None:
        """A new version, good."""
        self.by_number[fact.version.number] = Publication(fact.version, fact.parent, fact.delta, fact.snapshot, fact.full_bytes)

    def step_of(self, number: int) -> int | None:
        """The step of a version that is good or suspect, None for unknown and orphaned ones."""
        publication = self.by_number.get(number)
        if publication is None or publication.standing is Standing.ORPHANED:
            return None
        return publication.version.step

    def oldest_step(self, numbers: list[int]) -> int | None:
        """The smallest step of the versions `numbers`, None if one of them is unknown or orphaned."""
        steps = [self.step_of(number) for number in numbers]
        return None if not steps or None in steps else min(step for step in steps if step is not None)

    def steps_from(self, oldest: int) -> dict[int, int]:
        """The step of every version from number `oldest` on."""
        return {number: self.by_number[number].version.step for number in range(oldest, self.next_number)}

    def suspect_after(self, step: int) -> None:
        """A learner resumed at `step`: all that was published beyond it is in doubt."""
        for publication in self.by_number.values():
            if publication.version.step > step and publication.standing is Standing.GOOD:
                publication.standing = Standing.SUSPECT

    def reproduced_by(self, version: PolicyVersion) -> int | None:
        """The number of the not orphaned version with this step and root."""
        for number, publication in self.by_number.items():
            same = (publication.version.step, publication.version.root) == (version.step, version.root)
            if same and publication.standing is not Standing.ORPHANED:
                return number
        return None

    def in_doubt_from(self, step: int) -> list[int]:
        """Suspect versions at or beyond `step`: orphans once the learner has arrived elsewhere at `step`."""
        return [
            number
            for number, publication in self.by_number.items()
            if publication.standing is Standing.SUSPECT and publication.version.step >= step
        ]

    def route(self, held: int) -> list[BlobRef]:
        """The files that lead from version `held` (-1: none) to the newest, fewest bytes first choice.

        Either the deltas from `held`, if it is an ancestor of the newest, or the last snapshot on the way and the deltas behind it.
        """
        newest = self.newest
        if newest is None or newest.number == held:
            return []
        deltas: list[BlobRef] = []
        from_snapshot: list[BlobRef] | None = None
        number = newest.number
        while number != held:
            publication = self.by_number.get(number)
            if publication is None:
                return from_snapshot or []
            if publication.snapshot is not None and from_snapshot is None:
                from_snapshot = [publication.snapshot, *reversed(deltas)]
            if publication.delta is None:
                return from_snapshot or []
            deltas.append(publication.delta)
            number = publication.parent
        chain = list(reversed(deltas))
        if from_snapshot is None or sum(b.size for b in chain) <= sum(b.size for b in from_snapshot):
            return chain
        return from_snapshot
