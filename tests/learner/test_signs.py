"""Early signs and broken constraints: each by its own threshold, by name, in words that a person can use."""

from __future__ import annotations

import math

import pytest

from learner.stability.forecast import Forecast, forecast
from learner.stability.rule import Calibration, Measured, margins
from learner.stability.signs import broken, signs

LR = 1e-3
UNKNOWN = Forecast(None, None, None, None)
NOTHING = margins(Calibration(), LR, 4, 100)


@pytest.mark.parametrize(("lag", "nats"), [(0.0, 1.1), (1.0, 1.1), (4.0, 2.2), (9.0, 3.3), (100.0, 11.0)])
@pytest.mark.parametrize("length", [1.0, 2.5, 1000.0])
def test_a_completion_far_from_what_sampled_it_is_a_sign_and_how_far_depends_on_the_lag_and_on_no_length(
    lag: float, nats: float, length: float
) -> None:
    assert list(signs(1.001 * nats / length, length, lag)) == ["signal"]
    assert signs(0.999 * nats / length, length, lag) == {}


def test_the_sign_tells_its_figures() -> None:
    (text,) = signs(0.5, 9.0, 3.5).values()
    assert "4.5 nats" in text and "lag 3.5" in text


@pytest.mark.parametrize(("kl_behaviour", "length"), [(math.nan, 10.0), (0.0, math.nan), (-1.0, 10.0), (0.0, 0.0)])
def test_measures_of_a_step_that_are_no_number_are_no_sign_by_themselves(kl_behaviour: float, length: float) -> None:
    assert signs(kl_behaviour, length, 1.0) == {}


def test_only_a_batch_constraint_that_is_certainly_broken_is_told_and_by_how_much() -> None:
    calibration = Calibration(batch=Measured(8 * LR, 4 * LR, 16 * LR))
    for max_lag, verdict in ((2, "inside"), (8, "cannot tell"), (32, "outside")):
        where = margins(calibration, LR, max_lag, 100)
        assert where.batch.verdict == verdict
        told = broken(where, UNKNOWN, 100)
        assert list(told) == (["batch"] if verdict == "outside" else [])
    assert "4 times what S allows" in told["batch"]


def test_without_lag_or_without_a_calibration_nothing_is_broken() -> None:
    assert broken(NOTHING, UNKNOWN, 100) == {}
    assert broken(margins(Calibration(batch=Measured(LR, LR, LR)), LR, 0, 100), UNKNOWN, 100) == {}


def test_a_horizon_is_told_if_even_its_far_end_comes_before_the_end_of_the_run() -> None:
    ahead = Forecast(20, 10, 40, "horizon")
    assert broken(NOTHING, ahead, 40) == {}
    assert broken(NOTHING, ahead, 41) == {"horizon": "too fast for this long a run: about 20 steps left of 41"}
    assert broken(NOTHING, ahead._replace(upper=None), 10**9) == {}, "it may have no end"
    assert broken(NOTHING, Forecast(0, 0, 0, "batch"), 100) == {}, "that one is told as the batch constraint"


def test_a_horizon_that_is_open_above_is_never_told_as_broken() -> None:
    calibration = Calibration(horizon=Measured(LR, LR, None))
    where, ahead = margins(calibration, LR, 0, 1000), forecast(calibration, LR, 0, 5 * LR, LR, None)
    assert broken(where, ahead, 1000) == {}
