"""Ways from version to version: what they lead to, that their files are there, and that a recovered broker knows the same ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import blake3
from hypothesis import event, given, settings
from hypothesis import strategies as st

from broker import events as ev
from broker.ledger import Ledger
from broker.publications import ANCHOR_EVERY, KEPT_BYTES, Hop, Publications, Way
from protocol import facts, messages
from protocol.pacing import Pacing
from protocol.weights import BlobRef, PolicyVersion

LONG_AGO = 1 << 30
MODEL_BYTES = KEPT_BYTES // 16
"""The largest weights for which the store keeps KEPT_BYTES of deltas."""


def blob(name: str, size: int = 100) -> BlobRef:
    return BlobRef(blake3.blake3(name.encode()).hexdigest(), size)


class Store:
    """A ledger, with an account of the files in its store that rests on nothing but what it was told and what it said may be removed."""

    def __init__(self) -> None:
        self.pacing = Pacing(max_lag=1, reuse=1, sync_every=1, groups_per_batch=1, num_steps=LONG_AGO, window=1)
        self.ledger = Ledger(self.pacing, 0, 1, 1)
        self.facts: list[facts.AnyFact] = []
        self.files: set[BlobRef] = set()
        self.leads: dict[BlobRef, tuple[int, int]] = {}
        """Where a delta starts and ends."""
        self.parents: dict[int, int] = {}
        self.is_root: dict[int, bool] = {}
        self.steps: dict[int, int] = {}
        self.session = 0
        self.folding: tuple[int, int, Way] | None = None
        self.begin(0)

    @property
    def versions(self) -> Publications:
        return self.ledger.versions

    def handle(self, happened: ev.Event) -> list[ev.Effect]:
        self.ledger.progress.step = LONG_AGO  # which steps are done is not the subject here
        effects = self.ledger.handle(happened, 0.0)
        for effect in effects:
            if isinstance(effect, ev.Record):
                self.facts.append(effect.fact)
            if isinstance(effect, ev.RemoveBlobs):
                assert any(isinstance(other, ev.Record) for other in effects), "files go only after a fact that says so"
                self.files -= set(effect.blobs)
            if isinstance(effect, ev.SendLearner):
                assert not isinstance(effect.message, messages.LearnerRefused), effect.message
        return effects

    def begin(self, step: int) -> None:
        """A learner starts from what it had at `step`."""
        self.session += 1
        self.handle(ev.LearnerHere(f"s{self.session}", step, 1))

    def publish(
        self,
        parent: int = -1,
        *,
        base: bool = False,
        snapshot: bool = False,
        compact: bool = False,
        size: int = 100,
        step: int | None = None,
    ) -> int:
        number = self.versions.next_number
        step = (self.steps.get(parent, -1) + 1) if step is None else step
        version = PolicyVersion(number, step, self.ledger.progress.lineage, f"root of {number}")
        delta = blob(f"delta {number}", size) if parent >= 0 else None
        smaller = blob(f"compact {number}", size // 2) if compact and parent >= 0 else None
        whole = blob(f"snapshot {number}", MODEL_BYTES) if snapshot else None
        for file in (delta, smaller):
            if file is not None:
                self.leads[file] = (parent, number)
        if whole is not None:
            self.leads[whole] = (-1, number)
        self.files |= {file for file in (delta, smaller, whole) if file is not None}
        self.parents[number], self.is_root[number], self.steps[number] = parent, base or snapshot, step
        self.handle(ev.VersionReady(f"s{self.session}", version, parent, delta, whole, MODEL_BYTES, size, smaller, base))
        return number

    def line(self, length: int, parent: int, size: int = 100) -> list[int]:
        numbers = [parent]
        for _ in range(length):
            numbers.append(self.publish(numbers[-1], size=size))
        return numbers

    def start_anchor(self) -> bool:
        self.folding = self.folding or self.versions.anchor_due()
        return self.folding is not None

    def finish_anchor(self) -> None:
        """What the broker does once the way has been folded: the file is there, and then the fact."""
        assert self.folding is not None
        (number, root, way), self.folding = self.folding, None
        if all(hop.delta in self.files for hop in way.hops):
            file = blob(f"anchor {root} {number}")
            self.leads[file] = (root, number)
            self.files.add(file)
            self.handle(ev.AnchorMade(number, root, file))

    def anchor(self) -> None:
        assert self.start_anchor()
        self.finish_anchor()

    def arrive(self, held: int, way: Way) -> int:
        """The version that a way leads to, followed hop by hop with files that are in the store."""
        if way.start == "held":
            assert way.snapshot is None
            at = held
        elif way.start == "base":
            at = 0
            assert self.versions.by_number[0].fact.is_base
        else:
            assert way.snapshot in self.files
            assert way.snapshot is not None
            _, at = self.leads[way.snapshot]
        for hop in way.hops:
            assert hop.delta in self.files, "a file on the way is not in the store any more"
            begin, end = self.leads[hop.delta]
            assert at == (end if hop.inverted else begin)
            at = begin if hop.inverted else end
            if hop.compact is not None:
                assert not hop.inverted
                assert hop.compact in self.files
                assert self.leads[hop.compact] == (begin, end)
        return at

    def reachable(self, begin: int) -> set[int]:
        """The versions that can be reached from one by deltas in the store, walked either way: by flooding the tree."""
        edges = [
            self.leads[file] for file in self.files if self.leads[file] == (self.parents.get(self.leads[file][1]), self.leads[file][1])
        ]
        found, fresh = set(), {begin}
        while fresh:
            found |= fresh
            fresh = {b for a, b in edges if a in found} | {a for a, b in edges if b in found and a >= 0}
            fresh -= found
        return found

    def recovered(self) -> Ledger:
        fresh = Ledger(self.pacing, 0, 1, 1)
        for fact in self.facts:
            fresh.apply(fact)
        return fresh


# --- ways


def test_before_anything_is_published_there_is_no_way() -> None:
    versions = Publications()
    assert versions.newest is None
    assert versions.way_from_nothing() is None
    assert versions.way_from(0) is None


def test_a_newcomer_starts_at_the_base_and_goes_by_every_delta() -> None:
    store = Store()
    line = store.line(3, store.publish(base=True))
    way = store.versions.way_from_nothing()
    assert way == Way("base", None, tuple(Hop(blob(f"delta {number}")) for number in line[1:]))


def test_a_newcomer_starts_at_the_last_snapshot_on_the_line() -> None:
    store = Store()
    first = store.publish(base=True)
    second = store.publish(first, snapshot=True)
    third = store.publish(second)
    way = store.versions.way_from_nothing()
    assert way == Way("snapshot", blob(f"snapshot {second}", MODEL_BYTES), (Hop(blob(f"delta {third}")),))


def test_the_newest_version_is_no_way_from_itself() -> None:
    store = Store()
    newest = store.publish(store.publish(base=True))
    assert store.versions.way_from(newest) == Way("held", None, ())


def test_a_version_that_nobody_published_is_no_start() -> None:
    store = Store()
    store.publish(base=True)
    assert store.versions.way_from(5) is None
    assert store.versions.way_from(-1) is None


def test_whoever_holds_an_orphan_goes_up_to_the_common_ancestor_and_down_again() -> None:
    store = Store()
    line = store.line(3, store.publish(base=True))
    store.begin(1)
    fourth = store.publish(line[1])
    fifth = store.publish(fourth)
    assert store.versions.step_of(line[3]) is None
    way = store.versions.way_from(line[3])
    ups = (Hop(blob(f"delta {line[3]}"), inverted=True), Hop(blob(f"delta {line[2]}"), inverted=True))
    assert way == Way("held", None, (*ups, Hop(blob(f"delta {fourth}")), Hop(blob(f"delta {fifth}"))))


def test_the_compact_file_of_a_delta_is_told_for_steps_forwards_only() -> None:
    store = Store()
    first = store.publish(base=True)
    second = store.publish(first, compact=True)
    assert store.versions.way_from(first) == Way("held", None, (Hop(blob(f"delta {second}"), compact=blob(f"compact {second}", 50)),))
    store.begin(0)
    third = store.publish(first)
    way = store.versions.way_from(second)
    assert way == Way("held", None, (Hop(blob(f"delta {second}"), inverted=True), Hop(blob(f"delta {third}"))))


def test_a_version_that_only_a_snapshot_leads_to_is_reached_from_nothing_only() -> None:
    store = Store()
    first = store.publish(base=True)
    store.publish(snapshot=True, step=1)
    assert store.versions.way_from(first) is None
    way = store.versions.way_from_nothing()
    assert way is not None
    assert (way.start, way.hops) == ("snapshot", ())


# --- anchors


def test_an_anchor_is_due_after_so_many_deltas_and_then_a_newcomer_goes_by_it_and_the_rest() -> None:
    store = Store()
    line = store.line(ANCHOR_EVERY, store.publish(base=True))
    assert store.versions.anchor_due() is None
    line += store.line(1, line[-1])[1:]
    store.anchor()
    way = store.versions.way_from_nothing()
    assert way == Way("base", None, (Hop(blob(f"anchor 0 {line[-1]}")),))
    line += store.line(ANCHOR_EVERY - 1, line[-1])[1:]
    assert store.versions.anchor_due() is None
    line += store.line(1, line[-1])[1:]
    way = store.versions.way_from_nothing()
    assert way is not None
    assert len(way.hops) == ANCHOR_EVERY + 1
    store.anchor()
    assert blob(f"anchor 0 {line[ANCHOR_EVERY + 1]}") not in store.files, "the anchor before is not needed any more"
    assert store.versions.way_from_nothing() == Way("base", None, (Hop(blob(f"anchor 0 {line[-1]}")),))


def test_a_snapshot_makes_the_anchor_of_an_older_root_useless() -> None:
    store = Store()
    line = store.line(ANCHOR_EVERY + 1, store.publish(base=True))
    store.anchor()
    newest = store.publish(line[-1], snapshot=True)
    assert store.versions.way_from_nothing() == Way("snapshot", blob(f"snapshot {newest}", MODEL_BYTES), ())


def test_an_anchor_that_has_become_an_orphan_still_leads_on() -> None:
    store = Store()
    line = store.line(ANCHOR_EVERY + 1, store.publish(base=True))
    store.anchor()
    store.begin(ANCHOR_EVERY - 1)
    newest = store.publish(line[ANCHOR_EVERY - 1])
    way = store.versions.way_from_nothing()
    assert way is not None
    assert way.hops[0] == Hop(blob(f"anchor 0 {line[-1]}"))
    assert [hop.inverted for hop in way.hops] == [False, True, True, False]
    assert store.arrive(-1, way) == newest


# --- retention


def test_nothing_is_dropped_while_there_is_room_or_no_anchor() -> None:
    store = Store()
    line = store.line(ANCHOR_EVERY + 1, store.publish(base=True), size=KEPT_BYTES // (ANCHOR_EVERY + 1))
    assert store.versions.excess() is None
    store.anchor()
    assert all(blob(f"delta {number}", KEPT_BYTES // (ANCHOR_EVERY + 1)) in store.files for number in line[1:])


def test_the_oldest_deltas_are_dropped_until_the_rest_has_room() -> None:
    store = Store()
    size = KEPT_BYTES // 10
    line = store.line(ANCHOR_EVERY + 1, store.publish(base=True), size=size)
    store.anchor()
    kept = [number for number in line[1:] if blob(f"delta {number}", size) in store.files]
    assert kept == line[-10:]
    assert store.facts[-1] == facts.DeltasDropped(line[-11])
    assert store.versions.way_from(line[-11]) is not None
    assert store.versions.way_from(line[-12]) is None


def test_more_is_kept_of_larger_weights() -> None:
    store = Store()
    size = KEPT_BYTES // 10
    first = store.publish(base=True)
    line = store.line(ANCHOR_EVERY, first, size=size)
    version = PolicyVersion(store.versions.next_number, 99, 0, "large")
    file = blob("large", size)
    store.files.add(file)
    store.leads[file] = (line[-1], version.number)
    store.handle(ev.VersionReady("s1", version, line[-1], file, None, KEPT_BYTES // 8, size))
    store.anchor()
    assert not any(isinstance(fact, facts.DeltasDropped) for fact in store.facts), "16 times an eighth is more than 17 tenths"


def test_deltas_beyond_the_anchor_are_kept_however_many_bytes_they_have() -> None:
    store = Store()
    line = store.line(ANCHOR_EVERY + 1, store.publish(base=True))
    assert store.start_anchor()
    line += store.line(3, line[-1], size=2 * KEPT_BYTES)[1:]
    store.finish_anchor()
    way = store.versions.way_from_nothing()
    assert way is not None
    assert store.arrive(-1, way) == line[-1]
    assert store.versions.way_from(line[ANCHOR_EVERY + 1]) is not None
    assert store.versions.way_from(line[ANCHOR_EVERY]) is None


def test_an_anchor_that_was_orphaned_while_it_was_made_drops_nothing_that_a_newcomer_needs() -> None:
    store = Store()
    line = store.line(ANCHOR_EVERY + 1, store.publish(base=True), size=KEPT_BYTES)
    assert store.start_anchor()
    store.begin(ANCHOR_EVERY - 2)
    newest = store.publish(line[ANCHOR_EVERY - 2], size=KEPT_BYTES)
    store.finish_anchor()
    way = store.versions.way_from_nothing()
    assert way is not None
    assert store.arrive(-1, way) == newest
    assert any(isinstance(fact, facts.DeltasDropped) for fact in store.facts)


# --- any tree


@dataclass
class Walk:
    """A run as it may go: one learner that publishes, goes back to a checkpoint, and a broker that makes anchors beside it."""

    random: Random
    store: Store = field(default_factory=Store)
    current: int = -1
    line: list[int] = field(default_factory=list)
    may_be_lost: bool = False
    """The learner went back behind what newcomers can be led to; only a snapshot mends that."""
    lost: set[int] = field(default_factory=set)

    def publish(self, *, base: bool = False) -> None:
        snapshot = not base and (self.current < 0 or self.random.random() < 0.04)
        whole = self.current < 0 or (snapshot and self.random.random() < 0.3)
        self.current = self.store.publish(
            -1 if whole else self.current,
            base=base,
            snapshot=snapshot,
            compact=self.random.random() < 0.5,
            size=self.random.choice([100, 100, 1 << 20, KEPT_BYTES // 20, KEPT_BYTES // 2]),
            step=None if not self.line else self.store.steps[self.line[-1]] + 1,
        )
        self.line.append(self.current)
        self.may_be_lost = self.may_be_lost and not snapshot
        if self.may_be_lost:
            self.lost.add(self.current)

    def go_back(self) -> None:
        """A new learner from a checkpoint: everything beyond it is in doubt, and orphaned as soon as that learner publishes."""
        back = self.random.randint(1, self.random.choice([2, 5, 40]))
        self.line = self.line[: max(1, len(self.line) - back)]
        self.current = self.line[-1]
        dropped = max((fact.through for fact in self.store.facts if isinstance(fact, facts.DeltasDropped)), default=-1)
        anchor = self.store.versions.anchor
        behind = self.current < max(dropped, anchor.root if anchor is not None else -1)
        self.may_be_lost = self.may_be_lost or self.current in self.lost or behind
        self.store.begin(self.store.steps[self.current])

    def make_anchor(self) -> None:
        if self.store.folding is not None:
            self.store.finish_anchor()

    def check(self) -> None:
        store, versions = self.store, self.store.versions
        newest = versions.newest
        assert newest is not None
        way = versions.way_from_nothing()
        assert way is not None or self.may_be_lost, "a newcomer cannot get to the newest version"
        if way is not None:
            assert store.arrive(-1, way) == newest.number
            assert len(way.hops) <= len(store.parents) + 1
        reachable = store.reachable(newest.number)
        for held in store.parents:
            way = versions.way_from(held)
            assert (way is not None) == (held in reachable)
            if way is not None:
                assert way.start == "held"
                assert store.arrive(held, way) == newest.number
                assert not any(hop.inverted for hop in way.hops[sum(hop.inverted for hop in way.hops) :]), "first all the way up, then down"

    def check_recovery(self) -> None:
        versions, fresh = self.store.versions, self.store.recovered().versions
        assert fresh == versions
        assert fresh.way_from_nothing() == versions.way_from_nothing()
        assert [fresh.way_from(held) for held in versions.by_number] == [versions.way_from(held) for held in versions.by_number]
        assert fresh.anchor_due() == versions.anchor_due()


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 1 << 40), base=st.booleans(), length=st.sampled_from([1, 5, 20, 60, 100]))
def test_on_any_tree_every_way_leads_to_the_newest_version_by_files_that_are_in_the_store(seed: int, base: bool, length: int) -> None:
    walk = Walk(Random(seed))
    walk.publish(base=base)
    walk.check()
    back, make = walk.random.choice([0.0, 0.03, 0.1]), walk.random.choice([0.05, 0.5, 1.0])
    for _ in range(length):
        if walk.random.random() < back:
            walk.go_back()
            walk.check()
        walk.publish()
        walk.store.start_anchor()
        if walk.random.random() < make:
            walk.make_anchor()
        walk.check()
    walk.check_recovery()
    event(f"anchors: {min(3, sum(isinstance(fact, facts.VersionAnchored) for fact in walk.store.facts))}")
    event(f"dropped: {any(isinstance(fact, facts.DeltasDropped) for fact in walk.store.facts)}, lost: {walk.may_be_lost}")
    event(f"orphans: {any(isinstance(fact, facts.VersionOrphaned) for fact in walk.store.facts)}")
