"""Laws that a sweep was made by are found again within their intervals, and what a sweep cannot tell is said to be unknown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from analysis.cells import Cell, Outcome
from analysis.laws import (
    Interval,
    arms,
    boundary,
    boundary_law,
    difference_with_interval,
    escape_law,
    escapes,
    mean_with_interval,
    motion,
    separation,
)
from learner.stability.drift import drift_exponent
from tests.analysis.synthetic_sweep import LEARNING_RATES, make_sweep

NUM_SWEEPS = 200
FEWEST_HITS = 180
"""Of 200 intervals that each hold the truth with probability 0.95, fewer hold it with probability 0.002."""


def cell(lr: float, outcome: Outcome, *, lag: int = 8, collapse_step: int = 80) -> Cell:
    base = make_sweep(seeds=(0,), lags=(lag,), learning_rates=(lr,), has_rows=False)[0]
    return msgspec.structs.replace(base, outcome=outcome, collapse_step=collapse_step if outcome == "collapsed" else None)


def outcomes(*rates: tuple[float, str]) -> list[Cell]:
    """At each learning rate one run for each letter, c a collapsed and s a stable one."""
    return [cell(lr, "collapsed" if letter == "c" else "stable") for lr, letters in rates for letter in letters]


def found(*rates: tuple[float, str]) -> Any:
    return boundary(outcomes(*rates), np.random.default_rng(0))


def num_hits(truth: float, estimate: Callable[[list[Cell], np.random.Generator], Interval | None], **law: Any) -> int:
    """In how many of 200 sweeps of one law, their boundaries anywhere between two learning rates, the interval holds the truth."""
    hits = 0
    for rng_seed in range(NUM_SWEEPS):
        random = np.random.default_rng(rng_seed)
        cells = make_sweep(product=2.3e-6 * 2 ** random.uniform(-0.5, 0.5), rng_seed=rng_seed, has_rows=False, **law)
        interval = estimate(cells, random)
        hits += interval is not None and interval.contains(truth)
    return hits


# --- the boundary


def test_a_clean_step_lies_in_the_middle_of_its_gap_and_its_interval_is_the_gap() -> None:
    one = found((1e-7, "ss"), (4e-7, "cc"))
    assert one.estimate == pytest.approx(2e-7)
    assert (one.lower, one.upper) == (pytest.approx(1e-7), pytest.approx(4e-7))
    assert (one.censoring, one.is_censored, one.num_misplaced) == ("none", False, 0)


def test_outcomes_that_are_not_monotone_widen_the_interval_beyond_the_gap() -> None:
    one = found((1e-7, "ssss"), (2e-7, "sssc"), (4e-7, "sscc"), (8e-7, "sccc"), (1.6e-6, "cccc"))
    assert one.num_misplaced == 4
    assert one.lower <= 2e-7 * 1.0001
    assert one.upper >= 8e-7 * 0.9999
    assert one.lower < one.estimate < one.upper


def test_equally_good_gaps_are_averaged() -> None:
    assert found((1e-7, "ss"), (2e-7, "sc"), (4e-7, "cc")).estimate == pytest.approx(2e-7)


def test_a_boundary_above_the_grid_is_right_censored() -> None:
    one = found((1e-7, "ss"), (2e-7, "ss"))
    assert (one.censoring, one.estimate, one.upper) == ("right", None, math.inf)
    assert one.lower == pytest.approx(2e-7)


def test_a_boundary_below_the_grid_is_left_censored() -> None:
    one = found((1e-7, "cc"), (2e-7, "cc"))
    assert (one.censoring, one.estimate, one.lower) == ("left", None, 0.0)
    assert one.upper == pytest.approx(1e-7)


def test_one_learning_rate_with_either_end_bounds_nothing() -> None:
    one = found((1e-7, "sc"))
    assert (one.censoring, one.lower, one.upper) == ("both", 0.0, math.inf)


def test_an_interval_may_be_open_where_the_estimate_is_not_censored() -> None:
    assert found((1e-7, "ss"), (2e-7, "ss"), (4e-7, "sc")).upper == math.inf


def test_of_equally_good_places_the_bootstrap_too_takes_one_within_the_grid() -> None:
    assert found((1e-7, "ss"), (4e-7, "sccccc")).upper == pytest.approx(4e-7)


def test_a_boundary_is_of_one_lag() -> None:
    with pytest.raises(ValueError, match="one S"):
        boundary([cell(1e-7, "stable", lag=4), cell(1e-7, "stable", lag=8)], np.random.default_rng(0))
    with pytest.raises(ValueError, match="one S"):
        boundary([], np.random.default_rng(0))


# --- the boundaries over S


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_the_exponent_of_the_boundary_is_within_its_interval_as_often_as_it_says(exponent: float, noise: float) -> None:
    def interval(cells: list[Cell], random: np.random.Generator) -> Interval | None:
        return boundary_law(cells, random, 300).interval

    law = {"boundary_exponent": exponent, "noise": noise, "learning_rates": (1e-8, *LEARNING_RATES, 4e-6)}
    assert num_hits(exponent, interval, **law) >= FEWEST_HITS


def test_the_interval_of_the_exponent_is_as_wide_as_the_grid_allows_and_no_wider() -> None:
    coarse = boundary_law(make_sweep(has_rows=False), np.random.default_rng(0)).interval
    fine_rates = [2.5e-8 * 2 ** (step / 4) for step in range(25)]
    fine = boundary_law(make_sweep(has_rows=False, learning_rates=fine_rates, noise=0.0), np.random.default_rng(0)).interval
    assert coarse is not None
    assert fine is not None
    assert 0.3 < coarse.upper - coarse.lower < 0.7
    assert fine.upper - fine.lower < 0.2
    assert fine.contains(1.0)


def test_one_constant_fits_products_of_an_inverse_law_and_none_fits_those_of_a_flat_one() -> None:
    inverse = boundary_law(make_sweep(has_rows=False), np.random.default_rng(0))
    flat = boundary_law(make_sweep(boundary_exponent=0.0, has_rows=False), np.random.default_rng(0))
    assert inverse.is_constant is True
    assert inverse.constant == pytest.approx(2.3e-6, rel=0.3)
    assert set(inverse.products) == {4, 8, 16, 32}
    assert flat.is_constant is False


def test_censored_boundaries_are_left_out_of_the_fit_and_compared_with_it() -> None:
    law = boundary_law(make_sweep(learning_rates=(1e-7, 2e-7, 4e-7, 8e-7), has_rows=False), np.random.default_rng(0))
    assert law.left_out == [32]
    assert law.num_fitted == 3
    assert law.has_room_for_left_out is True
    assert law.products[32].lower == 0.0
    falling = [one for one in make_sweep(has_rows=False) if one.max_lag < 32]
    stable = boundary_law([*falling, *(cell(lr, "stable", lag=32) for lr in LEARNING_RATES)], np.random.default_rng(0))
    assert stable.left_out == [32]
    assert stable.has_room_for_left_out is False


def test_without_two_boundaries_there_is_no_exponent() -> None:
    random = np.random.default_rng(0)
    for cells in ([], make_sweep(lags=(8,), has_rows=False), make_sweep(learning_rates=(1e-9,), has_rows=False)):
        law = boundary_law(cells, random)
        assert (law.exponent, law.interval) == (None, None)


def test_a_lag_of_zero_has_a_boundary_and_no_place_in_the_power_law() -> None:
    zero = [msgspec.structs.replace(one, max_lag=0) for one in make_sweep(pipeline="queue", lags=(4,), has_rows=False)]
    law = boundary_law([*zero, *make_sweep(pipeline="queue", has_rows=False)], np.random.default_rng(0))
    assert law.boundaries[0].estimate is not None
    assert law.left_out == [0]
    assert law.exponent is not None
    assert 0 not in law.products


# --- the escape time


@pytest.mark.parametrize(("pipeline", "lags"), [("cycles", (2, 4, 8)), ("cycles", (4, 8, 16, 32)), ("queue", (4, 8, 16, 32))])
def test_the_exponents_of_the_escape_time_are_within_their_intervals_as_often_as_they_say(pipeline: str, lags: tuple[int, ...]) -> None:
    law = {"pipeline": pipeline, "lags": lags, "noise": 0.3, "seeds": (0, 1, 2)}
    assert num_hits(1.0, lambda cells, random: escape_law(cells, random, 300).lr_interval, **law) >= FEWEST_HITS
    assert num_hits(0.0, lambda cells, random: escape_law(cells, random, 300).lag_interval, **law) >= FEWEST_HITS


def test_other_exponents_of_the_escape_time_are_found_as_well() -> None:
    cells = make_sweep(pipeline="queue", escape_lr_exponent=0.5, escape_lag_exponent=0.7, seeds=range(4), has_rows=False)
    law = escape_law(cells, np.random.default_rng(0))
    assert law.lr_exponent == pytest.approx(0.5, abs=0.1)
    assert law.lag_exponent == pytest.approx(0.7, abs=0.1)
    assert law.lr_interval is not None
    assert not law.lr_interval.contains(1.0)


def test_the_mean_of_t_eta_is_within_its_interval_as_often_as_it_says() -> None:
    def interval(cells: list[Cell], random: np.random.Generator) -> Interval | None:
        return escape_law(cells, random, 300).mean_interval

    assert num_hits(3.2e-5 * math.exp(0.1**2 / 2), interval, noise=0.1, seeds=(0, 1, 2)) >= FEWEST_HITS


def test_a_collapse_lies_in_the_cycle_before_it_was_seen() -> None:
    cycles, queue = cell(1e-6, "collapsed", collapse_step=32), msgspec.structs.replace(cell(1e-6, "collapsed"), pipeline="queue")
    assert [(one.after, one.step, one.middle) for one in escapes([cycles, queue])] == [(24, 32, 28.0), (79, 80, 79.5)]


def test_groups_that_say_too_little_of_their_time_are_left_out_and_counted() -> None:
    coarse = [cell(1e-6, "collapsed", collapse_step=step) for step in (8, 16)]
    mixed = [cell(2e-7, "collapsed", collapse_step=400), cell(2e-7, "stable")]
    good = [cell(5e-7, "collapsed", collapse_step=step) for step in (64, 72)]
    law = escape_law([*coarse, *mixed, *good], np.random.default_rng(0))
    assert (law.num_collapsed, law.num_coarse, law.num_mixed, law.num_fitted) == (5, 2, 1, 2)
    assert law.mean == pytest.approx(5e-7 * 64)
    assert law.recorded_mean == pytest.approx((8e-6 + 16e-6 + 80e-6 + 32e-6 + 36e-6) / 5)


def test_a_spread_that_is_all_rounding_is_told_as_such() -> None:
    law = escape_law(make_sweep(noise=0.0, has_rows=False), np.random.default_rng(0))
    assert law.variation is not None
    assert law.quantum_variation is not None
    assert law.variation < 1.5 * law.quantum_variation
    same = escape_law([cell(8e-7, "collapsed", lag=8, collapse_step=64)] * 4, np.random.default_rng(0))
    assert same.quantum_variation == pytest.approx(8 / math.sqrt(12) / 60)


def test_an_exponent_whose_variable_does_not_vary_is_unknown() -> None:
    random = np.random.default_rng(0)
    one_rate = escape_law(make_sweep(learning_rates=(8e-7,), lags=(4, 8, 16), has_rows=False), random)
    assert one_rate.lr_exponent is None
    assert one_rate.lag_exponent is not None
    tied = escape_law([cell(1e-5 / lag, "collapsed", lag=lag, collapse_step=320) for lag in (4, 8, 16, 32)], random)
    assert (tied.lr_exponent, tied.lag_exponent, tied.num_fitted) == (None, None, 4)
    same = escape_law([cell(8e-7, "collapsed") for _ in range(8)], random)
    assert (same.lr_exponent, same.lag_exponent, same.variation) == (None, None, 0.0)
    empty = escape_law([], random)
    assert (empty.mean, empty.mean_interval, empty.recorded_variation) == (None, None, None)


# --- motion


def test_the_cosine_is_of_the_last_fifth_before_the_collapse_and_apart_by_batch() -> None:
    made = make_sweep(seeds=(0,), lags=(4,), learning_rates=(1e-9, 8e-7), noise=0.0)
    stable, collapsed = (motion(one, drift_exponent) for one in made)
    step = made[1].collapse_step
    assert step is not None
    assert collapsed.num_new_batch == math.ceil(0.2 * (step // 4 - 1))
    assert collapsed.num_same_batch == math.ceil(0.2 * step * 3 / 4)
    assert collapsed.new_batch == pytest.approx(0.75, abs=0.1)
    assert stable.new_batch == pytest.approx(0.0, abs=0.02)
    assert stable.same_batch == pytest.approx(0.5, abs=0.02)


def test_what_comes_after_the_collapse_does_not_count() -> None:
    made = make_sweep(seeds=(0,), lags=(4,), learning_rates=(8e-7,))[0]
    assert made.collapse_step is not None
    after = [msgspec.structs.replace(row, cosine=-1.0, displacement=1e9) for row in made.rows[made.collapse_step :]]
    other = msgspec.structs.replace(made, rows=[*made.rows[: made.collapse_step], *after])
    assert motion(other, drift_exponent) == motion(made, drift_exponent)


def test_ballistic_and_diffusive_drift_are_told_apart() -> None:
    made = make_sweep(seeds=(0,), lags=(4,), learning_rates=(1e-9, 8e-7))
    stable, collapsed = (motion(one, drift_exponent).drift_exponent for one in made)
    assert stable == pytest.approx(0.5, abs=0.02)
    assert collapsed == pytest.approx(1.0, abs=0.02)


def test_a_cell_without_rows_has_no_motion() -> None:
    still = motion(make_sweep(seeds=(0,), has_rows=False)[0], drift_exponent)
    assert (still.same_batch, still.new_batch, still.drift_exponent) == (None, None, None)


def test_differences_and_separations_of_two_sets_of_runs() -> None:
    random = np.random.default_rng(0)
    assert separation([2.0, 3.0], [1.0, 1.5]) == 1.0
    assert separation([1.0, 2.0], [1.0, 2.0]) == 0.5
    assert separation([], [1.0]) is None
    assert mean_with_interval([], random) is None
    assert difference_with_interval([1.0], [], random) is None
    difference = difference_with_interval([2.0, 3.0, 4.0], [1.0, 1.0, 1.0], random)
    assert difference is not None
    assert difference[0] == pytest.approx(2.0)
    assert difference[1].contains(2.0)
    assert not difference[1].contains(0.9)


def test_arms_are_apart_and_without_runs_whose_governor_changed_the_learning_rate() -> None:
    cycles, queue = make_sweep(has_rows=False), make_sweep(pipeline="queue", surrogate="min", has_rows=False)
    held = [msgspec.structs.replace(one, governor="hold") for one in cycles]
    warned = [msgspec.structs.replace(one, governor="warn") for one in cycles]
    found = arms([*cycles, *queue, *held, *warned])
    assert set(found) == {("cycles", "clip"), ("queue", "min")}
    assert found["cycles", "clip"] == [*cycles, *warned]
