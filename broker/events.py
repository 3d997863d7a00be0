"""What goes into the ledger (events) and what comes out of it (effects).

An event says what a peer did or that time passed; an effect says what the shell must do. Facts to be journalled come out as `Record`, and
the shell carries out nothing else of a round before all its records are committed.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from broker.room import Room
from protocol import messages
from protocol.facts import AnyFact
from protocol.messages import ActorReport
from protocol.weights import BlobRef, PolicyVersion


class ActorHere(Struct, frozen=True):
    """An actor said hello."""

    actor: str
    epoch: str
    engine: str
    host: str


class ActorReported(Struct, frozen=True):
    """An actor's heartbeat."""

    actor: str
    epoch: str
    report: ActorReport


class ActorGone(Struct, frozen=True):
    """An actor said goodbye."""

    actor: str
    epoch: str


class GroupArrived(Struct, frozen=True):
    """A group arrived; `versions` are the numbers of all versions it was sampled from, ascending. `invalid` is the reason if validation
    failed, and then what follows from the payload is empty."""

    actor: str
    epoch: str
    seq: int
    ticket: int
    attempt: int
    versions: list[int] = []
    num_tokens: int = 0
    reward: float = 0.0
    invalid: str = ""
    payload: bytes = b""


class AttemptGivenUp(Struct, frozen=True):
    """An actor could not serve a ticket."""

    actor: str
    epoch: str
    seq: int
    ticket: int
    attempt: int
    reason: str


class LearnerHere(Struct, frozen=True):
    """A learner session says hello with weights of `step`."""

    session: str
    step: int
    world_size: int
    environment: dict[str, str] = {}


class BatchWanted(Struct, frozen=True):
    """The learner stands at `step` and wants the batch that this step uses."""

    session: str
    step: int


class StepDone(Struct, frozen=True):
    """The learner applied the step that turns theta_step into theta_{step+1}."""

    session: str
    step: int
    batch: int
    lags: list[int]
    metrics: dict[str, float]
    notes: list[messages.Note] = []


class VersionReady(Struct, frozen=True):
    """The learner publishes weights whose blobs are in the store."""

    session: str
    version: PolicyVersion
    parent: int
    delta: BlobRef | None
    snapshot: BlobRef | None
    full_bytes: int
    bound_bytes: int
    compact: BlobRef | None = None
    is_base: bool = False
    seconds: dict[str, float] = {}


class AnchorMade(Struct, frozen=True):
    """The deltas on the way from version `root` to version `number` were folded into one."""

    number: int
    root: int
    delta: BlobRef


class EvaluationDone(Struct, frozen=True):
    """The learner measured the held-out reward."""

    session: str
    step: int
    reward: float
    num_prompts: int


class LearnerGone(Struct, frozen=True):
    """The learner ended in order."""

    session: str
    step: int
    summary: dict[str, float]


class ActorsWanted(Struct, frozen=True):
    """Somebody asked for another number of actors."""

    num_actors: int


class StopWanted(Struct, frozen=True):
    """Somebody asked for the run to end."""

    reason: str


class RoomMeasured(Struct, frozen=True):
    """Somebody looked how much room there is on the disk."""

    room: Room


class Tick(Struct, frozen=True):
    """Time passed."""


Event = (
    ActorHere
    | ActorReported
    | ActorGone
    | GroupArrived
    | AttemptGivenUp
    | LearnerHere
    | BatchWanted
    | StepDone
    | VersionReady
    | EvaluationDone
    | LearnerGone
    | ActorsWanted
    | StopWanted
    | AnchorMade
    | RoomMeasured
    | Tick
)


REQUESTS: Final[dict[type[Event], str]] = {
    StepDone: "commit",
    VersionReady: "publish",
    EvaluationDone: "evaluation",
    LearnerGone: "done",
}
"""What a learner calls that which it asks for with these."""


class Record(Struct, frozen=True):
    """Write a fact (and a group's payload) to the journal."""

    fact: AnyFact
    payload: bytes = b""


class WelcomeActor(Struct, frozen=True):
    """Answer an actor's hello; results up to `acked` are in the journal."""

    actor: str
    epoch: str
    acked: int


class WelcomeLearner(Struct, frozen=True):
    """Answer a learner's hello."""

    session: str
    lineage: int
    next_version: int


class SendActor(Struct, frozen=True):
    """Send a message to one actor."""

    actor: str
    epoch: str
    message: messages.ToActor


class SendAllActors(Struct, frozen=True):
    """Send a message to every actor present."""

    message: messages.ToActor


class SendLearner(Struct, frozen=True):
    """Send a message to the learner session."""

    session: str
    message: messages.ToLearner


class RemoveBlobs(Struct, frozen=True):
    """Once the records before are committed, remove files that nothing leads to any more."""

    blobs: list[BlobRef]


Effect = Record | RemoveBlobs | WelcomeActor | WelcomeLearner | SendActor | SendAllActors | SendLearner
