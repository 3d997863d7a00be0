"""A simulated learner: does what broker/learner_client.py and learner/loop.py do, with weights that are only names.

Invariant: theta_{t+1} is named after theta_t and the very bytes of the groups trained on, so two learners with the same root have trained on the
same groups in the same order. What a checkpoint holds is confirmed in the journal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import blake3
import msgspec

from broker.core import LEARNER, PUBLISHER
from broker.learner_client import GONE_SECONDS, GROUP_CREDIT, RESEND_SECONDS
from protocol import codec, messages
from protocol.groups import decode_group
from protocol.messages import HEARTBEAT_SECONDS, PROTOCOL_VERSION
from protocol.weights import BlobRef, PolicyVersion
from tests.simulation.schedule import Loop, Process, ProcessEnded, Sleep
from tests.simulation.weights import BASE_ROOT, WeightFile, encode, refer

if TYPE_CHECKING:
    from tests.simulation.world import World

Received = tuple[messages.ToLearner, bytes]

NOTE_EVERY = 3
"""Steps between two commits that come with a note."""


@dataclass(frozen=True)
class Checkpoint:
    """What a learner resumes from: theta_`step` has `root`; `trained` are the batch and tickets of every step that led there."""

    step: int = 0
    root: str = BASE_ROOT
    version: PolicyVersion | None = None
    trained: tuple[tuple[int, tuple[int, ...]], ...] = ()


class SimulatedLearner(Process):
    """One session of the learner."""

    def __init__(self, world: World, session: str, start: Checkpoint) -> None:
        super().__init__(world.schedule, f"learner/{session}")
        self.world, self.session, self.state = world, session, start
        self._pacing, self._plan, self._random = world.plan.pacing, world.plan, world.schedule.random
        self._salt = "" if self._plan.replays_exactly else session
        self._inboxes: dict[str, deque[Received]] = {LEARNER: deque(), PUBLISHER: deque()}
        self._stop: messages.Stop | None = None
        self._uncommitted: dict[int, messages.CommitStep] = {}
        self._published: tuple[PolicyVersion, str] | None = (start.version, start.version.root) if start.version else None
        self._next_number, self._lineage = -1, -1
        self._is_publishing = False
        self._snapshot_wanted = False
        self.finished = False
        self.spawn(self._run())
        self.spawn(self._heartbeat())

    def receive(self, conversation: str, frames: list[bytes]) -> None:
        """A message of the broker."""
        message, payload = codec.to_learner.decode(frames)
        self._inboxes[conversation].append((message, bytes(payload)))

    # --- the client

    def _send(self, conversation: str, message: messages.Message) -> None:
        self.world.from_learner(self, conversation, codec.encode(message))

    def _receive(self, conversation: str, heard_at: float) -> Generator[float, None, Received | None]:
        """The next message within RESEND_SECONDS."""
        inbox, until = self._inboxes[conversation], self.clock() + RESEND_SECONDS
        while not inbox:
            rest = until - self.clock()
            if rest <= 1e-9:
                if self.clock() - heard_at > GONE_SECONDS:
                    raise ProcessEnded("the broker is gone")
                return None
            yield rest
        return inbox.popleft()

    def _exchange(
        self,
        requests: Callable[[], list[messages.Message]],
        answer: type[Any],
        fits: Callable[[Any], bool] = lambda answer: True,
        *,
        conversation: str = LEARNER,
        stop_ends: bool = False,
    ) -> Generator[float, None, Any]:
        sent_at, heard_at = float("-inf"), self.clock()
        while not (stop_ends and self._stop is not None):
            if self.clock() - sent_at >= RESEND_SECONDS - 1e-9:
                for request in requests():
                    self._send(conversation, request)
                sent_at = self.clock()
            received = yield from self._receive(conversation, heard_at)
            if received is not None:
                heard_at = self.clock()
                message, _ = received
                if isinstance(message, answer) and fits(message):
                    self.world.checks.answered(self, message)
                    return message
                self._note(message)
        return None

    def _note(self, message: messages.ToLearner) -> None:
        match message:
            case messages.Stop():
                self._stop = message
            case messages.LearnerRefused(request, reason):
                self.world.checks.learner_refused(self, request, reason)
                raise ProcessEnded(f"refused {request}: {reason}")

    def _confirm(self) -> Loop:
        for step, commit in list(self._uncommitted.items()):
            yield from self._exchange(lambda commit=commit: [commit], messages.Committed, _about(step))
            del self._uncommitted[step]

    def _heartbeat(self) -> Loop:
        while True:
            self._send("heartbeat", messages.LearnerReport(self.session, self.state.step, 0.0, 1.0, "training"))
            yield Sleep(HEARTBEAT_SECONDS)

    # --- the loop

    def _run(self) -> Loop:
        hello = messages.LearnerHello(PROTOCOL_VERSION, self.session, self.state.step, 1)
        welcome = yield from self._exchange(lambda: [hello], messages.LearnerWelcome)
        self._next_number, self._lineage = welcome.next_version, welcome.lineage
        if self._published is None:
            yield from self._publish_first()
        while self.state.step < self._pacing.num_steps:
            ready = yield from self._next_batch()
            if ready is None:
                break
            payloads = yield from self._fetch_groups(ready.tickets)
            self.world.checks.batch_received(self, ready, payloads)
            last, due = min(self._pacing.last_use(ready.batch) + 1, self._pacing.num_steps), False
            while self.state.step < last:
                yield from self._take_step(ready, payloads)
                due = due or self.state.step % self._plan.checkpoint_every == 0
            if due and self.state.step < self._pacing.num_steps:
                yield from self._save()
        yield from self._save()
        yield from self._confirm()
        done = messages.LearnerDone(self.state.step, {})
        yield from self._exchange(lambda: [done], messages.Goodbye)
        self.finished = True
        raise ProcessEnded("in order")

    def _next_batch(self) -> Generator[float, None, messages.BatchReady | None]:
        step = self.state.step
        ready = yield from self._exchange(
            lambda: [*self._uncommitted.values(), messages.NextBatch(step)], messages.BatchReady, _about(step), stop_ends=True
        )
        if ready is None:
            yield from self._confirm()
            return None
        self._uncommitted.clear()
        return ready

    def _fetch_groups(self, tickets: list[int]) -> Generator[float, None, list[bytes]]:
        payloads: dict[int, bytes] = {}
        asked: set[int] = set()
        heard_at = self.clock()
        while len(payloads) < len(tickets):
            wanted = [ticket for ticket in tickets if ticket not in payloads and ticket not in asked]
            for ticket in wanted[: GROUP_CREDIT - len(asked)]:
                self._send(LEARNER, messages.GetGroup(ticket))
                asked.add(ticket)
            received = yield from self._receive(LEARNER, heard_at)
            if received is None:
                asked.clear()
                continue
            heard_at = self.clock()
            message, payload = received
            if isinstance(message, messages.GroupData) and message.ticket in tickets:
                payloads[message.ticket] = payload
                asked.discard(message.ticket)
            self._note(message)
        return [payloads[ticket] for ticket in tickets]

    def _take_step(self, ready: messages.BatchReady, payloads: list[bytes]) -> Loop:
        step = self.state.step
        lags = [step - min(ready.version_steps[n] for n in decode_group(data).versions.tolist()) for data in payloads]
        self.world.checks.stepped(self, step, ready.batch, lags)
        yield Sleep(self._random.uniform(0.5, 1.5) * self._plan.step_seconds)
        hasher = blake3.blake3(f"{self.state.root}/{step}/{self._salt}".encode())
        for data in payloads:
            hasher.update(data)
        entry = (ready.batch, tuple(ready.tickets))
        self.state = replace(self.state, step=step + 1, root=hasher.hexdigest(), trained=(*self.state.trained, entry))
        self.world.steps_of_roots[self.state.root] = step + 1
        if self._pacing.publishes(step + 1):
            yield from self._publish(step + 1)
        notes = [messages.Note("warning", f"noted at step {step}", {"loss": 0.5})] if step % NOTE_EVERY == NOTE_EVERY - 1 else []
        self._uncommitted[step] = messages.CommitStep(step, ready.batch, lags, {"loss": 0.5}, notes)
        if self._plan.eval_every and (step + 1) % self._plan.eval_every == 0:
            yield from self._exchange(lambda: [messages.Evaluation(step + 1, 0.5, 8)], messages.EvaluationNoted, _about(step + 1))

    # --- publishing beside the loop

    def _publish_first(self) -> Loop:
        root = self.state.root
        version = PolicyVersion(self._next_number, 0, self._lineage, root)
        snapshot = None if self._plan.has_base else (yield from self._upload(WeightFile("", root)))
        yield from self._tell(messages.Publish(version, -1, None, snapshot, 100, 100, is_base=self._plan.has_base))

    def _publish(self, step: int) -> Loop:
        while self._is_publishing:
            yield float("inf")
        yield Sleep(0.01)
        self._is_publishing = True
        self.spawn(self._announce(step, self.state.root))

    def _announce(self, step: int, root: str) -> Loop:
        assert self._published is not None
        before, before_root = self._published
        version = PolicyVersion(self._next_number, step, self._lineage, root)
        yield Sleep(self._random.expovariate(1 / self._plan.publish_seconds))
        delta = yield from self._upload(WeightFile(before_root, root))
        compact = (yield from self._upload(WeightFile(before_root, root, "compact"))) if self._plan.compact else None
        snapshot = (yield from self._upload(WeightFile("", root))) if self._snapshot_wanted else None
        yield from self._tell(messages.Publish(version, before.number, delta, snapshot, 100, 100, compact))
        self._is_publishing = False
        self.wake()

    def _upload(self, file: WeightFile) -> Generator[float, None, BlobRef]:
        data = encode(file)
        while True:
            yield Sleep(self._random.expovariate(1 / 0.05))
            if self.world.is_reachable(LEARNER):
                self.world.write_blob(data)
                return refer(data)
            yield Sleep(1.0)

    def _tell(self, publication: messages.Publish) -> Loop:
        version = publication.version
        answer = yield from self._exchange(lambda: [publication], messages.Published, _about(version.step), conversation=PUBLISHER)
        self._next_number, self._snapshot_wanted = answer.next_version, answer.snapshot_wanted
        self._published = (msgspec.structs.replace(version, number=answer.number), version.root)

    def _save(self) -> Loop:
        while self._is_publishing:
            yield float("inf")
        if self._published is None or self.state.step == 0:
            return
        yield from self._confirm()
        yield Sleep(self._random.uniform(0.1, 0.5))
        self.world.save(self, replace(self.state, version=self._published[0]))


def _about(step: int) -> Callable[[Any], bool]:
    return lambda answer: answer.step == step
