"""Recorded runs to replay: the archive of an earlier version, and runs recorded in this process."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.replay import Launch, Replay, ReplayOptions, replay_rank, replay_run
from tests.learner.conftest import on_ranks  # noqa: F401
from tests.replay.recording import OnRanks, Session, one_by_one, record

ARCHIVE = Path(__file__).parent / "format-1.zip"


@pytest.fixture
def archived(tmp_path: Path) -> Path:
    """The run recorded by a version that wrote journals of format 1, unpacked at a place where it never was."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path / "archived")
    return tmp_path / "archived"


@pytest.fixture
def make_recording(settings: Callable[..., dict[str, Any]], on_ranks: OnRanks, tmp_path: Path) -> Callable[..., Path]:  # noqa: F811
    """Record a run, with the lives of its learner and overridden sections."""

    def make(*sessions: Session, name: str = "recorded", **sections: dict[str, Any]) -> Path:
        return record(settings(**sections), tmp_path / name, sessions or (Session(),), on_ranks)

    return make


@pytest.fixture(scope="session")
def plain_recording(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps with lag, one learner from its beginning to its end; not to be changed."""
    config = settings(run={"steps": 10}, policy={"max_lag": 2}, learner={"checkpoint_every": 3, "eval_every": 5})
    return record(config, tmp_path_factory.mktemp("recorded") / "run", (Session(),), lambda count, call: [])


@pytest.fixture
def recording(plain_recording: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(plain_recording, tmp_path / "copy", symlinks=True))


@pytest.fixture
def launch(on_ranks: OnRanks) -> Launch:  # noqa: F811
    """Ranks of a replay that are threads of this process."""

    def run(plan: Path, num_ranks: int, num_threads: int) -> int:
        assert num_threads == 1
        if num_ranks == 1:
            replay_rank(plan)
        else:
            one_by_one(on_ranks, num_ranks, lambda ranks: replay_rank(plan, ranks))
        return 0

    return run


@pytest.fixture
def replay(launch: Launch) -> Callable[..., tuple[Replay, list[str]]]:
    """Replay a run in this process, with the fields of ReplayOptions; what came of it and what was said."""

    def run(directory: Path, **options: Any) -> tuple[Replay, list[str]]:
        said: list[str] = []
        return replay_run(directory, ReplayOptions(**options), said.append, launch), said

    return run
