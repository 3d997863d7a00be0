"""The governor: never above the schedule, down at once, up by a notch after long enough, every change with a reason."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from learner.stability.governor import MARGIN, NOTCHES, RISE_AFTER, Governor, Held, live_bound, sqrt_ess
from learner.stability.rule import Calibration, Measured, largest_lr

LR = 2.0**-10
"""A notch itself, so that what it is held at is whole notches below."""


def exactly(value: float) -> Measured:
    return Measured(value, value, value)


def holding(lr: float) -> Measured:
    """The bound at which just this learning rate is let through."""
    return exactly(MARGIN * lr)


def notches(held: Held, scheduled: float = LR) -> float:
    return NOTCHES * math.log2(scheduled / held.lr)


def test_inside_the_schedule_is_followed_without_a_word() -> None:
    governor = Governor()
    for step in range(100):
        scheduled = LR * (1 - step / 200)
        assert governor.hold(scheduled, holding(LR), step, "why") == Held(scheduled, "")


def test_outside_it_is_lowered_at_once_to_the_first_notch_inside_with_the_reason() -> None:
    for bound in (0.99, 0.9, 0.5, 0.49, 0.1, 0.001):
        held = Governor().hold(LR, holding(bound * LR), 7, "the reason")
        assert held.lr <= bound * LR * (1 + 1e-8)
        assert held.lr > bound * LR * 2 ** (-1 / NOTCHES) * (1 - 1e-8)
        assert notches(held) == pytest.approx(round(notches(held)))
        assert "the reason" in held.reason and f"{LR:.3g}" in held.reason and f"{held.lr:.3g}" in held.reason


def test_it_goes_by_the_lower_end_of_the_bound() -> None:
    assert Governor().hold(LR, Measured(2 * MARGIN * LR, MARGIN * LR / 4, None), 0, "").lr == pytest.approx(LR / 4)
    assert Governor().hold(LR, Measured(MARGIN * LR / 2, MARGIN * LR / 4, 4 * MARGIN * LR), 0, "").lr == pytest.approx(LR / 4)


def test_a_bound_that_is_a_notch_itself_is_inside() -> None:
    for number in range(20):
        held = Governor().hold(LR, holding(LR * 2 ** (-number / NOTCHES)), 0, "")
        assert notches(held) == pytest.approx(number)


def test_it_is_raised_by_one_notch_after_long_enough_inside() -> None:
    governor = Governor()
    governor.hold(LR, holding(LR / 2), 0, "")
    changes = {}
    for step in range(1, 400):
        held = governor.hold(LR, holding(LR), step, "")
        if held.reason:
            assert "raised" in held.reason
            changes[step] = round(notches(held))
    assert list(changes.values()) == [3, 2, 1, 0]
    assert list(changes) == [1 + RISE_AFTER * count for count in range(1, 5)]


def test_time_inside_counts_only_in_a_row() -> None:
    governor = Governor()
    governor.hold(LR, holding(LR / 2), 0, "")
    for step in range(1, 300):
        bound = LR / 2 if step % RISE_AFTER == 0 else LR
        held = governor.hold(LR, holding(bound), step, "")
        assert held.lr == pytest.approx(LR / 2) and held.reason == ""


def test_a_bound_that_is_unknown_holds_what_was_held() -> None:
    for unknown in (None, Measured(LR, 0.0, 2 * LR)):
        governor = Governor()
        assert governor.hold(LR, unknown, 0, "") == Held(LR, "")
        governor.hold(LR, holding(LR / 2), 1, "")
        for step in range(2, 100):
            held = governor.hold(LR, unknown, step, "")
            assert held.lr == pytest.approx(LR / 2) and held.reason == ""


def test_whatever_the_bounds_it_stays_below_schedule_and_bound_and_says_why_it_changes() -> None:
    rng, governor, ups, downs = np.random.default_rng(0), Governor(), 0, 0
    bound, cap = LR, math.inf
    for step in range(5000):
        scheduled = LR * (1 + math.cos(step / 500)) / 2 + 1e-9
        if rng.random() < 0.02:
            bound = LR * math.exp(rng.normal(-1, 1))
        known = rng.random() < 0.9
        held = governor.hold(scheduled, holding(bound) if known else None, step, "because")
        assert 0 < held.lr <= scheduled
        if known:
            assert held.lr <= bound * (1 + 1e-8)
        before, cap = min(scheduled, cap), math.inf if governor.cap is None else 2 ** (governor.cap / NOTCHES)
        assert held.lr == min(scheduled, cap)
        assert (held.reason == "") == (held.lr == before), "what the governor does is told, and what the schedule does is not"
        assert held.lr <= before * 2 ** (1 / NOTCHES) * (1 + 1e-8), "up by one notch at a time"
        ups, downs = ups + (held.lr > before), downs + (held.lr < before)
    assert ups > 5 and downs > 5


def test_a_schedule_that_decays_is_not_held_down_further_than_the_cap() -> None:
    governor = Governor()
    for step in range(1000):
        scheduled = LR * (1 - step / 1000)
        held = governor.hold(scheduled, holding(LR / 2), step, "because")
        assert held.lr == min(scheduled, LR / 2)
        assert bool(held.reason) == (step == 0)


def test_a_cap_that_the_schedule_has_left_for_long_is_given_up_without_a_word_and_comes_back_with_one() -> None:
    governor = Governor()
    assert governor.hold(LR, holding(LR / 2), 0, "").reason
    for step in range(1, 2 + RISE_AFTER):
        assert governor.hold(LR / 8, holding(LR / 2), step, "") == Held(LR / 8, "")
    assert governor.cap is None
    assert governor.hold(LR, holding(LR / 2), 99, "again") == Held(LR / 2, f"lowered from {LR:.3g} to {LR / 2:.3g}: again")


def test_a_rollback_halves_what_is_held_and_not_only_the_schedule() -> None:
    governor = Governor()
    governor.hold(LR, holding(LR / 4), 0, "")
    assert governor.hold(LR / 2, holding(LR / 4), 1, "", scale=0.5) == Held(LR / 8, "")
    assert governor.hold(LR / 2, holding(LR / 16), 2, "why", scale=0.5).lr == LR / 16


def test_a_bound_too_small_for_a_number_holds_what_was_held() -> None:
    assert Governor().hold(LR, exactly(5e-324), 0, "") == Held(LR, "")


def test_between_two_notches_the_last_rise_ends_at_the_schedule() -> None:
    governor, scheduled, found = Governor(), 0.9 * LR, []
    governor.hold(scheduled, holding(LR / 2), 0, "")
    for step in range(1, 400):
        held = governor.hold(scheduled, holding(scheduled), step, "")
        found += [held.lr] if held.reason else []
    assert found == pytest.approx([LR * 2 ** (-3 / 4), LR * 2 ** (-2 / 4), LR * 2 ** (-1 / 4), scheduled])
    assert governor.cap is None


def test_a_shorter_run_is_bound_as_one_that_goes_straighter() -> None:
    calibration = Calibration(horizon=exactly(1.0), straightness=0.1, calibrated_steps=1000.0)
    for num_steps, counted in ((10, 10), (100, 10**1.5), (1000, 100), (4000, 400)):
        bound = live_bound(calibration, 0, num_steps, None)
        assert bound is not None and bound.value == pytest.approx(1 / counted)


def test_a_governor_goes_on_from_json() -> None:
    rng, one, other = np.random.default_rng(1), Governor(), Governor()
    for step in range(300):
        bound = holding(LR * math.exp(rng.normal(0, 0.3))) if step % 60 == 0 else holding(LR)
        assert one.hold(LR, bound, step, "") == other.hold(LR, bound, step, "")
        other = msgspec.json.decode(msgspec.json.encode(one), type=Governor)
        assert other == one


# --- the bound


def test_the_live_bound_is_that_of_the_rule() -> None:
    calibration = Calibration(batch=Measured(2e-3, 1e-3, 4e-3), horizon=Measured(0.1, 0.05, 0.3))
    for lag in (0, 1, 8):
        for num_steps in (10, 1000):
            assert live_bound(calibration, lag, num_steps, None) == largest_lr(calibration, lag, num_steps)


def test_without_a_calibration_there_is_no_bound() -> None:
    assert live_bound(Calibration(), 8, 100, 1.0) is None
    assert live_bound(Calibration(batch=exactly(1.0)), 0, 100, 1.0) is None, "without lag the batch constraint says nothing"


def test_what_is_calibrated_alone_makes_the_bound() -> None:
    for calibration, expected in ((Calibration(batch=exactly(1.0)), 1 / 8), (Calibration(horizon=exactly(1.0)), 1 / 100)):
        bound = live_bound(calibration, 8, 100, None)
        assert bound is not None
        assert (bound.value, bound.lower, bound.upper) == pytest.approx((expected, expected, expected))


def test_a_horizon_without_a_known_end_bounds_nothing() -> None:
    open_above = Measured(1e-6, 1e-6, None)
    assert live_bound(Calibration(horizon=open_above), 8, 100, 1.0) is None
    alone, both = Calibration(batch=exactly(1.0)), Calibration(batch=exactly(1.0), horizon=open_above)
    assert live_bound(both, 8, 100, None) == live_bound(alone, 8, 100, None)
    assert live_bound(both, 0, 100, None) is None


def test_the_horizon_s_bound_counts_steps_as_straight_as_the_runs_it_came_from() -> None:
    calibration = Calibration(horizon=exactly(1.0), straightness=0.25)
    bound = live_bound(calibration, 8, 100, None)
    assert bound is not None and bound.value == pytest.approx(1 / 25)


def test_the_bound_goes_down_as_this_run_s_updates_are_larger_than_the_calibration_s() -> None:
    calibration = Calibration(batch=Measured(1.0, 0.5, None), horizon=Measured(1e3, 1e3, None), g_upd=10.0)
    own = live_bound(calibration, 4, 100, 40.0)
    assert own == Measured(1 / 16, 1 / 32, None)
    assert live_bound(calibration, 4, 100, None) == live_bound(calibration, 4, 100, 10.0) == Measured(1 / 4, 1 / 8, None)
    unscaled = msgspec.structs.replace(calibration, g_upd=None)
    assert live_bound(unscaled, 4, 100, 40.0) == Measured(1 / 4, 1 / 8, None)


# --- the other rule


def test_sqrt_ess_scales_by_the_root_of_the_share_and_never_raises() -> None:
    assert [sqrt_ess(LR, share) for share in (1.0, 0.25, 0.0)] == [LR, pytest.approx(LR / 2), 0.0]
    assert sqrt_ess(LR, 1 + 1e-9) == LR
    assert sqrt_ess(LR, -1e-9) == 0.0
    assert sqrt_ess(LR, math.nan) == 0.0, "a share that is no number is of a step that is not applied"
