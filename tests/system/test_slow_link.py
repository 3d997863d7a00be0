"""An actor behind a slow link that breaks time after time: it gets its weights all the same, and nobody else is held up."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from broker.pieces import CREDIT
from broker.publications import ANCHOR_EVERY
from broker.sockets import Channel
from protocol.facts import GroupAccepted, StepCommitted
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts
from protocol.messages import CHUNK_BYTES
from tests.faults.link import Link
from tests.random_policy import save_random_llama

pytestmark = pytest.mark.system
BYTES_PER_SECOND = 1e6
CUT_EVERY = 600_000
NUM_CUTS = 20
MEGABYTE = 1 << 20
LONGEST_STEP_SECONDS = 20.0
"""Far more than any step here takes, far less than what crosses the link."""


class Growth(threading.Thread):
    """How much larger processes have become at most since it was started, by resident memory."""

    def __init__(self, *processes: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._processes, self._ended = processes, threading.Event()
        self._before = [process.memory_info().rss for process in processes]
        self._peak = list(self._before)

    def run(self) -> None:
        while not self._ended.wait(0.02):  # memory that grows has no event to wait for
            self._peak = [max(peak, process.memory_info().rss) for peak, process in zip(self._peak, self._processes, strict=True)]

    def end(self) -> list[int]:
        self._ended.set()
        self.join()
        return [peak - before for peak, before in zip(self._peak, self._before, strict=True)]


def make_policy(folder: Path) -> Path:
    """A random Llama of 5 million parameters, 10 MB in bf16, with a character tokenizer."""
    return save_random_llama(folder, hidden_size=512, num_layers=2, num_heads=8, num_positions=128, dtype=torch.bfloat16)


def test_weights_arrive_over_a_slow_link_that_is_cut_twenty_times_and_nobody_is_held_up(
    start: Callable[..., Any],
    join: Callable[..., psutil.Popen],
    settings: Callable[..., Any],
    tmp_path: Path,
) -> None:
    run = start(
        settings(
            run={"steps": 100_000},
            # Versions far enough apart that the broker has no anchor to fold, which takes memory, while it is watched.
            policy={"path": str(make_policy(tmp_path / "policy")), "max_lag": 32, "sync_every": 6},
            task={"name": "tests.system.coin_task:Coins"},
            rollout={"group_size": 2, "groups_per_batch": 8, "max_tokens": 64},
            learner={"lr": 3e-4, "eval_prompts": 2, "checkpoint_every": 100_000},
        )
    )
    base_bytes = (tmp_path / "policy" / "model.safetensors").stat().st_size
    run.until(lambda status: status["num_versions"] > 1)
    cuts = range(CUT_EVERY, (NUM_CUTS + 1) * CUT_EVERY, CUT_EVERY)
    with Link(run.address(), BYTES_PER_SECOND, cuts) as link:
        begun = time.time()
        slow = join(run, "slow", link.address)

        def carried(num_bytes: int) -> dict[str, Any]:
            found: dict[str, Any] = run.until(lambda _: link.num_bytes[Channel.BLOBS] >= num_bytes)
            return found

        # The first file is the policy's: it is on its way for all of this time.
        before = carried(MEGABYTE)
        growth = Growth(slow, *run.roles("broker"))
        growth.start()
        after = carried(base_bytes - MEGABYTE)
        assert after["num_versions"] <= ANCHOR_EVERY
        grown = dict(zip(("actor", "broker"), growth.end(), strict=True))
        assert [actor["version"] for actor in after["actors"] if actor["name"] == "slow"] == [-1]
        assert after["step"] > before["step"], "steps go on meanwhile"
        newest = run.until(lambda _: link.num_cuts == NUM_CUTS)["num_versions"] - 1
        run.until_version("slow", newest)
        ended = time.time()
        late = run.until_sampled("slow", newest)
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 0, run.output()
        assert slow.wait(30) == 0, run.output()

    assert run.summary()["broken_promises"] == []
    assert late >= newest > 0
    for name, num_bytes in grown.items():
        assert num_bytes < CREDIT * CHUNK_BYTES, f"while a file came the {name} grew by {num_bytes} bytes"
    assert _longest_step(run.directory, begun, ended) < LONGEST_STEP_SECONDS
    before_and_meanwhile = _rates(run.directory, "actor-0", begun, ended)
    figures = {"seconds": ended - begun, "grown": grown, "tokens per second beside the broker, before and meanwhile": before_and_meanwhile}
    (tmp_path / "figures.json").write_text(json.dumps(figures))  # timings are for reading: other work on the machine changes them


def _longest_step(directory: Path, begin: float, end: float) -> float:
    with closing(open_read_only(directory / JOURNAL_NAME)) as journal:
        times = [entry.time for entry in read_facts(journal, directory) if isinstance(entry.fact, StepCommitted)]
    times = [time for time in times if begin <= time <= end]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def _rates(directory: Path, name: str, begin: float, end: float) -> tuple[float, float]:
    """Tokens per second of an actor from its first group until `begin`, and from then until `end`."""
    with closing(open_read_only(directory / JOURNAL_NAME)) as journal:
        facts = [(entry.time, entry.fact) for entry in read_facts(journal, directory)]
    made = [(at, fact.num_tokens) for at, fact in facts if isinstance(fact, GroupAccepted) and fact.actor == name]
    first = made[0][0]
    return sum(n for at, n in made if at < begin) / (begin - first), sum(n for at, n in made if begin <= at < end) / (end - begin)
