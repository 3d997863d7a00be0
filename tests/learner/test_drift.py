"""The drift exponent: known laws of motion are recovered within the stated interval, in about the stated share of trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from learner.stability.drift import DriftWindow, drift_exponent, slope, student_t

Paths = NDArray[np.float64]
WIDTH = 256
LAGS = [1, 2, 4, 8, 16]


def noise(rng: np.random.Generator, runs: int, steps: int, dimensions: int) -> Paths:
    """Independent updates of mean square norm 1, float64 (runs, steps, dimensions)."""
    return np.asarray(rng.standard_normal((runs, steps, dimensions)) / np.sqrt(dimensions))


def walk(rng: np.random.Generator, runs: int, steps: int, dimensions: int) -> Paths:
    return noise(rng, runs, steps, dimensions)


def ballistic(rng: np.random.Generator, runs: int, steps: int, dimensions: int) -> Paths:
    updates = noise(rng, runs, steps, dimensions)
    updates[:, :, 0] += 2.0
    return updates


def correlated(rng: np.random.Generator, runs: int, steps: int, dimensions: int) -> Paths:
    updates = noise(rng, runs, steps, dimensions)
    for step in range(1, steps):
        updates[:, step] = 0.8 * updates[:, step - 1] + 0.6 * updates[:, step]
    return updates


def path(updates: Paths) -> Paths:
    """Positions before and after each update, (runs, steps + 1, dimensions)."""
    return np.concatenate([np.zeros_like(updates[:, :1]), np.cumsum(updates, axis=1)], axis=1)


def msd_correlated(lag: int) -> float:
    return lag + 2 * sum((lag - apart) * 0.8**apart for apart in range(1, lag))


LAWS: dict[str, tuple[Callable[..., Paths], Callable[[int], float]]] = {
    "walk": (walk, lambda lag: lag),
    "ballistic": (ballistic, lambda lag: 4 * lag**2 + lag),
    "correlated": (correlated, msd_correlated),
}


def fill(window: DriftWindow, positions: Paths, first: int, last: int, lags: list[int] = LAGS) -> DriftWindow:
    """Feeds the distances at steps first + 1 .. last of one trajectory, (steps + 1, dimensions)."""
    distances = {lag: np.linalg.norm(positions[lag:] - positions[:-lag], axis=1) for lag in lags}
    for step in range(first + 1, last + 1):
        window.add({lag: float(distances[lag][step - lag]) for lag in lags if step >= lag})
    return window


@pytest.mark.parametrize(("dimensions", "runs"), [(2, 200), (30, 100), (1000, 20)])
@pytest.mark.parametrize("law", LAWS)
def test_a_window_s_interval_holds_the_law_in_about_95_of_100_trajectories(law: str, dimensions: int, runs: int) -> None:
    make, msd = LAWS[law]
    true = slope([math.log(lag) for lag in LAGS], [math.log(msd(lag)) / 2 for lag in LAGS])
    positions = path(make(np.random.default_rng(7), runs, WIDTH + max(LAGS), dimensions))
    found = [fill(DriftWindow(WIDTH), one, max(LAGS), WIDTH + max(LAGS)).exponent() for one in positions]
    held = np.mean([exponent is not None and exponent.lower <= true <= exponent.upper for exponent in found])
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs) <= held
    widths = [exponent.upper - exponent.lower for exponent in found if exponent is not None]
    assert np.mean(widths) < 0.3 / np.sqrt(dimensions)  # An interval that says something: more so where there is more to average.


@pytest.mark.parametrize(("dimensions", "runs"), [(2, 200), (30, 100), (1000, 20)])
@pytest.mark.parametrize("law", ["walk", "ballistic"])
def test_from_displacements_alone_the_interval_holds_the_law_in_at_least_about_95_of_100(law: str, dimensions: int, runs: int) -> None:
    displacements = np.linalg.norm(path(LAWS[law][0](np.random.default_rng(11), runs, 512, dimensions)), axis=2)
    steps = list(range(513))
    true = {"walk": 0.5, "ballistic": 1.0}[law]
    found = [drift_exponent(steps, one.tolist()) for one in displacements]
    # Independent noise bends a straight path's first steps by a hundredth of alpha: allowed for beside the interval.
    held = np.mean([exponent is not None and exponent.lower - 0.015 <= true <= exponent.upper + 0.015 for exponent in found])
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs) <= held


def test_the_textbook_interval_of_a_log_log_fit_would_be_far_too_narrow() -> None:
    """Why drift_exponent is not a plain regression: its nominal 95 % hold the law in less than half of the random walks."""
    displacements = np.linalg.norm(path(walk(np.random.default_rng(3), 100, 512, 2)), axis=2)[:, 1:]
    xs = np.log(np.arange(1, 513))
    held = 0
    for ys in np.log(displacements):
        value = slope(xs, ys)
        residuals = ys - ys.mean() - value * (xs - xs.mean())
        held += abs(value - 0.5) < 1.96 * np.sqrt(residuals.var() / ((xs - xs.mean()) ** 2).sum())
    assert held < 50


def test_a_window_forgets_that_the_run_was_ballistic_first() -> None:
    rng = np.random.default_rng(5)
    updates = np.concatenate([ballistic(rng, 1, 400, 100), walk(rng, 1, 400, 100)], axis=1)
    positions = path(updates)[0]
    window = fill(DriftWindow(WIDTH), positions, 0, 400)
    early = window.exponent()
    fill(window, positions, 400, 800)
    late = window.exponent()
    assert early is not None and late is not None
    assert early.lower > 0.9 and late.upper < 0.6
    alone = drift_exponent(range(500, 801), np.linalg.norm(positions[500:], axis=1).tolist())
    assert alone is None or alone.upper < 0.5  # From the origin, neither law is seen: the window is what tells.


def test_distances_seen_only_now_and_then_are_enough() -> None:
    positions = path(walk(np.random.default_rng(13), 1, 512, 200))[0]
    window = DriftWindow(512)
    for step in range(1, 513):
        window.add({lag: float(np.linalg.norm(positions[step] - positions[step - lag])) for lag in LAGS if step % 16 == lag % 16})
    exponent = window.exponent()
    assert exponent is not None
    assert exponent.lower <= 0.5 <= exponent.upper and exponent.num_steps == 512


def test_without_enough_to_go_on_there_is_no_exponent() -> None:
    window = DriftWindow(64)
    for _ in range(63):
        window.add({1: 1.0, 2: 1.5})
    assert window.exponent() is None  # Not full.
    window.add({1: 1.0, 2: 1.5})
    assert window.exponent() is not None
    still, single, long = DriftWindow(64), DriftWindow(64), DriftWindow(64)
    for _ in range(64):
        still.add({1: 0.0, 2: 0.0})
        single.add({1: 1.0})
        long.add({1: 1.0, 32: 5.0})
    assert still.exponent() is None and single.exponent() is None and long.exponent() is None
    assert drift_exponent([], []) is None
    assert drift_exponent([0, 1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0, 4.0]) is None
    assert drift_exponent(range(100), [0.0] * 100) is None


def test_a_narrow_window_and_disordered_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="32"):
        DriftWindow(31)
    with pytest.raises(ValueError, match="ascend"):
        drift_exponent([1, 1], [1.0, 2.0])


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.182), (7, 2.365), (30, 2.042), (1000, 1.962)])
def test_student_s_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, rel=0.01)
