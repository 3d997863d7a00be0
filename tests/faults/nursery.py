"""Toy processes, forked from one that has everything imported: what is killed every few seconds should not spend them on starting.

`Nursery` is the driver's end, `main` the process that forks. Requests and answers are lines of JSON; each request has one answer. Nobody but the
nursery can wait for its children, so it is also asked for the exit codes of those that ended. Children die with it, and it with the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROLES = ("actor", "learner")
CLONE_NEWNET = 0x40000000
"""Of Linux's sched.h."""


class Forked:
    """A child of the nursery, as far as the driver needs one. Signals go by a descriptor, so they never reach another process."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery, self.pid = nursery, pid
        self.returncode: int | None = None
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._descriptor = -1  # it has ended already

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None and (self._descriptor < 0 or select.select([self._descriptor], [], [], 0)[0]):
            return self.wait()
        return self.returncode

    def wait(self) -> int:
        """The exit code, once it has ended."""
        if self.returncode is None:
            self.returncode = self._nursery.exit_code(self.pid)
            if self._descriptor >= 0:
                os.close(self._descriptor)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Signal it; one that has ended does not mind."""
        if self.returncode is None and self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        """End it now."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The driver's end."""

    def __init__(self, root: Path, environment: dict[str, str], log: Path) -> None:
        command = [sys.executable, "-m", "tests.faults.nursery", str(os.getpid())]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, cwd=root, env=environment, text=True
            )

    def start(self, role: str, arguments: list[str], log: Path, namespace: str = "") -> Forked:
        """A process of a role, its output appended to `log`; in a network namespace, unless that is empty."""
        return Forked(self, int(self._ask({"role": role, "arguments": arguments, "log": str(log), "namespace": namespace})))

    def exit_code(self, pid: int) -> int:
        """Of a child that has ended or is about to; its negative signal if it was one."""
        return int(self._ask({"wait": pid}))

    def close(self) -> None:
        """End it, and with it what it has forked."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def main() -> None:
    """The process: consumes requests, waits for the next one or the end of the driver; produces children, and their exit codes."""
    from deploy.parent import die_with_parent

    die_with_parent(int(sys.argv[1]))
    from tests.faults import actor_process, learner_process
    from tests.faults.run_directory import compile_loops

    compile_loops()
    mains = dict(zip(ROLES, (actor_process.main, learner_process.main), strict=True))
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            sys.stdout.flush()
            answer = os.fork()
            if answer == 0:
                _be_child(mains[request["role"]], request["arguments"], Path(request["log"]), request["namespace"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def enter(namespace: str) -> None:
    """Be in a network namespace from now on; only of use before there are threads and sockets. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}", "rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def _be_child(run: Any, arguments: list[str], log: Path, namespace: str) -> None:
    """In a fresh child: give up what belongs to the nursery, run, and never return."""
    code = 1
    try:
        nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for old, new in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(old, new)
        if namespace:
            enter(namespace)
        run([*arguments, "--parent", str(os.getppid())])
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
