"""What a person sees: the same facts live and in plain lines."""

from __future__ import annotations

import errno
import io

import msgspec
import pytest
from rich.console import Console

from deploy.monitor import Monitor, Pace, plain_line, render
from protocol.messages import PeerStatus, RunStatus


def status(step: int = 10, elapsed: float = 20.0) -> RunStatus:
    actor = PeerStatus("actor-0", "host", "transformers", 3, 8, [41, 42], 0.5, 1234.0, 0.2, "generating 1 groups")
    learner = PeerStatus("learner (2 ranks)", "", "", -1, 10, [], 0.75, 0.0, 0.1, "training step 10")
    return RunStatus(
        run="run-1", phase="training", step=step, num_steps=100, max_lag=4, elapsed_seconds=elapsed,
        issued=50, outstanding=4, queued=6, consumed=40, expired=0, failed=0, void=0, refused={"stale": 1},
        lags={0: 8, 3: 2}, largest_lag=3, num_versions=4, newest_step=10, delta_bytes=1500, full_bytes=250_000,
        actors=[actor], learner=learner, desired_actors=1, metrics={"reward": 0.5, "lag_mean": 1.5},
        evaluations=[(0, 0.25), (10, 0.5)], waits=["learner waits for 3 groups"], halted="",
    )  # fmt: skip


def test_the_live_view_shows_who_waits_lags_tickets_rewards_and_bytes() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(status(), 75.0))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    wanted = ("run-1", "10/100", "1:15 left", "training 0.500", "held-out 0.500 at step 10 (before: 0.250)", "0: 8", "S = 4", "largest 3")
    wanted += ("50 issued = 4 outstanding + 6 queued + 40 consumed", "1 stale", "1.5 KB of 250.0 KB", "actor-0", "41 42", "1234", "50%")
    for part in (*wanted, "learner (2 ranks)", "training step 10", "learner waits for 3 groups"):
        assert part in text, part


def test_whom_nobody_has_heard_is_not_shown_as_seen() -> None:
    unheard = msgspec.structs.replace(status().actors[0], was_heard=False, last_seen=8.0)
    console = Console(file=io.StringIO(), width=200)
    console.print(render(msgspec.structs.replace(status(), actors=[unheard]), None))
    assert "not since the broker started, 8.0 s ago" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_lag_is_shown_in_its_parts_live_and_in_plain_lines() -> None:
    parts = {"publish": 0.4, "in_flight": 1.2, "queued": 1.0, "reuse": 0.5}
    told = msgspec.structs.replace(status(), lag_parts=parts)
    console = Console(file=io.StringIO(), width=160)
    console.print(render(told, None))
    line = "lag 3.1 = 0.4 publishing + 1.2 in flight + 1.0 queued + 0.5 reuse"
    assert f"{line}, mean over the last 50 steps" in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{line} (largest 3, S 4)" in plain_line(told, None)
    assert "lag 1.5 (largest 3, S 4)" in plain_line(status(), None), "a broker that does not tell the parts"


def test_plain_lines_come_every_few_seconds_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    with Monitor(console) as monitor:
        for second in range(12):
            monitor.show(status(step=second, elapsed=float(second)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split(",")[0] for line in lines] == ["step 0/100", "step 5/100", "step 10/100"], "one line each, however narrow"


def test_a_run_that_stands_still_says_who_waits_for_what() -> None:
    console = Console(file=io.StringIO(), width=80)
    with Monitor(console) as monitor:
        for second in range(100):
            monitor.show(status(step=5, elapsed=float(second)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split(":")[0] for line in lines[1:]] == ["no step for 30 s", "no step for 60 s", "no step for 90 s"]
    assert "learner waits for 3 groups" in lines[1]


def test_the_time_left_follows_the_pace_of_the_steps() -> None:
    pace = Pace()
    assert pace.seconds_left(status(0, 0.0)) is None
    assert pace.seconds_left(status(1, 30.0)) is None, "the first step also holds everybody's start"
    assert pace.seconds_left(status(11, 50.0)) == pytest.approx(178.0)
    assert pace.seconds_left(status(11, 55.0)) == pytest.approx(178.0)


class FullFile(io.StringIO):
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_output_without_room_does_not_end_the_run() -> None:
    with Monitor(Console(file=FullFile())) as monitor:
        monitor.say("broker: starting again")
        monitor.show(status())
