"""Each figure shows the cells it is given: panels, labels, curves, marks; and the same cells give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from xml.etree import ElementTree

import matplotlib
import msgspec
import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import sweep_figures as figures
from analysis.cells import Cell
from analysis.laws import boundary_law, escape_law
from tests.analysis.synthetic_sweep import G_UPD, make_sweep

RATES = (1e-7, 4e-7, 1.6e-6)
Draw = Callable[[list[Cell]], Figure]
ALL: list[Draw] = [
    *(figures.draw_sweep, figures.draw_small_rates, figures.draw_panels, figures.draw_phase),
    *(figures.draw_collapse_times, figures.draw_displacement, figures.draw_cosines),
]


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return make_sweep(lags=(4, 16), learning_rates=RATES, horizon=150, noise=0.0)


def test_figure_1_has_three_rows_a_column_for_each_rate_and_the_curves_of_each_lag(cells: list[Cell]) -> None:
    axes = figures.draw_sweep(cells).axes
    assert len(axes) == 3 * 3
    assert [panel.get_title() for panel in axes[:3]] == ["η = 1.6e-06", "η = 4e-07", "η = 1e-07"]
    assert [panel.get_ylabel() for panel in axes[::3]] == ["training reward", "Grad CosSim", "validation reward"]
    assert [panel.get_xlabel() for panel in axes[6:]] == ["learner step"] * 3
    assert len(axes[4].lines) == 2 * (2 + 1), "two lags, each with two seeds and their mean"
    marked = sorted(float(x) for line in axes[0].lines if line.get_marker() == "x" for x in line.get_xdata())
    assert marked == sorted(cell.collapse_step for cell in cells if cell.lr == 1.6e-6 and cell.collapse_step is not None) != []


def test_a_mean_is_that_of_its_seeds_and_ends_with_the_first_of_them(cells: list[Cell]) -> None:
    one, two = (cell for cell in cells if cell.lr == 1.6e-6 and cell.max_lag == 4)
    pair = [one, msgspec.structs.replace(two, rows=two.rows[:5])]
    mean = figures.draw_sweep(pair).axes[0].lines[2]
    expected = [((a.reward or 0) + (b.reward or 0)) / 2 for a, b in zip(one.rows, two.rows[:5], strict=False)]
    np.testing.assert_allclose(np.array(mean.get_ydata(), float), expected)


def test_of_many_rates_the_columns_are_those_around_the_boundary() -> None:
    rates = [10.0**-power for power in range(1, 13)]
    cells = make_sweep(lags=(1,), learning_rates=rates, seeds=(0,), product=10.0**-6.5, escape=1e-12, has_rows=False, noise=0.0)
    assert {cell.lr for cell in cells if cell.outcome == "collapsed"} == {lr for lr in rates if lr > 10.0**-6.5}
    assert figures.shown_rates(cells) == rates[3:9]
    assert figures.shown_rates(cells[:3]) == sorted(rates[:3], reverse=True)


def test_figure_3_shows_the_smallest_rates_of_the_longest_horizon(cells: list[Cell]) -> None:
    rates = (5e-8, 6e-8, 7e-8, 8e-8, 9e-8)
    long = make_sweep(lags=(8, 16), learning_rates=rates, seeds=(0,), horizon=300)
    figure = figures.draw_small_rates([*cells, *long])
    assert [panel.get_ylabel() for panel in figure.axes] == ["training reward", "Grad CosSim", "validation reward"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"S = 16, η = {lr:g}" for lr in rates[:4]]


def test_figure_4_has_a_panel_for_each_setting_with_its_collapses_marked(cells: list[Cell]) -> None:
    without = [cell for cell in cells if (cell.max_lag, cell.lr) != (16, 1e-7)]
    figure = figures.draw_panels(without)
    assert len(figure.axes) == 2 * 3
    for panel, (lag, lr) in zip(figure.axes, product((4, 16), sorted(RATES, reverse=True)), strict=True):
        expected = [cell.collapse_step for cell in without if (cell.max_lag, cell.lr) == (lag, lr) and cell.collapse_step is not None]
        found = [line.get_xdata() for line in panel.lines if line.get_linestyle() == "--"]
        assert [float(xs[0]) for xs in found] == expected
    assert [text.get_text() for text in figure.axes[-1].texts] == ["not run"]


def test_the_phase_diagram_counts_collapses_and_draws_both_lines(cells: list[Cell]) -> None:
    law = boundary_law(cells, np.random.default_rng(0), 50)
    axes = figures.draw_phase(cells, law).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale(), axes.get_yscale()) == ("S", "learning rate η", "log", "log")
    counts = {text.xy: text.get_text() for text in axes.texts if isinstance(text, matplotlib.text.Annotation)}
    assert counts[4, 1e-7] == "0/2" and counts[16, 1.6e-6] == "2/2" and len(counts) == 6
    paper = next(line for line in axes.lines if line.get_label() == "1/S")
    (left, right), (top, bottom) = np.array(paper.get_xdata(), float), np.array(paper.get_ydata(), float)
    assert left * top == pytest.approx(right * bottom) == pytest.approx(law.constant)
    fit = next(line for line in axes.lines if str(line.get_label()).startswith("fit"))
    (left, right), (top, bottom) = np.array(fit.get_xdata(), float), np.array(fit.get_ydata(), float)
    assert np.log(top / bottom) / np.log(right / left) == pytest.approx(law.exponent)


def test_collapse_times_are_those_of_the_cells_beside_the_mean_of_the_law(cells: list[Cell]) -> None:
    law = escape_law(cells, np.random.default_rng(0), 50)
    axes = figures.draw_collapse_times(cells, law).axes[0]
    points = sorted(y for line in axes.lines if line.get_marker() == "o" for y in np.array(line.get_ydata(), float))
    assert points == pytest.approx(sorted(cell.collapse_step * cell.lr for cell in cells if cell.collapse_step is not None))
    assert any(law.mean in np.array(line.get_ydata(), float) for line in axes.lines)


def test_displacements_over_the_rate_have_the_slopes_of_the_guides(cells: list[Cell]) -> None:
    axes = figures.draw_displacement(cells).axes[0]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", "learner step")

    def slopes(colour: str, style: str) -> list[float]:
        lines = [line for line in axes.lines if line.get_color() == colour and line.get_linestyle() == style]
        ends = [(np.log(np.array(line.get_xdata(), float)), np.log(np.array(line.get_ydata(), float))) for line in lines]
        return [float((y[-1] - y[0]) / (x[-1] - x[0])) for x, y in ends]

    starts = [float(np.array(line.get_ydata(), float)[0]) for line in axes.lines]
    assert starts == pytest.approx([G_UPD] * len(starts)), "the first update is as long as the gradient at every rate"
    assert slopes(figures.GUIDE, ":") == pytest.approx([1.0, 0.5])
    assert slopes(figures.COLLAPSED, "-") == pytest.approx([1.0] * len(slopes(figures.COLLAPSED, "-")), abs=0.01)
    assert slopes(figures.STABLE, "-") == pytest.approx([0.5] * len(slopes(figures.STABLE, "-")), abs=0.01)


def test_cosines_of_one_batch_and_across_batches_are_apart(cells: list[Cell]) -> None:
    same, new, means = figures.draw_cosines(cells).axes
    assert (same.get_title(), new.get_title()) == ("pairs on the same batch", "pairs across a change of batch")
    assert len([line for line in means.lines if line.get_marker() == "o"]) == len(cells)
    stable = next(cell for cell in cells if cell.outcome == "stable")
    first = [row.cosine for row in stable.rows if row.is_first_use and row.cosine is not None]
    point = next(line for line in means.lines if line.get_color() == figures.STABLE)
    assert float(np.array(point.get_ydata(), float)[0]) == pytest.approx(sum(first) / len(first))
    fresh = make_sweep(pipeline="queue", lags=(4,), learning_rates=(1e-7,), seeds=(0,), horizon=30)
    assert [text.get_text() for text in figures.draw_cosines(fresh).axes[0].texts] == ["there are no such pairs"]


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_figures_are_well_formed_and_the_same_each_time(draw: Draw, cells: list[Cell]) -> None:
    before = dict(matplotlib.rcParams)
    few = [cell for cell in cells if cell.lr != 4e-7]
    figure = draw(few)
    first = figures.svg_of(figure, "name")
    assert first == figures.svg_of(draw(few), "name")
    ElementTree.fromstring(first)
    assert not re.search(r"\d{4}-\d\d-\d\d", first), "a date"
    assert figures.png_of(figure).startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_a_figure_can_be_drawn_of_runs_that_measured_nothing(draw: Draw) -> None:
    bare = Cell("bare", "queue", "clip", 0, 1e-6, 0, 10, "off", [], [], "stable")
    ElementTree.fromstring(figures.svg_of(draw([bare]), "bare"))
