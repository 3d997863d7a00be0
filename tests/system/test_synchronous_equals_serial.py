"""With max_lag 0, one rank and the same seeds, what is computed does not depend on how it is spread over processes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system


def roots(directory: Path) -> list[tuple[int, str]]:
    connection = sqlite3.connect(directory / "journal.sqlite")
    try:
        return connection.execute("SELECT step, root FROM versions ORDER BY number").fetchall()
    finally:
        connection.close()


def test_a_run_over_processes_publishes_the_roots_of_the_serial_run_with_one_actor_and_with_three(
    train: Callable[..., dict[str, Any]], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    train(settings(), "serial", "--serial")
    train(settings(), "one", "--set", "actor.num_actors=1")
    train(settings(), "three", "--set", "actor.num_actors=3")
    serial = roots(tmp_path / "serial")
    assert [step for step, _ in serial] == [0, 1, 2, 3, 4]
    assert len({root for _, root in serial}) == 5, "every step changed the weights"
    assert roots(tmp_path / "one") == serial
    assert roots(tmp_path / "three") == serial


def test_the_paper_s_cycle_of_two_publishes_the_roots_of_the_serial_run(
    train: Callable[..., dict[str, Any]], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    cycle = settings(run={"steps": 6}, policy={"reuse": 2, "max_lag": 1}, actor={"num_actors": 2})
    train(cycle, "serial", "--serial")
    train(cycle, "processes")
    serial = roots(tmp_path / "serial")
    assert [step for step, _ in serial] == [0, 2, 4, 6]
    assert roots(tmp_path / "processes") == serial
