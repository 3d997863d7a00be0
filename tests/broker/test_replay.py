"""The learner's port over a recording, with made-up weights: what is compared, against what, and when it stops. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest

from broker.blobs import BlobStore
from broker.history import History
from broker.journal import Journal
from broker.publications import Publications
from broker.recorded_weights import RecordedWeights
from broker.replay import Replayed, ReplayPort
from protocol import facts
from protocol.delta import encode_delta, encode_snapshot
from protocol.errors import RootMismatch, WeightsError
from protocol.fold import Leg, fold
from protocol.messages import NamedBlob, Publish
from protocol.weights import BlobRef, PolicyVersion, Weights, root_hash

HERE = {"torch": "1", "threads": "1"}
MakeTree = Callable[..., Any]


class Recording:
    """A journal and a blob store with a version after each step, whose weights are those of a tree."""

    def __init__(self, folder: Path, tree: Any, group: bytes, environment: dict[str, str] = HERE) -> None:
        self.folder, self.tree, self._group, self._environment = folder, tree, group, environment
        self.blobs = BlobStore(folder / "blobs")
        data = tree.policy_file
        self.files = [NamedBlob("model.safetensors", self.blobs.add(data))]
        self.history = History("contract", "{}")
        self._journal = Journal(folder / "journal.sqlite", "contract", "{}")
        self.tell(facts.RunStarted("contract", 0, "{}"))

    def tell(self, fact: facts.AnyFact, payload: bytes = b"") -> None:
        self._journal.append(fact, payload, 1.0)
        self._journal.commit()
        self.history.add(fact)

    def begin(self, step: int = 0, lineage: int = 0, world_size: int = 1) -> None:
        self.tell(facts.LearnerStarted(f"s{lineage}", lineage, step, world_size, self._environment))

    def base(self) -> None:
        self.tell(facts.VersionPublished(self.tree.root(), -1, None, None, 1, 1, is_base=True))

    def step(self, step: int, *, lineage: int = 0, number: int | None = None, parent: int | None = None) -> None:
        """A batch of one group, the step that used it, and the version that it led to."""
        if step not in self.history.batches:
            self.tell(facts.GroupAccepted("a", "e", step + 1, step, 1, [0], 0, 4, 0.5), self._group)
            self.tell(facts.BatchFormed(step, step, [step]))
        self.tell(facts.StepCommitted(step, step, lineage, [0], {"loss": 1.0}))
        if number is not None:
            before = number - 1 if parent is None else parent
            version = self.tree.child(before, number, step + 1, lineage)
            delta = self.blobs.add(self.tree.delta(before, number))
            self.tell(facts.VersionPublished(version, before, delta, None, 1, 1))

    def port(self, end: int = 100, how: Replayed = Replayed()) -> tuple[ReplayPort, list[str]]:  # noqa: B008
        said: list[str] = []
        self._journal.close()
        return ReplayPort(self.folder / "journal.sqlite", self.history, self.files, end, how, said.append, lambda row: None), said

    def weights(self) -> RecordedWeights:
        return RecordedWeights(self.history.publications, self.blobs, self.files)


@pytest.fixture
def make_recording(make_tree: MakeTree, tmp_path: Path) -> Callable[..., Recording]:
    """A recording of `num_steps` steps with a version after each, or an empty one."""
    from tests.broker.conftest import full_group

    def make(num_steps: int = 0, **how: Any) -> Recording:
        recording = Recording(tmp_path, make_tree(), full_group(2, 2), **how)
        if num_steps:
            recording.begin()
            recording.base()
        for step in range(num_steps):
            recording.step(step, number=step + 1)
        return recording

    return make


class Publisher:
    """What a replaying learner publishes: weights as told, by deltas from what it published before."""

    def __init__(self, port: ReplayPort, weights: Weights, number: int, step: int) -> None:
        self._port, self._held = port, weights
        self._version = PolicyVersion(number, step, 0, root_hash(weights))

    def first(self, *, is_base: bool = True) -> None:
        blob = None if is_base else self._port.put_blob(encode_snapshot("contract", self._held, self._version))
        self._port.publish(Publish(self._version, -1, None, blob, 1, 1, is_base=is_base))

    def then(self, weights: Weights, step: int) -> None:
        version = PolicyVersion(self._version.number + 1, step, 0, root_hash(weights))
        delta = self._port.put_blob(encode_delta("contract", self._held, weights, self._version, version)[0])
        compact = self._port.put_blob(encode_delta("contract", self._held, weights, self._version, version, classes=True)[0])
        answer = self._port.publish(Publish(version, self._version.number, delta, None, 1, 1, compact))
        assert answer.number == version.number
        self._held, self._version = weights, version


def changed(weights: Weights, count: int, by: int = 1) -> Weights:
    """Weights with `count` elements of one tensor moved by so many ulps."""
    bits = weights["one"].bits.copy()
    bits[:count] += np.uint16(by)
    return weights | {"one": weights["one"]._replace(bits=bits)}


def test_versions_with_the_recorded_roots_are_equal_and_nothing_differs(make_recording: Callable[..., Recording]) -> None:
    recording = make_recording(3)
    port, said = recording.port()
    assert port.join(0, 1, HERE).next_version == 0
    learner = Publisher(port, recording.tree.weights[0], 0, 0)
    learner.first()
    for step in (1, 2, 3):
        learner.then(recording.tree.weights[step], step)
    assert (port.result.num_compared, port.result.num_equal, port.result.difference) == (4, 4, None)
    assert said == ["the same machine, libraries and ranks as in the run: every version must have the recorded root"]


def test_on_the_same_machine_the_first_version_that_is_another_is_named_and_no_batch_is_given_after_it(
    make_recording: Callable[..., Recording],
) -> None:
    recording = make_recording(3)
    port, _ = recording.port()
    port.join(0, 1, HERE)
    learner, waited = Publisher(port, recording.tree.weights[0], 0, 0), list[int]()
    learner.first()
    assert port.next_batch(0, lambda: waited.append(0)) is not None
    learner.then(changed(recording.tree.weights[1], 7, by=2), 1)
    found = port.result.difference
    assert found is not None and (found.step, found.version) == (1, 1)
    assert found.recorded_root == recording.tree.versions[1].root
    assert [(tensor.name, tensor.num_elements, tensor.num_different, tensor.largest_ulps) for tensor in found.tensors] == [
        ("one", 300, 7, 2)
    ]
    assert port.next_batch(1, lambda: waited.append(1)) is None
    assert waited == [0, 1]
    learner.then(changed(recording.tree.weights[2], 9), 2)
    assert port.result.difference is found
    assert (port.result.num_compared, port.result.num_unrecorded) == (2, 0)


def test_the_first_version_may_differ_as_base_or_as_snapshot(make_recording: Callable[..., Recording]) -> None:
    recording = make_recording(2)
    port, _ = recording.port()
    port.join(0, 1, HERE)
    Publisher(port, changed(recording.tree.weights[0], 3), 0, 0).first(is_base=False)
    assert port.result.difference is not None
    assert [tensor.num_different for tensor in port.result.difference.tensors] == [3]


def test_a_first_version_that_was_recorded_as_a_snapshot_and_is_the_base_now_is_equal_by_its_root(
    make_recording: Callable[..., Recording],
) -> None:
    recording = make_recording()
    recording.begin()
    root = recording.tree.root()
    snapshot = recording.blobs.add(recording.tree.snapshot(0))
    recording.tell(facts.VersionPublished(root, -1, None, snapshot, 1, 1))
    recording.step(0, number=1)
    port, _ = recording.port()
    port.join(0, 1, HERE)
    learner = Publisher(port, recording.tree.weights[0], 0, 0)
    learner.first()
    learner.then(changed(recording.tree.weights[1], 4), 1)
    assert port.result.num_equal == 1
    assert port.result.difference is not None and port.result.difference.tensors[0].num_different == 4


def test_on_another_machine_drift_is_measured_and_roots_may_become_equal_again(make_recording: Callable[..., Recording]) -> None:
    recording = make_recording(4)
    port, said = recording.port(how=Replayed(tolerance=1e9))
    port.join(0, 2, HERE | {"torch": "2"})
    assert port.result.environment == {"ranks": ("1", "2"), "torch": ("1", "2")}
    assert said[:2] == ["not as in the run: ranks was 1, is 2", "not as in the run: torch was 1, is 2"]
    weights = recording.tree.weights
    learner = Publisher(port, weights[0], 0, 0)
    learner.first()
    learner.then(changed(weights[1], 5), 1)
    first = port.result.largest_drift
    learner.then(changed(weights[2], 5), 2)
    learner.then(weights[3], 3)
    learner.then(changed(weights[4], 1), 4)
    assert (port.result.num_compared, port.result.num_equal, port.result.difference) == (5, 2, None)
    assert 0 < first <= port.result.largest_drift
    assert not port.result.is_exact


def test_drift_is_the_distance_as_a_share_of_what_the_run_had_moved(make_recording: Callable[..., Recording]) -> None:
    recording = make_recording(2)

    def values(weights: Weights) -> Any:
        return (weights["one"].bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    ours, recorded, start = changed(recording.tree.weights[2], 6, by=3), recording.tree.weights[2], recording.tree.weights[0]
    expected = np.linalg.norm(values(ours) - values(recorded)) / np.linalg.norm(values(recorded) - values(start))
    port, _ = recording.port(how=Replayed(tolerance=float(expected) * 0.99))
    port.join(0, 1, HERE | {"threads": "4"})
    learner = Publisher(port, recording.tree.weights[0], 0, 0)
    learner.first()
    learner.then(recording.tree.weights[1], 1)
    learner.then(ours, 2)
    assert port.result.difference is not None
    assert port.result.difference.drift == pytest.approx(expected, rel=1e-5)


def test_a_run_that_did_not_record_what_it_ran_on_is_said_to_and_need_not_be_equal(make_recording: Callable[..., Recording]) -> None:
    port, said = make_recording(1, environment={}).port(how=Replayed(tolerance=0.1))
    port.join(0, 1, HERE)
    assert said == [
        "the run did not record what its learner ran on",
        "roots may differ; versions are compared within a drift of 10.0%",
    ]


def test_a_what_if_compares_nothing(make_recording: Callable[..., Recording]) -> None:
    recording = make_recording(1)
    port, said = recording.port(how=Replayed(compare=False))
    port.join(0, 1, HERE)
    learner = Publisher(port, recording.tree.weights[0], 0, 0)
    learner.first()
    learner.then(changed(recording.tree.weights[1], 5), 1)
    assert (port.result.num_compared, port.result.difference, said) == (0, None, [])


def test_a_version_that_the_run_did_not_live_to_publish_is_counted_apart(make_recording: Callable[..., Recording]) -> None:
    recording = make_recording(1)
    recording.step(1)
    port, _ = recording.port()
    port.join(0, 1, HERE)
    learner = Publisher(port, recording.tree.weights[0], 0, 0)
    learner.first()
    learner.then(recording.tree.weights[1], 1)
    learner.then(changed(recording.tree.weights[1], 5), 2)
    assert (port.result.num_compared, port.result.num_equal, port.result.num_unrecorded, port.result.difference) == (2, 2, 1, None)


def test_after_a_restart_the_versions_of_the_lineage_that_counts_are_compared_and_the_orphaned_ones_are_not(
    make_recording: Callable[..., Recording],
) -> None:
    recording = make_recording(3)
    recording.begin(step=1, lineage=1, world_size=2)
    recording.tell(facts.VersionOrphaned(2, 1))
    recording.tell(facts.VersionOrphaned(3, 1))
    recording.step(1, lineage=1, number=4, parent=1)
    port, _ = recording.port()
    assert port.join(1, 2, HERE).next_version == 2
    learner = Publisher(port, recording.tree.weights[1], 1, 1)
    learner.then(recording.tree.weights[4], 2)
    assert (port.result.first, port.result.num_equal, port.result.difference) == (1, 1, None)


def test_a_group_is_given_as_it_was_recorded_with_the_steps_of_its_versions_alone(make_recording: Callable[..., Recording]) -> None:
    from tests.broker.conftest import full_group

    port, _ = make_recording(3).port(end=2)
    port.join(0, 1, HERE)
    batch = port.next_batch(1, lambda: None)
    assert batch is not None and (batch.number, batch.payloads, batch.version_steps) == (1, [full_group(2, 2)], {0: 0})
    assert port.next_batch(2, lambda: None) is None
    port.stop_after(0)
    assert port.next_batch(1, lambda: None) is None


# --- weights of a recording


def test_every_version_is_built_again_from_any_other(make_recording: Callable[..., Recording]) -> None:
    recording = make_recording(5)
    recording.begin(step=2, lineage=1)
    for step, number, parent in ((2, 6, 2), (3, 7, 6)):
        recording.step(step, lineage=1, number=number, parent=parent)
    weights = recording.weights()
    for number in (5, 7, 0, 3, 6, 6, 1, 4, 7, 2):
        assert root_hash(weights.at(number)) == recording.tree.versions[number].root


def test_a_version_beyond_dropped_deltas_is_reached_by_the_anchor_and_one_among_them_is_not(
    make_recording: Callable[..., Recording],
) -> None:
    recording = make_recording(5)
    deltas = [publication.fact.delta for publication in recording.history.publications.by_number.values()]
    held = [blob for blob in deltas if blob is not None]
    anchor = recording.blobs.add(fold([Leg(recording.blobs.path(blob.digest).read_bytes()) for blob in held[:3]])[0])
    recording.tell(facts.VersionAnchored(3, 0, anchor))
    recording.tell(facts.DeltasDropped(2))
    for blob in held[:2]:
        recording.blobs.path(blob.digest).unlink()
    weights = recording.weights()
    for number in (5, 3, 2, 4, 0):  # version 2 is one step back from 3
        assert root_hash(weights.at(number)) == recording.tree.versions[number].root
    with pytest.raises(WeightsError, match="version 1 cannot be built again"):
        weights.at(1)
    assert root_hash(weights.at(5)) == recording.tree.versions[5].root


def test_a_version_that_the_run_does_not_have_is_named(make_recording: Callable[..., Recording]) -> None:
    with pytest.raises(WeightsError, match=r"no version 9\. It has versions 0 to 2"):
        make_recording(2).weights().at(9)


def test_a_missing_or_cut_file_is_named_and_other_versions_are_still_there(make_recording: Callable[..., Recording]) -> None:
    recording = make_recording(4)
    blob = recording.history.publications.by_number[3].fact.delta
    assert blob is not None
    path = recording.blobs.path(blob.digest)
    path.unlink()
    path.write_bytes(b"cut")
    weights = recording.weights()
    with pytest.raises(WeightsError, match=blob.digest[:16]):
        weights.at(4)
    assert root_hash(weights.at(2)) == recording.tree.versions[2].root


def test_files_that_lead_elsewhere_are_a_mismatch_of_roots(make_recording: Callable[..., Recording]) -> None:
    recording = make_recording(2)
    publications: Publications = recording.history.publications
    wrong = recording.blobs.add(
        encode_delta(
            "contract",
            recording.tree.weights[1],
            changed(recording.tree.weights[2], 1),
            recording.tree.versions[1],
            recording.tree.versions[2],
        )[0]
    )
    version = publications.by_number[2].version
    publications.add(facts.VersionPublished(version, 1, wrong, None, 1, 1))
    with pytest.raises(RootMismatch):
        recording.weights().at(2)


def test_what_a_replaying_learner_stores_is_addressed_as_in_a_run(make_recording: Callable[..., Recording]) -> None:
    port, _ = make_recording(1).port()
    assert port.put_blob(b"abc") == BlobRef(blake3.blake3(b"abc").hexdigest(), 3)
