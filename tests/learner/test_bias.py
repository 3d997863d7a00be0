"""The estimate of the staleness bias, on gradients whose bias is known, under noise larger than it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from learner.stability.bias import Bias, Fit, RoundProducts, fit_growth, gradient_size, staleness_bias, student_t

DIMENSIONS = 40
FRESH = np.zeros(DIMENSIONS)
FRESH[0] = 2.0
TRIALS = 250
NUM_FITS = 60


class Noise(NamedTuple):
    """Standard deviations of each element: of the difference's noise, and of the noise of the fresh gradient."""

    difference: float
    fresh: float


def products(differences: NDArray[Any], fresh: NDArray[Any]) -> RoundProducts:
    return RoundProducts((differences @ differences.T).tolist(), (differences @ fresh.T).tolist(), (fresh @ fresh.T).tolist())


def rounds(delta: NDArray[Any], noise: Noise, num_rounds: int, rng: np.random.Generator) -> RoundProducts:
    """Rounds of noisy gradients. The noise of a difference is part of the fresh one's, as where both are measured."""
    shared = rng.standard_normal((num_rounds, DIMENSIONS))
    other = rng.standard_normal((num_rounds, DIMENSIONS))
    return products(delta - noise.difference * shared, FRESH + noise.fresh * (0.6 * shared + 0.8 * other))


def along_and_across(along: float, across: float) -> NDArray[Any]:
    delta = np.zeros(DIMENSIONS)
    delta[0], delta[1] = along * 2.0, across * 2.0
    return delta


def trials(delta: NDArray[Any], noise: Noise, num_rounds: int) -> list[Bias]:
    return [staleness_bias(rounds(delta, noise, num_rounds, np.random.default_rng([num_rounds, trial]))) for trial in range(TRIALS)]


@pytest.mark.parametrize("num_rounds", [4, 16])
def test_the_square_of_the_bias_is_unbiased_under_noise_that_is_larger_and_its_interval_covers_it(num_rounds: int) -> None:
    delta, noise = along_and_across(-0.3, 0.4), Noise(0.5, 0.5)  # |delta| = 1; the noise of one round has size 3.2
    found = trials(delta, noise, num_rounds)
    squares = np.array([bias.squared.value for bias in found])
    assert abs(squares.mean() - 1.0) < 4 * squares.std() / np.sqrt(TRIALS)
    covered = np.mean([bias.squared.low <= 1.0 <= bias.squared.high for bias in found])
    assert covered >= 0.92
    floors = np.array([bias.noise_floor for bias in found])
    assert np.sqrt((floors**2).mean()) == pytest.approx(0.5 * np.sqrt(DIMENSIONS / num_rounds), rel=0.05)


@pytest.mark.parametrize("num_rounds", [4, 16])
def test_noise_alone_gives_zero_on_average_and_is_seldom_taken_for_a_bias(num_rounds: int) -> None:
    found = trials(np.zeros(DIMENSIONS), Noise(0.5, 0.5), num_rounds)
    squares = np.array([bias.squared.value for bias in found])
    assert abs(squares.mean()) < 4 * squares.std() / np.sqrt(TRIALS)
    assert np.mean([bias.is_clear for bias in found]) <= 0.04
    assert all(bias.size.low == 0 for bias in found if not bias.is_clear)


def test_without_noise_the_shrinking_and_the_turning_are_exact() -> None:
    bias = staleness_bias(rounds(along_and_across(-0.3, 0.4), Noise(0, 0), 4, np.random.default_rng(0)))
    assert bias.along is not None
    assert (bias.size.value, bias.along.value, bias.across) == (pytest.approx(1.0), pytest.approx(-0.3), pytest.approx(0.4))
    assert bias.size.low == pytest.approx(1.0) and bias.noise_floor == pytest.approx(0.0)
    assert bias.is_clear


def test_under_noise_the_shrinking_is_not_mistaken_though_both_gradients_share_it() -> None:
    """Within a round the noise of the difference is against the fresh gradient's: products of one round would see a shrinking of 0.9 more."""
    delta = along_and_across(-0.3, 0.4)
    found = [bias.along for bias in trials(delta, Noise(0.5, 0.3), 16) if bias.along is not None]
    assert len(found) == TRIALS
    assert np.mean([along.value for along in found]) == pytest.approx(-0.3, abs=0.02)
    assert np.mean([along.low <= -0.3 <= along.high for along in found]) >= 0.92


def test_a_fresh_gradient_that_is_lost_in_noise_gives_no_direction() -> None:
    noise = np.eye(4, DIMENSIONS)  # at right angles to one another, with a little against one another
    bias = staleness_bias(products(np.ones((4, DIMENSIONS)), noise - 0.01 * np.roll(noise, 1, axis=0)))
    assert (bias.along, bias.across) == (None, None)
    assert bias.is_clear


def test_the_size_of_the_fresh_gradient_is_estimated_without_its_noise() -> None:
    found = [gradient_size(rounds(FRESH, Noise(0, 0.5), 8, np.random.default_rng([8, trial])).fresh).value ** 2 for trial in range(TRIALS)]
    assert np.mean(found) == pytest.approx(4.0, rel=0.05)


LAGS = [1.0, 2.0, 4.0, 8.0, 16.0]


def fit(power: float, scale: float, noise: float, num_rounds: int = 16, seed: int = 0) -> Fit:
    """|delta| = scale * x^power; the noise of a difference grows with the root of x, as if every step added some."""
    rng = np.random.default_rng([seed, 1])
    delta = along_and_across(-0.3, 0.4)
    return fit_growth(LAGS, [rounds(scale * x**power * delta, Noise(noise * x**0.5, 0.3), num_rounds, rng) for x in LAGS])


@pytest.mark.parametrize(("power", "growth"), [(1.0, "linear"), (0.5, "sublinear"), (2.0, "superlinear")])
def test_the_growth_is_told_under_noise(power: float, growth: str) -> None:
    found = fit(power, 1.0, 0.1)
    assert found.growth == growth
    assert found.exponent.low <= power <= found.exponent.high
    assert found.num_clear == len(LAGS)


@pytest.mark.parametrize(("scale", "told"), [(0.5, 0.8), (0.3, 0.2), (0.1, 0.0)])
def test_an_exponent_is_covered_and_no_other_growth_claimed_however_small_the_bias(scale: float, told: float) -> None:
    """At 0.1 the noise of one round is five times the largest bias; `told` is the least share of trials in which the growth is told."""
    found = [fit(1.0, scale, 0.5, seed=seed) for seed in range(NUM_FITS)]
    assert np.mean([each.exponent.low <= 1 <= each.exponent.high for each in found]) >= 0.92
    assert np.mean([each.growth in {"sublinear", "superlinear"} for each in found]) <= 0.08
    assert np.mean([each.growth == "linear" for each in found]) >= told


def test_the_slope_through_the_origin_is_unbiased_and_covered() -> None:
    found = [fit(1.0, 0.3, 0.5, seed=seed) for seed in range(NUM_FITS)]
    assert np.mean([each.slope.value**2 for each in found]) == pytest.approx(0.09, rel=0.06)
    assert np.mean([each.slope.low <= 0.3 <= each.slope.high for each in found]) >= 0.92


def test_without_a_bias_no_growth_is_claimed() -> None:
    found = [fit(1.0, 0.0, 0.5, seed=seed) for seed in range(NUM_FITS)]
    assert np.mean([each.growth == "cannot tell (noise)" for each in found]) >= 0.96
    assert np.mean([each.slope.low > 0 for each in found]) <= 0.04


def test_lags_that_are_near_to_one_another_or_a_single_one_tell_no_growth() -> None:
    rng = np.random.default_rng(3)
    near = [rounds(x * along_and_across(-0.3, 0.4), Noise(1.5, 0.3), 16, rng) for x in (8.0, 9.0, 10.0)]
    for xs in ([8.0, 9.0, 10.0], [8.0]):
        found = fit_growth(xs, near[: len(xs)])
        assert found.slope.low > 0.8
        assert found.growth == "cannot tell (noise)"


def test_versions_that_are_the_same_weights_tell_no_growth() -> None:
    nothing = products(np.zeros((4, DIMENSIONS)), np.ones((4, DIMENSIONS)))
    found = fit_growth([0.0, 0.0], [nothing, nothing])
    assert (found.slope.value, found.growth, found.num_clear) == (0.0, "cannot tell (noise)", 0)


@pytest.mark.parametrize(("freedom", "point"), [(3, 3.182), (10, 2.228), (12, 2.179), (15, 2.131), (30, 2.042), (1000, 1.962)])
def test_the_points_of_students_distribution_are_those_of_the_tables(freedom: int, point: float) -> None:
    assert student_t(freedom) == pytest.approx(point, abs=2e-3)
