"""The broker without its sockets: messages in, messages out, with the journal between.

Invariant: nothing leaves `flush` (or `settle`, its last part) before every fact it depends on is committed. Shared by the socket server and the
in-memory ports, so that both keep the same promises with the same code.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker import events as ev
from broker.blobs import BlobStore
from broker.folding import Folds
from broker.journal import Journal, RunJournal
from broker.ledger import Ledger
from broker.publications import ANCHOR_EVERY, Hop, Way
from broker.room import COPIES, MIB, Room, reserves
from broker.status import StatusBook
from protocol import facts, messages
from protocol.config import Config, config_json
from protocol.errors import InvalidGroup, JournalDamaged
from protocol.groups import decode_group
from protocol.journal import JOURNAL_NAME
from protocol.messages import PROTOCOL_VERSION, NamedBlob
from protocol.sampling import prompt_index, ticket_seed
from protocol.weights import BlobRef

METRICS_NAME = "metrics.jsonl"
log = logging.getLogger("broker")


class Outgoing(NamedTuple):
    """A message to one peer: `peer` is "learner" or an actor's name, `session` its epoch or session."""

    peer: str
    session: str
    message: messages.Message
    payload: bytes = b""


class Decided(NamedTuple):
    """What one commit makes durable (`num_bytes` of payloads with it), and what is to happen after it."""

    has_facts: bool
    num_bytes: int
    outgoing: list[Outgoing]
    removals: list[BlobRef]


LEARNER = "learner"
PUBLISHER = "publisher"
"""Peer names of the learner in `Outgoing`: what it trains on, and what it publishes, are two conversations. Actors are "actor:<name>"."""
FOLD_BYTES = 1 << 20
FOLD_HOPS = 8
"""A way of more bytes or more deltas than this is folded first; a shorter one is given as it is, which takes no time to make."""
MEASURE_BYTES = MIB
"""After this much has come in, the disk is looked at again before the next tick."""
LEFT_SECONDS = 3600.0
"""A file in the store that nothing leads to is removed at a start of the broker once it is this old."""


def actor_peer(name: str) -> str:
    """The peer name of an actor in `Outgoing`."""
    return f"actor:{name}"


class Broker:
    """One run's ledger, journal and blobs."""

    def __init__(
        self,
        directory: Path,
        run: str,
        config: Config,
        num_prompts: int,
        policy_files: list[NamedBlob],
        now: float,
        wall: float,
        journal: RunJournal | None = None,
        run_beside: Callable[[Callable[[], None]], object] = lambda job: job(),
        wake: Callable[[], None] = lambda: None,
        free: Callable[[], int] | None = None,
    ) -> None:
        """Start on a new run's directory, or recover a run from its journal.

        `journal` is open for this run; without one, the directory's own is opened. `run_beside` carries out long work, at once or in
        another thread; `wake` is called there when `tick` has something to collect. `free` says how many bytes are free on the disk;
        without it, the directory's is asked.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.run, self.config, self._policy_files, self._num_prompts = run, config, policy_files, num_prompts
        self._config_json = config_json(config)
        self.blobs = BlobStore(directory / "blobs")
        self._journal = journal if journal is not None else Journal(directory / JOURNAL_NAME, run, self._config_json)
        self._metrics_path = directory / METRICS_NAME
        self.ledger = Ledger(config.pacing, config.run.seed, num_prompts, config.actor.num_actors)
        self.book = StatusBook(run, config.run.steps, now)
        self._free = free or (lambda: shutil.disk_usage(directory).free)
        self.ledger.room = Room(self._free(), reserves(config, sum(file.blob.size for file in policy_files)))
        self._num_uncommitted = self._num_unmeasured = 0
        """Bytes of payloads since the last commit, and since somebody looked how much room there is."""
        self._facts: list[tuple[facts.AnyFact, bytes, float]] = []
        self._outgoing: list[Outgoing] = []
        self._groups: list[Outgoing] = []
        """Payloads for the learner: they come from the journal, so they wait for no commit."""
        self._removals: list[BlobRef] = []
        self._folds = Folds(self.blobs, run_beside, wake)
        self._routes_wanted: dict[tuple[str, str], tuple[int, tuple[Hop, ...]]] = {}
        """Actors that wait for a way to be folded: the version they hold, and that way."""
        self._anchoring: tuple[int, int, Way] | None = None
        self._snapshot_wanted = False
        entries = self._journal.entries()
        for entry in entries:
            try:
                self.ledger.apply(entry.fact)
            except (LookupError, ValueError) as error:
                problem = f"it contradicts what is before it ({error!r})"
                raise JournalDamaged(directory / JOURNAL_NAME, f"event {entry.lsn}", problem) from error
            self.book.observe(entry.fact, now)
        self.ledger.recovered(now)
        self.book.recovered()
        if self.ledger.versions.anchor is not None:
            self._folds.pin(self.ledger.versions.anchor.delta)
        self._sweep(wall)
        self._journal.append(facts.RunStarted(run, len(entries), self._config_json), b"", wall)
        self._journal.commit()
        self.measure_room(now, wall)

    # --- what comes in

    def actor_message(
        self, actor: str, epoch: str, message: messages.ActorMessage, payload: bytes | memoryview, now: float, wall: float
    ) -> None:
        """Handle one message of an actor's epoch."""
        match message:
            case messages.ActorHello():
                if message.protocol != PROTOCOL_VERSION:
                    reason = f"the broker speaks protocol {PROTOCOL_VERSION}, this actor {message.protocol}"
                    self._send(actor_peer(actor), epoch, messages.HelloRefused(reason))
                    return
                self._handle(ev.ActorHere(actor, epoch, message.engine, message.host), now, wall)
            case messages.ActorReport():
                if actor in self.ledger.actors:
                    self.book.actor_reported(actor, message, now)
                self._handle(ev.ActorReported(actor, epoch, message), now, wall)
            case messages.SubmitGroup():
                self._num_unmeasured += len(payload)
                if self._num_unmeasured > MEASURE_BYTES:
                    self.measure_room(now, wall)
                self._handle(self._arrival(actor, epoch, message, bytes(payload)), now, wall)
            case messages.TicketFailed(seq=seq, ticket=ticket, attempt=attempt, reason=reason):
                self._handle(ev.AttemptGivenUp(actor, epoch, seq, ticket, attempt, reason), now, wall)
            case messages.GetRoute():
                if message.failed:
                    log.warning("%s could not follow the way to the newest version: %s", actor, message.failed)
                    self._snapshot_wanted = self._snapshot_wanted or (message.held < 0 and self._may_want_snapshot())
                self._route(actor, epoch, message.held)
            case messages.ActorBye():
                self._handle(ev.ActorGone(actor, epoch), now, wall)

    def _arrival(self, actor: str, epoch: str, message: messages.SubmitGroup, payload: bytes) -> ev.GroupArrived:
        place = (actor, epoch, message.seq, message.ticket, message.attempt)
        try:
            group = decode_group(payload)
            if group.ticket != message.ticket:
                raise InvalidGroup("ticket", f"the group is for ticket {group.ticket}, the message for {message.ticket}")
            seed, prompt = (
                ticket_seed(self.config.run.seed, message.ticket),
                prompt_index(self.config.run.seed, message.ticket, self._num_prompts),
            )
            if (group.prompt, group.seed) != (prompt, seed):
                raise InvalidGroup("ticket", "prompt or seed are not the ticket's")
            if group.rewards.size != self.config.rollout.group_size:
                raise InvalidGroup("group size", f"{group.rewards.size} completions, {self.config.rollout.group_size} wanted")
            if group.num_tokens.max() > self.config.rollout.max_tokens:
                raise InvalidGroup("budget", f"a completion has {group.num_tokens.max()} tokens")
        except InvalidGroup as error:
            return ev.GroupArrived(*place, invalid=f"invalid: {error.reason}")
        return ev.GroupArrived(
            *place,
            versions=_distinct(group.versions),
            num_tokens=int(group.token_ids.size),
            reward=float(group.rewards.mean(dtype=np.float64)),
            payload=payload,
        )

    def learner_message(self, session: str, message: messages.LearnerMessage, now: float, wall: float) -> None:
        """Handle one message of a learner session."""
        match message:
            case messages.GetRun():
                info = messages.RunInfo(PROTOCOL_VERSION, self.run, self._config_json, self._policy_files, self.ledger.progress.step)
                self._send(LEARNER, session, info)
            case messages.LearnerHello():
                if message.protocol != PROTOCOL_VERSION:
                    reason = f"the broker speaks protocol {PROTOCOL_VERSION}, this learner {message.protocol}"
                    self._send(LEARNER, session, messages.HelloRefused(reason))
                    return
                self._handle(ev.LearnerHere(session, message.step, message.world_size, message.environment), now, wall)
            case messages.NextBatch():
                self._handle(ev.BatchWanted(session, message.step), now, wall)
            case messages.GetGroup():
                group = self._journal.payload(message.ticket)
                if group is None:
                    self._send(LEARNER, session, messages.LearnerRefused("group", f"ticket {message.ticket} has no group"))
                else:
                    self._groups.append(Outgoing(LEARNER, session, messages.GroupData(message.ticket), group))
            case messages.CommitStep():
                self._handle(ev.StepDone(session, message.step, message.batch, message.lags, message.metrics, message.notes), now, wall)
            case messages.Publish():
                self._publish(session, message, now, wall)
            case messages.Evaluation():
                self._handle(ev.EvaluationDone(session, message.step, message.reward, message.num_prompts), now, wall)
            case messages.LearnerReport():
                self.book.learner_reported(message, now)
            case messages.LearnerDone():
                self._handle(ev.LearnerGone(session, message.step, message.summary), now, wall)

    # --- weights

    def _may_want_snapshot(self) -> bool:
        """Whether it is long enough since the last snapshot: one actor that cannot use any must not fill the store with them."""
        versions = self.ledger.versions
        snapshots = [number for number, publication in versions.by_number.items() if publication.fact.snapshot is not None]
        return not snapshots or versions.next_number - snapshots[-1] > ANCHOR_EVERY

    def _sweep(self, wall: float) -> None:
        """Remove what crashes have left in the store; what a learner may be about to announce is younger than that."""
        keep = self.ledger.versions.files() | {file.blob.digest for file in self._policy_files}
        removed = self.blobs.sweep(keep, wall - LEFT_SECONDS)
        if removed:
            log.info("removed %d files from the store that nothing leads to", removed)

    def _route(self, actor: str, epoch: str, held: int) -> None:
        """Answer an actor that wants to get from `held` to the newest version, or nearer to it, now or once the way is folded."""
        versions = self.ledger.versions
        newest, peer = versions.newest, actor_peer(actor)
        waits_from, begun = self._routes_wanted.pop((actor, epoch), (held, ()))
        if newest is None or newest.number == held:
            self._send(peer, epoch, messages.Route(held, newest, "held", None, []))
            return
        way = versions.way_from(held)
        if way is None or self._folds.has_failed(way.hops):
            way = versions.way_from_nothing()
        if way is None:
            # Nothing leads there yet: the actor asks again, and the next publication brings a snapshot.
            self._snapshot_wanted = True
            return
        hops = self._to_fold(way.hops, begun if waits_from == held else ())
        if hops and not self.ledger.room.allows_commits:
            return  # a fold takes room, too: the actor asks again
        if hops and self._folds.has_failed(hops) and not any(hop.inverted for hop in way.hops):
            hops = ()  # what cannot be folded may still be followed delta by delta
        folded = self._folds.get(hops) if hops else None
        if hops and folded is None:
            self._routes_wanted[actor, epoch] = held, hops
            return
        rest = way.hops[len(hops) :]
        if folded is not None and sum(hop.delta.size for hop in rest) > FOLD_BYTES:
            # Published meanwhile, and more than a slow link should carry unfolded: the actor goes as far as this, and asks again from there.
            newest, rest = versions.before(rest[0]), ()
        deltas = [rest[0].compact or rest[0].delta] if len(way.hops) == len(rest) == 1 else [hop.delta for hop in rest]
        deltas = deltas if folded is None else [folded, *deltas]
        self._send(peer, epoch, messages.Route(held, newest, way.start, way.snapshot if way.start == "snapshot" else None, deltas))

    def _to_fold(self, hops: tuple[Hop, ...], begun: tuple[Hop, ...]) -> tuple[Hop, ...]:
        """How much of a way to fold: all, if that pays or if one delta is walked back, or nothing.

        Of a way that has become longer since it was begun, what was begun: versions may follow one another faster than ways are folded.
        """
        is_short = len(hops) <= 1 or (len(hops) <= FOLD_HOPS and sum(hop.delta.size for hop in hops) <= FOLD_BYTES)
        if is_short and not any(hop.inverted for hop in hops):
            return ()
        since = hops[len(begun) :]
        if hops[: len(begun)] == begun and not any(hop.inverted for hop in since) and not self._folds.has_failed(begun):
            return begun or hops
        return hops

    def _collect_folds(self, now: float, wall: float) -> None:
        """Carry on with whatever waited for a way to be folded."""
        for hops, result in self._folds.collect():
            if isinstance(result, str) and self.ledger.versions.keeps(hops):
                self._snapshot_wanted = True
            if self._anchoring is None or self._anchoring[2].hops != hops:
                continue
            number, root, _ = self._anchoring
            self._anchoring = None
            if not isinstance(result, str):
                self._anchor(number, root, result, now, wall)
        for (actor, epoch), (held, _) in list(self._routes_wanted.items()):
            state = self.ledger.actors.get(actor)
            if state is None or state.epoch != epoch:
                del self._routes_wanted[actor, epoch]
            else:
                self._route(actor, epoch, held)

    def _consider_anchor(self, now: float, wall: float) -> None:
        if not self.ledger.room.allows_commits:
            return
        due = self.ledger.versions.anchor_due() if self._anchoring is None else None
        if due is None or self._folds.has_failed(due[2].hops):
            return
        number, root, way = due
        folded = self._folds.get(way.hops)
        if folded is None:
            self._anchoring = due
        else:
            self._anchor(number, root, folded, now, wall)

    def _anchor(self, number: int, root: int, delta: BlobRef, now: float, wall: float) -> None:
        if self.ledger.room.allows_commits:  # otherwise it is due again at the next publication
            self._folds.pin(delta)
            self._handle(ev.AnchorMade(number, root, delta), now, wall)

    def _publish(self, session: str, message: messages.Publish, now: float, wall: float) -> None:
        for blob in (message.delta, message.snapshot, message.compact):
            if blob is not None and self.blobs.size(blob.digest) != blob.size:
                reason = f"blob {blob.digest[:16]} of {blob.size} bytes is not in the store"
                self._send_learner(session, messages.LearnerRefused("publish", reason))
                return
        self._collect_folds(now, wall)
        self._handle(
            ev.VersionReady(
                session,
                message.version,
                message.parent,
                message.delta,
                message.snapshot,
                message.full_bytes,
                message.bound_bytes,
                message.compact,
                message.is_base,
                message.seconds,
            ),
            now,
            wall,
        )
        self._consider_anchor(now, wall)
        self._collect_folds(now, wall)

    def control_message(self, message: messages.ControlMessage, now: float, wall: float) -> messages.FromControl:
        """Handle one request of an administrator."""
        match message:
            case messages.GetStatus():
                return self.status(now)
            case messages.SetActors() | messages.StopRun() if not self.ledger.room.allows_commits:
                return messages.NotNow(type(message).__name__, self.ledger.room.shortage)
            case messages.SetActors():
                self._handle(ev.ActorsWanted(message.num_actors), now, wall)
            case messages.StopRun():
                self._handle(ev.StopWanted(message.reason), now, wall)
        return messages.Done()

    def tick(self, now: float, wall: float) -> None:
        """Let time pass; to be called several times a second."""
        self.measure_room(now, wall)
        self._collect_folds(now, wall)
        self._handle(ev.Tick(), now, wall)

    # --- room on the disk

    def measure_room(self, now: float, wall: float) -> None:
        """Look how much room there is, and stop or go on accordingly. What is not committed yet has taken none."""
        before, self._num_unmeasured = self.ledger.room, 0
        room = before.measured(self._free() - COPIES * self._num_uncommitted)
        self._handle(ev.RoomMeasured(room), now, wall)
        if room.allows_same(before):
            return
        if room.shortage:
            log.warning("%s", room.shortage)
        else:
            log.info("there is room on the broker's disk again: %d MiB free", room.free // MIB)
            self._folds.forgive()

    def no_room_for(self, num_bytes: int) -> str:
        """Why so much of an upload cannot be stored now, or nothing. May be called by any thread."""
        room = self.ledger.room.measured(self._free() - num_bytes)
        return "" if room.allows_commits else room.shortage

    # --- what goes out

    def flush(self) -> list[Outgoing]:
        """Commit all facts, then hand out every message that was waiting for them. Raises JournalCommitFailed."""
        decided = self.cut()
        if decided.has_facts:
            self.commit()
        return [*self.groups(), *self.settle(decided)]

    def cut(self) -> Decided:
        """Append what has been decided since the last cut to the journal; not while a commit is under way. Raises JournalCommitFailed."""
        found, self._facts = self._facts, []
        for fact, payload, wall in found:
            self._journal.append(fact, payload, wall)
        num_bytes = sum(len(payload) for _, payload, _ in found)
        decided = Decided(bool(found), num_bytes, _latest_acks(self._outgoing), self._removals)
        self._outgoing, self._removals = [], []
        return decided

    def commit(self) -> None:
        """Make durable what was cut. May be called by another thread, and messages be handled meanwhile. Raises JournalCommitFailed."""
        self._journal.commit()

    def settle(self, decided: Decided) -> list[Outgoing]:
        """Once it is durable: carry out what waited for that, and hand out its messages."""
        self._num_uncommitted -= decided.num_bytes
        for blob in decided.removals:
            self.blobs.remove(blob.digest)
        return decided.outgoing

    def groups(self) -> list[Outgoing]:
        """Hand out the payloads that the learner has asked for. They were durable before they were read."""
        found, self._groups = self._groups, []
        return found

    @property
    def num_uncommitted(self) -> int:
        """Bytes of payloads that are not durable yet."""
        return self._num_uncommitted

    def status(self, now: float) -> messages.RunStatus:
        """The state of the run."""
        return self.book.status(self.ledger, now)

    def close(self) -> None:
        """Release the journal."""
        self._journal.close()

    def _send(self, peer: str, session: str, message: messages.Message, payload: bytes = b"") -> None:
        self._outgoing.append(Outgoing(peer, session, message, payload))

    def _handle(self, event: ev.Event, now: float, wall: float) -> None:
        for effect in self.ledger.handle(event, now):
            match effect:
                case ev.Record(fact, payload):
                    self._facts.append((fact, payload, wall))
                    self._num_uncommitted += len(payload)
                    self.book.observe(fact, now)
                    self._write_metrics(fact, wall)
                    if isinstance(fact, facts.VersionPublished) and fact.snapshot is not None:
                        self._snapshot_wanted = False
                case ev.WelcomeActor(actor, epoch, acked):
                    newest = self.ledger.versions.newest
                    welcome = messages.ActorWelcome(PROTOCOL_VERSION, self.run, acked, self._config_json, self._policy_files, newest)
                    self._send(actor_peer(actor), epoch, welcome)
                case ev.WelcomeLearner(session, lineage, next_version):
                    self._send(
                        LEARNER,
                        session,
                        messages.LearnerWelcome(PROTOCOL_VERSION, self.run, lineage, next_version),
                    )
                case ev.SendActor(actor, epoch, message):
                    self._send(actor_peer(actor), epoch, message)
                case ev.SendAllActors(message):
                    for state in self.ledger.actors.values():
                        self._send(actor_peer(state.name), state.epoch, message)
                case ev.SendLearner(session, message):
                    self._send_learner(session, message)
                case ev.RemoveBlobs(blobs):
                    policy = {file.blob.digest for file in self._policy_files}  # which a version may share, and newcomers always need
                    self._removals += [blob for blob in blobs if blob.digest not in policy]

    def _send_learner(self, session: str, message: messages.ToLearner) -> None:
        if isinstance(message, messages.Published):
            wanted = self._snapshot_wanted and not self.ledger.versions.has_suspects
            message = msgspec.structs.replace(message, snapshot_wanted=wanted)
        about_publication = isinstance(message, messages.Published) or (
            isinstance(message, messages.LearnerRefused | messages.NotNow) and message.request == "publish"
        )
        self._send(PUBLISHER if about_publication else LEARNER, session, message)

    def _write_metrics(self, fact: facts.AnyFact, wall: float) -> None:
        """Steps and evaluations also go to metrics.jsonl, for whoever wants to follow the run with other tools."""
        match fact:
            case facts.StepCommitted():
                row = {"time": wall, "step": fact.step, "lineage": fact.lineage, "largest_lag": max(fact.lags), **fact.metrics}
            case facts.Evaluated():
                row = {"time": wall, "step": fact.step, "heldout_reward": fact.reward, "num_prompts": fact.num_prompts}
            case _:
                return
        try:
            with self._metrics_path.open("ab") as file:
                file.write(msgspec.json.encode(row) + b"\n")
        except OSError as error:  # a copy for other tools; the journal has it all
            log.warning("could not write %s: %s", METRICS_NAME, error.strerror)


def _distinct(versions: NDArray[np.int32]) -> list[int]:
    """The version numbers that occur, in order; nearly always there is one, and no need to sort."""
    oldest = int(versions.min())
    return [oldest] if oldest == versions.max() else np.unique(versions).tolist()


def _latest_acks(outgoing: list[Outgoing]) -> list[Outgoing]:
    """The messages, less the acknowledgements that a later one to the same peer includes."""
    latest = {(one.peer, one.session): place for place, one in enumerate(outgoing) if isinstance(one.message, messages.Ack)}
    return [
        one for place, one in enumerate(outgoing) if not isinstance(one.message, messages.Ack) or latest[one.peer, one.session] == place
    ]
