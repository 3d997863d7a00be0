"""Ranks that are real processes: gathering beside the training thread, and publishing together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from learner.ranks import OneRank
from protocol.delta import apply_file
from protocol.weights import Weights, root_hash

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = Path(__file__).with_name("rank_process.py")
DEADLINE = 180.0

Start = Callable[..., list[tuple[int, str]]]


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Runs the script on so many ranks in a folder to its end; each rank's exit status and what it said."""

    def run(world_size: int, folder: Path, what: str = "all") -> list[tuple[int, str]]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if world_size > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, str(SCRIPT), str(folder), what]
                with log.open("wb") as output:
                    processes.append(
                        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank)}, stdout=output, stderr=subprocess.STDOUT)
                    )
            for process in processes:
                process.wait(DEADLINE)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [(process.returncode, log.read_text()[-3000:]) for process, log in zip(processes, logs, strict=True)]

    return run


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def published(run_ranks: Start, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[list[str], list[Weights]]]:
    """What so many ranks publish together, after they have gathered beside all-reduces: the roots, and the weights an actor gets to."""
    done: dict[int, tuple[list[str], list[Weights]]] = {}

    def publish(world_size: int) -> tuple[list[str], list[Weights]]:
        if world_size not in done:
            folder = tmp_path_factory.mktemp(f"ranks-{world_size}")
            for status, text in run_ranks(world_size, folder):
                assert status == 0, text
            done[world_size] = follow(folder)
        return done[world_size]

    return publish


def follow(folder: Path) -> tuple[list[str], list[Weights]]:
    roots, chain = [], []
    held: Weights | None = None
    for number in range(len(list(folder.glob("version-*")))):
        root, digest = (folder / f"version-{number}").read_text().split()
        _, held = apply_file((folder / digest).read_bytes(), held, roots[-1] if roots else "")
        roots.append(root)
        chain.append(held)
    return roots, chain


@pytest.mark.parametrize("world_size", [2, 3])
def test_gather_gives_every_ranks_bytes_in_order_beside_a_thread_that_sums_and_broadcasts(
    world_size: int, published: Callable[[int], tuple[list[str], list[Weights]]]
) -> None:
    """Asserted by the ranks themselves."""
    published(world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_so_many_processes_publish_the_same_roots_and_the_same_weights(
    world_size: int, published: Callable[[int], tuple[list[str], list[Weights]]]
) -> None:
    roots, chain = published(world_size)
    expected, expected_chain = published(1)
    assert len(set(expected)) == 5
    assert roots == expected
    assert [root_hash(weights) for weights in chain] == roots
    assert [root_hash(weights) for weights in expected_chain] == roots


def test_a_failure_on_another_rank_ends_its_process_for_torchrun_to_see(run_ranks: Start, tmp_path: Path) -> None:
    ((status, _),) = run_ranks(1, tmp_path, "fail")
    assert status == 1
    log = (tmp_path / "log").read_text()
    assert "rank 1" in log
    assert "the connection is gone" in log


def test_one_rank_gathers_from_itself() -> None:
    assert OneRank().gather(b"mine") == [b"mine"]
