"""Ranks know of one another whether they live, however long they rightly wait."""

from __future__ import annotations

from collections import Counter

import pytest

from learner.pulse import LOST_SECONDS, SAY_SECONDS, START_SECONDS, STUCK_SECONDS, Pulse, Vitals, Watch


def test_a_rank_without_a_pulse_is_told_and_then_lost() -> None:
    watch = Watch()
    for now in range(int(LOST_SECONDS) + 12):
        watch.observe({0: Vitals(now, 0, 0, False), 1: Vitals(1 + min(now, 10), 0, 0, False)}, float(now))
        silent = now - 10
        assert (1 in watch.silent(float(now))) == (silent > SAY_SECONDS)
        assert 0 not in watch.silent(float(now))
        assert bool(watch.lost(float(now))) == (silent > LOST_SECONDS)
    assert "rank 1" in watch.lost(LOST_SECONDS + 11)


def test_a_rank_that_still_starts_has_longer() -> None:
    watch = Watch()
    for now in range(0, int(START_SECONDS) + 100, 10):
        watch.observe({0: Vitals(now, 1, 0, False), 1: Vitals(0, 0, 0, False)}, float(now))
        assert bool(watch.lost(float(now))) == (now > START_SECONDS)


def test_a_rank_may_be_waited_for_in_a_collective_for_hours() -> None:
    watch = Watch()
    for now in range(0, 100_000, 100):
        watch.observe({0: Vitals(now, 7, 7, False), 1: Vitals(now, 8, 7, False)}, float(now))
        assert not watch.lost(float(now))


def test_a_collective_that_all_have_entered_does_not_take_for_ever() -> None:
    watch = Watch()
    for now in range(0, int(STUCK_SECONDS) + 200, 100):
        watch.observe({0: Vitals(now, 8, 7, False), 1: Vitals(now, 8, 7, False)}, float(now))
        assert bool(watch.lost(float(now))) == (now > STUCK_SECONDS)


def test_collectives_that_follow_one_another_are_no_standstill() -> None:
    watch = Watch()
    for now in range(0, 3 * int(STUCK_SECONDS), 100):
        watch.observe({0: Vitals(now, now, now - 1, False), 1: Vitals(now, now, now - 1, False)}, float(now))
        assert not watch.lost(float(now))


def test_a_rank_that_has_left_in_order_is_not_missed() -> None:
    watch = Watch()
    for now in range(0, 2 * int(LOST_SECONDS), 10):
        watch.observe({0: Vitals(now, 0, 0, False), 1: Vitals(3, 0, 0, True)}, float(now))
    assert not watch.silent(float(now))
    assert not watch.lost(float(now))


class Store:
    """torch.distributed's store, as far as a pulse uses it."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def add(self, key: str, amount: int) -> int:
        self.values[key] += amount
        return self.values[key]


def test_pulses_show_each_other_what_the_ranks_do(caplog: pytest.LogCaptureFixture) -> None:
    store, now, ended = Store(), [0.0], []
    first, second = (Pulse(store, rank, 2, lambda: now[0], lambda rank=rank: ended.append(rank)) for rank in range(2))
    for pulse in (first, second):
        pulse.enter()
    first.leave()
    for _ in range(3):
        now[0] += 1
        first.beat()
        second.beat()
    assert (store.values["entered/0"], store.values["left/0"], store.values["left/1"]) == (1, 1, 0)
    first.beat()
    assert (first.waits, ended) == ("", [])
    now[0] += SAY_SECONDS + 1
    first.beat()
    assert first.waits == "rank 1 last heard 11 s ago"
    assert [record.message for record in caplog.records if "has not been heard" in record.message]
    now[0] += LOST_SECONDS
    first.beat()
    assert ended == [0]
