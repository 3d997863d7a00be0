"""Every promise holds in simulated runs with faults; and the simulator finds what breaks one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from protocol import facts
from tests.simulation.account import Violation
from tests.simulation.defects import DEFECTS
from tests.simulation.plan import FAULTS
from tests.simulation.run import simulate

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_BLOCKS = 20
SEEDS_PER_BLOCK, SEEDS_PER_LONG_BLOCK = 25, 500
SEEDS_FOR_A_DEFECT = 300


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_every_promise_holds_whatever_befalls_the_run(block: int, soak: bool) -> None:
    size = SEEDS_PER_LONG_BLOCK if soak else SEEDS_PER_BLOCK
    for seed in range(block * size, (block + 1) * size):
        simulate(seed)


def test_every_fault_befalls_and_every_fact_is_recorded() -> None:
    counts: Counter[str] = Counter()
    for seed in range(100):
        counts.update(simulate(seed).checks.counts)
    quiet = [kind for kind in FAULTS if not counts[f"fault {kind}"]]
    # Deltas are dropped only when the store holds more than a gigabyte of them.
    unheard = [fact.__name__ for fact in facts.Fact.__subclasses__() if not counts[fact.__name__] and fact is not facts.DeltasDropped]
    assert not quiet and not unheard
    assert counts["flipped bits found"] and counts["failed commits"] and counts["runs gone on with"]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect: str) -> None:
    for seed in range(SEEDS_FOR_A_DEFECT):
        try:
            simulate(seed, **DEFECTS[defect])
        except Violation as error:
            assert f"--seed {seed}" in error.__notes__[0]
            return
    pytest.fail(f"{SEEDS_FOR_A_DEFECT} seeds did not find it")


def test_a_seed_fixes_the_order_of_all_events_byte_for_byte() -> None:
    traces = [_trace(seed=7, hash_seed=hash_seed) for hash_seed in ("1", "2")]
    assert traces[0] == traces[1] and traces[0].count(b"\n") > 1000
    assert _trace(seed=8, hash_seed="1") != traces[0]


def test_a_trace_changes_nothing() -> None:
    plain, traced = simulate(11), simulate(11, keep_trace=True)
    assert (plain.schedule.num_events, plain.schedule.now) == (traced.schedule.num_events, traced.schedule.now)
    assert plain.checks.facts == traced.checks.facts


def _trace(seed: int, hash_seed: str) -> bytes:
    command: list[Any] = [sys.executable, "-m", "tests.simulation.run", "--seed", str(seed), "--trace"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True).stdout
