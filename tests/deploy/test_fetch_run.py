"""A learner by hand gets its run from the broker alone, and starts from no checkpoint that the broker's journal does not reach."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.blobs import BlobStore
from broker.core import Broker
from broker.keys import KeyFile, allowed_keys, load_key, make_keys
from broker.server import Server, Wakeup
from deploy.rundir import RunDirectory, policy_files
from deploy.wiring import fetch_run
from protocol.config import parse_config
from protocol.errors import ConfigError

DEADLINE_SECONDS = 20.0


@pytest.fixture
def key(tmp_path: Path) -> KeyFile:
    make_keys(tmp_path / "keys")
    return load_key(tmp_path / "keys" / "learner.key")


@pytest.fixture
def address(tmp_path: Path, key: KeyFile) -> Iterator[str]:
    """Where the broker of run `one` listens, at step 0."""
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    files = policy_files(policy, BlobStore(tmp_path / "run" / "blobs"))
    broker = Broker(tmp_path / "run", "one", parse_config({}), 5, files, time.monotonic(), time.time())
    server = Server(broker, "tcp://127.0.0.1:0", load_key(tmp_path / "keys" / "broker.key"), allowed_keys(tmp_path / "keys"), Wakeup())
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server.address
    server.stop()
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()


def test_checkpoints_ahead_of_the_broker_s_journal_are_set_aside(address: str, key: KeyFile, tmp_path: Path) -> None:
    folder = tmp_path / "learner"
    fetch_run(address, key, folder)
    for step in (0, 40):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir()
    fetch_run(address, key, folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000000", "ahead-0-step-00000040"}


def test_a_policy_s_folder_that_is_gone_is_fetched_again(address: str, key: KeyFile, tmp_path: Path) -> None:
    folder = tmp_path / "learner"
    fetch_run(address, key, folder)
    shutil.rmtree(folder / "policy")
    moved = RunDirectory(folder.rename(tmp_path / "moved"))
    fetch_run(address, key, moved.path)
    assert (moved.policy() / "config.json").read_text() == "{}"
    assert moved.policy() == moved.path / "policy"


def test_a_folder_of_another_run_is_left_as_it_is(address: str, key: KeyFile, tmp_path: Path) -> None:
    folder = tmp_path / "learner"
    fetch_run(address, key, folder)
    manifest = (folder / "run.json").read_text()
    (folder / "run.json").write_text(manifest.replace('"one"', '"two"'))
    (folder / "checkpoints" / "step-00000040").mkdir()
    with pytest.raises(ConfigError, match="is of run two, the broker's is one"):
        fetch_run(address, key, folder)
    assert (folder / "checkpoints" / "step-00000040").exists()
