"""The two-constraint rule: margins with intervals, what binds, and nothing that was not measured."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.stability.rule import (
    UNKNOWN_EXPONENT,
    Calibration,
    Measured,
    differences,
    divide,
    largest_lag,
    largest_lr,
    margins,
    smallest,
)
from protocol.errors import ConfigError

PAPER = Calibration(
    batch=Measured(2.2e-6, 1.6e-6, 3.2e-6),
    horizon=Measured(3.2e-5, 3.0e-5, 3.4e-5),
    runs=("sweep/a", "sweep/b"),
    valid_for={"policy": "Llama-3.2-1B", "optimizer": "adamw", "clip": "0.2"},
    notes="Table 2",
)


@pytest.mark.parametrize(
    ("lr", "max_lag", "horizon", "batch", "whole", "binding", "verdict"),
    [
        (1e-7, 8, 100, "inside", "inside", "batch", "inside"),
        (1e-7, 8, 1000, "inside", "outside", "horizon", "outside"),
        (1e-6, 8, 10, "outside", "inside", "batch", "outside"),
        (2.5e-7, 8, 60, "cannot tell", "inside", "batch", "cannot tell"),
        (1e-7, 8, 320, "inside", "cannot tell", "horizon", "cannot tell"),
        (1e-7, 0, 100, "inside", "inside", "horizon", "inside"),
    ],
)
def test_each_constraint_is_judged_by_its_whole_interval(
    lr: float, max_lag: int, horizon: int, batch: str, whole: str, binding: str, verdict: str
) -> None:
    found = margins(PAPER, lr, max_lag, horizon)
    assert (found.batch.verdict, found.horizon.verdict, found.binding, found.verdict) == (batch, whole, binding, verdict)


def test_the_ratio_is_bound_over_used() -> None:
    found = margins(PAPER, 1e-7, 8, 160)
    assert found.batch.ratio is not None and found.horizon.ratio is not None
    assert [found.batch.ratio.value, found.batch.ratio.lower, found.batch.ratio.upper] == pytest.approx([2.75, 2.0, 4.0])
    assert [found.horizon.ratio.value, found.horizon.ratio.lower, found.horizon.ratio.upper] == pytest.approx([2.0, 1.875, 2.125])


def test_what_was_not_calibrated_is_unknown() -> None:
    nothing = margins(Calibration(), 1e-7, 8, 100)
    assert (nothing.batch.verdict, nothing.horizon.verdict, nothing.binding, nothing.verdict) == ("unknown", "unknown", None, "unknown")
    half = Calibration(batch=PAPER.batch)
    assert margins(half, 1e-7, 8, 100).verdict == "unknown"
    assert margins(half, 1e-7, 8, 100).binding is None
    assert margins(half, 1e-5, 8, 100).verdict == "outside"  # One broken constraint is enough.
    assert margins(Calibration(horizon=PAPER.horizon), 1e-7, 0, 100).verdict == "inside"  # Without lag the batch constraint is absent.
    assert largest_lr(half, 8, 100) is None and largest_lr(half, 0, 100) is None
    assert largest_lag(Calibration(horizon=PAPER.horizon), 1e-7, 100) is None


def test_the_largest_learning_rate_is_where_the_first_constraint_binds() -> None:
    by_lag, by_horizon, without_lag = largest_lr(PAPER, 8, 10), largest_lr(PAPER, 8, 1000), largest_lr(PAPER, 0, 10)
    assert by_lag is not None and by_horizon is not None and without_lag is not None
    assert [by_lag.value, by_lag.lower, by_lag.upper] == pytest.approx([2.75e-7, 2e-7, 4e-7])
    assert [by_horizon.value, by_horizon.lower, by_horizon.upper] == pytest.approx([3.2e-8, 3.0e-8, 3.4e-8])
    assert without_lag.value == pytest.approx(3.2e-6)


def test_the_largest_lag_goes_as_one_over_the_learning_rate() -> None:
    assert largest_lag(PAPER, 1.03e-7, 100) == (21, 15, 31, "inside")
    assert largest_lag(PAPER, 5.1e-8, 1000) == (43, 31, 62, "outside")
    assert largest_lag(PAPER, 5e-6, 1) == (0, 0, 0, "inside")


@given(st.floats(1e-9, 1e-4), st.integers(1, 10_000), st.floats(0.5, 2.0), st.floats(1.0, 1.5), st.floats(1.0, 64.0))
def test_the_largest_lag_and_the_margins_agree(lr: float, horizon: int, exponent: float, factor: float, reference: float) -> None:
    b = Measured(exponent, exponent / factor, exponent * factor)
    calibration = Calibration(batch=PAPER.batch, horizon=PAPER.horizon, lag_exponent=b, reference_lag=reference)
    largest = largest_lag(calibration, lr, horizon)
    assert largest is not None and largest.upper is not None
    assert largest.lower <= largest.value <= largest.upper
    assert margins(calibration, lr, largest.lower, horizon).batch.verdict == "inside"
    assert margins(calibration, lr, largest.lower + 1, horizon).batch.verdict != "inside"
    assert margins(calibration, lr, largest.upper + 1, horizon).batch.verdict == "outside"


def test_a_one_sided_bound_decides_one_side_only() -> None:
    stable_so_far = Calibration(batch=Measured(1.6e-6, 1.6e-6, None), horizon=Measured(3.2e-5, 3.2e-5, None))
    assert margins(stable_so_far, 1e-7, 8, 100).verdict == "inside"
    assert margins(stable_so_far, 1e-3, 8, 100).verdict == "cannot tell"
    assert largest_lag(stable_so_far, 1.03e-7, 100) == (15, 15, None, "inside")
    largest = largest_lr(stable_so_far, 8, 100)
    assert largest is not None and largest.upper is None and largest.lower == pytest.approx(2e-7)
    assert margins(Calibration(batch=Measured(1e-6, 0.0, 1e-6), horizon=PAPER.horizon), 1e-9, 1, 1).batch.verdict == "cannot tell"


def measured(ends: tuple[float, float, float], is_open: bool) -> Measured:
    lower, value, upper = sorted(ends)
    return Measured(value, lower, None if is_open else upper)


SIZES = st.floats(1e-9, 1e9)


@given(st.lists(st.builds(measured, st.tuples(SIZES, SIZES, SIZES), st.booleans()), min_size=1, max_size=5))
def test_the_smallest_of_some_bounds_is_within_all_of_them(limits: list[Measured]) -> None:
    found = smallest(limits)
    assert found.lower == min(limit.lower for limit in limits)
    assert found.ceiling == min(limit.ceiling for limit in limits)
    closed = [limit.value for limit in limits if limit.upper is not None]
    assert found.value == min(closed or [limit.value for limit in limits]), "the best guess is of bounds whose end is known"
    assert smallest(limits[::-1]) == found
    assert smallest([found]) == found


def test_a_bound_that_is_open_above_says_what_is_certain_and_not_what_is_likely() -> None:
    """No run came to the end of the horizon; the farthest one bounds the learning rate of what is known to be stable, no more."""
    calibration = Calibration(batch=PAPER.batch, horizon=Measured(1e-6, 1e-6, None))
    largest, alone = largest_lr(calibration, 8, 100), largest_lr(msgspec.structs.replace(calibration, horizon=PAPER.horizon), 8, 1)
    assert largest is not None and alone is not None
    assert largest.lower == pytest.approx(1e-8)
    assert (largest.value, largest.upper) == (alone.value, alone.upper) == pytest.approx((2.75e-7, 4e-7))
    without_lag = largest_lr(calibration, 0, 100)
    assert without_lag is not None
    assert [without_lag.value, without_lag.lower] == pytest.approx([1e-8, 1e-8]) and without_lag.upper is None


def test_of_two_constraints_the_one_with_a_known_end_binds() -> None:
    open_batch, open_horizon = Measured(1e-9, 1e-9, None), Measured(1e-9, 1e-9, None)
    assert margins(Calibration(batch=PAPER.batch, horizon=open_horizon), 1e-7, 8, 100).binding == "batch"
    assert margins(Calibration(batch=open_batch, horizon=PAPER.horizon), 1e-7, 8, 100).binding == "horizon"
    neither = Calibration(batch=open_batch, horizon=open_horizon)
    assert (margins(neither, 1e-7, 8, 4).binding, margins(neither, 1e-7, 8, 16).binding) == ("batch", "horizon")


def test_the_horizon_counts_steps_as_straight_as_the_runs_it_came_from() -> None:
    half = msgspec.structs.replace(PAPER, straightness=0.5)
    assert margins(half, 1e-7, 8, 320).horizon == margins(PAPER, 1e-7, 8, 160).horizon
    assert margins(half, 1e-7, 8, 320).batch == margins(PAPER, 1e-7, 8, 160).batch
    assert largest_lr(half, 0, 200) == largest_lr(PAPER, 0, 100)


def test_shorter_runs_go_straighter_by_the_root_of_their_length_and_longer_ones_are_counted_as_the_calibrating_ones() -> None:
    calibration = msgspec.structs.replace(PAPER, straightness=0.25, calibrated_steps=1600.0)
    steps = {num_steps: calibration.effective_horizon(num_steps).value for num_steps in (1, 100, 400, 1600, 6400)}
    assert steps == pytest.approx({1: 1, 100: 100, 400: 200, 1600: 400, 6400: 1600})
    counts = [calibration.effective_horizon(num_steps).value for num_steps in range(1, 3000)]
    assert counts == sorted(counts), "more steps never lead less far"
    constant = msgspec.structs.replace(calibration, calibrated_steps=None)
    assert [margins(one, 2e-7, 0, 400).verdict for one in (constant, calibration)] == ["inside", "outside"]


def test_an_exponent_that_is_not_known_widens_what_is_said_at_another_s_and_nothing_at_the_same() -> None:
    known = msgspec.structs.replace(PAPER, reference_lag=8.0)
    calibration = msgspec.structs.replace(known, lag_exponent=UNKNOWN_EXPONENT)
    assert margins(calibration, 1e-7, 8, 100) == margins(known, 1e-7, 8, 100)
    there = margins(calibration, 1e-7, 32, 100).batch.ratio
    exact = margins(known, 1e-7, 32, 100).batch.ratio
    assert there is not None and exact is not None and there.value == exact.value
    assert there.lower < exact.lower / 2.5 and there.ceiling > 2.5 * exact.ceiling
    assert [margins(one, 1e-8, 64, 100).batch.verdict for one in (known, calibration)] == ["inside", "cannot tell"]


def test_far_beyond_the_largest_s_of_the_calibrating_runs_nothing_is_inside() -> None:
    calibration = msgspec.structs.replace(PAPER, largest_lag_seen=4)
    lr = 1e-9
    assert [margins(calibration, lr, lag, 100).batch.verdict for lag in (0, 4, 16, 17)] == ["inside", "inside", "inside", "cannot tell"]
    assert margins(calibration, lr, 17, 100).verdict == "cannot tell"
    assert margins(PAPER, lr, 17, 100).verdict == "inside", "where it is not known how far they went"
    assert margins(calibration, 1e-3, 17, 100).batch.verdict == "outside"
    assert largest_lag(calibration, 1.03e-9, 100) == (2135, 16, 3106, "inside")


def test_a_measured_lag_exponent_carries_its_interval_away_from_the_reference() -> None:
    b = Measured(0.5, 0.4, 0.6)
    calibration = Calibration(batch=Measured(1e-5, 1e-5, 1e-5), horizon=PAPER.horizon, lag_exponent=b, reference_lag=16.0)
    at, far = margins(calibration, 1e-7, 16, 10).batch.ratio, margins(calibration, 1e-7, 64, 10).batch.ratio
    assert at is not None and far is not None
    assert [at.value, at.lower, at.upper] == pytest.approx([6.25, 6.25, 6.25])
    assert [far.value, far.lower, far.upper] == pytest.approx([6.25 / 4**0.5, 6.25 / 4**0.6, 6.25 / 4**0.4])


def test_scatter_between_runs_widens_what_is_said_of_the_next() -> None:
    scattered = msgspec.structs.replace(PAPER, horizon_scatter=0.5)
    assert margins(PAPER, 1e-7, 8, 160).horizon.verdict == "inside"
    assert margins(scattered, 1e-7, 8, 160).horizon.verdict == "cannot tell"
    assert margins(scattered, 1e-7, 8, 100).horizon.verdict == "inside"


def test_errors_of_a_ratio_add_in_squares_of_their_logarithms() -> None:
    ratio = divide(Measured(8.0, 4.0, 16.0), Measured(2.0, 1.0, 4.0))
    assert [ratio.value, ratio.lower, ratio.upper] == pytest.approx([4.0, 4 / 2**2**0.5, 4 * 2**2**0.5])


@pytest.mark.parametrize("calibration", [PAPER, Calibration(), Calibration(batch=Measured(1.0, 0.5, None))])
def test_a_calibration_survives_json(calibration: Calibration) -> None:
    assert msgspec.json.decode(msgspec.json.encode(calibration), type=Calibration) == calibration


def test_a_quantity_out_of_order_is_refused_when_made_and_when_read() -> None:
    for value, lower, upper in ((1.0, 2.0, 3.0), (0.0, 0.0, 1.0), (2.0, 1.0, 1.5), (float("nan"), 0.0, None), (1.0, 0.5, float("inf"))):
        with pytest.raises(ValueError):
            Measured(value, lower, upper)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"batch": {"value": 1.0, "lower": 2.0, "upper": null}}', type=Calibration)


def test_a_calibration_for_something_else_says_in_what() -> None:
    assert differences(PAPER, PAPER.valid_for) == {}
    here = {"policy": "Llama-3.2-3B", "optimizer": "adamw", "task": "countdown"}
    assert differences(PAPER, here) == {
        "policy": ("Llama-3.2-1B", "Llama-3.2-3B"),
        "clip": ("0.2", None),
        "task": (None, "countdown"),
    }


@pytest.mark.parametrize(("lr", "max_lag", "horizon", "field"), [(0.0, 8, 10, "lr"), (1e-6, -1, 10, "max_lag"), (1e-6, 8, 0, "horizon")])
def test_a_setting_that_no_run_has_is_refused_by_name(lr: float, max_lag: int, horizon: int, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        margins(PAPER, lr, max_lag, horizon)
    assert raised.value.field == field
