"""Target: a broker in a conversation with several sessions, of which some are honest and some say whatever decodes.

An input is only a source of choices; each stands for MESSAGES messages. After every round: conservation. Now and then the broker is killed before or
after a commit, and what recovers from the journal must be what was committed.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from broker.tickets import State
from protocol import codec, messages
from protocol.errors import MalformedFrame
from protocol.groups import Group, encode_group
from protocol.messages import PROTOCOL_VERSION
from protocol.sampling import prompt_index, ticket_seed
from protocol.weights import BlobRef, PolicyVersion
from tests.fuzz.files import make_broker, room
from tests.fuzz.fuzzing import Target
from tests.fuzz.mutate import damage_msgpack
from tests.fuzz.values import random_struct

MESSAGES: Final = 100
PEERS: Final = [("a", "e1"), ("a", "e2"), ("b", "e1"), ("b/../c", "\0")]
"""Actors by name and epoch; the last is an identity that no client makes."""
SESSIONS: Final = ["s1", "s2"]
_ACTOR_KINDS: Final = typing.get_args(messages.ActorMessage)
_LEARNER_KINDS: Final = typing.get_args(messages.LearnerMessage)
_CONTROL_KINDS: Final = (messages.GetStatus, messages.SetActors, messages.StopRun)
_folders = itertools.count()


class Conversation:
    """One run's broker and everybody who talks to it. `now` moves on with every message."""

    def __init__(self, rng: random.Random, directory: Path) -> None:
        self.rng, self.directory, self.now = rng, directory, 0.0
        self.broker = make_broker(directory)
        self.files = [self.broker.blobs.add(bytes([number]) * (number + 1)) for number in range(3)]

    # --- what is said

    def say(self) -> None:
        """One message, or time passing."""
        self.now += self.rng.choice([0.0, 0.1, 0.1, 0.5, 0.5, 1.0, 1.0, 7.0])
        what = self.rng.randrange(10)
        if what < 3:
            self._hostile()
        elif what < 6:
            self._honest_actor()
        elif what < 9:
            self._honest_learner()
        else:
            self.broker.tick(self.now, self.now)

    def _hostile(self) -> None:
        """A message of random fields, if it decodes; a refusal by the decoder is as far as it gets."""
        rng, known = self.rng, self._known()
        side = rng.randrange(8)
        kind = rng.choice(_ACTOR_KINDS if side < 4 else _LEARNER_KINDS if side < 7 else _CONTROL_KINDS)
        message = random_struct(rng, kind, known)
        if isinstance(message, messages.StopRun | messages.LearnerDone | messages.ActorBye) and rng.random() < 0.8:
            return  # otherwise most conversations would be short
        if isinstance(message, messages.Publish):
            message = random_struct(rng, kind, known, delta=self._file(), snapshot=self._file(), compact=self._file())
        try:
            if side < 4:
                decoded, _ = codec.from_actor.decode(codec.encode(message))
                payload = damage_msgpack(rng, [self._group(rng.choice(known), [0])]) if isinstance(message, messages.SubmitGroup) else b""
                self.broker.actor_message(*rng.choice(PEERS), decoded, payload, self.now, self.now)
            elif side < 7:
                heard, _ = codec.from_learner.decode(codec.encode(message))
                self.broker.learner_message(rng.choice(SESSIONS), heard, self.now, self.now)
            else:
                request, _ = codec.from_control.decode(codec.encode(message))
                codec.to_control.decode(codec.encode(self.broker.control_message(request, self.now, self.now)))
        except (MalformedFrame, OverflowError):
            if not isinstance(message, kind):
                raise

    def _known(self) -> list[int]:
        """Numbers that mean something now."""
        ledger = self.broker.ledger
        return [
            0,
            1,
            2,
            ledger.progress.step,
            ledger.progress.lineage,
            ledger.versions.next_number,
            ledger.tickets.counts.issued,
            *ledger.tickets.open,
        ]

    def _file(self) -> BlobRef | None:
        return self.rng.choice([None, *self.files, BlobRef("ab" * 32, 3)])

    def _honest_actor(self) -> None:
        """What an actor would say: hello, a report, or a group for a ticket that it has."""
        rng, ledger = self.rng, self.broker.ledger
        actor, epoch = rng.choice(PEERS[:3])
        state = ledger.actors.get(actor)
        if state is None or state.epoch != epoch:
            if state is None or rng.random() < 0.1:
                self._from_actor(actor, epoch, messages.ActorHello(PROTOCOL_VERSION, actor, epoch, "engine", "host", 1, []))
            return
        newest = ledger.versions.newest
        if not state.tickets or rng.random() < 0.3:
            version = newest.number if newest is not None else -1
            self._from_actor(actor, epoch, messages.ActorReport(version, 3, sorted(state.tickets), 1.0, 2.0, 9, "generating"))
            self._from_actor(actor, epoch, messages.GetRoute(rng.choice([-1, 0, version])))
            return
        number = rng.choice(sorted(state.tickets))
        ticket, seq = ledger.tickets.open[number], ledger._acked.get((actor, epoch), 0) + 1
        good = [v for v in ledger.versions.by_number if ledger.versions.step_of(v) is not None]
        if rng.random() < 0.1 or not good:
            self._from_actor(actor, epoch, messages.TicketFailed(seq, number, ticket.attempt, "no"))
        else:
            self._from_actor(actor, epoch, messages.SubmitGroup(seq, number, ticket.attempt), self._group(number, good[-2:]))

    def _from_actor(self, actor: str, epoch: str, message: messages.ActorMessage, payload: bytes = b"") -> None:
        self.broker.actor_message(actor, epoch, message, payload, self.now, self.now)

    def _group(self, number: int, versions: list[int]) -> bytes:
        seed, prompts = self.broker.config.run.seed, self.broker._num_prompts
        return encode_group(
            Group(
                ticket=number % (1 << 62),
                prompt=prompt_index(seed, number % 1000, prompts),
                seed=ticket_seed(seed, number),
                actor="a",
                engine="engine",
                prompt_ids=np.array([1], np.int32),
                num_tokens=np.array([1, 2], np.int32),
                token_ids=np.array([1, 2, 3], np.int32),
                logprobs=np.array([-1, -1, -1], np.float32),
                versions=np.resize(np.array(versions, np.int32), 3),
                rewards=np.array([0, 1], np.float32),
                finish=np.array([0, 0], np.uint8),
            )
        )

    def _honest_learner(self) -> None:
        """What a learner would say: hello, a publication, a wish for a batch, or a step on it."""
        rng, ledger = self.rng, self.broker.ledger
        step, session = ledger.progress.step, ledger.learner.session if ledger.learner is not None else "s1"
        message: messages.LearnerMessage
        if ledger.learner is None or rng.random() < 0.03:
            session = rng.choice(SESSIONS)
            back = rng.choice([step, step, max(0, step - 1)])
            message = random_struct(rng, messages.LearnerHello, [1], protocol=PROTOCOL_VERSION, session=session, step=back, world_size=1)
        elif (newest := ledger.versions.newest) is None or newest.step < step or rng.random() < 0.1:
            version = PolicyVersion(ledger.versions.next_number, step, ledger.progress.lineage, rng.choice(["one", f"root {self.now}"]))
            parent = newest.number if newest is not None else -1
            delta = rng.choice(self.files) if newest is not None and rng.random() < 0.8 else None
            message = messages.Publish(version, parent, delta, None, 10, 10, is_base=delta is None)
        elif (batch := ledger.tickets.batches.get(ledger.pacing.batch_of_step(step))) is not None and rng.random() < 0.7:
            message = messages.CommitStep(step, batch.number, [step - oldest for oldest in batch.oldest_steps], {"loss": 0.5})
        elif step >= ledger.pacing.num_steps:
            message = messages.LearnerDone(step, {})
        else:
            message = messages.NextBatch(step)
        self.broker.learner_message(session, message, self.now, self.now)

    # --- what must hold

    def settle(self) -> None:
        """Commit and hand out; everything that leaves must be readable at the other end."""
        for outgoing in self.broker.flush():
            decoder: Any = codec.to_actor if outgoing.peer.startswith("actor:") else codec.to_learner
            decoder.decode(codec.encode(outgoing.message, outgoing.payload))
        codec.to_control.decode(codec.encode(self.broker.status(self.now)))
        self.check()

    def check(self) -> None:
        """Conserved and whole."""
        table = self.broker.ledger.tickets
        states = [ticket.state for ticket in table.open.values()]
        assert table.counts.conserved, table.counts
        assert table.counts.queued == sum(state in (State.QUEUED, State.BATCHED) for state in states)
        assert table.counts.outstanding == sum(state in (State.PENDING, State.OUTSTANDING) for state in states)

    def crash(self, settled: bool) -> None:
        """Kill the broker, after a commit or with facts that are not committed, and start it again on what is on the disk."""
        if settled:
            self.settle()
        before = self.recoverable()
        self.broker.close()
        self.broker = make_broker(self.directory)
        self.check()
        if settled:
            assert self.recoverable() == before, "what was recovered is not what was committed"

    def recoverable(self) -> Any:
        """All that a journal must bring back."""
        ledger = self.broker.ledger
        table, versions, progress = ledger.tickets, ledger.versions, ledger.progress
        tickets = [(t.number, t.state, t.attempt, t.num_failures, t.actor, t.epoch, t.versions, t.oldest_step) for t in table.open.values()]
        standings = [(number, found.standing, found.has_delta) for number, found in versions.by_number.items()]
        actors = [(actor.name, actor.epoch, sorted(actor.tickets)) for actor in ledger.actors.values()]
        return repr(
            (
                sorted(tickets),
                table.batches,
                table.counts,
                standings,
                versions.anchor,
                progress,
                actors,
                ledger._acked,
                ledger.desired_actors,
            )
        )


def _check(data: bytes) -> None:
    rng = random.Random(data)
    directory = room() / f"conversation-{next(_folders)}"
    conversation = Conversation(rng, directory)
    try:
        for number in range(MESSAGES):
            conversation.say()
            if rng.random() < 0.3:
                conversation.settle()
            if rng.random() < 0.02:
                conversation.crash(settled=rng.random() < 0.7)
            assert conversation.broker.ledger.tickets.counts.conserved, f"after message {number}"
        conversation.crash(settled=True)
    finally:
        with contextlib.suppress(Exception):
            conversation.broker.close()
        shutil.rmtree(directory, ignore_errors=True)


def _damage(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    return rng.randbytes(8)


def targets() -> dict[str, Target]:
    """By name."""
    return {"broker": Target(lambda: [b"first"], _check, (), _damage, share=0.05)}
