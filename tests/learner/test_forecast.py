"""The horizon forecast: known laws of motion reach the horizon when it says, the worst case comes first, and the unknown stays unknown."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.stability.drift import Exponent
from learner.stability.forecast import Forecast, forecast
from learner.stability.rule import Calibration, Measured
from protocol.errors import ConfigError

LR = 1e-6
CALIBRATION = Calibration(batch=Measured(1e-4, 5e-5, 2e-4), horizon=Measured(1e-3, 8e-4, 1.25e-3))


def sure(value: float) -> Exponent:
    return Exponent(value, value, value, 100)


@given(st.floats(0.3, 1.0), st.integers(1, 1500))
def test_a_run_that_keeps_its_law_meets_the_horizon_at_the_forecast_step(alpha: float, step: int) -> None:
    """D(t) = 1e-6 t^alpha."""
    distance, speed = LR * step**alpha, LR * alpha * step ** (alpha - 1)
    horizon = LR * 2000**alpha
    found = forecast(Calibration(horizon=Measured(horizon, horizon, horizon)), LR, 0, distance, speed, sure(alpha))
    assert found.steps_left is not None and found.lower is not None
    assert abs(found.steps_left - (2000 - step)) <= 1
    assert found.upper == found.steps_left
    assert found.lower <= found.steps_left + 1  # A straight path at full speed is never later.


def test_the_interval_runs_from_a_straight_path_to_the_slowest_law_and_the_farthest_horizon() -> None:
    found = forecast(CALIBRATION, LR, 8, 4e-4, 5e-7, Exponent(0.5, 0.4, 0.6, 100))
    tau, slow = 0.5 * 4e-4 / 5e-7, 0.4 * 4e-4 / 5e-7
    assert found.steps_left == math.floor(tau * (2.5**2 - 1))
    assert found.lower == math.floor((8e-4 - 4e-4) / LR)
    assert found.upper == math.floor(slow * ((1.25 / 0.4) ** 2.5 - 1))
    assert found.binding == "horizon"


@given(st.floats(0, 2e-3), st.one_of(st.none(), st.floats(-1e-6, 1e-6)), st.floats(-0.2, 1.1), st.floats(0, 0.5))
def test_the_ends_are_in_order(distance: float, speed: float | None, alpha: float, half: float) -> None:
    found = forecast(CALIBRATION, LR, 8, distance, speed, Exponent(alpha, alpha - half, alpha + half, 50))
    assert found.lower is not None
    assert found.lower <= (math.inf if found.steps_left is None else found.steps_left) <= (math.inf if found.upper is None else found.upper)


def test_without_a_law_the_path_counts_as_straight_and_the_far_end_is_open() -> None:
    straight = Forecast(600, 400, None, "horizon")
    for speed, exponent in ((None, None), (5e-7, None), (None, sure(0.5))):
        found = forecast(CALIBRATION, LR, 8, 4e-4, speed, exponent)
        assert (found.steps_left, found.upper, found.binding) == (straight.steps_left, None, "horizon")
        assert found.lower == pytest.approx(400, abs=1)
    assert forecast(CALIBRATION, LR, 8, 0.0, 1e-6, sure(1.0)).upper is None


def test_a_run_past_the_horizon_has_no_steps_left() -> None:
    assert forecast(CALIBRATION, LR, 8, 2e-3, 5e-7, sure(0.5)) == Forecast(0, 0, 0, "horizon")


def test_a_displacement_that_does_not_grow_may_go_on_for_ever() -> None:
    found = forecast(CALIBRATION, LR, 8, 4e-4, 0.0, sure(0.5))
    assert found.steps_left is None and found.upper is None and found.lower is not None


def test_a_broken_batch_constraint_leaves_no_steps() -> None:
    assert forecast(CALIBRATION, LR, 1000, 4e-4, 5e-7, sure(0.5)) == Forecast(0, 0, 0, "batch")
    doubtful = forecast(CALIBRATION, LR, 150, 4e-4, 5e-7, sure(0.5))
    assert doubtful.binding == "batch" and doubtful.lower == 0 and doubtful.upper == 850


def test_without_a_horizon_nothing_is_forecast() -> None:
    assert forecast(Calibration(), LR, 8, 4e-4, 5e-7, sure(0.5)) == Forecast(None, None, None, None)
    assert forecast(Calibration(batch=CALIBRATION.batch), LR, 8, 4e-4, 5e-7, sure(0.5)) == Forecast(None, None, None, None)
    assert forecast(Calibration(batch=CALIBRATION.batch), LR, 1000, 4e-4, 5e-7, sure(0.5)) == Forecast(0, 0, 0, "batch")
    far = forecast(Calibration(horizon=Measured(1e-3, 1e-3, None)), LR, 8, 4e-4, 5e-7, sure(0.5))
    assert far.lower is not None and far.upper is None


def test_scatter_between_runs_brings_the_worst_case_nearer() -> None:
    scattered = Calibration(horizon=CALIBRATION.horizon, horizon_scatter=0.3)
    near, calm = forecast(scattered, LR, 8, 4e-4, 5e-7, sure(0.5)), forecast(CALIBRATION, LR, 8, 4e-4, 5e-7, sure(0.5))
    assert near.lower is not None and calm.lower is not None and near.lower < calm.lower
    assert near.steps_left == calm.steps_left


def test_a_learning_rate_that_no_run_has_is_refused() -> None:
    with pytest.raises(ConfigError):
        forecast(CALIBRATION, 0.0, 8, 4e-4, 5e-7, None)
