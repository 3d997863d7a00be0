"""Bounded: no step uses a group above max_lag, and ledger, learner and journal count the same lags, over both pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system


def learner_lags(directory: Path) -> dict[str, int]:
    """The largest lag of each step as the learner asserted it."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: int(row["lag_max"]) for row in rows if "lag_max" in row}


def check(summary: dict[str, Any], directory: Path, max_lag: int, num_steps: int, num_groups: int) -> None:
    assert summary["broken_promises"] == []
    assert summary["steps"] == num_steps
    assert summary["lags"] == summary["lags_by_ledger"]
    assert summary["largest_lag"] == summary["largest_lag_by_learner"] == max(learner_lags(directory).values()) <= max_lag
    assert sum(summary["lags"].values()) == num_groups * num_steps
    assert summary["tickets_open"] == 0
    ended = sum(summary[f"tickets_{way}"] for way in ("consumed", "expired", "failed", "void"))
    assert summary["tickets_issued"] == ended


@pytest.mark.parametrize("max_lag", [0, 1, 4])
def test_the_queue_pipeline_keeps_the_bound(
    train: Callable[..., dict[str, Any]], settings: Callable[..., dict[str, Any]], tmp_path: Path, max_lag: int
) -> None:
    summary = train(settings(run={"steps": 12}, policy={"max_lag": max_lag}, actor={"num_actors": 2}, learner={"ranks": 2}))
    check(summary, tmp_path / "run", max_lag, 12, 4)


@pytest.mark.parametrize("cycle", [2, 8])
def test_the_paper_s_cycles_keep_the_bound(
    train: Callable[..., dict[str, Any]], settings: Callable[..., dict[str, Any]], tmp_path: Path, cycle: int
) -> None:
    summary = train(settings(run={"steps": 16}, policy={"reuse": cycle, "max_lag": cycle - 1}))
    check(summary, tmp_path / "run", cycle - 1, 16, 4)
    assert summary["lags"] == {str(lag): 4 * 16 // cycle for lag in range(cycle)}, "every batch ages by one at each use"
