"""Runs recorded in this process: the real broker, actors and learner over the in-memory ports, with learners that die as told."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import msgspec
import numpy as np

from broker.memory import MemoryBroker
from deploy.prepare import prepare_run
from deploy.rundir import RunDirectory
from deploy.wiring import SystemClock, build_actor, build_learner, learner_device, make_broker
from learner.ranks import OneRank, Ranks
from protocol.config import parse_config
from protocol.groups import decode_group, encode_group
from protocol.messages import ActorReport

OnRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]
DEADLINE_SECONDS = 60


class Session(NamedTuple):
    """One life of a learner: its ranks, and the step after whose commit it dies."""

    num_ranks: int = 1
    dies_after: int | None = None


class Killed(Exception):
    """The learner dies."""


class MortalPort:
    """A learner's port that lets it die after the commit of a step."""

    def __init__(self, port: Any, dies_after: int | None) -> None:
        self._port, self._dies_after = port, dies_after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)

    def commit(self, step: int, *rest: Any) -> None:
        self._port.commit(step, *rest)
        if step == self._dies_after:
            raise Killed


class OneByOne:
    """A rank that holds a lock until it first meets the others: models are loaded by one thread of a process at a time."""

    def __init__(self, ranks: Ranks, loading: threading.Lock) -> None:
        self._ranks, self._loading, self._is_loading = ranks, loading, True
        self.rank, self.world_size = ranks.rank, ranks.world_size
        loading.acquire()

    def __getattr__(self, name: str) -> Any:
        if self._is_loading:
            self._is_loading = False
            self._loading.release()
        return getattr(self._ranks, name)


def one_by_one(on_ranks: OnRanks, num_ranks: int, call: Callable[[Any], None]) -> None:
    """Call a function once for each rank, all at once, as soon as each has loaded what it needs."""
    loading = threading.Lock()
    on_ranks(num_ranks, lambda ranks: call(OneByOne(ranks, loading)))


def record(config: dict[str, Any], directory: Path, sessions: Sequence[Session], on_ranks: OnRanks) -> Path:
    """Train in `directory`, one session after the other; each but the last dies."""
    config["run"] |= {"directory": str(directory.parent)}
    run = prepare_run(parse_config(config), directory, lambda text: None)
    for session in sessions:
        live(run, session, on_ranks)
    return directory


def live(run: RunDirectory, session: Session, on_ranks: OnRanks) -> None:
    """One life of a learner, with a broker and an actor of its own."""
    config, loop, broker = run.config(), asyncio.new_event_loop(), make_broker(run)
    memory = MemoryBroker(broker, SystemClock())
    actors: list[asyncio.Task[None]] = []

    def check() -> None:
        """Let the failure of the actor end the learner's wait."""
        if actors[0].done():
            actors[0].result()

    port = MortalPort(memory.learner_port(loop, check), session.dies_after)

    def learn(ranks: Ranks) -> None:
        policy = Path(run.manifest().policy)
        mine = port if ranks.rank == 0 else None
        build_learner(config, run.manifest().run, policy, run.checkpoints, ranks, mine, learner_device(config), beside=False).run()

    with tempfile.TemporaryDirectory() as folder:
        actor = loop.create_task(_act(memory.actor_port("actor"), Path(folder)))
        actors.append(actor)
        try:
            if session.num_ranks == 1:
                learn(OneRank())
            else:
                one_by_one(on_ranks, session.num_ranks, learn)
            loop.run_until_complete(asyncio.wait_for(actor, DEADLINE_SECONDS))
        except Killed:
            actor.cancel()
            loop.run_until_complete(asyncio.gather(actor, return_exceptions=True))
        finally:
            loop.close()
            broker.close()


async def _act(port: Any, folder: Path) -> None:
    built: list[Any] = []
    nothing_yet = ActorReport(-1, 0, [], 0.0, 0.0, 0, "building the engine")
    welcome = await port.join("any engine", lambda: built[0].report() if built else nothing_yet)
    built.append(await build_actor(port, welcome, folder, "actor"))
    await built[0].run()


def listing(directory: Path) -> dict[str, str]:
    """Every file below a directory with the digest of what is in it, every folder, and every link with where it leads."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def plant(directory: Path, step: int) -> None:
    """Change one reward in the first group that a step used, with its digest mended."""
    with closing(sqlite3.connect(directory / "journal.sqlite", isolation_level=None)) as journal:
        (tickets,) = journal.execute(
            "SELECT tickets FROM batches JOIN steps USING (batch) WHERE steps.step = ? ORDER BY batches.lsn DESC", (step,)
        ).fetchone()
        ticket = msgspec.json.decode(tickets)[0]
        (payload,) = journal.execute("SELECT payload FROM groups WHERE ticket = ? ORDER BY lsn DESC", (ticket,)).fetchone()
        group = decode_group(payload)
        rewards = group.rewards.copy()
        rewards[0] = np.float32(1.0) - rewards[0] if rewards[0] != np.float32(0.5) else np.float32(0.0)
        changed = encode_group(msgspec.structs.replace(group, rewards=rewards))
        journal.execute("UPDATE groups SET payload = ?, digest = ? WHERE ticket = ?", (changed, blake3.blake3(changed).digest(), ticket))
        journal.execute("PRAGMA wal_checkpoint(TRUNCATE)")
