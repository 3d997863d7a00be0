"""`up`: a whole run on this machine, each role in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from types import FrameType

from broker.control import ControlClient
from broker.keys import load_key
from broker.sockets import Channel
from broker.status import STARTING
from deploy.monitor import Monitor
from deploy.prepare import CLI
from deploy.presence import ACTOR, Presence
from deploy.presence import LEARNER as LEARNER_PATIENCE
from deploy.resume import NOTHING, Past
from deploy.rundir import RunDirectory
from deploy.supervisor import Child, Crashes, Supervisor
from deploy.torchrun import newest_checkpoint
from protocol.errors import BrokerUnreachable, RequestRefused, RunHalted, SlipstreamError
from protocol.messages import RunStatus

CONNECT_SECONDS = 60.0
POLL_SECONDS = 0.3
END_SECONDS = 20.0
STOP_SECONDS = 60.0
SAY_SECONDS = 30.0
"""How often a wait is told again."""
LEARNER = "learner"
BROKER = "broker"


class LocalRun:
    """One run and its processes."""

    def __init__(self, run: RunDirectory, monitor: Monitor, past: Past = NOTHING, num_actors: int | None = None) -> None:
        """`past` is what the run had come to before; `num_actors` replaces the number of actors that it wants."""
        self._run, self._monitor, self._config = run, monitor, run.config()
        self._past, self._num_actors = past, num_actors
        self._presence = Presence()
        self._away_said_at = float("-inf")
        self._supervisor = Supervisor(run.logs, run.commands, monitor.say)
        self._control: ControlClient | None = None
        self._num_interrupts = 0
        self._told_to_stop, self._stop_from, self._said = False, 0.0, ""
        self._next_actor = 0
        self._status: RunStatus | None = None

    def go(self) -> RunStatus:
        """Run to the end. Raises SlipstreamError if a role cannot be kept running, RunHalted if the broker gave up.

        The first interrupt asks for an orderly end, the second ends everything now. Nothing is left running in any case.
        """
        previous = {number: signal.signal(number, self._interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._start_broker()
            self._start_learner()
            while True:
                while not self._is_over():
                    self._turn()
                if not self._goes_on():
                    return self._finish()
        except KeyboardInterrupt:
            self._monitor.say("interrupted twice: ending everything now")
            raise
        finally:
            self._supervisor.end_all(0.0 if self._num_interrupts > 1 else 2.0)
            if self._control is not None:
                self._control.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    # --- starting

    def _start_broker(self) -> None:
        """Start the broker and wait until it listens, where it did before if it can.

        waits for:    its announcement; a long journal, or a disk without room, may take it long
          unblocked by: the broker; its process is the heartbeat, and what it says last is told every SAY_SECONDS
        """
        before = self._run.broker_address()
        if before is not None and self._config.broker.address.endswith(":0") and not _is_free(before):
            self._monitor.say(f"broker: somebody else listens at {before}, taking other ports; actors elsewhere need the new address")
            (self._run.path / "broker.json").unlink()
        self._supervisor.start(Child(BROKER, _command(BROKER, "--run", str(self._run.path)), restarts=True))
        since = said_at = time.monotonic()
        while not self._supervisor.is_running(BROKER) or self._run.broker_process() != self._supervisor.process_id(BROKER):
            self._supervisor.poll()
            if self._num_interrupts:
                raise SlipstreamError("interrupted before the broker was there")
            if time.monotonic() - said_at > SAY_SECONDS:
                said_at = time.monotonic()
                self._monitor.say(f"waiting for the broker for {said_at - since:.0f} s. Its log ends:\n{self._supervisor.tail(BROKER)}")
            time.sleep(0.05)
        self._control = ControlClient(self._address, load_key(self._run.keys / "admin.key"), CONNECT_SECONDS)
        self._monitor.say(f"broker: listening at {self._address}")

    @property
    def _address(self) -> str:
        address = self._run.broker_address()
        assert address is not None
        return address

    def _start_learner(self) -> None:
        command = _command(
            LEARNER, "--broker", self._address, "--key", str(self._run.keys / "learner.key"), "--folder", str(self._run.path),
            "--ranks", str(self._config.learner.ranks),
        )  # fmt: skip
        crashes = Crashes(lambda: newest_checkpoint(self._run))
        self._supervisor.start(Child(LEARNER, command, True, math_threads(self._config.learner.threads), crashes))

    def _start_actor(self) -> None:
        name = f"actor-{self._next_actor}"
        self._next_actor += 1
        command = _command("actor", "--broker", self._address, "--key", str(self._run.keys / "actor.key"), "--name", name)
        self._supervisor.start(Child(name, command, restarts=True, environment=math_threads(self._config.actor.threads)))

    # --- going on

    def _turn(self) -> None:
        """Watch the children, follow the broker's status, keep the wanted number of actors."""
        if self._told_to_stop:
            self._supervisor.restart_nothing(keep=(BROKER, LEARNER))
        self._supervisor.poll()
        if self._told_to_stop and self._learner_is_silent():
            self._monitor.say(f"the learner has not been heard for {STOP_SECONDS:.0f} s, ending it")
            raise SlipstreamError("stopped without the learner, which did not answer; nothing after its last checkpoint is kept")
        if self._num_interrupts and not self._told_to_stop:
            self._ask_to_stop()
        status = self._ask_status()
        if status is None or status.shortage:
            self._presence.nobody_listened(time.monotonic())
        if status is not None:
            self._status = status
            self._monitor.show(status)
            if self._told_to_stop and status.phase in ("starting", "training"):
                self._told_to_stop = False  # what had ended before has begun again since: to be asked again
            if not self._told_to_stop and status.phase in ("starting", "training"):
                self._set_actors()
                self._keep_actors(status.desired_actors)
                if not status.shortage:
                    self._end_the_silent(status, time.monotonic())
        time.sleep(POLL_SECONDS)

    def _end_the_silent(self, status: RunStatus, now: float) -> None:
        """End processes that are there and have not been heard for too long, so that they are started again."""
        seen = {actor.name: actor.last_seen for actor in status.actors if actor.was_heard}
        if status.learner is not None and status.learner.was_heard and status.learner.doing != STARTING:
            seen[LEARNER] = status.learner.last_seen
        for name, child in self._supervisor.children.items():
            if name == BROKER or not child.is_wanted or not self._supervisor.is_running(name):
                continue
            patience = LEARNER_PATIENCE if name == LEARNER else ACTOR
            self._presence.observe(name, child.started_at, seen.get(name), now)
            what = f"{name}: its process is there, but it has not been heard for {self._presence.silence(name, now):.0f} s"
            if self._presence.is_lost(name, patience, now):
                self._monitor.say(f"{what}; ending it, it is hung or stopped")
                self._supervisor.end_now(name)
            elif self._presence.is_news(name, now):
                self._monitor.say(f"{what}; after {patience.joined:.0f} s it is started again")

    def _learner_is_silent(self) -> bool:
        """Whether a stop was asked for, and the learner has given no sign of life for STOP_SECONDS since."""
        learner = self._status.learner if self._status else None
        if learner is not None and learner.was_heard and learner.last_seen < STOP_SECONDS:
            self._stop_from = time.monotonic()
        return time.monotonic() - self._stop_from > STOP_SECONDS

    def _ask_status(self) -> RunStatus | None:
        assert self._control is not None
        try:
            return self._control.status(2.0)
        except BrokerUnreachable as error:
            if time.monotonic() - self._away_said_at > SAY_SECONDS:
                self._away_said_at = time.monotonic()
                self._monitor.say(f"waiting for the broker: {error}")
            return None

    def _set_actors(self) -> None:
        """Ask for the number of actors that this start was given; asked again at the next turn if that cannot be journalled now."""
        if self._num_actors is None or self._control is None:
            return
        try:
            self._control.set_actors(self._num_actors)
        except (BrokerUnreachable, RequestRefused) as error:
            self._monitor.say(f"waiting to set the number of actors: {error}")
        else:
            self._num_actors = None

    def _ask_to_stop(self) -> None:
        """Ask for an orderly end; asked again at the next turn if the broker is away or has no room to journal it."""
        assert self._control is not None
        try:
            self._control.stop("interrupted")
        except (BrokerUnreachable, RequestRefused) as error:
            if str(error) != self._said:
                self._monitor.say(f"waiting to stop (interrupt again to end now): {error}")
            self._said = str(error)
            return
        self._monitor.say("stopping: the learner finishes its step and writes a checkpoint (interrupt again to end now)")
        self._told_to_stop, self._stop_from = True, time.monotonic()

    def _keep_actors(self, num_wanted: int) -> None:
        wanted = [name for name, child in self._supervisor.children.items() if name.startswith("actor-") and child.is_wanted]
        for _ in range(num_wanted - len(wanted)):
            self._start_actor()
        for name in wanted[num_wanted:]:
            self._supervisor.ask_to_end(name)

    def _is_over(self) -> bool:
        """Whether the run has ended since its learner joined; a run that goes on had ended before, too."""
        status = self._status
        return status is not None and status.lineage > self._past.lineage and status.phase in ("finished", "halted")

    def _goes_on(self) -> bool:
        """Start the learner once more if what ended the run now is a stop from before this process."""
        status = self._status
        assert status is not None
        was_stopping = bool(self._past.stopping) and not self._past.has_ended
        if not was_stopping or self._told_to_stop or status.halted or status.step >= status.num_steps:
            return False
        self._monitor.say("the stop from before is done; going on")
        for name in self._supervisor.wait([LEARNER], END_SECONDS):
            self._supervisor.end_now(name)
        self._past = Past(status.step, status.lineage)
        self._start_learner()
        return True

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._num_interrupts += 1
        if self._num_interrupts > 1:
            raise KeyboardInterrupt

    # --- ending

    def _finish(self) -> RunStatus:
        """Let the roles end by themselves, the broker last."""
        assert self._status is not None and self._control is not None
        roles = [name for name in self._supervisor.children if name != BROKER]
        for name in roles:
            self._supervisor.children[name].is_wanted = False
        if self._status.halted:
            self._supervisor.end_all(2.0)
            raise RunHalted(self._status.halted)
        for name in self._supervisor.wait(roles, END_SECONDS):
            self._monitor.say(f"{name}: still there after {END_SECONDS:.0f} s, ending it")
            self._supervisor.ask_to_end(name)
        self._status = self._control.status()
        self._supervisor.children[BROKER].is_wanted = False
        self._control.shut_down()
        self._supervisor.wait([BROKER], END_SECONDS)
        return self._status


def _command(role: str, *arguments: str) -> list[str]:
    return [sys.executable, str(CLI), role, *arguments, "--parent", str(os.getpid())]


def _is_free(address: str) -> bool:
    """Whether a broker could listen at an address: whether its ports are free."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    for channel in Channel:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port) + channel))
            except OSError:
                return False
    return True


def math_threads(count: int) -> dict[str, str]:
    """Math libraries read these when they are loaded; more threads than configured would fight over the cores."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(count)) | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
