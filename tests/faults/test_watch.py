"""A deadlock is called when a run stands still though everything is up, and at no other time."""

from __future__ import annotations

from tests.faults.watch import CEASEFIRE_SECONDS, DEADLOCK_SECONDS, Watch


def test_a_run_that_stands_still_with_everything_up_is_deadlocked() -> None:
    watch = Watch(0.0)
    watch.at_step(3, 1.0)
    watch.up(True, 1.0)
    for second in range(2, 31):
        watch.at_step(3, float(second))
        watch.up(True, float(second))
        assert not watch.is_deadlocked(float(second))
    assert watch.is_deadlocked(1.0 + DEADLOCK_SECONDS)


def test_a_run_that_moves_is_not_deadlocked_and_neither_is_one_that_goes_back() -> None:
    watch = Watch(0.0)
    watch.up(True, 0.0)
    for number, step in enumerate([5, 4, 5, 4]):
        now = number * (DEADLOCK_SECONDS - 1)
        watch.at_step(step, now)
        assert not watch.is_deadlocked(now)


def test_a_run_with_a_process_down_is_left_alone_and_not_called_deadlocked() -> None:
    watch = Watch(0.0)
    watch.up(True, 0.0)
    watch.up(False, DEADLOCK_SECONDS - 1)
    watch.up(True, DEADLOCK_SECONDS)
    assert watch.holds_fire(CEASEFIRE_SECONDS)
    assert not watch.is_deadlocked(DEADLOCK_SECONDS + 1)
    assert watch.is_deadlocked(2 * DEADLOCK_SECONDS)
