"""One rank of several real ones, for test_ranks.py: `rank_process.py FOLDER WHAT` with torchrun's environment. What it finds, it asserts."""

from __future__ import annotations

import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch

from learner.publish import Publisher
from learner.ranks import OneRank, TorchRanks
from protocol.messages import LearnerWelcome, Publish, Published
from protocol.weights import BlobRef

NUM_STEPS = 5
ROUNDS = 30
DEADLINE = 60.0


class FolderPort:
    """A broker that writes everything down in a folder, for the test to read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._roots: list[str] = []

    def put_blob(self, data: bytes) -> BlobRef:
        ref = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        (self._folder / ref.digest).write_bytes(data)
        return ref

    def publish(self, publication: Publish) -> Published:
        blob = publication.delta or publication.snapshot
        assert blob is not None
        number = publication.version.number
        (self._folder / f"version-{number}").write_text(f"{publication.version.root} {blob.digest}")
        return Published(publication.version.step, number, number + 1)


class ToyModel(torch.nn.Module):
    """The same on every rank; training it takes sums over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        for number, size in enumerate((700, 30, 30, 1)):
            self.register_parameter(f"p{number}", torch.nn.Parameter(torch.randn(size, 11)))

    def train_step(self, ranks: Any, step: int) -> None:
        """In place, as an optimizer does it; the sum over the ranks does not depend on how many there are."""
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                whole = torch.from_numpy(np.random.default_rng([step, number]).standard_normal(tuple(parameter.shape)) * 1e-3)
                mine = whole.clone()
                mine[torch.arange(len(mine)) % ranks.world_size != ranks.rank] = 0
                ranks.sum_(mine)
                assert torch.equal(mine, whole)
                parameter.add_(mine.float())


def publish(ranks: Any, folder: Path) -> None:
    """A run of training steps, each published beside the ones that follow."""
    model = ToyModel()
    port, welcome = (FolderPort(folder), LearnerWelcome(2, "run", 0, 0)) if ranks.rank == 0 else (None, None)
    publisher = Publisher(model, ranks, port, welcome, None, lambda: "", compact=True)  # type: ignore[arg-type]
    publisher.publish(0)
    for step in range(1, NUM_STEPS):
        for part in range(3):
            model.train_step(ranks, 10 * step + part)
        publisher.publish(step)
    model.train_step(ranks, 999)
    publisher.flush()
    publisher.close()
    ranks.barrier()


def some_bytes(number: int, rank: int) -> bytes:
    """What a rank sends in a round; every size from nothing to a few megabytes."""
    size = [0, 1, 1000, 3_000_000][(number + rank) % 4]
    return np.random.default_rng([number, rank]).bytes(size)


def gather(ranks: TorchRanks) -> None:
    """Gathers in one thread, everything else in the other, with as much at once as will go."""
    started = threading.Event()

    def side() -> None:
        for number in range(ROUNDS):
            found = ranks.gather(some_bytes(number, ranks.rank))
            started.set()
            if ranks.rank:
                assert found is None
            else:
                assert found == [some_bytes(number, rank) for rank in range(ranks.world_size)]

    with ThreadPoolExecutor(1) as pool:
        gathering = pool.submit(side)
        assert started.wait(DEADLINE)
        for number in range(10 * ROUNDS):
            tensor = torch.arange(1000, dtype=torch.float64) * (ranks.rank + number)
            ranks.sum_(tensor)
            factor = sum(rank + number for rank in range(ranks.world_size))
            assert torch.equal(tensor, torch.arange(1000, dtype=torch.float64) * factor)
            text = f"step {number}".encode() * (number + 1)
            assert ranks.broadcast(text if ranks.rank == 0 else None) == text
        gathering.result()
    ranks.barrier()


def fail(folder: Path) -> None:
    """Rank 1, whose share cannot be sent."""

    class Cut(OneRank):
        rank, world_size = 1, 2

        def gather(self, data: bytes) -> list[bytes] | None:
            raise RuntimeError("the connection is gone")

    logging.basicConfig(filename=folder / "log")
    publisher = Publisher(ToyModel(), Cut(), None, None, None, lambda: "")
    publisher.publish(0)
    publisher.publish(1)
    threading.Event().wait(DEADLINE)  # as its loop waits for rank 0


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    if what == "fail":
        fail(folder)
        return
    if "MASTER_PORT" not in os.environ:
        publish(OneRank(), folder)
        return
    ranks = TorchRanks(torch.device("cpu"))
    gather(ranks)
    publish(ranks, folder)
    ranks.close()


if __name__ == "__main__":
    main()
