"""Actors with different engines in one run, one of which has its weights from the other."""

from __future__ import annotations

import importlib.util
import signal
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from broker.sockets import Channel
from protocol.groups import decode_group
from protocol.journal import JOURNAL_NAME, open_read_only
from tests.faults.link import Link, free_port
from tests.random_policy import save_random_llama
from tests.system.conftest import stopped

pytestmark = pytest.mark.system


def make_policy(folder: Path) -> Path:
    """A random Llama with heads of 32, the least that vLLM serves on the CPU."""
    return save_random_llama(folder, hidden_size=64, num_layers=2, num_heads=2)


def test_actors_with_transformers_and_with_vllm_work_side_by_side_and_one_has_its_weights_from_the_other(
    start: Callable[..., Any], join: Callable[..., psutil.Popen], settings: Callable[..., Any], tmp_path: Path
) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.fail("vLLM is not installed here: run `make vllm`", pytrace=False)
    run = start(
        settings(
            run={"steps": 100_000},
            policy={"path": str(make_policy(tmp_path / "policy")), "max_lag": 8},
            task={"name": "tests.system.coin_task:Coins"},
            rollout={"groups_per_batch": 16, "max_tokens": 16},
            actor={"num_actors": 0, "max_sequences": 16},
            learner={"checkpoint_every": 100_000},
        )
    )
    run.until(lambda status: status["num_versions"] == 1)
    relay = f"tcp://127.0.0.1:{free_port()}"
    with Link(run.address()) as link:
        fast = join(run, "fast", link.address, "--engine", "vllm", "--relay", relay)
        plain = join(run, "plain", run.address(), "--engine", "transformers", "--serve", relay)
        run.until_sampled("plain", 1)
        with stopped(run.roles("learner-rank")[-1]):  # vLLM starts slowly beside others that compute
            run.until_version("fast", 1)
        version = run.until_sampled("fast", 1)
        run.until_sampled("fast", version + 4)
        from_broker = link.num_bytes[Channel.BLOBS]
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 0, run.output()
        for process in (fast, plain):
            assert process.wait(60) == 0, run.output()
    assert run.summary()["broken_promises"] == []
    assert engines(run.directory) == {"plain": {"transformers"}, "fast": {"vllm"}}
    assert 0 < from_broker < run.summary()["publication_bytes"], "only the handshake: every file came from the relay"


def engines(directory: Path) -> dict[str, set[str]]:
    """Who made the journalled groups with which engine."""
    found = defaultdict(set)
    with closing(open_read_only(directory / JOURNAL_NAME)) as journal:
        for (payload,) in journal.execute("SELECT payload FROM groups"):
            group = decode_group(payload)
            found[group.actor].add(group.engine.split("/")[0].split("-")[0])
    return dict(found)
