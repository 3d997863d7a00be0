"""A real run whose learner's rank was killed: replayed over all its parts, every root comes out the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.repacing import course_of, repace
from protocol.config import parse_config
from protocol.journal import open_read_only, read_facts
from tests.system.conftest import start  # noqa: F401

pytestmark = pytest.mark.system


def test_a_run_whose_rank_was_killed_and_resumed_replays_exactly_and_repaces(
    start: Callable[..., Any],  # noqa: F811
    settings: Callable[..., Any],
    replay: Callable[..., Any],
    soak: bool,
) -> None:
    num_steps = 400 if soak else 40
    config = settings(run={"steps": num_steps}, policy={"max_lag": 2}, learner={"checkpoint_every": 7})
    run = start(config)
    status = run.until(lambda status: status["step"] >= 10)
    for rank in run.roles("learner-rank"):
        rank.kill()
    run.until(lambda now: now["lineage"] > status["lineage"])
    assert run.wait() == 0, run.output()
    found, _ = replay(run.directory)
    assert len({step.lineage for step in found.history.steps.values()}) >= 2
    assert sum(result.num_equal for result in found.results) == num_steps + 1
    assert all(result.is_exact and result.environment == {} for result in found.results)
    check_model(run.directory, config)


def check_model(directory: Path, config: dict[str, Any]) -> None:
    """The recorded course through the ledger gets to its end, with every step's groups, whatever was killed."""
    path = directory / "journal.sqlite"
    journal = open_read_only(path)
    try:
        course = course_of(read_facts(journal, path))
    finally:
        journal.close()
    account = repace(course, parse_config(config))
    assert sum(account.lags.values()) == sum(course.lags.values()) == config["run"]["steps"] * config["rollout"]["groups_per_batch"]
    assert sum(course.lost_seconds.values()) > 0
    assert account.elapsed > sum(course.lost_seconds.values())
