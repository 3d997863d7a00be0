"""The broker without its sockets: messages in, messages out, with the journal between.

Invariant: nothing leaves `flush` before every fact it depends on is committed. Shared by the socket server and the in-memory ports, so
that both keep the same promises with the same code.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from broker import events as ev
from broker.blobs import BlobStore
from broker.journal import Journal
from broker.ledger import Ledger
from broker.status import StatusBook
from protocol import facts, messages
from protocol.config import Config, config_json
from protocol.errors import InvalidGroup
from protocol.groups import decode_group
from protocol.journal import JOURNAL_NAME
from protocol.messages import PROTOCOL_VERSION, NamedBlob
from protocol.sampling import prompt_index, ticket_seed

METRICS_NAME = "metrics.jsonl"
log = logging.getLogger("broker")


class Outgoing(NamedTuple):
    """A message to one peer: `peer` is "learner" or an actor's name, `session` its epoch or session."""

    peer: str
    session: str
    message: messages.Message
    payload: bytes = b""


LEARNER = "learner"
"""The peer name of the learner in `Outgoing`; actors are addressed as "actor:<name>"."""


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
    ) -> None:
        """Start on a new run's directory, or recover a run from its journal."""
        directory.mkdir(parents=True, exist_ok=True)
        self.run, self.config, self._policy_files, self._num_prompts = run, config, policy_files, num_prompts
        self._config_json = config_json(config)
        self.blobs = BlobStore(directory / "blobs")
        self._journal = Journal(directory / JOURNAL_NAME, run, self._config_json)
        self._metrics_path = directory / METRICS_NAME
        self.ledger = Ledger(config.pacing, config.run.seed, num_prompts, config.actor.num_actors)
        self.book = StatusBook(run, config.run.steps, now)
        self._outgoing: list[Outgoing] = []
        entries = self._journal.entries()
        for entry in entries:
            self.ledger.apply(entry.fact)
            self.book.observe(entry.fact, now)
        self.ledger.recovered(now)
        self._journal.append(facts.RunStarted(run, len(entries)), b"", wall)
        self._journal.commit()

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
                self._handle(self._arrival(actor, epoch, message, bytes(payload)), now, wall)
            case messages.TicketFailed(seq=seq, ticket=ticket, attempt=attempt, reason=reason):
                self._handle(ev.AttemptGivenUp(actor, epoch, seq, ticket, attempt, reason), now, wall)
            case messages.GetRoute():
                route = self.ledger.versions.route(message.held)
                self._send(actor_peer(actor), epoch, messages.Route(message.held, self.ledger.versions.newest, route))
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
            versions=np.unique(group.versions).tolist(),
            num_tokens=int(group.token_ids.size),
            reward=float(group.rewards.mean(dtype=np.float64)),
            payload=payload,
        )

    def learner_message(self, session: str, message: messages.LearnerMessage, now: float, wall: float) -> None:
        """Handle one message of a learner session."""
        match message:
            case messages.GetRun():
                info = messages.RunInfo(PROTOCOL_VERSION, self.run, self._config_json, self._policy_files)
                self._send(LEARNER, session, info)
            case messages.LearnerHello():
                if message.protocol != PROTOCOL_VERSION:
                    reason = f"the broker speaks protocol {PROTOCOL_VERSION}, this learner {message.protocol}"
                    self._send(LEARNER, session, messages.HelloRefused(reason))
                    return
                self._handle(ev.LearnerHere(session, message.step, message.world_size), now, wall)
            case messages.NextBatch():
                self._handle(ev.BatchWanted(session, message.step), now, wall)
            case messages.GetGroup():
                group = self._journal.payload(message.ticket)
                if group is None:
                    self._send(LEARNER, session, messages.LearnerRefused("group", f"ticket {message.ticket} has no group"))
                else:
                    self._send(LEARNER, session, messages.GroupData(message.ticket), group)
            case messages.CommitStep():
                self._handle(ev.StepDone(session, message.step, message.batch, message.lags, message.metrics), now, wall)
            case messages.Publish():
                self._publish(session, message, now, wall)
            case messages.Evaluation():
                self._handle(ev.EvaluationDone(session, message.step, message.reward, message.num_prompts), now, wall)
            case messages.LearnerReport():
                self.book.learner_reported(message, now)
            case messages.LearnerDone():
                self._handle(ev.LearnerGone(session, message.step, message.summary), now, wall)

    def _publish(self, session: str, message: messages.Publish, now: float, wall: float) -> None:
        for blob in (message.delta, message.snapshot):
            if blob is not None and self.blobs.size(blob.digest) != blob.size:
                reason = f"blob {blob.digest[:16]} of {blob.size} bytes is not in the store"
                self._send(LEARNER, session, messages.LearnerRefused("publish", reason))
                return
        self._handle(
            ev.VersionReady(
                session,
                message.version,
                message.parent,
                message.delta,
                message.snapshot,
                message.full_bytes,
                message.bound_bytes,
            ),
            now,
            wall,
        )

    def control_message(self, message: messages.ControlMessage, now: float, wall: float) -> messages.FromControl:
        """Handle one request of an administrator."""
        match message:
            case messages.GetStatus():
                return self.status(now)
            case messages.SetActors():
                self._handle(ev.ActorsWanted(message.num_actors), now, wall)
            case messages.StopRun():
                self._handle(ev.StopWanted(message.reason), now, wall)
        return messages.Done()

    def tick(self, now: float, wall: float) -> None:
        """Let time pass; to be called several times a second."""
        self._handle(ev.Tick(), now, wall)

    # --- what goes out

    def flush(self) -> list[Outgoing]:
        """Commit all facts, then hand out every message that was waiting for them. Raises JournalCommitFailed."""
        self._journal.commit()
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

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
                    self._journal.append(fact, payload, wall)
                    self.book.observe(fact, now)
                    self._write_metrics(fact, wall)
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
                    self._send(LEARNER, session, message)

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
