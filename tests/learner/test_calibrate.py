"""Calibration: the constants of runs made with known ones lie within the stated intervals, and what runs do not decide stays open."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from learner.stability.calibrate import (
    RunRecord,
    StepMeasure,
    calibrate,
    fit_batch,
    fit_horizon,
    fit_lag_exponent,
    fit_signal,
    root_mean_square_update,
    straightness,
    travelled,
)
from learner.stability.rule import Calibration, Measured, margins

G_UPD = 3.0
HORIZON = 3.2e-5
LEARNING_RATES = (1e-6, 5e-7, 2e-7, 1e-7)
TABLE_2 = {8: (4, 8, None, None), 16: (2, 4, 10, None), 32: (1, 2, 5, 10)}
"""M_collapse by S and learning rate (paper, Table 2)."""


def run_until(horizon: float, max_lag: int, lr: float, num_steps: int, alpha: float = 1.0, name: str = "run") -> RunRecord:
    """A run that goes eta t^alpha and collapses once it has gone beyond `horizon`, in learning rate times steps."""
    steps: list[StepMeasure] = []
    for step in range(num_steps):
        distance = lr * (step + 1) ** alpha
        steps.append(StepMeasure(step, None, distance * G_UPD, G_UPD, None))
        if distance >= horizon:
            return RunRecord(name, max_lag, lr, True, step + 1, num_steps, steps)
    return RunRecord(name, max_lag, lr, False, None, num_steps, steps)


def outcome(max_lag: int, lr: float, collapsed: bool) -> RunRecord:
    return RunRecord(f"{max_lag}/{lr}", max_lag, lr, collapsed, 10 if collapsed else None, 100, [])


def ends(measured: Measured | None) -> tuple[Any, ...]:
    assert measured is not None
    return measured.value, measured.lower, measured.upper


def table_2(num_stable_steps: int = 1400) -> list[RunRecord]:
    """The paper's runs: those that collapse go straight, the stable ones diffuse (claim c)."""
    runs = []
    for max_lag, row in TABLE_2.items():
        for lr, sync in zip(LEARNING_RATES, row, strict=True):
            num_steps = num_stable_steps if sync is None else sync * max_lag
            steps = [
                StepMeasure(step, None, G_UPD * lr * (step + 1) ** (0.5 if sync is None else 1.0), G_UPD, None) for step in range(num_steps)
            ]
            runs.append(RunRecord(f"{max_lag}/{lr}", max_lag, lr, sync is not None, num_steps if sync else None, num_steps, steps))
    return runs


def test_a_collapse_is_bracketed_by_the_displacements_s_steps_before_and_at_it() -> None:
    run = run_until(HORIZON, 8, 1e-6, 100)
    assert run.collapse_step == 32
    assert travelled(run) == pytest.approx((24e-6, 32e-6))
    assert travelled(run_until(1.0, 8, 1e-6, 100)) == pytest.approx((1e-4, math.inf))
    assert travelled(run_until(4.5e-6, 8, 1e-6, 100)) == pytest.approx((0.0, 5e-6))  # Within the first S steps nothing is known below.
    assert travelled(outcome(8, 1e-6, True)) is None


def test_the_update_s_size_is_its_root_mean_square() -> None:
    steps = [StepMeasure(step, None, None, size, None) for step, size in enumerate((3.0, None, 4.0))]
    assert root_mean_square_update(steps) == pytest.approx(math.sqrt(12.5))
    assert root_mean_square_update([]) is None and root_mean_square_update([StepMeasure(0, None, None, 0.0, None)]) is None


@pytest.mark.parametrize(("num_runs", "scatter", "max_lag"), [(6, 0.3, 1), (12, 0.3, 8), (24, 0.5, 4)])
def test_a_known_horizon_lies_in_the_interval_in_about_95_of_100_sweeps(num_runs: int, scatter: float, max_lag: int) -> None:
    """Half of the runs are too short to collapse, so they only bound it from below."""
    held = num_decisive = 0
    scatters = []
    for seed in range(40):
        rng = random.Random(seed)
        horizons = [HORIZON * math.exp(scatter * rng.gauss(0, 1)) for _ in range(num_runs)]
        fit = fit_horizon([run_until(own, max_lag, LEARNING_RATES[index % 4], 120) for index, own in enumerate(horizons)])
        if fit.is_decisive:
            assert fit.constant is not None
            num_decisive += 1
            held += fit.constant.lower <= HORIZON <= fit.constant.ceiling
            scatters.append(fit.scatter)
    assert num_decisive >= 36
    assert held / num_decisive >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / num_decisive)
    assert sum(scatters) / num_decisive == pytest.approx(scatter, rel=0.2)


def test_the_paper_s_table_gives_a_sharp_horizon_a_gap_for_the_batch_and_a_wide_lag_exponent() -> None:
    """The 320 of every cell is quantised by the weight syncs: the table says that the collapse set in between 2.88e-5 and 3.2e-5."""
    runs = table_2()
    horizon, batch, exponent = fit_horizon(runs), fit_batch(runs), fit_lag_exponent(runs)
    assert horizon.is_decisive and horizon.constant is not None and batch.constant is not None and exponent is not None
    assert 2.8e-5 < horizon.constant.lower < 2.88e-5 and 3.19e-5 < horizon.constant.ceiling < 3.3e-5
    assert (batch.constant.lower, batch.constant.upper) == pytest.approx((1.6e-6, 3.2e-6))
    # Twelve outcomes on a grid of factors of two hold any boundary S^b eta from the root of S to its square and more.
    assert (exponent.lower, exponent.upper) == pytest.approx((0.5, math.log2(5)))


def test_where_stable_runs_went_much_farther_displacement_is_said_not_to_decide() -> None:
    rng = random.Random(1)
    runs = [run_until(HORIZON * math.exp(0.2 * rng.gauss(0, 1)) if index % 2 else 1.0, 8, 1e-6, 320) for index in range(12)]
    fit = fit_horizon(runs)
    assert not fit.is_decisive
    assert fit.constant is not None and fit.constant.upper is None
    assert "6 of 6 stable runs went farther" in fit.notes
    assert margins(Calibration(horizon=fit.constant), 1e-6, 0, 1000).verdict == "cannot tell"


def test_what_stable_runs_went_through_is_kept_where_displacement_does_not_decide() -> None:
    stable = run_until(1.0, 8, 1e-6, 320)
    collapsed = [run_until(HORIZON / 8 * 40**share, 1, 1e-7, 2000) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    fit = fit_horizon([stable, *collapsed])
    assert all(run.collapsed for run in collapsed)
    assert not fit.is_decisive and fit.scatter == 0.0
    assert ends(fit.constant) == (pytest.approx(3.2e-4), pytest.approx(3.2e-4), None)
    assert "scatters by a factor" in fit.notes


def test_runs_that_collapsed_on_what_the_first_weights_sampled_say_nothing_of_the_horizon() -> None:
    """Within its first S steps a run is broken by lag, if by anything: there was no way to go."""
    late = [run_until(HORIZON, 8, lr, 400) for lr in (1e-6, 5e-7, 2e-7, 1e-7)]
    early = [run_until(HORIZON / 100, 64, 1e-6, 400)._replace(max_lag=lag) for lag in (1, 16, 64)]
    assert all(run.collapse_step == 1 for run in early)
    assert fit_horizon([*late, *early]) == fit_horizon(late)
    at_s, after = run_until(HORIZON, 32, 1e-6, 400), run_until(HORIZON, 31, 1e-6, 400)
    assert (at_s.collapse_step, fit_horizon([at_s]).num_collapsed, fit_horizon([after]).num_collapsed) == (32, 0, 1)


@pytest.mark.parametrize(("alpha", "num_steps"), [(1.0, 50), (0.5, 100), (0.5, 400)])
def test_straightness_is_the_way_of_a_stable_run_over_that_of_a_straight_path(alpha: float, num_steps: int) -> None:
    assert straightness(run_until(1.0, 8, 1e-7, num_steps, alpha)) == pytest.approx(num_steps ** (alpha - 1))


def test_a_run_that_comes_back_went_as_far_as_it_ended_and_not_as_it_once_was() -> None:
    out = run_until(1.0, 8, 1e-7, 100)
    back = [step._replace(displacement=0.25 * 100 * 1e-7 * G_UPD) if step.step == 99 else step for step in out.steps]
    assert straightness(out._replace(steps=back)) == pytest.approx(0.25)


def test_straightness_is_not_known_of_runs_that_collapsed_or_did_not_measure_their_way() -> None:
    assert straightness(run_until(HORIZON, 8, 1e-6, 400)) is None
    assert straightness(outcome(8, 1e-6, False)) is None
    still = [StepMeasure(step, None, 0.0, G_UPD, None) for step in range(5)]
    assert straightness(RunRecord("still", 8, 1e-6, False, None, 5, still)) is None


def test_one_stable_run_a_little_farther_does_not_refute_the_horizon() -> None:
    rng = random.Random(2)
    runs = [run_until(HORIZON * math.exp(0.3 * rng.gauss(0, 1)), 1, 1e-6, 400) for _ in range(8)]
    farthest = max(bracket[1] for run in runs if (bracket := travelled(run)))
    assert fit_horizon([*runs, run_until(1.0, 1, farthest / 100, 105)]).is_decisive


def test_too_few_collapses_give_no_interval_and_none_a_lower_bound() -> None:
    stable = [run_until(1.0, 8, 1e-7, 100), run_until(1.0, 8, 1e-7, 200)]
    fit = fit_horizon(stable)
    assert ends(fit.constant) == (pytest.approx(2e-5), pytest.approx(2e-5), None) and "lower bound" in fit.notes
    few, alone = run_until(HORIZON, 8, 1e-6, 100), fit_horizon([run_until(HORIZON, 8, 1e-6, 100)])
    assert ends(fit_horizon([*stable, few]).constant) == ends(fit.constant), "as far as stable runs went is known to be stable"
    assert ends(alone.constant) == (pytest.approx(HORIZON, rel=0.1), 0.0, None)
    assert not alone.is_decisive and not fit_horizon([*stable, few]).is_decisive
    assert fit_horizon([]).constant is None
    assert fit_horizon([outcome(8, 1e-6, True)]).constant is None


def sweep(seed: int, boundary: float, scale: float, exponent: float = 1.0, repeats: int = 3) -> list[RunRecord]:
    """Outcomes over a grid of S and learning rate, with logistic odds of collapse in log(16 (S/16)^b eta)."""
    rng = random.Random(seed)
    return [
        outcome(
            max_lag, lr, rng.random() < 1 / (1 + math.exp((math.log(boundary) - math.log(16 * (max_lag / 16) ** exponent * lr)) / scale))
        )
        for max_lag in (4, 8, 16, 32, 64)
        for lr in (4e-7, 2e-7, 1e-7, 5e-8)
        for _ in range(repeats)
    ]


def share_that_holds(found: Sequence[Measured | None], true: float) -> float:
    return sum(one is not None and one.lower <= true <= one.ceiling for one in found) / len(found)


def test_a_known_batch_radius_lies_in_the_interval_in_about_95_of_100_sweeps() -> None:
    found = [fit_batch(sweep(seed, 2.1e-6, 0.3)).constant for seed in range(60)]
    assert share_that_holds(found, 2.1e-6) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 60)
    assert all(one is not None and one.lower > 0 and one.ceiling / one.lower < 4 for one in found)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_known_lag_exponent_lies_in_the_interval_in_about_95_of_100_sweeps(exponent: float) -> None:
    found = [fit_lag_exponent(sweep(seed, 2.1e-6, 0.3, exponent)) for seed in range(20)]
    assert share_that_holds(found, exponent) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 20)
    assert sum(one is not None and one.upper is not None and one.upper / max(one.lower, 0.01) < 4 for one in found) > 13


def test_with_the_measured_exponent_the_batch_constant_is_at_the_reference_lag() -> None:
    fit = fit_batch(sweep(5, 2.1e-6, 0.02, exponent=0.5, repeats=1), Measured(0.5, 0.4, 0.6))
    assert fit.reference_lag == pytest.approx(16.0)
    assert fit.constant is not None and fit.constant.lower < 2.1e-6 < fit.constant.ceiling and "gap" in fit.notes


def test_outcomes_on_one_side_bound_on_one_side() -> None:
    stable = fit_batch([outcome(8, 1e-7, False), outcome(16, 1e-7, False), outcome(0, 1e-3, False)])
    assert ends(stable.constant) == (pytest.approx(1.6e-6), pytest.approx(1.6e-6), None)
    collapsed = fit_batch([outcome(8, 1e-6, True), outcome(16, 1e-6, True)])
    assert ends(collapsed.constant) == (pytest.approx(8e-6), 0.0, pytest.approx(8e-6))
    assert fit_batch([]).constant is None and fit_batch([outcome(0, 1e-3, True)]).constant is None


def test_outcomes_that_have_nothing_to_do_with_the_product_leave_it_open() -> None:
    backwards = [outcome(S, lr, S * lr < 3e-6) for S in (8, 16, 32) for lr in LEARNING_RATES]
    for runs in (backwards, [outcome(8, 1e-6, True), outcome(8, 1e-6, False)] * 6):
        fit = fit_batch(runs)
        assert fit.constant is not None and (fit.constant.lower, fit.constant.upper) == (0.0, None)
        assert "does not tell" in fit.notes


def test_a_lag_exponent_needs_both_outcomes_at_two_lags() -> None:
    assert fit_lag_exponent([]) is None
    assert fit_lag_exponent([outcome(8, 1e-6, True), outcome(8, 1e-7, False)]) is None
    assert fit_lag_exponent([outcome(8, 1e-6, False), outcome(16, 1e-7, False)]) is None


def diffusing(seed: int, kappa: float, floor: float = 1e-4, power: float = 1.0, num_steps: int = 400) -> RunRecord:
    """A stable run in cycles of 8 uses, whose log-ratios are kappa drift^power, with noise of 20 %, over a floor in KL."""
    rng = random.Random(seed)
    steps = []
    for step in range(num_steps):
        drift = 1e-3 * (step % 8) * (1 + 0.1 * rng.random())
        spread = kappa * drift**power * math.exp(0.2 * rng.gauss(0, 1))
        steps.append(StepMeasure(step, drift, 1e-3 * (step + 1), G_UPD, spread**2 / 2 + floor))
    return RunRecord(f"stable-{seed}", 8, 1e-4, False, None, num_steps, steps)


def test_a_known_signal_radius_lies_in_the_interval_in_about_95_of_100_runs() -> None:
    found = [fit_signal(diffusing(seed, 40.0), 0.2) for seed in range(100)]
    true = math.log(1.2) / 40 / G_UPD
    assert share_that_holds([fit.kappa for fit in found], 40.0) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 100)
    assert share_that_holds([fit.constant for fit in found], true) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 100)
    assert all(fit.constant is not None and fit.constant.ceiling / fit.constant.lower < 1.5 for fit in found)


def test_log_ratios_that_do_not_grow_in_proportion_are_said_not_to() -> None:
    assert "do not extrapolate" in fit_signal(diffusing(1, 40.0, floor=0.0, power=0.5), 0.2).notes
    assert "do not extrapolate" not in fit_signal(diffusing(1, 40.0), 0.2).notes


def test_a_run_without_enough_drift_or_signal_gives_no_radius() -> None:
    assert fit_signal(diffusing(1, 40.0, num_steps=40), 0.2).constant is None
    assert fit_signal(outcome(8, 1e-6, False), 0.2).constant is None
    silent = fit_signal(diffusing(1, 0.0), 0.2)
    assert silent.constant is None and "floor" in silent.notes


def test_a_calibration_keeps_where_it_comes_from_and_survives_json() -> None:
    found = calibrate(table_2(), 0.2, {"policy": "Llama-3.2-1B"})
    assert found.runs == tuple(run.name for run in table_2()) and found.valid_for == {"policy": "Llama-3.2-1B"}
    assert "gap" in found.notes and "censored" in found.notes and found.largest_lag_seen == 32
    assert found.horizon == fit_horizon(table_2()).constant, "a horizon as sharp as that keeps its say"
    assert msgspec.json.decode(msgspec.json.encode(found), type=Calibration) == found
    assert margins(found, 1e-7, 8, 100).verdict == "inside"
    assert margins(found, 1e-6, 32, 1000).verdict == "outside"


def by_product(rng: random.Random, max_lag: int, lr: float, product: float, scatter: float) -> RunRecord:
    """A run that collapses if S eta is above `product`, after its first S steps, at a displacement that has nothing to do with why."""
    collapses = max_lag * lr * math.exp(0.1 * rng.gauss(0, 1)) > product
    return run_until(
        60 * lr * math.exp(scatter * rng.gauss(0, 1)) if collapses else 1.0, max_lag, lr, 400, name=f"{max_lag}/{lr}/{rng.random()}"
    )


def test_late_collapses_that_the_product_explains_better_say_nothing_of_the_horizon() -> None:
    for seed in range(10):
        rng = random.Random(seed)
        runs = [by_product(rng, max_lag, 1e-6 * 1.5**place, 2e-5, 0.6) for max_lag in (4, 8) for place in range(10) for _ in range(3)]
        found = calibrate(runs, 0.2, {})
        assert found.horizon is not None and found.horizon.upper is None and "are left out" in found.notes
        stable = [bracket[0] for run in runs if not run.collapsed and run.max_lag * run.lr < 1e-5 and (bracket := travelled(run))]
        assert found.horizon.value >= max(stable) * (1 - 1e-9), "what stable runs went through is known all the same"
        assert found.horizon.value <= 400 * 1e-6 * 1.5**9, "but not of those that came through where others collapsed"


def test_a_collapse_below_the_product_is_the_horizon_s_whatever_the_scatter() -> None:
    """Long runs at rates that short ones bear: no product explains them."""
    rng = random.Random(4)
    runs = [by_product(rng, max_lag, 1e-6 * 1.5**place, 2e-5, 0.6) for max_lag in (4, 8) for place in range(10) for _ in range(3)]
    low = [run_until(4e-3 * math.exp(0.3 * rng.gauss(0, 1)), 4, 2e-6, 6000, name=f"long-{place}") for place in range(6)]
    assert not fit_horizon([*runs, *low]).is_decisive
    found = calibrate([*runs, *low], 0.2, {})
    assert found.horizon is not None and found.horizon.upper is not None
    assert 2e-3 < found.horizon.value < 8e-3


def test_without_a_collapse_the_batch_constant_is_that_of_the_ratios() -> None:
    found = calibrate([outcome(8, 1e-6, False), diffusing(3, 40.0)], 0.2, {})
    assert found.batch == fit_signal(diffusing(3, 40.0), 0.2).constant
    assert "stable-3" in found.notes and "lower bound" in found.notes
    assert calibrate([], 0.2, {}).batch is None and calibrate([], 0.2, {}).horizon is None
