"""The policy versions of a run: which are good, and how to get from one to another.

Invariant: the newest good version is never older than any version an actor may still be told to fetch, and there is a way to it from nothing.
A version is good, suspect (a resumed learner has gone back behind its step and may or may not arrive there again) or orphaned.

Versions form a tree: each delta leads from a parent to its child, and can be walked back. A newcomer starts at a root: the policy's own files,
or a snapshot. The anchor is one folded delta from the root to a version further on, so that the deltas behind it can be dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, NamedTuple

from protocol.facts import DeltasDropped, VersionAnchored, VersionPublished
from protocol.weights import BlobRef, PolicyVersion

ANCHOR_EVERY: Final = 16
"""Deltas beyond the anchor (or the root) after which a new anchor is due."""
KEPT_MODELS: Final = 16
KEPT_BYTES: Final = 1 << 30
"""Deltas are kept up to KEPT_MODELS times the size of the weights, and up to KEPT_BYTES in any case."""


class Standing(Enum):
    """Whether groups sampled from a version may be trained on."""

    GOOD = "good"
    SUSPECT = "suspect"
    ORPHANED = "orphaned"


@dataclass(slots=True)
class Publication:
    """A published version and the files that lead to it."""

    fact: VersionPublished
    standing: Standing = Standing.GOOD
    has_delta: bool = True
    """Whether its delta is still in the store (or never was needed)."""

    @property
    def version(self) -> PolicyVersion:
        return self.fact.version

    @property
    def is_root(self) -> bool:
        """Whether a newcomer can start here."""
        return self.fact.is_base or self.fact.snapshot is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of its deltas in the store."""
        return sum(blob.size for blob in (self.fact.delta, self.fact.compact) if blob is not None) if self.has_delta else 0


class Hop(NamedTuple):
    """A delta on the way; `inverted` if it is walked from child to parent. `compact` is another file for the same step forwards."""

    delta: BlobRef
    inverted: bool = False
    compact: BlobRef | None = None


class Way(NamedTuple):
    """How to arrive at the newest version: where to start, and the deltas from there."""

    start: Literal["held", "base", "snapshot"]
    snapshot: BlobRef | None
    hops: tuple[Hop, ...]


@dataclass(slots=True)
class Publications:
    """All versions by number, in order."""

    by_number: dict[int, Publication] = field(default_factory=dict)
    anchor: VersionAnchored | None = None

    @property
    def next_number(self) -> int:
        """The number that the next publication takes."""
        return next(reversed(self.by_number), -1) + 1

    @property
    def newest(self) -> PolicyVersion | None:
        """The newest version that is not orphaned."""
        for publication in reversed(self.by_number.values()):
            if publication.standing is not Standing.ORPHANED:
                return publication.version
        return None

    # --- standing

    def add(self, fact: VersionPublished) -> None:
        """A new version, good."""
        self.by_number[fact.version.number] = Publication(fact)

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
        found = self._at_or_beyond(version.step)
        return next((p.version.number for p in found if (p.version.step, p.version.root) == (version.step, version.root)), None)

    def in_doubt_from(self, step: int) -> list[int]:
        """Suspect versions at or beyond `step`: orphans once the learner has arrived elsewhere at `step`."""
        return [p.version.number for p in self._at_or_beyond(step) if p.standing is Standing.SUSPECT][::-1]

    def _at_or_beyond(self, step: int) -> Iterator[Publication]:
        """The versions at or beyond `step` that are not orphaned, newest first. Their steps rise with their numbers, so the last few are seen."""
        for publication in reversed(self.by_number.values()):
            if publication.standing is not Standing.ORPHANED:
                if publication.version.step < step:
                    return
                yield publication

    # --- ways

    def way_from(self, held: int) -> Way | None:
        """How to get from version `held` to the newest, up to their common ancestor and down again; None if that cannot be told."""
        newest = self.newest
        return None if newest is None else self.way_between(held, newest.number)

    def way_from_nothing(self) -> Way | None:
        """How a newcomer gets to the newest version; None if there is none, or no root or delta is left to start with."""
        found = self._from_nothing()
        return None if found is None else found[1]

    def way_to(self, number: int) -> Way | None:
        """How to get from nothing to version `number`, whatever its standing, by the files that are left; None if there is no way."""
        roots = [root for root, publication in reversed(self.by_number.items()) if publication.is_root]
        for root in roots:
            hops = self._hops(root, number)
            if hops is not None:
                return self._starting(root, hops)[1]
        if self.anchor is not None and (hops := self._hops(self.anchor.number, number)) is not None:
            return self._starting(self.anchor.root, (Hop(self.anchor.delta), *hops))[1]
        return None

    def way_between(self, held: int, number: int) -> Way | None:
        """How to get from version `held` to version `number`, whatever their standing; None if that cannot be told."""
        hops = self._hops(held, number)
        return None if hops is None else Way("held", None, hops)

    def _from_nothing(self) -> tuple[int, Way] | None:
        """The root where a newcomer starts, and the way from there.

        The last root that the newest version descends from comes first (a snapshot is there because what was before could not be followed),
        by the anchor if it starts there; then, for a learner that has gone back behind that, any root from whose branch there is a way back.
        """
        newest, ours = self.newest, self._root()
        if newest is None:
            return None
        anchored = self.anchor.root if self.anchor is not None else None
        others = [number for number, publication in reversed(self.by_number.items()) if publication.is_root]
        for number in dict.fromkeys([*([ours.version.number] if ours is not None else []), *others]):
            rest = self._hops(self.anchor.number, newest.number) if self.anchor is not None and anchored == number else None
            if rest is not None and self.anchor is not None:
                return self._starting(number, (Hop(self.anchor.delta), *rest))
            hops = self._hops(number, newest.number)
            if hops is not None:
                return self._starting(number, hops)
        return None

    def _root(self) -> Publication | None:
        """The last version that a newcomer can start at and that the newest descends from."""
        newest = self.newest
        number = newest.number if newest is not None else -1
        while (publication := self.by_number.get(number)) is not None:
            if publication.is_root:
                return publication
            number = publication.fact.parent
        return None

    def _starting(self, root: int, hops: tuple[Hop, ...]) -> tuple[int, Way]:
        fact = self.by_number[root].fact
        return root, Way("base" if fact.is_base else "snapshot", fact.snapshot, hops)

    def _hops(self, begin: int, end: int) -> tuple[Hop, ...] | None:
        if begin not in self.by_number:
            return None
        down: dict[int, int] = {}
        """For each version that `end` descends from by deltas in the store, its place in that line, 0 for `end` itself."""
        number = end
        while True:
            down[number] = len(down)
            publication = self.by_number[number]
            if publication.fact.delta is None or not publication.has_delta:
                break
            number = publication.fact.parent
        hops: list[Hop] = []
        number = begin
        while number not in down:
            publication = self.by_number[number]
            if publication.fact.delta is None or not publication.has_delta:
                return None
            hops.append(Hop(publication.fact.delta, inverted=True))
            number = publication.fact.parent
        line = [other for other, place in down.items() if place < down[number]]
        for other in reversed(line):
            fact = self.by_number[other].fact
            assert fact.delta is not None
            hops.append(Hop(fact.delta, compact=fact.compact))
        return tuple(hops)

    def before(self, hop: Hop) -> PolicyVersion:
        """The version that a hop forwards starts from."""
        child = next(publication.fact for publication in self.by_number.values() if publication.fact.delta == hop.delta)
        return self.by_number[child.parent].version

    # --- anchor and retention

    def anchor_due(self) -> tuple[int, int, Way] | None:
        """Number and root of an anchor that should be made now, and the way to fold; None if none is due."""
        newest, found = self.newest, self._from_nothing()
        if newest is None or found is None or len(found[1].hops) <= ANCHOR_EVERY:
            return None
        return newest.number, *found

    def set_anchor(self, fact: VersionAnchored) -> None:
        """Newcomers go by this anchor from now on."""
        self.anchor = fact

    def excess(self) -> int | None:
        """The number through which deltas should be dropped now; None if all may stay. Only what no newcomer needs is dropped."""
        way = self.way_from_nothing()
        if self.anchor is None or way is None:
            return None
        needed = {hop.delta for hop in way.hops}
        kept = {number: publication.num_bytes for number, publication in self.by_number.items()}
        budget = max(KEPT_BYTES, KEPT_MODELS * self.by_number[self.anchor.number].fact.full_bytes)
        total, through = sum(kept.values()), None
        for number, size in kept.items():
            if total <= budget or number > self.anchor.number or self.by_number[number].fact.delta in needed:
                break
            if size:
                total, through = total - size, number
        return through

    def keeps(self, hops: tuple[Hop, ...]) -> bool:
        """Whether all deltas of a way are meant to be in the store still."""
        kept = {publication.fact.delta for publication in self.by_number.values() if publication.has_delta}
        return all(hop.delta in kept or (self.anchor is not None and hop.delta == self.anchor.delta) for hop in hops)

    @property
    def has_suspects(self) -> bool:
        """Whether a resumed learner may still arrive at versions published before."""
        return any(publication.standing is Standing.SUSPECT for publication in self.by_number.values())

    def files(self) -> set[str]:
        """The digests of all files that any way may use."""
        found = {self.anchor.delta.digest} if self.anchor is not None else set()
        for publication in self.by_number.values():
            fact = publication.fact
            deltas = (fact.delta, fact.compact) if publication.has_delta else ()
            found |= {blob.digest for blob in (*deltas, fact.snapshot) if blob is not None}
        return found

    def delta_files(self, through: int) -> list[BlobRef]:
        """The delta files in the store of versions up to number `through`."""
        kept = [publication.fact for number, publication in self.by_number.items() if number <= through and publication.has_delta]
        return [blob for fact in kept for blob in (fact.delta, fact.compact) if blob is not None]

    def drop(self, fact: DeltasDropped) -> None:
        """The deltas of versions up to a number are gone."""
        for number, publication in self.by_number.items():
            if number <= fact.through:
                publication.has_delta = False
