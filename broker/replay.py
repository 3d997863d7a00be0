"""A recorded run in a broker's place: the learner's port over its journal.

Invariant: the batch given for a step is the one that the step used in the run, byte for byte; every version that the learner publishes is compared
with the recorded one before the batch after next is given.

Nothing is written to the run's directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import blake3
import msgspec
import numpy as np

from broker.blobs import BlobStore
from broker.history import History
from broker.recorded_weights import RecordedWeights, base_weights, moved
from protocol import messages
from protocol.differences import TensorDifference, differences, distance
from protocol.errors import WeightsError
from protocol.groups import decode_group
from protocol.journal import open_read_only, read_payload
from protocol.messages import PROTOCOL_VERSION, NamedBlob
from protocol.ports import ReceivedBatch
from protocol.weights import BlobRef, Weights


class Difference(msgspec.Struct, frozen=True):
    """The first version that is not what was recorded. `tensors` is empty if the recorded weights cannot be built again; `why` says so then."""

    step: int
    version: int
    root: str
    recorded_root: str
    drift: float | None
    tensors: list[TensorDifference]
    why: str = ""


class StepRow(msgspec.Struct, frozen=True):
    """What one step came to in the replay."""

    step: int
    lags: list[int]
    metrics: dict[str, float]


class ReplayResult(msgspec.Struct):
    """What a replay of steps `first` to `end` (exclusive) found.

    `environment` holds, for each thing that is not as it was in the run, what it was and what it is. `largest_drift` is the largest distance of
    a published version from the recorded one, as a share of how far the recorded one had come since the replay's start.
    """

    first: int
    end: int = 0
    num_compared: int = 0
    num_equal: int = 0
    num_unrecorded: int = 0
    """Versions at a step of which the run has none: it was ended before it could publish it."""
    largest_drift: float = 0.0
    difference: Difference | None = None
    environment: dict[str, tuple[str, str]] = {}
    evaluations: dict[int, float] = {}
    busy_seconds: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether every version was the recorded one."""
        return self.num_compared == self.num_equal


class Replayed(msgspec.Struct, frozen=True):
    """How a replay is compared: not at all (a what-if), or within `tolerance` (see ReplayResult.largest_drift) where roots need not be equal."""

    compare: bool = True
    tolerance: float = 0.0


class ReplayPort:
    """Implements protocol.ports.LearnerPort."""

    def __init__(
        self,
        journal: Path,
        history: History,
        policy_files: list[NamedBlob],
        end: int,
        how: Replayed,
        say: Callable[[str], None],
        on_step: Callable[[StepRow], None],
    ) -> None:
        """Give the steps before `end`. `say` is told what a person wants to know, `on_step` every step. Raises JournalError."""
        self._path, self._history, self._files, self._end, self._how = journal, history, policy_files, end, how
        self._connection = open_read_only(journal)
        self._blobs = BlobStore(journal.parent / "blobs")
        self._recorded, self._reference = (RecordedWeights(history.publications, self._blobs, policy_files) for _ in range(2))
        self._say, self._on_step = say, on_step
        self._stored: dict[str, bytes] = {}
        self._compared: int | None = None
        """The last version whose root was the recorded one."""
        self._own: Weights | None = None
        """The weights published last, once they are not the recorded ones."""
        self._next_number = 0
        self._first_version: int | None = None
        self._exact = True
        self._segment_environment: dict[str, str] = {}
        self.batch: ReceivedBatch | None = None
        self.result = ReplayResult(0)

    # --- what the learner asks

    def join(self, step: int, world_size: int, environment: dict[str, str]) -> messages.LearnerWelcome:
        segment = next(part for part in self._history.segments if part.first <= step < part.end)
        self._segment_environment = segment.environment
        before = segment.environment | {"ranks": str(segment.world_size)}
        now = environment | {"ranks": str(world_size)}
        apart = {name: (before.get(name, "not recorded"), now.get(name, "unknown")) for name in {*before, *now}}
        self.result = ReplayResult(step, environment={name: pair for name, pair in sorted(apart.items()) if pair[0] != pair[1]})
        self._exact = not self.result.environment
        self._compared = self._first_version = self._history.newest_version_at(step)
        held = self._compared if self._compared is not None and step > 0 else -1  # at step 0 the first version is still to come
        self._next_number = 1 + held
        if self._how.compare:
            self._announce()
        return messages.LearnerWelcome(PROTOCOL_VERSION, self._history.run, segment.lineage, self._next_number)

    def _announce(self) -> None:
        if not self._segment_environment:
            self._say("the run did not record what its learner ran on")
        for name, (was, now) in self.result.environment.items():
            if self._segment_environment or name == "ranks":
                self._say(f"not as in the run: {name} was {was}, is {now}")
        if self._exact:
            self._say("the same machine, libraries and ranks as in the run: every version must have the recorded root")
        else:
            self._say(f"roots may differ; versions are compared within a drift of {self._how.tolerance:.1%}")

    def next_batch(self, step: int, while_waiting: Callable[[], None]) -> ReceivedBatch | None:
        while_waiting()
        if step >= self._end or self.result.difference is not None:
            return None
        number = self._history.steps[step].batch
        payloads = [self._payload(ticket) for ticket in self._history.batches[number]]
        self.batch = ReceivedBatch(number, payloads, self._version_steps(payloads))
        return self.batch

    def _version_steps(self, payloads: list[bytes]) -> dict[int, int]:
        """The step of each version that the groups were sampled from."""
        numbers = {number for payload in payloads for number in np.unique(decode_group(payload).versions).tolist()}
        return {number: self._history.publications.by_number[number].version.step for number in sorted(numbers)}

    def stop_after(self, step: int) -> None:
        """Give no batch for any step after `step`; the batch in hand is finished with."""
        self._end = step + 1

    def _payload(self, ticket: int) -> bytes:
        payload = read_payload(self._connection, self._path, ticket)
        assert payload is not None, "a batch is formed of groups in the journal"
        return payload

    def commit(self, step: int, batch: int, lags: list[int], metrics: dict[str, float], notes: Sequence[messages.Note] = ()) -> None:
        del batch
        if step in self._history.steps:  # a run may have been ended in the middle of a batch; the learner finishes what it has begun
            self.result.end = step + 1
            self._on_step(StepRow(step, lags, metrics))

    def confirm(self) -> None:
        pass

    def put_blob(self, data: bytes) -> BlobRef:
        blob = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        self._stored[blob.digest] = data
        return blob

    def publish(self, publication: messages.Publish) -> messages.Published:
        number, self._next_number = self._next_number, self._next_number + 1
        if self._how.compare:
            self._compare(publication)
        self._stored.clear()  # one publication is under way at a time
        return messages.Published(publication.version.step, number, self._next_number)

    def evaluated(self, step: int, reward: float, num_prompts: int) -> None:
        del num_prompts
        self.result.evaluations[step] = reward

    def doing(self, text: str) -> None:
        pass

    def done(self, step: int, summary: dict[str, float]) -> None:
        del step
        self.result.busy_seconds = summary["busy_seconds"]

    def close(self) -> None:
        self._connection.close()

    # --- comparing, in the publisher's thread

    def _compare(self, publication: messages.Publish) -> None:
        step, root = publication.version.step, publication.version.root
        number = self._history.version_at(step)
        if self.result.difference is not None:
            return
        if number is None:
            self.result.num_unrecorded += 1
            return
        self.result.num_compared += 1
        recorded_root = self._history.publications.by_number[number].version.root
        if root == recorded_root:
            self.result.num_equal += 1
            self._compared, self._own = number, None
            return
        found = self._difference(publication, number, recorded_root)
        self.result.largest_drift = max(self.result.largest_drift, found.drift or 0.0)
        if self._exact or found.drift is None or found.drift > self._how.tolerance:
            self.result.difference = found

    def _difference(self, publication: messages.Publish, number: int, recorded_root: str) -> Difference:
        place = (publication.version.step, number, publication.version.root, recorded_root)
        try:
            own = self._weights_of(publication)
            recorded = self._recorded.at(number)
            tensors = differences(own, recorded)
            start = self._reference.at(self._first_version if self._first_version is not None else 0)
            travelled = distance(recorded, start)
            drift = distance(own, recorded) / travelled if travelled else float("inf")
        except WeightsError as error:
            return Difference(*place, None, [], str(error))
        self._own = own
        return Difference(*place, drift, tensors)

    def _weights_of(self, publication: messages.Publish) -> Weights:
        """What the replaying learner has published, as weights."""
        file = publication.snapshot or publication.delta
        if file is None:
            return base_weights(self._blobs, self._files)
        if publication.snapshot is not None:
            return moved(self._stored[file.digest], {})
        before = self._own
        if before is None:
            assert self._compared is not None
            before = self._recorded.at(self._compared)
        return moved(self._stored[file.digest], before)
