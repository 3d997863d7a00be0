"""Closed: whatever the bytes, the outcome is success or a typed error; never a crash, a hang, or memory out of proportion.

The inputs run in a process of their own, which a hang or a crash of compiled code may take down. With `--soak` it is a million of them, with compiled
loops that check every index.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from tests.fuzz.fuzzing import LEAK, Result
from tests.fuzz.run import all_targets, inputs_of

ROOT = Path(__file__).resolve().parents[2]
SEED = 1
"""Other seeds: `python -m tests.fuzz.run --seed N`."""


class Fuzzed(NamedTuple):
    """What the process printed for each target, and what it left if it died."""

    results: dict[str, Result]
    remains: str
    total: int


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, soak: bool) -> Fuzzed:
    """All targets, once."""
    folder = tmp_path_factory.mktemp("fuzz")
    total = 1_000_000 if soak else 30_000
    checked = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(folder / "numba")} if soak else {}
    command = [sys.executable, "-m", "tests.fuzz.run", "--total", str(total), "--seed", str(SEED), "--log", str(folder / "log")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | checked, capture_output=True, text=True, timeout=3000 if soak else 250, check=False
    )
    found = [msgspec.json.decode(line, type=Result) for line in done.stdout.splitlines()]
    remains = f"exit status {done.returncode}\n{(folder / 'log').read_text()}\n{done.stderr[-3000:]}"
    return Fuzzed({result.target: result for result in found}, remains, total)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", sorted(all_targets()))
def test_whatever_the_bytes_the_outcome_is_success_or_a_typed_error(fuzzed: Fuzzed, target: str, soak: bool) -> None:
    assert target in fuzzed.results, fuzzed.remains
    result = fuzzed.results[target]
    assert not result.failure, result.failure
    assert result.inputs == inputs_of(target, fuzzed.total)
    if all_targets()[target].expected:
        assert 0.1 < result.refused / result.inputs < 0.999, "the damage is too small or too large to find anything"
    if soak:
        assert result.growth < LEAK, f"{result.growth >> 20} MiB more at the end than after a tenth of the inputs"
