"""Everything that crosses a socket, one struct per message, as a tagged union for each socket and direction.

Evolution: fields are only added, with a default, and PROTOCOL_VERSION is raised when an old peer could not cope.
Names of actors and sessions are claims; what a peer may do follows from the key it authenticated with.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from protocol.weights import BlobRef, PolicyVersion

PROTOCOL_VERSION: Final = 3
CHUNK_BYTES: Final = 1 << 20
HEARTBEAT_SECONDS: Final = 1.0
"""Every peer reports at least this often, whatever it is doing."""
LEASE_SECONDS: Final = 6.0
"""An actor silent for this long has lost its tickets."""

TAKEN_OVER: Final = "another learner session has taken over"
"""The reason that an older learner session is refused with."""

Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^(?!\.+\Z)[\w.\-]+\Z")]
"""Usable as a file name: no slash, not only dots, no line end."""
MAX_TEXT: Final = 4096
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Label = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Number = Annotated[int, Meta(ge=-1, le=1 << 53)]
"""The number of a version; -1 for none."""
Figure = Annotated[float, Meta(ge=0.0, le=1e15)]
"""A finite number that is not negative."""
Tickets = Annotated[list[Count], Meta(max_length=1 << 16)]


class Message(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag is the class name."""


class NotNow(Message, frozen=True):
    """Nothing is wrong, and the other side is there: it cannot do what was asked now, as without room on its disk. Ask again in a second.

    `request` says what was asked (for a blob, its digest), `reason` why not, in words.
    """

    request: Text
    reason: Text


class WireTicket(Struct, frozen=True, array_like=True):
    """Permission to generate one group: its number, which attempt this is, the prompt index and the seed."""

    number: int
    attempt: int
    prompt: int
    seed: int


class NamedBlob(Struct, frozen=True, array_like=True):
    """A file of the policy's folder (configuration, tokenizer) as a blob."""

    name: Name
    blob: BlobRef


# --- actors socket: Actor -> Broker -------------------------------------------------------------------------------------------------


class ActorHello(Message, frozen=True):
    """First message of an actor, and again whenever the broker says it does not know it."""

    protocol: int
    actor: Name
    epoch: Name
    engine: Text
    host: Text
    pid: Count
    tickets: Tickets
    """Tickets in hand or finished and not yet acknowledged."""


class ActorReport(Message, frozen=True):
    """Heartbeat and credit. `version` is the number of the version sampled from, -1 before the first."""

    version: Number
    num_wanted: Annotated[int, Meta(ge=0, le=4096)]
    """How many tickets this actor is ready to have in hand."""
    tickets: Tickets
    busy_seconds: Figure
    """Seconds spent generating since the start of the process."""
    elapsed_seconds: Figure
    num_tokens: Count
    """Tokens sampled since the start of the process."""
    doing: Text
    """What the actor is doing or waiting for, in words."""


class SubmitGroup(Message, frozen=True):
    """A finished group; the payload is a GroupWire. `seq` counts this actor epoch's results from 1 without a gap."""

    seq: Count
    ticket: Count
    attempt: Count


class TicketFailed(Message, frozen=True):
    """The ticket could not be served; numbered like a group."""

    seq: Count
    ticket: Count
    attempt: Count
    reason: Text


class GetRoute(Message, frozen=True):
    """Ask how to get from the version held (-1: none) to the newest. `failed` says why the way given before did not lead there."""

    held: Number
    failed: Text = ""


class ActorBye(Message, frozen=True):
    """The actor leaves and gives its tickets back."""


ActorMessage = ActorHello | ActorReport | SubmitGroup | TicketFailed | GetRoute | ActorBye


# --- actors socket: Broker -> Actor -------------------------------------------------------------------------------------------------


class ActorWelcome(Message, frozen=True):
    """The actor is known; results up to `acked` are in the journal."""

    protocol: int
    run: Name
    acked: Count
    config: str
    """The run's resolved configuration as JSON."""
    policy_files: list[NamedBlob]
    """Every file of the policy that the run starts from; actors need all but the weights, which come as versions."""
    newest: PolicyVersion | None


class HelloWanted(Message, frozen=True):
    """The broker does not know this actor (any more): say hello again."""


class IssueTicket(Message, frozen=True):
    """A ticket to serve. Sampling from a newer version than the one reported is always allowed."""

    ticket: WireTicket


class Ack(Message, frozen=True):
    """All results up to `seq` are in the journal, or refused for good."""

    seq: Count


class Refused(Message, frozen=True):
    """A result was refused for good; `reason` is a short stable word."""

    seq: Count
    ticket: Count
    reason: Text


class NewVersion(Message, frozen=True):
    """A version was published."""

    version: PolicyVersion


class Route(Message, frozen=True):
    """How to arrive at `version`: start from `start`, then apply `deltas` in order (nearly always one).

    `start` is held (the version held), base (the policy's files rounded to bf16) or snapshot (the file `snapshot`).
    """

    held: int
    version: PolicyVersion | None
    start: Literal["held", "base", "snapshot"]
    snapshot: BlobRef | None
    deltas: list[BlobRef]


class Stop(Message, frozen=True):
    """The run is ending; finish what is in hand or leave."""

    reason: Text


class HelloRefused(Message, frozen=True):
    """The peer cannot take part."""

    reason: Text
    protocol: int = PROTOCOL_VERSION


ToActor = ActorWelcome | HelloWanted | IssueTicket | Ack | Refused | NewVersion | Route | Stop | HelloRefused | NotNow


# --- learner socket: Learner -> Broker ----------------------------------------------------------------------------------------------


class GetRun(Message, frozen=True):
    """Ask what run this is, before any session."""


class LearnerHello(Message, frozen=True):
    """First message of a learner session; `step` is the step of the weights it starts from."""

    protocol: int
    session: Name
    step: Count
    world_size: Count
    environment: dict[Label, Label] = {}
    """What the bits of its arithmetic depend on beside the data: libraries, processor, device, threads, rollbacks."""


class NextBatch(Message, frozen=True):
    """Ask for the batch that step `step` uses. Repeated while waiting."""

    step: Count


class GetGroup(Message, frozen=True):
    """Ask for the payload of one group of a delivered batch."""

    ticket: Count


class Note(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Something the learner decided or saw at a step, that no single measure says."""

    kind: Literal["learning-rate", "warning", "region", "collapse", "rollback"]
    text: Text
    values: dict[str, float] = {}
    ends_run: bool = False
    """Whether the run is to be stopped for it."""


class CommitStep(Message, frozen=True):
    """theta_{step+1} exists. `lags` are the lags of the batch's groups as the learner counted them from the tokens' versions."""

    step: Count
    batch: Count
    lags: Annotated[list[Number], Meta(max_length=1 << 16)]
    metrics: dict[str, float]
    notes: Annotated[list[Note], Meta(max_length=64)] = []


class Publish(Message, frozen=True):
    """New weights. The blobs are in the store already. `delta` leads from `parent` to `version`, and so does `compact`, with positions by class.

    `is_base` says that the weights are the policy's files rounded to bf16. `seconds` is what each part of the publication took.
    """

    version: PolicyVersion
    parent: Number
    delta: BlobRef | None
    snapshot: BlobRef | None
    full_bytes: Count
    bound_bytes: Count
    compact: BlobRef | None = None
    is_base: bool = False
    seconds: dict[str, Figure] = {}


class Evaluation(Message, frozen=True):
    """Mean held-out reward of theta_step over `num_prompts` prompts."""

    step: Count
    reward: Annotated[float, Meta(ge=-1e30, le=1e30)]
    num_prompts: Count


class LearnerReport(Message, frozen=True):
    """Heartbeat of a learner."""

    session: Name
    step: Count
    busy_seconds: Figure
    elapsed_seconds: Figure
    doing: Text


class LearnerDone(Message, frozen=True):
    """The learner ends in order, at `step`; everything it wants kept is on its disk. `summary` are figures of the whole session."""

    step: Count
    summary: dict[str, float]


LearnerMessage = GetRun | LearnerHello | NextBatch | GetGroup | CommitStep | Publish | Evaluation | LearnerReport | LearnerDone


# --- learner socket: Broker -> Learner ----------------------------------------------------------------------------------------------


class RunInfo(Message, frozen=True):
    """The run, its resolved configuration as JSON, every file of the policy it starts from, and the step at which its journal ends.

    A learner cannot start from a checkpoint after that step.
    """

    protocol: int
    run: Name
    config: str
    policy_files: list[NamedBlob]
    step: Number = -1


class LearnerWelcome(Message, frozen=True):
    """The session is the learner now. `next_version` is the number its next publication takes."""

    protocol: int
    run: Name
    lineage: int
    next_version: int


class BatchReady(Message, frozen=True):
    """The groups of `batch`, in ticket order; each payload is fetched with GetGroup."""

    step: Count
    batch: Count
    tickets: Tickets
    version_steps: dict[int, int]
    """Step of every version that any token of the batch was sampled from, and of all between."""


class BatchPending(Message, frozen=True):
    """The batch is not complete; `waiting_for` says what is missing, in words."""

    step: Count
    num_missing: Count
    waiting_for: Text


class GroupData(Message, frozen=True):
    """The payload of a group follows."""

    ticket: Count


class Committed(Message, frozen=True):
    """The step is in the journal."""

    step: Count


class EvaluationNoted(Message, frozen=True):
    """The evaluation of `step` is in the journal."""

    step: Count


class Published(Message, frozen=True):
    """The publication is in the journal under `number` (an older number if it reproduced that version).

    `snapshot_wanted` asks for a snapshot with the next publication: the store cannot lead a newcomer to the newest version.
    """

    step: Count
    number: int
    next_version: int
    snapshot_wanted: bool = False


class LearnerRefused(Message, frozen=True):
    """The request cannot be met, now or ever."""

    request: Text
    reason: Text


class Goodbye(Message, frozen=True):
    """LearnerDone is in the journal."""


ToLearner = (
    RunInfo
    | LearnerWelcome
    | BatchReady
    | BatchPending
    | GroupData
    | Committed
    | EvaluationNoted
    | Published
    | LearnerRefused
    | Goodbye
    | Stop
    | HelloRefused
    | NotNow
)


# --- blobs socket: Client -> Broker and back ----------------------------------------------------------------------------------------


class PutChunk(Message, frozen=True):
    """A piece of a file of `size` bytes; the payload is the bytes at `offset`."""

    digest: Digest
    size: Count
    offset: Count


class GetChunk(Message, frozen=True):
    """Ask for up to `length` bytes at `offset` of a file of `size` bytes (a relay may have to fetch it first)."""

    digest: Digest
    offset: Count
    length: Annotated[int, Meta(ge=0, le=CHUNK_BYTES)] = CHUNK_BYTES
    size: Count = 0


BlobMessage = PutChunk | GetChunk


class PutOk(Message, frozen=True):
    """Everything before `offset` has arrived; `stored` once the whole file is verified and named."""

    digest: Digest
    offset: Count
    stored: bool


class Chunk(Message, frozen=True):
    """The payload is the bytes at `offset` of a file of `size` bytes."""

    digest: Digest
    offset: Count
    size: Count


class BlobRefused(Message, frozen=True):
    """The store does not have the file, or will not take it."""

    digest: Digest
    reason: Text


ToBlobClient = PutOk | Chunk | BlobRefused | NotNow


# --- control socket: Admin -> Broker and back ---------------------------------------------------------------------------------------


class GetStatus(Message, frozen=True):
    """Ask for the state of the run."""


class SetActors(Message, frozen=True):
    """Ask the run's supervisor to keep this many actors."""

    num_actors: Annotated[int, Meta(ge=0, le=4096)]


class StopRun(Message, frozen=True):
    """End the run in order."""

    reason: Text


class ShutDown(Message, frozen=True):
    """The broker itself may go; sent by the supervisor when everything else has ended."""


ControlMessage = GetStatus | SetActors | StopRun | ShutDown


class Done(Message, frozen=True):
    """The request was carried out."""


class PeerStatus(Struct, frozen=True):
    """One actor or learner as the broker sees it. Times are seconds before now.

    `was_heard` is False for one that this broker knows from its journal alone; `last_seen` is then the broker's own start.
    """

    name: str
    host: str
    engine: str
    version: int
    step: int
    tickets: list[int]
    busy_share: float
    tokens_per_second: float
    last_seen: float
    doing: str
    was_heard: bool = True


class RunStatus(Message, frozen=True):
    """The state of a run."""

    run: str
    phase: str
    step: int
    num_steps: int
    max_lag: int
    elapsed_seconds: float
    issued: int
    outstanding: int
    queued: int
    consumed: int
    expired: int
    failed: int
    void: int
    refused: dict[str, int]
    lags: dict[int, int]
    """How many groups were trained on at each lag."""
    largest_lag: int
    num_versions: int
    newest_step: int
    delta_bytes: int
    full_bytes: int
    actors: list[PeerStatus]
    learner: PeerStatus | None
    desired_actors: int
    metrics: dict[str, float]
    evaluations: list[tuple[int, float]]
    waits: list[str]
    halted: str
    lineage: int = -1
    """The last learner session's, -1 before the first."""
    shortage: str = ""
    """Why everything that would be journalled is put off, without room on the disk; empty if nothing is."""
    turned_away: dict[str, int] = {}
    """What the broker did not take, by "channel: reason": refused keys, malformed messages, connections cut by the guard, answers not taken."""
    notes: list[tuple[int, str]] = []
    """The last notes of the learner: step and text."""
    lag_parts: dict[str, float] = {}
    """The fields of lag_account.LagParts: means over the groups of the last steps. Empty before the first step."""


FromControl = RunStatus | Done | HelloRefused | NotNow
