"""One simulated run: broker, learner, actors and whoever starts them again, from a seed to its end.

Invariant: a seed fixes everything that happens, byte for byte; nothing here reads a clock, and nothing waits.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from broker.core import LEARNER
from protocol import messages
from protocol.weights import BlobRef
from tests.simulation import faults
from tests.simulation.account import Violation, require
from tests.simulation.actors import SimulatedActor
from tests.simulation.broker import BrokerHost
from tests.simulation.checks import Checks
from tests.simulation.disk import PLENTY
from tests.simulation.learner import Checkpoint, SimulatedLearner
from tests.simulation.network import Network
from tests.simulation.plan import Plan, draw_plan
from tests.simulation.schedule import Schedule
from tests.simulation.weights import BASE_ROOT, put

BROKER = faults.BROKER
LAUNCH_SECONDS = 0.5
LEAVE_SECONDS = 60.0
"""How long actors may take to leave once the run has ended."""
KEPT_CHECKPOINTS = 3


class World:
    """See the module. `defect` are keyword arguments of BrokerHost."""

    def __init__(self, seed: int, directory: Path, *, keep_trace: bool = False, **defect: Any) -> None:
        self.schedule = Schedule(seed, keep_trace=keep_trace)
        self.plan: Plan = draw_plan(Random(f"plan {seed}"), seed)
        self.network = Network(self.schedule, lambda: self.plan.weather(self.schedule.random))
        self.jump, self.num_jumps = 0.0, 0
        self.checks = Checks(self)
        self.steps_of_roots = self.checks.truth.steps_of_roots
        self.steps_of_roots[BASE_ROOT] = 0
        self.host = BrokerHost(self, directory, **defect)
        self.learner: SimulatedLearner | None = None
        self.learners: dict[str, SimulatedLearner] = {}
        self._checkpoints = [Checkpoint()]
        self.actors: dict[str, SimulatedActor] = {}
        self.all_actors: list[SimulatedActor] = []
        self.vanished: set[str] = set()
        self._desired = self.plan.num_actors
        self._goes_on = self.plan.goes_on
        self._mended_at = float("inf")
        self._actors_of_epochs: dict[tuple[str, str], SimulatedActor] = {}

    # --- the run

    def run(self) -> None:
        """From the start to the end. Raises Violation, with the time in it."""
        try:
            self._run()
        except Violation as error:
            raise Violation(f"at {self.schedule.now:.3f} s: {error}") from None

    def _run(self) -> None:
        schedule = self.schedule
        self.host.start()
        self.host.ask(messages.SetActors(self.plan.num_actors))
        self.start_learner()
        self._launch()
        for at, kind in self.plan.faults:
            schedule.after(at, lambda kind=kind: self._befall(kind))
        schedule.after(self.plan.fault_seconds, self.mend)
        while schedule.step():
            if self.host.damaged is not None:
                require(self.host.flipped >= 0, f"the journal is damaged, and nobody flipped a bit: {self.host.damaged}")
                self.checks.count("flipped bits found")
                return
            if self.is_over:
                break
            late = schedule.now - self._mended_at
            if late > self.plan.patience:
                raise Violation(f"the run waits for ever, {late:.0f} s after everything was mended: {self._waits()}")
        require(self.host.flipped < 0, "a flipped bit was not found")
        self._finish()

    def _finish(self) -> None:
        """The end: actors leave, and what is on the disk after a power loss is the same run."""
        until = self.schedule.now + LEAVE_SECONDS
        self.mend()
        while any(actor.alive for actor in self.actors.values()):
            require(self.schedule.now <= until, f"{[a.name for a in self.actors.values() if a.alive]} do not leave")
            self.schedule.step()
        while self.host.broker is None:
            self.schedule.step()
        self.host.die(power=True)
        while self.host.broker is None:
            self.schedule.step()
        assert self.learner is not None
        self.checks.over(self.learner)
        self.checks.thorough(self.host.broker)
        if not self.checks.account.halted and not self._was_stopped:
            require(self.checks.account.step == self.plan.pacing.num_steps, f"the run ended at step {self.checks.account.step}")

    @property
    def is_over(self) -> bool:
        """Whether the learner has left in order, and the run is not to go on after that."""
        if self.learner is None or not self.learner.finished or not self.checks.account.ended:
            return False
        if self.checks.account.step < self.plan.pacing.num_steps and self._goes_on:
            self._go_on()
            return False
        return True

    @property
    def _was_stopped(self) -> bool:
        return any(kind == "run_is_stopped" for _, kind in self.plan.faults)

    def _go_on(self) -> None:
        """Somebody starts the run that was stopped again, all of it."""
        self._goes_on = False
        self.checks.count("runs gone on with")
        self.schedule.note("the run is started again")
        for actor in self.actors.values():
            actor.kill("started again")
        if self.host.broker is not None:
            self.host.die(power=False)
        self.start_learner()
        self._mended_at = max(self._mended_at, self.schedule.now) if self._mended_at < float("inf") else self._mended_at

    def _waits(self) -> str:
        broker = self.host.broker
        where = f"learner {self.learner.name} at step {self.learner.state.step}" if self.learner is not None else "no learner"
        return f"{where}, {broker.ledger.why_waiting() if broker is not None else 'no broker'}"

    # --- whoever starts processes again

    def _launch(self) -> None:
        """Once every half second: as many actors as desired, on other machines than those that vanished, and a learner."""
        if self.host.broker is not None:
            self._desired = self.host.broker.ledger.desired_actors
        going = not self.checks.account.stopping
        if self._mended_at < float("inf"):
            self._desired = max(1, self._desired)
        places = [name for number in range(self._desired + len(self.vanished)) if (name := f"a{number}") not in self.vanished]
        for name in places[: self._desired]:
            if going and (name not in self.actors or not self.actors[name].alive):
                self._start_actor(name)
        for name, actor in self.actors.items():
            if name not in places[: self._desired]:
                actor.kill("not desired any more")
        if self.learner is not None and not self.learner.alive and not self.learner.finished:
            self.start_learner()
        self.schedule.after(LAUNCH_SECONDS * self.schedule.random.uniform(0.5, 1.5), self._launch)

    def _start_actor(self, name: str) -> None:
        actor = SimulatedActor(self, name, f"e{len(self.all_actors)}")
        self.actors[name] = self._actors_of_epochs[name, actor.epoch] = actor
        self.all_actors.append(actor)

    def start_learner(self) -> None:
        """A new session from the last checkpoint."""
        session = f"s{len(self.learners)}"
        self.learner = self.learners[session] = SimulatedLearner(self, session, self._checkpoints[-1])
        self.schedule.note(self.learner.name, "starts at step", self._checkpoints[-1].step)

    def some_actor(self) -> SimulatedActor | None:
        """One that lives, if any does."""
        alive = [actor for actor in self.actors.values() if actor.alive]
        return self.schedule.random.choice(alive) if alive else None

    def save(self, learner: SimulatedLearner, checkpoint: Checkpoint) -> None:
        """The learner's checkpoint is on its disk.

        One that was replaced while it was frozen has lost the disk: were it to write between its successor's start and end, the next learner
        would start from a step that the journal is not at, and be refused.
        """
        if learner is self.learner and checkpoint.step not in [known.step for known in self._checkpoints]:
            self._checkpoints = sorted([*self._checkpoints, checkpoint], key=lambda known: known.step)[-KEPT_CHECKPOINTS:]

    # --- faults

    def _befall(self, kind: str) -> None:
        if not self.is_over and self._mended_at == float("inf"):
            self.schedule.note("fault:", kind)
            self.checks.count(f"fault {kind}")
            faults.befall[kind](self)

    def mend(self) -> None:
        """From now on everything works."""
        if self._mended_at < float("inf"):
            return
        self.schedule.note("everything is mended")
        self._mended_at = self.schedule.now
        self.network.clear_up()
        disk = self.host.disk
        disk.capacity, disk.sync_failures, disk.operations_left = PLENTY, 0.0, None
        for process in [*self.actors.values(), *self.learners.values()]:
            process.thaw()

    # --- what carries messages and files

    def wall(self) -> float:
        """The broker machine's wall clock, seconds since 1970."""
        return 1.7e9 + self.schedule.now + self.jump

    def from_actor(self, actor: SimulatedActor, frames: list[Any]) -> None:
        """A message from an actor to the broker."""
        sender = ("actor", actor.actor, actor.epoch)
        self.network.send(actor.actor, BROKER, lambda: self.host.receive(sender, frames))

    def to_actor(self, name: str, epoch: str, frames: list[Any]) -> None:
        """A message from the broker to an actor's process."""
        self.network.send(BROKER, name, lambda: self._arrive_at_actor(name, epoch, frames))

    def _arrive_at_actor(self, name: str, epoch: str, frames: list[Any]) -> None:
        actor = self._actors_of_epochs[name, epoch]
        if actor.alive:
            self.schedule.note(actor.name, "<-", frames[0])
            actor.meet(lambda: actor.receive(frames))

    def from_learner(self, learner: SimulatedLearner, conversation: str, frames: list[Any]) -> None:
        """A message from a learner to the broker."""
        sender = ("learner", conversation, learner.session)
        self.network.send(LEARNER, BROKER, lambda: self.host.receive(sender, frames))

    def to_learner(self, conversation: str, session: str, frames: list[Any]) -> None:
        """A message from the broker to a learner's session."""
        self.network.send(BROKER, LEARNER, lambda: self._arrive_at_learner(conversation, session, frames))

    def _arrive_at_learner(self, conversation: str, session: str, frames: list[Any]) -> None:
        learner = self.learners[session]
        if learner.alive:
            self.schedule.note(learner.name, conversation, "<-", frames[0])
            learner.meet(lambda: learner.receive(conversation, frames))

    def is_reachable(self, peer: str) -> bool:
        """Whether files can be carried between the broker and a peer."""
        ways = (self.network.link(peer, BROKER), self.network.link(BROKER, peer))
        return self.host.broker is not None and not any(way.is_cut for way in ways)

    def read_blob(self, blob: BlobRef) -> bytes | None:
        """A file of the broker's store."""
        assert self.host.broker is not None
        return self.host.broker.blobs.read(blob.digest)

    def write_blob(self, data: bytes) -> None:
        """Upload a file."""
        assert self.host.broker is not None
        put(self.host.broker.blobs, data, self.wall())
