"""The seams between the parts: what an actor and a learner need of a broker, whatever carries it.

One contract suite (tests/broker/test_port_contract.py) runs against every implementation: sockets and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from protocol.groups import Group
from protocol.messages import ActorReport, ActorWelcome, LearnerWelcome, Note, Publish, Published, Route, WireTicket
from protocol.weights import BlobRef, PolicyVersion


class Clock(Protocol):
    """Time, passed in: `monotonic` for durations, `wall` (seconds since 1970) for records."""

    def monotonic(self) -> float: ...

    def wall(self) -> float: ...


class ActorPort(Protocol):
    """An actor's view of the broker. All methods belong to one event loop."""

    @property
    def newest(self) -> PolicyVersion | None:
        """The newest version announced."""

    @property
    def stopping(self) -> str:
        """Why the run is ending; empty while it is not."""

    def held_tickets(self) -> list[int]:
        """Numbers of the tickets in hand or with a result that is not acknowledged yet."""

    async def join(self, engine: str, report: Callable[[], ActorReport]) -> ActorWelcome:
        """Say hello; from then on `report` is asked once a second and whenever `report_now` is called."""

    def report_now(self) -> None:
        """Tell the broker at once what `report` says, as when a new version is held."""

    async def next_ticket(self) -> WireTicket | None:
        """The next ticket; None when the run ends."""

    async def new_version(self, held: int) -> PolicyVersion | None:
        """Wait until a version other than number `held` is the newest; None when the run ends."""

    async def submit(self, group: Group, attempt: int) -> None:
        """Hand in a whole group. Returns once it is kept here for resending; it is safe when the broker has acknowledged it."""

    async def fail(self, ticket: WireTicket, reason: str) -> None:
        """Give a ticket up."""

    async def route(self, held: int, failed: str = "") -> Route:
        """How to get from version `held` (-1: none) to the newest; `failed` says why the way given before did not lead there."""

    async def fetch(self, blob: BlobRef) -> Path:
        """A file with a blob's bytes, verified; not to be written to. Raises RequestRefused if the store does not have it any more."""

    def forget(self, blob: BlobRef) -> None:
        """The file of a blob is not needed any more."""

    async def leave(self) -> None:
        """Wait for what is unacknowledged, within reason, then say goodbye and release everything."""


class ReceivedBatch(NamedTuple):
    """A batch as delivered: its number, the payload of each group in ticket order, and the step of each version number."""

    number: int
    payloads: list[bytes]
    version_steps: dict[int, int]


class LearnerPort(Protocol):
    """The learner's view of the broker; used by rank 0 only.

    `put_blob` and `publish` may be called from a second thread, beside one that trains; all else belongs to one thread.
    """

    def join(self, step: int, world_size: int, environment: dict[str, str]) -> LearnerWelcome:
        """Say hello with weights of `step`, and on what they are trained. Raises RequestRefused if they are not of this run."""

    def next_batch(self, step: int, while_waiting: Callable[[], None]) -> ReceivedBatch | None:
        """The batch that `step` uses; waits for it, and meanwhile calls `while_waiting` every second or so. None when the run is to stop."""

    def commit(self, step: int, batch: int, lags: list[int], metrics: dict[str, float], notes: Sequence[Note] = ()) -> None:
        """Record that theta_{step+1} exists, and what was noted at it. May return before it is in the journal; `next_batch` and `done` do not."""

    def confirm(self) -> None:
        """Wait until every step committed is in the journal."""

    def put_blob(self, data: bytes) -> BlobRef:
        """Store a blob."""

    def publish(self, publication: Publish) -> Published:
        """Announce new weights whose blobs are stored."""

    def evaluated(self, step: int, reward: float, num_prompts: int) -> None:
        """Record a held-out evaluation."""

    def doing(self, text: str) -> None:
        """Say what the learner is busy with, for heartbeats; an empty text means waiting."""

    def done(self, step: int, summary: dict[str, float]) -> None:
        """End the session in order."""

    def close(self) -> None:
        """Release everything."""
