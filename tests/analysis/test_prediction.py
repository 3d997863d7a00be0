"""What a calibration is worth, judged on sweeps whose laws we chose, and warnings counted on cells made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from analysis.cells import Cell, Outcome, StepRow
from analysis.prediction import (
    FACTOR,
    VERDICTS,
    Prediction,
    Warned,
    advice_table,
    advised,
    judgement,
    predict,
    prediction_table,
    warn,
    warn_as_advised,
    warning_step,
    warning_table,
)
from learner.stability.rule import EXACTLY_ONE, Measured, Verdict
from learner.stability.signs import FAR_NATS
from tests.analysis.synthetic_sweep import make_sweep

FINE = [4e-9 * 1.5**place for place in range(20)]
"""Learning rates so close to each other that a grid does not hide an exponent of S."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- predictions


@pytest.mark.parametrize("lag_exponent", [None, EXACTLY_ONE])
def test_a_boundary_that_goes_as_one_over_s_is_predicted_within_the_factor(lag_exponent: Measured | None, rng: np.random.Generator) -> None:
    found = predict(make_sweep(lags=(4, 8, 16, 32)), rng, lag_exponent)
    assert [(one.calibrated_on, one.max_lag) for one in found] == [
        (pair, lag) for pair in ((4, 8), (4, 16), (4, 32), (8, 16), (8, 32), (16, 32)) for lag in (4, 8, 16, 32) if lag not in pair
    ]
    assert {one.arm for one in found} == {"cycles, clip"}
    assert all(one.is_right for one in found)
    assert "12 of 12 predictions" in prediction_table(found, "").note


def test_what_is_predicted_for_is_the_s_that_runs_reached(rng: np.random.Generator) -> None:
    """However they were set: with no run above a lag of 2 all have one boundary."""
    cells = [
        msgspec.structs.replace(cell, rows=[msgspec.structs.replace(row, lag=min(row.lag, 2.0)) for row in cell.rows])
        for cell in make_sweep(boundary_exponent=0.0, lags=(4, 8, 16), pipeline="queue")
    ]
    found = predict(cells, rng)
    assert len(found) == 3 and all(one.is_right for one in found)


def test_a_run_without_lag_is_looked_at_for_warnings_as_any_other() -> None:
    cell = msgspec.structs.replace(make_sweep(lags=(1,), seeds=(0,))[0], max_lag=0)
    assert warning_step(cell) is None


def test_a_boundary_that_does_not_go_as_one_over_s_is_not_predicted_by_one_over_s(rng: np.random.Generator) -> None:
    cells = make_sweep(boundary_exponent=0.25, lags=(4, 32, 256), learning_rates=FINE, has_rows=True, horizon=2000)
    by_paper = {one.calibrated_on: one for one in predict(cells, rng, EXACTLY_ONE)}
    for pair in ((4, 32), (32, 256)):
        assert by_paper[pair].is_right is False
    below, above = by_paper[4, 32].ratio, by_paper[32, 256].ratio
    assert below is not None and above is not None
    assert below < 1 / FACTOR and above > FACTOR, "too little for larger S, too much for smaller"
    note = prediction_table(list(by_paper.values()), "").note
    assert "of 3 predictions" in note and not note.startswith("3 of")
    assert all(one.is_right for one in predict(cells, rng)), "the exponent that the runs show has it right"


def test_a_boundary_that_the_learning_rates_do_not_hold_is_not_judged(rng: np.random.Generator) -> None:
    cells = make_sweep(lags=(8, 16, 32))
    only_stable = [cell for cell in cells if cell.max_lag != 16 or cell.outcome == "stable"]
    by_lag = {one.max_lag: one for one in predict(only_stable, rng)}
    assert (by_lag[16].measured, by_lag[16].ratio, by_lag[16].is_right) == (None, None, None)
    table = prediction_table(list(by_lag.values()), "")
    assert table.note.startswith(f"2 of 2 predictions within a factor {FACTOR:g}") and table.note.endswith("1 not judged.")
    assert [row[-2:] for row in table.rows if row[2] == "16"] == [["censored", "-"]]


def test_pipelines_and_surrogates_are_predicted_apart_and_two_values_of_s_predict_no_third(rng: np.random.Generator) -> None:
    cells = make_sweep(lags=(8, 16)) + make_sweep(lags=(4, 8, 16), surrogate="min-clip", pipeline="queue")
    assert {one.arm for one in predict(cells, rng)} == {"queue, min-clip"}
    held = [msgspec.structs.replace(cell, governor="hold") for cell in make_sweep(lags=(4, 8, 16))]
    assert predict(held, rng) == [], "a learning rate that was changed on the way is no outcome of the one that was set"


@pytest.mark.parametrize(("ratio", "is_right"), [(1 / FACTOR, True), (FACTOR, True), (1 / FACTOR - 1e-9, False), (FACTOR + 1e-9, False)])
def test_right_is_within_the_factor_either_way(ratio: float, is_right: bool) -> None:
    assert Prediction("arm", (4, 8), 16, ratio, 1.0).is_right is is_right


# --- advice


def test_of_cells_advised_as_inside_none_collapses_and_of_those_outside_all_do() -> None:
    cells = make_sweep(lags=(4, 8, 16))
    found = advised(cells)
    assert sum(map(len, found.values())) == len(cells), "each S has two others"
    inside, outside = found["cycles, clip", "inside"], found["cycles, clip", "outside"]
    assert len(inside) > 5 and {cell.outcome for cell in inside} == {"stable"}
    assert len(outside) > 5 and {cell.outcome for cell in outside} == {"collapsed"}
    (row,) = advice_table(found).rows
    counts = dict(zip(VERDICTS, row[1:], strict=True))
    assert counts["inside"] == f"0 of {len(inside)} (0%)"
    assert counts["outside"] == f"{len(outside)} of {len(outside)} (100%)"
    assert counts["unknown"] == "0 of 0"


def test_no_advice_is_judged_by_the_cells_that_it_came_from() -> None:
    assert advised(make_sweep(lags=(4, 8))) == {}, "the other S is one only"
    cells = make_sweep(lags=(4, 8, 16))
    turned = [
        cell if cell.max_lag != 8 else msgspec.structs.replace(cell, outcome="collapsed", collapse_step=cell.collapse_step or 1)
        for cell in cells
    ]
    assert split(advised(turned), 8) == split(advised(cells), 8)


def split(found: dict[tuple[str, Verdict], list[Cell]], max_lag: int) -> dict[tuple[str, Verdict], int]:
    """How many cells of one S were advised how."""
    counts = {key: sum(cell.max_lag == max_lag for cell in group) for key, group in found.items()}
    return {key: count for key, count in counts.items() if count}


# --- warnings


def small_cell(seed: int, num_steps: int, bad: Sequence[int], collapse: int | None = None, **changes: object) -> Cell:
    """A cell in which the batch's signal has degenerated at the steps `bad`."""
    rows = [
        StepRow(
            step=step,
            reward=0.0 if collapse is not None and step >= collapse else 0.5,
            lr=1e-3,
            lag=4.0,
            is_first_use=True,
            cosine=None,
            g_upd=1.0,
            drift=0.0,
            displacement=1e-3 * step,
            clip_fraction=0.0,
            effective_sample_size=None,
            kl_behaviour=2 * FAR_NATS / 8 if step in bad else 0.0,
            entropy=None,
            completion_length=8.0,
        )
        for step in range(num_steps)
    ]
    outcome: Outcome = "stable" if collapse is None else "collapsed"
    cell = Cell("cell", "queue", "clip", 2, 1e-3, seed, 40, "off", rows, [], outcome, collapse, num_completions=64)
    return msgspec.structs.replace(cell, **changes)


def test_warnings_are_counted_as_by_hand() -> None:
    warned, silent, in_vain = (
        small_cell(1, 30, bad=[12, 13, 14], collapse=20),
        small_cell(2, 30, bad=[], collapse=20),
        small_cell(3, 40, [7]),
    )
    assert warn([warned, silent, in_vain]) == [
        Warned("queue, clip", 2, 1e-3, 1, 12, 20),
        Warned("queue, clip", 2, 1e-3, 2, None, 20),
        Warned("queue, clip", 2, 1e-3, 3, 7, None),
    ]
    assert [one.lead for one in warn([warned, silent, in_vain])] == [8, None, None]
    table = warning_table(warn([warned, silent, in_vain]), "Warnings", "")
    assert table.rows == [[name, "1 of 2 (50%)", "1 of 1 (100%)", "8"] for name in ("queue, clip", "all")]


def test_a_warning_at_the_collapse_or_after_it_is_none_before_it() -> None:
    late = [small_cell(1, 30, bad=[20], collapse=20), small_cell(2, 30, bad=[25], collapse=20), small_cell(3, 30, bad=[4], collapse=20)]
    assert [one.lead for one in warn(late)] == [0, -5, 16]
    assert warning_table(warn(late), "Warnings", "").rows[-1] == ["all", "1 of 3 (33%)", "0 of 0", "16"]
    assert warning_table(warn(late[:2]), "Warnings", "").rows[-1] == ["all", "0 of 2 (0%)", "0 of 0", "-"]


def test_warnings_are_counted_by_arm_and_together_without_runs_that_were_held() -> None:
    cells = [
        small_cell(1, 30, bad=[10], collapse=20),
        small_cell(1, 30, bad=[18], collapse=20, surrogate="min-clip"),
        small_cell(1, 30, bad=[1], collapse=20, governor="hold"),
    ]
    assert warning_table(warn(cells), "Warnings", "").rows == [
        ["queue, clip", "1 of 1 (100%)", "0 of 0", "10"],
        ["queue, min-clip", "1 of 1 (100%)", "0 of 0", "2"],
        ["all", "2 of 2 (100%)", "0 of 0", "6"],
    ]


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, 5), ({"lag": 5.0}, None), ({"completion_length": 7.0}, None), ({"kl_behaviour": 0.1}, None)]
)
def test_a_cell_is_warned_of_by_its_divergence_a_completion_for_its_lag(changes: dict[str, float], expected: int | None) -> None:
    cell = small_cell(1, 20, bad=[5])
    rows = [msgspec.structs.replace(row, **changes) if row.step == 5 else row for row in cell.rows]
    assert warning_step(msgspec.structs.replace(cell, rows=rows)) == expected


def test_with_a_calibration_what_is_outside_is_known_from_the_start_and_a_sign_is_not_heeded_inside() -> None:
    cells = [small_cell(seed, 30, bad=[12], collapse=20) for seed in (1, 2, 3, 4)]
    verdicts: tuple[Verdict, ...] = ("outside", "inside", "cannot tell", "unknown")
    found = warn_as_advised({("queue, clip", verdict): [cell] for verdict, cell in zip(verdicts, cells, strict=True)})
    assert [one.warning_step for one in found] == [0, None, 12, 12]


def test_a_cell_that_did_not_measure_what_the_sign_is_made_of_is_no_stable_run_without_a_warning() -> None:
    measured = small_cell(1, 20, bad=[])
    older = msgspec.structs.replace(measured, rows=[msgspec.structs.replace(row, completion_length=None) for row in measured.rows])
    assert [len(warn(cells)) for cells in ([measured], [older], [measured, older])] == [1, 0, 1]


@pytest.mark.parametrize("pipeline", ["queue", "cycles"])
def test_a_row_that_is_not_measured_is_passed_over(pipeline: str) -> None:
    cell = small_cell(1, 20, bad=[5, 9], pipeline=pipeline)
    assert warning_step(cell) == 5
    for field in ("reward", "g_upd", "displacement"):
        rows = [msgspec.structs.replace(row, **{field: None}) if row.step == 5 else row for row in cell.rows]
        assert warning_step(msgspec.structs.replace(cell, rows=rows)) == 9
    assert warning_step(msgspec.structs.replace(cell, rows=[])) is None


# --- together


def test_the_judgement_of_a_sweep_is_the_same_for_the_same_seed_and_says_nothing_where_there_is_nothing() -> None:
    cells = make_sweep(lags=(4, 8, 16))
    tables = judgement(cells, np.random.default_rng(3))
    assert tables == judgement(cells, np.random.default_rng(3))
    assert [len(table.rows) for table in tables] == [3, 3, 1, 2, 2]
    assert len({table.title for table in tables}) == 5
    assert all(len(row) == len(table.header) for table in tables for row in table.rows)
    few = judgement(make_sweep(lags=(4, 8)), np.random.default_rng(3))
    assert [len(table.rows) for table in few] == [0, 0, 0, 2]
