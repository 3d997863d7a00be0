"""Ranks are started again until they end in order, for good, or again and again without progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.supervisor import CRASH_LOOP_COUNT, Crashes
from deploy.torchrun import keep_running, torchrun_arguments
from protocol.errors import ConfigError, RunHalted


class Ranks:
    """Ends with one code after the other; each life takes a second. `checkpoints` are what is there at each end."""

    def __init__(self, codes: list[int], checkpoints: list[str] | None = None) -> None:
        self.codes, self.num_started, self.pauses = codes, 0, [0.0][:0]
        self._checkpoints = checkpoints or [""] * len(codes)
        self.now = 0.0

    def run(self) -> int:
        self.num_started += 1
        self.now += 1.0
        return self.codes[self.num_started - 1]

    def newest(self) -> str:
        return self._checkpoints[self.num_started - 1] if self.num_started else ""

    def keep(self) -> int:
        return keep_running(self.run, Crashes(self.newest), lambda: self.now, self.pauses.append)


def test_killed_ranks_are_started_again_with_growing_pauses() -> None:
    ranks = Ranks([1, 1, 1, 0])
    assert ranks.keep() == 0
    assert ranks.pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("code", [ConfigError.exit_code, RunHalted.exit_code])
def test_an_error_that_a_restart_cannot_mend_ends_it_at_once(code: int) -> None:
    ranks = Ranks([code])
    assert ranks.keep() == code
    assert ranks.pauses == []


def test_deaths_without_a_checkpoint_in_between_are_a_crash_loop() -> None:
    ranks = Ranks([1] * 20)
    assert ranks.keep() == 1
    assert ranks.num_started == CRASH_LOOP_COUNT


def test_a_long_run_survives_any_number_of_deaths_as_long_as_it_gets_on() -> None:
    ranks = Ranks([1] * 40 + [0], [f"step-{step:08d}" for step in range(41)])
    assert ranks.keep() == 0
    assert ranks.num_started == 41
    assert set(ranks.pauses) == {0.5}


def test_torchrun_restarts_nothing_by_itself_where_the_ranks_are_on_one_machine() -> None:
    here = torchrun_arguments(Path("/r"), "tcp://h:1", Path("/k"), 2, "1", None, 7)
    assert here[here.index("--max-restarts") + 1] == "0"
    assert here[-2:] == ["--parent", "7"]
    several = torchrun_arguments(Path("/r"), "tcp://h:1", Path("/k"), 2, "2", "h:29400", 7)
    assert int(several[several.index("--max-restarts") + 1]) > 100
