"""A toy learner: the real client, real versions and real checkpoints, of weights that are a hash chain over what was trained on.

The driver's nursery forks it, and it ends with them. By itself: `python -m tests.faults.learner_process`. With a salt its steps lead elsewhere than
those of the sessions before it, as those of another machine would, so that what these published is orphaned.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import blake3
import msgspec
import numpy as np

from broker.keys import load_key
from broker.learner_client import LearnerClient
from deploy.parent import die_with_parent
from deploy.rundir import RunDirectory
from protocol.delta import encode_delta, encode_snapshot
from protocol.errors import StaleGroup
from protocol.messages import LearnerWelcome, Publish
from protocol.pacing import Pacing
from protocol.ports import ReceivedBatch
from protocol.weights import PolicyVersion, num_bytes, root_hash
from tests.faults.records import Announced, Announcing, Complaint, Confirmed, Log, Resumed, Saved, Trained
from tests.faults.run_directory import RECORDS
from tests.faults.tokens import Contradiction, Described, Theta, describe, fingerprint, first_theta

NUM_KEPT = 3
NEVER = PolicyVersion(-1, -1, -1, "")


class Published(NamedTuple):
    """What the broker was told last."""

    version: PolicyVersion
    theta: Theta


class Checkpoint(msgspec.Struct, frozen=True):
    """What a checkpoint's file holds: theta_step, and the weights published last."""

    step: int
    chain: bytes
    body: bytes
    version: PolicyVersion
    published_chain: bytes
    published_body: bytes


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def save(folder: Path, step: int, theta: Theta, published: Published) -> None:
    """Write a checkpoint: its name appears after its bytes are on the disk, and is on the disk itself when this returns."""
    state = Checkpoint(step, theta.chain, theta.body.tobytes(), published.version, published.theta.chain, published.theta.body.tobytes())
    partial = folder / ".partial"
    with partial.open("wb") as file:
        file.write(msgspec.msgpack.encode(state))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / f"step-{step:08d}")
    for old in list_checkpoints(folder)[:-NUM_KEPT]:
        old.unlink()
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Names in `folder` are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Publisher:
    """Publishes beside the training, one version at a time, as the real one does."""

    def __init__(self, client: LearnerClient, welcome: LearnerWelcome, published: Published | None, log: Log) -> None:
        self._client, self._welcome, self._log = client, welcome, log
        self.published = published
        self._next_number, self._snapshot_wanted = welcome.next_version, False
        self._thread = ThreadPoolExecutor(1, "publisher")
        self._under_way: Future[None] | None = None

    def publish(self, step: int, theta: Theta) -> None:
        """Make theta_step available to actors, soon."""
        self.flush()
        self._under_way = self._thread.submit(self._work, step, theta)

    def flush(self) -> None:
        """Wait until everything is announced. Raises the error of a publication that failed."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def check(self) -> None:
        """Raise the error of a publication that failed."""
        if self._under_way is not None and self._under_way.done():
            self.flush()

    def close(self) -> None:
        """Release the thread, after `flush`."""
        self._thread.shutdown()

    def _work(self, step: int, theta: Theta) -> None:
        weights, before = theta.weights(), self.published
        version = PolicyVersion(self._next_number, step, self._welcome.lineage, root_hash(weights))
        self._log.write(Announcing(version.lineage, version.number, step, version.root, theta.chain.hex()))
        delta = snapshot = None
        if before is not None:
            data, _ = encode_delta(self._welcome.run, before.theta.weights(), weights, before.version, version)
            delta = self._client.put_blob(data)
            if self._snapshot_wanted:
                snapshot = self._client.put_blob(encode_snapshot(self._welcome.run, weights, version))
        parent = before.version.number if before is not None else -1
        size = num_bytes(weights)
        answer = self._client.publish(Publish(version, parent, delta, snapshot, size, size, is_base=before is None))
        self._log.write(Announced(version.lineage, answer.number, step, version.root))
        self._next_number, self._snapshot_wanted = answer.next_version, answer.snapshot_wanted
        self.published = Published(msgspec.structs.replace(version, number=answer.number), theta)


class ToyLearner:
    """One session.

    Invariant: a step is written down before the broker is told of it, and a checkpoint is never ahead of the journal.
    """

    def __init__(self, client: LearnerClient, pacing: Pacing, folder: Path, log: Log, salt: str, random: np.random.Generator) -> None:
        self._client, self._pacing, self._folder, self._log, self._salt = client, pacing, folder, log, salt
        self._random = random
        self.step, self._theta = 0, first_theta()
        self._resumed_from: Published | None = None
        found = list_checkpoints(folder)
        if found:
            state = msgspec.msgpack.decode(found[-1].read_bytes(), type=Checkpoint)
            self.step, self._theta = state.step, _theta(state.chain, state.body)
            self._resumed_from = Published(state.version, _theta(state.published_chain, state.published_body))

    def run(self, incarnation: int, checkpoint_every: int) -> None:
        """The main loop: consumes batches, waits for the next; produces commits, versions and checkpoints until the run is stopped."""
        welcome = self._client.join(self.step, 1, {"learner": "toy"})
        self._lineage = welcome.lineage
        self._log.write(Resumed(incarnation, self._lineage, self.step, self._theta.chain.hex(), self._salt))
        self._publisher = Publisher(self._client, welcome, self._resumed_from, self._log)
        if self._resumed_from is None:
            self._publisher.publish(self.step, self._theta)
        saved = self.step
        while (batch := self._client.next_batch(self.step, self._publisher.check)) is not None:
            self._log.write(Confirmed(self._lineage, self.step))
            self._train(batch)
            if self.step - saved >= checkpoint_every:
                self._save()
                saved = self.step
        self._save()
        self._publisher.close()
        self._client.done(self.step, {})
        self._client.close()

    def _train(self, batch: ReceivedBatch) -> None:
        """All steps on one batch."""
        digests = [blake3.blake3(payload).digest() for payload in batch.payloads]
        groups = [self._described(payload) for payload in batch.payloads]
        while self.step <= self._pacing.last_use(batch.number):
            lags = [self.step - min(batch.version_steps[number] for number in group.versions) for group in groups]
            if max(lags) > self._pacing.max_lag:
                self._log.write(Complaint(f"step {self.step} was given lags {lags}, max_lag is {self._pacing.max_lag}"))
                raise StaleGroup(groups[lags.index(max(lags))].ticket, self.step, max(lags), self._pacing.max_lag)
            self._theta = self._theta.after(digests, self._salt)
            time.sleep(self._random.uniform(0, 0.3 if self._random.random() < 0.03 else 0.02))
            tickets, names = [group.ticket for group in groups], [digest.hex() for digest in digests]
            self._log.write(Trained(self._lineage, self.step, batch.number, tickets, names, lags, self._theta.chain.hex()))
            self.step += 1
            if self._pacing.publishes(self.step):
                self._publisher.publish(self.step, self._theta)
            metrics = {"lag_max": float(max(lags)), "chain": float(fingerprint(self._theta.chain))}
            self._client.commit(self.step - 1, batch.number, lags, metrics)

    def _described(self, payload: bytes) -> Described:
        try:
            return describe(payload)
        except Contradiction as error:
            self._log.write(Complaint(f"step {self.step} was given a group that contradicts itself: {error}"))
            raise

    def _save(self) -> None:
        self._publisher.flush()
        if self._publisher.published is None or self.step == 0:
            return
        self._client.confirm()
        self._log.write(Confirmed(self._lineage, self.step))
        save(self._folder, self.step, self._theta, self._publisher.published)
        self._log.write(Saved(self.step))


def _theta(chain: bytes, body: bytes) -> Theta:
    return Theta(chain, np.frombuffer(body, np.uint16).copy())


def main(arguments: list[str]) -> None:
    """The process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    for name in ("--incarnation", "--seed", "--parent"):
        parser.add_argument(name, required=True, type=int)
    parser.add_argument("--salt", default="", help="makes the steps of this session lead elsewhere")
    parser.add_argument("--broker", help="where to reach the broker. Default: where it listens")
    parser.add_argument("--lose-newest", action="store_true", help="start from the checkpoint before the newest")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    die_with_parent(given.parent)
    run = RunDirectory(Path(given.run))
    config, address = run.config(), given.broker or run.broker_address()
    assert address is not None, "the broker has never run"
    if given.lose_newest:
        for newest in list_checkpoints(run.checkpoints)[1:][-1:]:
            newest.unlink()
        sync_folder(run.checkpoints)
    log = Log(run.path / RECORDS / f"learner.{given.incarnation:04d}.jsonl")
    client = LearnerClient(address, load_key(run.keys / "learner.key"))
    random = np.random.default_rng([given.seed, given.incarnation])
    learner = ToyLearner(client, config.pacing, run.checkpoints, log, given.salt, random)
    learner.run(given.incarnation, config.learner.checkpoint_every)


if __name__ == "__main__":
    main(sys.argv[1:])
