"""torchrun over the learner's ranks on this machine: run to their end, and started again by whoever supervises.

torchrun's own restarts are used only where ranks of other machines wait for this one's: it knows no difference between a rank that was killed and
one that was told something impossible, and counts its restarts over its whole life.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from deploy.prepare import CLI
from deploy.rundir import RunDirectory
from deploy.supervisor import HOPELESS, Crashes, how_ended

log = logging.getLogger("torchrun")
ELASTIC_RESTARTS = 1000
"""Restarts within torchrun where several machines meet: ending it on one of them would cost the others their rendezvous."""


def newest_checkpoint(run: RunDirectory) -> str:
    """The name of the newest checkpoint, by which a learner's progress is told; empty if there is none."""
    return max((path.name for path in run.checkpoints.glob("step-*")), default="")


def torchrun_arguments(run: Path, address: str, key: Path, ranks: int, nodes: str, rendezvous: str | None, parent: int) -> list[str]:
    """The arguments of torchrun for this machine's ranks; with a rendezvous (host:port), over several machines.

    `parent` is the process that runs torchrun: its ranks end with it.
    """
    where = ["--standalone", "--max-restarts", "0"] if rendezvous is None else [
        "--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous, "--rdzv-id", run.name,
        "--max-restarts", str(ELASTIC_RESTARTS),
    ]  # fmt: skip
    return [
        *where, "--nproc-per-node", str(ranks), "--log-dir", str(run / "logs" / "torchrun"),
        str(CLI), "learner-rank", "--folder", str(run), "--broker", address, "--key", str(key), "--parent", str(parent),
    ]  # fmt: skip


def learn(arguments: list[str], run: RunDirectory, *, is_supervised: bool) -> int:
    """Run the ranks to the learner's end; the exit code. `is_supervised` says that somebody else starts it again where that helps."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    try:
        if is_supervised:
            return run_ranks(arguments)
        return keep_running(lambda: run_ranks(arguments), Crashes(lambda: newest_checkpoint(run)))
    except SignalException as error:
        log.info("told to end by %s", error.sigval.name)
        return 128 + error.sigval


def run_ranks(arguments: list[str]) -> int:
    """Run torchrun in this process until all ranks have ended; the exit code.

    That of a rank which a restart cannot mend, if there is one, otherwise that of the rank that failed first; 1 for a rank that was killed.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        torchrun.run(torchrun.parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            log.error("rank %d (process %d) ended with %s", rank, failure.pid, how_ended(failure.exitcode))
        hopeless = [failure.exitcode for failure in error.failures.values() if failure.exitcode in HOPELESS]
        return max(1, *hopeless, error.get_first_failure()[1].exitcode) if not hopeless else hopeless[0]
    return 0


def keep_running(
    run_once: Callable[[], int],
    crashes: Crashes,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run the ranks, again and again until they end in order or for good; the exit code.

    waits for:    the ranks, then the pause before they are started again
    unblocked by: their end, and time
    """
    while True:
        started = monotonic()
        code = run_once()
        pause = None if code == 0 else crashes.pause(code, monotonic() - started)
        if pause is None:
            return code
        log.warning("the ranks ended with %s, starting them again in %.1f s from the newest checkpoint", how_ended(code), pause)
        sleep(pause)
