"""The journal's vocabulary: everything that happened in a run and that must survive a crash, one struct per fact.

Applying a run's facts in order rebuilds the ledger. Facts are written as JSON, so they read well in sqlite3, DuckDB and pandas.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from protocol.weights import BlobRef, PolicyVersion

Outcome = Literal["expired", "failed", "void"]
"""How a ticket ends when its group is not trained on; the fourth way is a committed step (consumed)."""


class Fact(Struct, frozen=True, tag_field="fact", tag=True):
    """Base of all facts; the tag is the class name."""


class RunStarted(Fact, frozen=True):
    """The broker started on this journal, for the first time or again."""

    run: str
    recovered_facts: int
    config: str = ""
    """The resolved configuration from here on, as JSON. Empty in journals of format 1, whose `meta` has it."""


class ActorJoined(Fact, frozen=True):
    """An actor said hello. An epoch is one process of that actor."""

    actor: str
    epoch: str
    engine: str
    host: str


class ActorLeft(Fact, frozen=True):
    """An actor left, fell silent for a lease, or was replaced by a newer process; with the figures it reported last."""

    actor: str
    epoch: str
    reason: str
    busy_seconds: float = 0.0
    elapsed_seconds: float = 0.0
    num_tokens: int = 0


class TicketIssued(Fact, frozen=True):
    """A ticket went to an actor that held `version`, taken at `step`. The first attempt creates the ticket."""

    ticket: int
    attempt: int
    actor: str
    epoch: str
    version: int
    step: int


class TicketRevoked(Fact, frozen=True):
    """A ticket is no longer with its actor, or its group is no longer good: it will be issued again."""

    ticket: int
    attempt: int
    reason: str


class GroupAccepted(Fact, frozen=True):
    """A whole group is in the journal. `seq` is its place among its actor epoch's results."""

    actor: str
    epoch: str
    seq: int
    ticket: int
    attempt: int
    versions: list[int]
    """Numbers of all versions that its tokens were sampled from, ascending."""
    oldest_step: int
    num_tokens: int
    reward: float
    """Mean reward of the group."""


class ResultRefused(Fact, frozen=True):
    """A result was refused for good; the ticket, if it is still open, is not touched by this."""

    actor: str
    epoch: str
    seq: int
    ticket: int
    reason: str


class AttemptFailed(Fact, frozen=True):
    """An actor could not serve a ticket."""

    actor: str
    epoch: str
    seq: int
    ticket: int
    attempt: int
    reason: str


class TicketEnded(Fact, frozen=True):
    """A ticket ended without being trained on."""

    ticket: int
    outcome: Outcome
    reason: str


class BatchFormed(Fact, frozen=True):
    """A batch is complete and belongs to the learner; first used at `step`."""

    batch: int
    step: int
    tickets: list[int]


class StepCommitted(Fact, frozen=True):
    """theta_{step+1} exists. `lags` are the lags of the batch's groups at this step, in ticket order."""

    step: int
    batch: int
    lineage: int
    lags: list[int]
    metrics: dict[str, float | None]
    """None stands for a number that was not finite, which JSON cannot write."""


class Evaluated(Fact, frozen=True):
    """Mean held-out reward of theta_step."""

    step: int
    reward: float
    num_prompts: int


class LearnerNoted(Fact, frozen=True):
    """The learner decided or saw something that no single measure says, before its step `step`."""

    step: int
    kind: Literal["learning-rate", "warning", "region", "collapse", "rollback"]
    text: str
    values: dict[str, float | None] = {}


class VersionPublished(Fact, frozen=True):
    """New weights that actors may sample from; the fields are those of messages.Publish."""

    version: PolicyVersion
    parent: int
    delta: BlobRef | None
    snapshot: BlobRef | None
    full_bytes: int
    bound_bytes: int
    compact: BlobRef | None = None
    is_base: bool = False
    seconds: dict[str, float] = {}


class VersionAnchored(Fact, frozen=True):
    """One folded delta leads from version `root` (where newcomers start) to version `number`."""

    number: int
    root: int
    delta: BlobRef


class DeltasDropped(Fact, frozen=True):
    """The deltas of versions up to `through` are not in the store any more; newcomers reach later versions by the anchor."""

    through: int


class VersionReproduced(Fact, frozen=True):
    """A later lineage arrived at the same weights at the same step: the version stays good."""

    number: int
    lineage: int


class VersionOrphaned(Fact, frozen=True):
    """A later lineage arrived elsewhere: groups sampled from this version are refused from now on."""

    number: int
    lineage: int


class LearnerStarted(Fact, frozen=True):
    """A learner session began at `step`; every session opens a lineage."""

    session: str
    lineage: int
    step: int
    world_size: int
    environment: dict[str, str] = {}
    """What the bits of its arithmetic depend on beside the data: libraries, processor, device, threads, rollbacks."""


class LearnerFinished(Fact, frozen=True):
    """The learner ended in order."""

    step: int
    summary: dict[str, float | None]


class ActorsDesired(Fact, frozen=True):
    """Somebody asked for this many actors."""

    num_actors: int


class RunStopping(Fact, frozen=True):
    """No more tickets are issued."""

    reason: str


class RunEnded(Fact, frozen=True):
    """Nothing is open any more. `halted` says why if the run was cut short because going on was useless."""

    halted: str


AnyFact = (
    RunStarted
    | ActorJoined
    | ActorLeft
    | TicketIssued
    | TicketRevoked
    | GroupAccepted
    | ResultRefused
    | AttemptFailed
    | TicketEnded
    | BatchFormed
    | StepCommitted
    | Evaluated
    | LearnerNoted
    | VersionPublished
    | VersionAnchored
    | DeltasDropped
    | VersionReproduced
    | VersionOrphaned
    | LearnerStarted
    | LearnerFinished
    | ActorsDesired
    | RunStopping
    | RunEnded
)
