"""`replay --step`: a conversation, one line at a time, over a recorded run."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.replay import ReplayOptions, replay_rank, replay_run
from tests.learner.conftest import on_ranks  # noqa: F401
from tests.replay.conftest import plain_recording  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent.parent
Talk = Callable[..., tuple[list[str], Any]]


@pytest.fixture
def talk(plain_recording: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Talk:  # noqa: F811
    """Say these lines at the prompt of a replay, then nothing more; what was shown, line by line, and what came of the replay."""

    def run(*lines: str | bytes, first: int = 0, end: int | None = None) -> tuple[list[str], Any]:
        reading, writing = os.pipe()
        with os.fdopen(writing, "wb") as said:
            said.write(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
        with os.fdopen(reading, encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            options = ReplayOptions(first=first, end=end, stepping=True)

            def launch(plan: Path, num_ranks: int, num_threads: int) -> int:
                replay_rank(plan)
                return 0

            found = replay_run(plain_recording, options, lambda text: None, launch)
        return capfd.readouterr().out.splitlines(), found

    return run


def steps_shown(lines: list[str]) -> list[int]:
    """The steps whose outcome was shown."""
    return [int(found[1]) for line in lines if (found := re.search(r"step (\d+): gradient norm", line))]


def test_enter_takes_one_step_and_the_end_of_input_takes_the_last(talk: Talk) -> None:
    shown, found = talk("", "")
    assert steps_shown(shown) == [0, 1, 2]
    assert [row.step for row in found.rows] == [0, 1, 2]
    assert found.results[0].is_exact
    assert "no step before to compare with" in next(line for line in shown if "step 0: gradient norm" in line)
    assert "cosine to the step before" in next(line for line in shown if "step 1: gradient norm" in line)


def test_n_takes_so_many_steps_c_all_of_them_and_q_one_more(talk: Talk) -> None:
    assert steps_shown(talk("n 3", "q")[0]) == [0, 1, 2, 3]
    shown, found = talk("n 2", "c")
    assert steps_shown(shown) == list(range(10))
    assert found.results[0].num_equal == 11


def test_a_part_is_silent_up_to_its_first_step_and_the_first_cosine_is_there(talk: Talk) -> None:
    shown, found = talk("q", first=8)
    assert [row.step for row in found.rows] == [6, 7, 8]
    assert steps_shown(shown) == [8]
    assert any("cosine to the step before" in line for line in shown)
    assert sum("batch 8" in line for line in shown) == 1


def test_groups_are_listed_with_versions_rewards_advantages_and_ratios_near_one_where_the_batch_is_fresh(talk: Talk) -> None:
    shown, _ = talk("g", "q", end=1)
    head = next(place for place, line in enumerate(shown) if "ticket" in line and "ratios" in line)
    rows = [re.search(r"(\d+) +(\d+)-(\d+) .* ([\d.]+) to +([\d.]+)  '", line) for line in shown[head + 1 : head + 5]]
    assert [row and int(row[1]) for row in rows] == [0, 1, 2, 3]
    assert all(row and (row[2], row[3]) == ("0", "0") for row in rows)
    assert all(row and 0.999 <= float(row[4]) <= float(row[5]) <= 1.001 for row in rows)


def test_a_group_is_shown_with_its_completions_and_with_its_tokens(talk: Talk) -> None:
    shown, _ = talk("g 2", "t 2", "q", end=1)
    completions = [line for line in shown if "  reward " in line]
    assert len(completions) == 8
    assert completions[:4] == completions[4:]
    tokens = [line for line in shown if "log-probability" in line]
    assert 4 <= len(tokens) <= 24
    assert all("version 0" in line for line in tokens)


@pytest.mark.parametrize(
    "garbage", ["g 99", "g x", "t", "n 0", "n -1", "n ²", "help me", "g 1 2", "\x00", b"\xff\xfe\n", "n " + "9" * 30 + "x"]
)
def test_garbage_takes_no_step_and_is_answered(garbage: str | bytes, talk: Talk) -> None:
    shown, found = talk(garbage, "q", end=2)
    assert [row.step for row in found.rows] == [0]
    assert sum("enter" in line for line in shown) >= 2 or any("not in this batch" in line for line in shown)


def test_a_person_at_a_terminal_steps_through_a_run(plain_recording: Path, environment: dict[str, str]) -> None:  # noqa: F811
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "cli.py"), "replay", str(plain_recording), "--step", "--to", "3"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.close(theirs)
    os.write(ours, b"g\n\nq\n")
    output = process.communicate(timeout=240)[0].decode()
    os.close(ours)
    assert process.returncode == 0, output
    assert steps_shown(output.splitlines()) == [0, 1]
    assert "ratios" in output
