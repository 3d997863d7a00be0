"""Folded files: right, made once, kept while they are of use, and a failure is told and not repeated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.blobs import BlobStore
from broker.core import Broker, Outgoing
from broker.folding import NUM_KEPT, Folds, Way
from broker.publications import ANCHOR_EVERY, KEPT_BYTES, Hop
from protocol import facts, messages
from protocol.config import parse_config
from protocol.messages import NamedBlob
from protocol.weights import BlobRef

DEADLINE_SECONDS = 20


class Later:
    """Jobs are kept until they are asked for; `submit` is what a broker calls."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def work(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()


class Line:
    """Deltas of one line of versions, in a store."""

    def __init__(self, folder: Path, tree: Any, length: int) -> None:
        self.store, self.tree = BlobStore(folder), tree
        tree.root()
        for number in range(1, length + 1):
            tree.child(number - 1, number)
        self.deltas = {number: self.store.add(tree.delta(number - 1, number)) for number in range(1, length + 1)}

    def way(self, begin: int, end: int) -> Way:
        numbers = range(begin + 1, end + 1) if begin < end else range(begin, end, -1)
        return tuple(Hop(self.deltas[number], inverted=begin > end) for number in numbers)

    def leads(self, blob: BlobRef, begin: int, end: int) -> bool:
        data = self.store.read(blob.digest)
        assert data is not None
        found: bool = self.tree.follow(self.tree.weights[begin], [data]) == self.tree.versions[end].root
        return found


@pytest.fixture
def line(tmp_path: Path, make_tree: Callable[..., Any]) -> Line:
    return Line(tmp_path / "blobs", make_tree(), 6 + NUM_KEPT)


def at_once(job: Callable[[], None]) -> None:
    job()


def made(folds: Folds, way: Way) -> BlobRef | None:
    """A folded way, taken in as the broker takes it in."""
    found = folds.get(way)
    folds.collect()
    return found


def no_wake() -> None:
    pass


# --- folds


def test_a_way_folded_at_once_is_one_file_that_leads_to_its_end(line: Line) -> None:
    folds = Folds(line.store, at_once, no_wake)
    blob = folds.get(line.way(0, 5))
    assert blob is not None
    assert line.leads(blob, 0, 5)
    assert line.store.size(blob.digest) == blob.size
    assert folds.collect() == [(line.way(0, 5), blob)]
    assert folds.collect() == []


def test_a_way_up_and_down_again_is_one_file_too(line: Line) -> None:
    line.tree.child(2, 20)
    line.deltas[20] = line.store.add(line.tree.delta(2, 20))
    folds = Folds(line.store, at_once, no_wake)
    blob = folds.get((*line.way(4, 2), Hop(line.deltas[20])))
    assert blob is not None
    assert line.leads(blob, 4, 20)


def test_a_single_delta_walked_back_is_folded_as_well(line: Line) -> None:
    blob = Folds(line.store, at_once, no_wake).get(line.way(3, 2))
    assert blob is not None
    assert line.leads(blob, 3, 2)


def test_a_way_is_folded_once_while_its_result_is_kept(line: Line) -> None:
    later = Later()
    folds = Folds(line.store, later.submit, no_wake)
    assert [folds.get(line.way(0, 5)) for _ in range(3)] == [None] * 3
    assert len(later.jobs) == 1
    later.work()
    [(_, blob)] = folds.collect()
    assert [folds.get(line.way(0, 5)) for _ in range(3)] == [blob] * 3
    assert later.jobs == []


def test_a_way_folded_in_another_thread_is_found_once_it_has_woken_the_broker(line: Line) -> None:
    woken = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        folds = Folds(line.store, pool.submit, woken.set)
        first = folds.get(line.way(0, 9))
        assert woken.wait(DEADLINE_SECONDS)
        [(way, blob)] = folds.collect()
    assert first is None or first == blob
    assert way == line.way(0, 9)
    assert folds.get(way) == blob
    assert isinstance(blob, BlobRef)
    assert line.leads(blob, 0, 9)


@pytest.mark.parametrize("damage", ["gone", "cut short", "empty", "no delta", "of another parent"])
def test_a_fold_that_fails_is_told_once_remembered_and_never_tried_again(line: Line, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = line.store.path(line.deltas[3].digest)
    match damage:
        case "gone":
            path.unlink()
        case "cut short":
            path.write_bytes(path.read_bytes()[:-7])
        case "empty":
            path.write_bytes(b"")
        case "no delta":
            path.write_bytes(line.tree.snapshot(3))
        case _:
            path.write_bytes(line.store.path(line.deltas[7].digest).read_bytes())
    later = Later()
    folds = Folds(line.store, later.submit, no_wake)
    assert folds.get(line.way(0, 5)) is None
    later.work()
    [(way, reason)] = folds.collect()
    assert way == line.way(0, 5)
    assert isinstance(reason, str)
    assert reason
    assert "cannot be folded" in caplog.text
    assert [folds.get(way) for _ in range(3)] == [None] * 3
    assert later.jobs == []
    assert folds.collect() == []


def test_old_results_are_removed_and_the_newest_kept(line: Line) -> None:
    folds = Folds(line.store, at_once, no_wake)
    blobs = [made(folds, line.way(0, end)) for end in range(2, 4 + NUM_KEPT)]
    sizes = [blob is not None and line.store.size(blob.digest) for blob in blobs]
    assert sizes[0] is None
    assert None not in sizes[1:]
    again = made(folds, line.way(0, 2))
    assert again == blobs[0], "what is asked for again is made again"


def test_a_result_that_was_asked_for_lately_is_kept_longer(line: Line) -> None:
    folds = Folds(line.store, at_once, no_wake)
    first = made(folds, line.way(0, 2))
    assert first is not None
    for end in range(3, 3 + NUM_KEPT):
        made(folds, line.way(0, end))
        assert made(folds, line.way(0, 2)) == first
    assert line.store.size(first.digest) == first.size


def test_a_pinned_result_is_never_removed(line: Line) -> None:
    folds = Folds(line.store, at_once, no_wake)
    anchor = made(folds, line.way(0, 2))
    assert anchor is not None
    folds.pin(anchor)
    for end in range(3, 5 + NUM_KEPT):
        made(folds, line.way(0, end))
    assert line.store.size(anchor.digest) == anchor.size


def test_a_file_that_two_ways_fold_into_stays_as_long_as_one_of_them_is_kept(line: Line) -> None:
    folds = Folds(line.store, at_once, no_wake)
    half = made(folds, line.way(0, 3))
    assert half is not None
    folds.pin(half)
    one, other = line.way(0, 5), (Hop(half), *line.way(3, 5))
    whole = made(folds, one)
    assert whole is not None
    for end in range(6, 5 + NUM_KEPT):
        made(folds, line.way(0, end))
    assert made(folds, other) == whole
    made(folds, line.way(1, 4))
    made(folds, line.way(1, 5))
    assert made(folds, other) == whole
    assert line.store.size(whole.digest) == whole.size


# --- the broker around them


class Rig:
    """A broker without sockets, a learner and actors that are nothing but their messages, and time that does not pass."""

    def __init__(self, folder: Path, tree: Any, run: Callable[[Callable[[], None]], object] = at_once) -> None:
        self.tree, self._folder, self._run = tree, folder, run
        self.sent: list[Outgoing] = []
        self.start()

    def start(self) -> None:
        base = NamedBlob("model.safetensors", BlobRef("ab" * 32, 1))
        self.broker = Broker(self._folder, self.tree.run, parse_config({}), 16, [base], 0.0, 0.0, run_beside=self._run)
        self.session = f"s{time.monotonic_ns()}"
        self.learner(messages.LearnerHello(messages.PROTOCOL_VERSION, self.session, 0, 1))

    def restart(self) -> None:
        self.broker.close()
        self.start()

    def flush(self) -> list[messages.Message]:
        out = self.broker.flush()
        self.sent += out
        return [outgoing.message for outgoing in out]

    def learner(self, message: messages.LearnerMessage) -> list[messages.Message]:
        self.broker.learner_message(self.session, message, 0.0, 0.0)
        return self.flush()

    def publish(self, number: int, parent: int, *, snapshot: bool = False, compact: bool = False) -> messages.Published:
        lineage = self.broker.ledger.progress.lineage
        if number not in self.tree.versions:
            _ = self.tree.root(number) if parent < 0 else self.tree.child(parent, number)
        version = msgspec.structs.replace(self.tree.versions[number], lineage=lineage)
        delta = self.broker.blobs.add(self.tree.delta(parent, number)) if parent >= 0 else None
        smaller = self.broker.blobs.add(self.tree.delta(parent, number, classes=True)) if compact else None
        whole = self.broker.blobs.add(self.tree.snapshot(number)) if snapshot else None
        answers = self.learner(messages.Publish(version, parent, delta, whole, 600, 10, smaller, parent < 0 and not snapshot))
        return next(answer for answer in answers if isinstance(answer, messages.Published))

    def line(self, begin: int, end: int) -> messages.Published:
        return [self.publish(number, number - 1) for number in range(begin, end + 1)][-1]

    def join(self, actor: str = "a") -> None:
        hello = messages.ActorHello(messages.PROTOCOL_VERSION, actor, "e", "fake", "here", 1, [])
        self.broker.actor_message(actor, "e", hello, b"", 0.0, 0.0)
        self.flush()

    def ask(self, held: int, actor: str = "a", failed: str = "") -> list[messages.Route]:
        self.broker.actor_message(actor, "e", messages.GetRoute(held, failed), b"", 0.0, 0.0)
        return [message for message in self.flush() if isinstance(message, messages.Route)]

    def tick(self) -> list[messages.Route]:
        self.broker.tick(0.0, 0.0)
        return [message for message in self.flush() if isinstance(message, messages.Route)]

    def arrives(self, route: messages.Route) -> bool:
        """Whether a route leads to the version that it says, by files that are in the store."""
        assert route.version is not None
        files = [*([route.snapshot] if route.snapshot is not None else []), *route.deltas]
        data = [self.broker.blobs.read(file.digest) for file in files]
        assert None not in data
        start = {"base": self.tree.base, "snapshot": None, "held": self.tree.weights.get(route.held)}[route.start]
        found: bool = self.tree.follow(start, data) == route.version.root if data else start is not None
        return found

    def delta(self, number: int) -> BlobRef:
        """The file of a version's delta."""
        delta = self.broker.ledger.versions.by_number[number].fact.delta
        assert delta is not None
        return delta

    def damage(self, number: int) -> None:
        """What is on the disk is not what was written."""
        self.broker.blobs.path(self.delta(number).digest).write_bytes(b"damaged")

    def recorded(self, kind: Any) -> list[Any]:
        return [entry.fact for entry in self.broker._journal.entries() if isinstance(entry.fact, kind)]


@pytest.fixture
def later() -> Later:
    return Later()


@pytest.fixture
def rig(tmp_path: Path, make_tree: Callable[..., Any]) -> Rig:
    rig = Rig(tmp_path / "run", make_tree())
    rig.publish(0, -1)
    rig.join()
    return rig


@pytest.fixture
def slow_rig(tmp_path: Path, make_tree: Callable[..., Any], later: Later) -> Rig:
    """Folds are made when the test says so."""
    rig = Rig(tmp_path / "run", make_tree(), later.submit)
    rig.publish(0, -1)
    rig.join()
    return rig


def test_a_short_way_is_given_as_it_is_and_a_long_one_as_one_file(rig: Rig) -> None:
    rig.line(1, 8)
    [short] = rig.ask(0)
    assert len(short.deltas) == 8
    assert rig.arrives(short)
    rig.line(9, 9)
    [long] = rig.ask(0)
    assert len(long.deltas) == 1
    assert rig.arrives(long)


def test_a_short_way_of_many_bytes_is_given_as_one_file(tmp_path: Path, make_tree: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("broker.core.FOLD_BYTES", 1000)
    rig = Rig(tmp_path / "run", make_tree())
    rig.publish(0, -1)
    rig.join()
    rig.line(1, 3)
    [route] = rig.ask(0)
    assert len(route.deltas) == 1
    assert rig.arrives(route)


def test_one_step_forwards_is_given_compactly(rig: Rig) -> None:
    rig.publish(1, 0, compact=True)
    rig.publish(2, 1)
    [route] = rig.ask(1)
    assert rig.arrives(route)
    rig.publish(3, 2, compact=True)
    [route] = rig.ask(2)
    assert route.deltas == [rig.broker.ledger.versions.by_number[3].fact.compact]
    assert rig.arrives(route)


def test_an_actor_is_answered_as_soon_as_its_way_is_folded_without_asking_again(slow_rig: Rig, later: Later) -> None:
    slow_rig.line(1, 10)
    assert slow_rig.ask(0) == []
    assert slow_rig.tick() == []
    later.work()
    [route] = slow_rig.tick()
    assert len(route.deltas) == 1
    assert slow_rig.arrives(route)
    assert slow_rig.tick() == []


def test_many_actors_that_want_the_same_way_wait_for_one_fold(slow_rig: Rig, later: Later) -> None:
    for name in "bcd":
        slow_rig.join(name)
    slow_rig.line(1, 10)
    for name in "abcd":
        assert slow_rig.ask(0, name) == []
    assert len(later.jobs) == 1
    later.work()
    routes = slow_rig.tick()
    assert len(routes) == 4
    assert len({route.deltas[0].digest for route in routes}) == 1


def test_publications_go_on_while_a_way_is_folded_and_the_answer_leads_to_the_newest_version(slow_rig: Rig, later: Later) -> None:
    slow_rig.line(1, 10)
    assert slow_rig.ask(0) == []
    slow_rig.line(11, 12)
    later.work()
    routes = slow_rig.tick()
    later.work()
    [route] = routes or slow_rig.tick()
    assert route.version is not None
    assert route.version.number == 12
    assert slow_rig.arrives(route)


def test_an_actor_is_answered_however_fast_versions_follow_one_another(slow_rig: Rig, later: Later) -> None:
    slow_rig.line(1, 10)
    assert slow_rig.ask(0) == []
    routes: list[messages.Route] = []
    for number in range(11, 20):  # each publication comes while one more fold is being made
        job = later.jobs.pop(0) if later.jobs else no_wake
        slow_rig.publish(number, number - 1)
        job()
        routes += slow_rig.tick()
    assert routes, "whoever waits for a way is not passed over by each new version"
    assert slow_rig.arrives(routes[0])
    assert len(later.jobs) < 9, "folds that nobody waits for any more do not pile up"


def test_many_bytes_published_while_a_way_was_folded_are_folded_in_their_turn(slow_rig: Rig, later: Later, monkeypatch: Any) -> None:
    monkeypatch.setattr("broker.core.FOLD_BYTES", 1000)
    slow_rig.line(1, 10)
    assert slow_rig.ask(0) == []
    slow_rig.line(11, 14)
    later.work()
    [route] = slow_rig.tick()
    assert len(route.deltas) == 1
    assert route.version == slow_rig.broker.ledger.versions.by_number[10].version
    assert slow_rig.arrives(route)
    assert slow_rig.ask(10) == []
    later.work()
    [route] = slow_rig.tick()
    assert len(route.deltas) == 1
    assert route.version == slow_rig.broker.ledger.versions.newest
    assert slow_rig.arrives(route)


def test_an_answer_that_nothing_is_newer_ends_the_wait_for_a_way(slow_rig: Rig, later: Later) -> None:
    slow_rig.line(1, 10)
    assert slow_rig.ask(0) == []
    [route] = slow_rig.ask(10)
    assert route.deltas == []
    later.work()
    assert slow_rig.tick() == []


def test_a_fold_that_fails_makes_the_next_publication_carry_one_snapshot(rig: Rig) -> None:
    rig.line(1, 10)
    rig.damage(4)
    assert rig.ask(-1) == []
    rig.tick()
    assert rig.publish(11, 10).snapshot_wanted
    assert not rig.publish(12, 11, snapshot=True).snapshot_wanted, "it has come"
    assert not rig.publish(13, 12).snapshot_wanted
    [route] = rig.ask(-1)
    assert route.start == "snapshot"
    assert rig.arrives(route)


def test_a_bit_that_flipped_in_the_store_is_not_folded_with_what_is_whole(rig: Rig) -> None:
    rig.line(1, 10)
    path = rig.broker.blobs.path(rig.delta(4).digest)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert rig.ask(-1) == []
    rig.tick()
    assert rig.publish(11, 10).snapshot_wanted


def test_a_fold_that_failed_without_a_tick_since_is_told_with_the_next_publication(rig: Rig) -> None:
    rig.line(1, 10)
    rig.damage(4)
    assert rig.ask(-1) == []
    assert rig.publish(11, 10).snapshot_wanted


def test_whoever_holds_a_version_that_no_fold_leads_on_from_starts_again_from_nothing(rig: Rig) -> None:
    rig.line(1, 10)
    rig.damage(6)
    assert rig.ask(1) == []
    rig.tick()
    rig.publish(11, 10)
    rig.publish(12, 11, snapshot=True)
    routes = [*rig.ask(1), *rig.tick()]
    assert routes, "the actor waits for ever"
    assert routes[0].start == "snapshot"
    assert rig.arrives(routes[0])


def test_a_newcomer_that_could_not_follow_its_way_makes_the_broker_want_a_snapshot(rig: Rig) -> None:
    rig.line(1, 2)
    assert len(rig.ask(1, failed="the shadow was lost")) == 1
    assert not rig.publish(3, 2).snapshot_wanted, "there is still the way from nothing"
    assert len(rig.ask(-1, failed="the root is another one")) == 1
    assert rig.publish(4, 3).snapshot_wanted


def test_an_anchor_is_made_beside_publications_and_recorded_in_the_journal(slow_rig: Rig, later: Later) -> None:
    slow_rig.line(1, ANCHOR_EVERY + 1)
    assert len(later.jobs) == 1
    slow_rig.line(ANCHOR_EVERY + 2, ANCHOR_EVERY + 3)
    assert slow_rig.recorded(facts.VersionAnchored) == []
    later.work()
    slow_rig.tick()
    [anchored] = slow_rig.recorded(facts.VersionAnchored)
    assert (anchored.number, anchored.root) == (ANCHOR_EVERY + 1, 0)
    [route] = slow_rig.ask(-1)
    assert route.deltas[0] == anchored.delta
    assert len(route.deltas) == 3
    assert slow_rig.arrives(route)


def test_an_anchor_is_made_although_a_newcomer_had_the_same_way_folded_before(tmp_path: Path, make_tree: Any, later: Later) -> None:
    rig = Rig(tmp_path / "run", make_tree(), later.submit)
    rig.publish(0, -1)
    rig.join()
    rig.line(1, ANCHOR_EVERY + 1)
    later.jobs.clear()  # the broker is killed before the anchor is made
    rig.restart()
    rig.join()
    assert rig.ask(-1) == []
    later.work()
    assert len(rig.tick()) == 1
    rig.publish(ANCHOR_EVERY + 1, ANCHOR_EVERY)  # the learner, which had no answer, says it again
    later.work()
    rig.tick()
    rig.line(ANCHOR_EVERY + 2, ANCHOR_EVERY + 3)
    later.work()
    rig.tick()
    assert rig.recorded(facts.VersionAnchored), "no anchor is ever made again"


def test_an_anchor_that_cannot_be_folded_is_not_tried_in_a_loop_and_made_from_the_snapshot_that_comes_instead(
    slow_rig: Rig, later: Later
) -> None:
    slow_rig.line(1, ANCHOR_EVERY)
    slow_rig.damage(4)
    slow_rig.publish(ANCHOR_EVERY + 1, ANCHOR_EVERY)
    later.work()
    for _ in range(5):
        slow_rig.tick()
    assert slow_rig.publish(ANCHOR_EVERY + 2, ANCHOR_EVERY + 1).snapshot_wanted
    assert later.jobs == []
    slow_rig.publish(ANCHOR_EVERY + 3, ANCHOR_EVERY + 2, snapshot=True)
    last = 2 * ANCHOR_EVERY + 4
    slow_rig.line(ANCHOR_EVERY + 4, last)
    later.work()
    slow_rig.tick()
    [anchored] = slow_rig.recorded(facts.VersionAnchored)
    assert (anchored.number, anchored.root) == (last, ANCHOR_EVERY + 3)
    [route] = slow_rig.ask(-1)
    assert route.start == "snapshot"
    assert slow_rig.arrives(route)


def test_a_way_over_an_anchor_that_was_replaced_meanwhile_is_no_reason_for_a_snapshot(slow_rig: Rig, later: Later) -> None:
    slow_rig.line(1, ANCHOR_EVERY + 1)
    later.work()
    slow_rig.tick()
    last = 2 * ANCHOR_EVERY + 1
    slow_rig.line(ANCHOR_EVERY + 2, last)
    slow_rig.publish(last + 1, last)
    assert slow_rig.ask(-1) == []  # by the old anchor, folded after the new one
    later.jobs.pop(0)()
    slow_rig.tick()
    later.work()
    routes = slow_rig.tick()
    assert not slow_rig.publish(last + 2, last + 1).snapshot_wanted
    assert slow_rig.arrives((routes or slow_rig.ask(-1))[0])


def test_files_are_removed_only_after_the_commit_of_the_fact_that_nothing_leads_to_them(
    slow_rig: Rig, later: Later, monkeypatch: Any
) -> None:
    monkeypatch.setattr("broker.publications.KEPT_BYTES", KEPT_BYTES // (1 << 20))
    monkeypatch.setattr("broker.publications.KEPT_MODELS", 0)
    slow_rig.line(1, ANCHOR_EVERY + 1)
    files = [slow_rig.delta(number) for number in range(1, ANCHOR_EVERY + 2)]
    later.work()
    slow_rig.broker.tick(0.0, 0.0)
    assert all(slow_rig.broker.blobs.size(file.digest) == file.size for file in files), "not committed yet"
    slow_rig.flush()
    [dropped] = slow_rig.recorded(facts.DeltasDropped)
    gone = [number for number, file in enumerate(files, 1) if slow_rig.broker.blobs.size(file.digest) is None]
    assert gone == list(range(1, dropped.through + 1))
    [route] = slow_rig.ask(-1)
    assert slow_rig.arrives(route)


def test_a_recovered_broker_gives_the_same_ways(rig: Rig) -> None:
    rig.line(1, ANCHOR_EVERY + 6)
    rig.session = "resumed"
    before = [[route.deltas for route in rig.ask(held)] for held in range(-1, ANCHOR_EVERY + 7)]
    rig.restart()
    rig.join()
    after = [[route.deltas for route in rig.ask(held)] for held in range(-1, ANCHOR_EVERY + 7)]
    assert before == after
    assert all(len(routes) == 1 for routes in after)


def test_the_anchor_of_a_recovered_broker_is_never_removed(rig: Rig) -> None:
    rig.line(1, ANCHOR_EVERY + 1)
    rig.restart()
    rig.join()
    anchor = rig.broker.ledger.versions.anchor
    assert anchor is not None
    for held in range(ANCHOR_EVERY - 8):
        rig.ask(held)
    rig.line(ANCHOR_EVERY + 2, ANCHOR_EVERY + 12)
    for held in range(ANCHOR_EVERY - 8):
        rig.ask(held)
    assert rig.broker.blobs.size(anchor.delta.digest) == anchor.delta.size
    [route] = rig.ask(-1)
    assert rig.arrives(route)
