"""Early signs and broken constraints: each by its own threshold, by name, in words that a person can use."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from learner.stability.forecast import Forecast, forecast
from learner.stability.rule import Calibration, Measured, margins
from learner.stability.signs import CLIPPED_SHARE, FAR_NATS, broken, signs
from protocol.sweep import Surrogate

LR = 1e-3
BELOW = 1 - 1e-9
UNKNOWN = Forecast(None, None, None, None)
NOTHING = margins(Calibration(), LR, 4, 100)


@pytest.mark.parametrize("surrogate", get_args(Surrogate))
def test_a_batch_that_is_clipped_and_far_from_what_sampled_it_is_a_sign_and_either_alone_is_none(surrogate: str) -> None:
    share = CLIPPED_SHARE[surrogate]
    assert list(signs(surrogate, share, FAR_NATS)) == list(signs(surrogate, 1.0, 100.0)) == ["signal"]
    assert signs(surrogate, share * BELOW, 100.0) == {}
    assert signs(surrogate, 1.0, FAR_NATS * BELOW) == {}
    assert signs(surrogate, 0.0, 0.0) == {}


def test_the_sign_tells_both_figures() -> None:
    (text,) = signs("clip", 0.75, 2.5).values()
    assert "75%" in text and "2.5 nats" in text


@pytest.mark.parametrize(("clip_fraction", "kl_behaviour"), [(math.nan, math.nan), (math.nan, 0.0), (0.0, math.nan), (0.0, math.inf)])
def test_measures_of_a_step_that_are_no_number_are_no_sign_by_themselves(clip_fraction: float, kl_behaviour: float) -> None:
    assert signs("clip", clip_fraction, kl_behaviour) == {}


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
