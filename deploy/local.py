"""`up`: a whole run on this machine, each role in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from broker.control import ControlClient
from broker.keys import load_key
from deploy.monitor import Monitor
from deploy.prepare import CLI
from deploy.rundir import RunDirectory
from deploy.supervisor import Child, Supervisor
from protocol.errors import BrokerUnreachable, RunHalted, SlipstreamError
from protocol.messages import RunStatus

READY_SECONDS = 60.0
POLL_SECONDS = 0.3
END_SECONDS = 20.0
STOP_SECONDS = 60.0
LEARNER = "learner"
BROKER = "broker"


class LocalRun:
    """One run and its processes."""

    def __init__(self, run: RunDirectory, monitor: Monitor) -> None:
        self._run, self._monitor, self._config = run, monitor, run.config()
        self._supervisor = Supervisor(run.logs, run.commands, monitor.say)
        self._control: ControlClient | None = None
        self._num_interrupts = 0
        self._told_to_stop, self._stop_from = False, 0.0
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
            while not self._is_over():
                self._turn()
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
        announcement = self._run.path / "broker.json"
        announcement.unlink(missing_ok=True)
        self._supervisor.start(Child(BROKER, _command(BROKER, "--run", str(self._run.path)), restarts=True))
        deadline = time.monotonic() + READY_SECONDS
        while not announcement.exists():
            self._supervisor.poll()
            if time.monotonic() > deadline:
                raise SlipstreamError(
                    f"the broker was not ready after {READY_SECONDS:.0f} s. Its log says:\n{self._supervisor.explain(BROKER)}"
                )
            time.sleep(0.05)
        self._control = ControlClient(self._address, load_key(self._run.keys / "admin.key"), READY_SECONDS)
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
        self._supervisor.start(Child(LEARNER, command, restarts=False, environment=_threads(self._config.learner.threads)))

    def _start_actor(self) -> None:
        name = f"actor-{self._next_actor}"
        self._next_actor += 1
        command = _command("actor", "--broker", self._address, "--key", str(self._run.keys / "actor.key"), "--name", name)
        self._supervisor.start(Child(name, command, restarts=True, environment=_threads(self._config.actor.threads)))

    # --- going on

    def _turn(self) -> None:
        """Watch the children, follow the broker's status, keep the wanted number of actors."""
        if self._told_to_stop:
            self._supervisor.restart_nothing(keep=BROKER)
        self._supervisor.poll()
        self._check_learner()
        if self._told_to_stop and self._learner_is_silent():
            self._monitor.say(f"the learner has not been heard for {STOP_SECONDS:.0f} s, ending it")
            raise SlipstreamError("stopped without the learner, which did not answer; nothing after its last checkpoint is kept")
        if self._num_interrupts and not self._told_to_stop:
            self._monitor.say("stopping: the learner finishes its step and writes a checkpoint (interrupt again to end now)")
            self._told_to_stop, self._stop_from = True, time.monotonic()
            self._ask_to_stop()
        status = self._ask_status()
        if status is not None:
            self._status = status
            self._monitor.show(status)
            if not self._told_to_stop and status.phase in ("starting", "training"):
                self._keep_actors(status.desired_actors)
        time.sleep(POLL_SECONDS)

    def _learner_is_silent(self) -> bool:
        """Whether a stop was asked for, and the learner has given no sign of life for STOP_SECONDS since."""
        learner = self._status.learner if self._status else None
        if learner is not None and learner.last_seen < STOP_SECONDS:
            self._stop_from = time.monotonic()
        return time.monotonic() - self._stop_from > STOP_SECONDS

    def _ask_status(self) -> RunStatus | None:
        assert self._control is not None
        try:
            return self._control.status(2.0)
        except BrokerUnreachable as error:
            self._monitor.say(f"waiting for the broker: {error}")
            return None

    def _ask_to_stop(self) -> None:
        assert self._control is not None
        try:
            self._control.stop("interrupted")
        except BrokerUnreachable:
            self._told_to_stop = False

    def _keep_actors(self, num_wanted: int) -> None:
        wanted = [name for name, child in self._supervisor.children.items() if name.startswith("actor-") and child.is_wanted]
        for _ in range(num_wanted - len(wanted)):
            self._start_actor()
        for name in wanted[num_wanted:]:
            self._supervisor.ask_to_end(name)

    def _check_learner(self) -> None:
        learner = self._supervisor.children[LEARNER]
        if learner.exit_code not in (None, 0):
            code = learner.exit_code
            how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            raise SlipstreamError(f"the learner ended with {how}. Its log says:\n{self._supervisor.explain(LEARNER)}")

    def _is_over(self) -> bool:
        return self._status is not None and self._status.phase in ("finished", "halted")

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


def _threads(count: int) -> dict[str, str]:
    """Math libraries read these when they are loaded; more threads than configured would fight over the cores."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(count)) | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def torchrun_command(run: Path, address: str, key: Path, ranks: int, nodes: str, rendezvous: str | None) -> list[str]:
    """torchrun over this machine's ranks; with a rendezvous (host:port), over several machines."""
    where = ["--standalone"] if rendezvous is None else [
        "--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous, "--rdzv-id", run.name,
    ]  # fmt: skip
    return [
        sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks), "--max-restarts", "3",
        "--log-dir", str(run / "logs" / "torchrun"),
        str(CLI), "learner-rank", "--folder", str(run), "--broker", address, "--key", str(key),
    ]  # fmt: skip
