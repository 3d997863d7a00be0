"""Real processes under random fire keep the promises: bounded, conserved, durable, whole, and trained on once.

Short in `make test`; with `--soak` ten minutes. A failure names the seed; `python -m tests.faults.chaos --seed N` does the same shots again, though
processes that run beside each other never do exactly the same twice.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.faults.chaos import run_chaos

SECONDS, SOAK_SECONDS = 40.0, 600.0


@pytest.mark.system
@pytest.mark.timeout(SOAK_SECONDS + 300)
def test_no_promise_is_broken_by_random_kills_and_stops(tmp_path: Path, soak: bool) -> None:
    seed = int(os.environ.get("CHAOS_SEED", "0")) or int.from_bytes(os.urandom(2), "big")
    report = run_chaos(tmp_path / "run", seed, SOAK_SECONDS if soak else SECONDS)
    (tmp_path / "chaos.json").write_text(report.json())
    sys.stdout.write(f"\n{report.text()}\n")
    assert report.findings == [], f"CHAOS_SEED={seed} found:\n{report.text()}"
    kills = {name: number for name, number in report.fired.items() if name.startswith("kill")}
    assert sum(kills.values()) > 0, f"nothing was killed: {report.fired}"
    assert report.figures["groups_acknowledged"] > 0, f"nothing happened:\n{report.text()}"
    assert report.figures["steps_committed"] > 0, f"nothing happened:\n{report.text()}"
