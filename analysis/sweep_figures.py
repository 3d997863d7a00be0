"""The paper's figures, drawn from the cells of a sweep that share a pipeline and a surrogate.

Each function takes such cells and gives a matplotlib Figure; `svg_of` and `png_of` turn it into bytes that depend on nothing but the cells.
Long runs are drawn as means over blocks of steps. A mean over seeds is drawn as far as all of its runs go.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import product
from statistics import fmean, geometric_mean, median
from typing import Any, Final, ParamSpec

from matplotlib import colormaps, rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from analysis.cells import Cell, StepRow
from analysis.laws import BoundaryLaw, EscapeLaw

MAX_COLUMNS: Final = 6
MAX_POINTS: Final = 120
"""A curve has about this many points; the steps between are averaged."""
SMALLEST: Final = 4
"""Figure 3 shows this many learning rates."""
STABLE: Final = "#0072b2"
COLLAPSED: Final = "#d55e00"
"""Blue and vermilion: told apart by every kind of eye."""
GUIDE: Final = "#666666"
SETTINGS: Final[dict[Any, Any]] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
DPI: Final = 130

_PATH: Final = re.compile(r' d="[^"]*"')
_DECIMALS: Final = re.compile(r"(\.\d\d)\d+")
"""A hundredth of a point is fine enough for paths; it halves the files."""

Given = ParamSpec("Given")
Points = list[tuple[float, float]]
Read = Callable[[Cell], Points]


def _styled(draw: Callable[Given, Figure]) -> Callable[Given, Figure]:
    """Draw under SETTINGS, leaving matplotlib's own as they are, and lay the figure out once for all formats."""

    @wraps(draw)
    def drawn(*args: Given.args, **kwargs: Given.kwargs) -> Figure:
        with rc_context(SETTINGS):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure

    return drawn


@_styled
def draw_sweep(cells: Sequence[Cell]) -> Figure:
    """Figures 1 and 2: training reward, Grad CosSim and validation reward by learning rate, one curve for each S."""
    rates, lags = shown_rates(cells), _lags(cells)
    ends = {lr: _end(cell for cell in cells if cell.lr == lr) for lr in rates}
    figure = _figure(1.0 + 1.9 * max(len(rates), 2), 5.2)
    grid = figure.subplots(3, len(rates), squeeze=False, sharex="col", sharey="row")
    colours = _shades("viridis", lags)
    for (row, (label, read)), (column, lr) in product(enumerate(_TRIO), enumerate(rates)):
        axes = grid[row][column]
        for lag in lags:
            runs = [cell for cell in cells if cell.lr == lr and cell.max_lag == lag]
            _draw_runs(axes, runs, read, colours[lag], ends[lr])
            if row == 0:
                _mark_collapses(axes, runs, colours[lag])
        if row == 0:
            axes.set_title(f"η = {lr:g}")
        if column == 0:
            axes.set_ylabel(label)
        if row == 2:
            axes.set_xlabel("learner step")
    collapse = Line2D([], [], color=GUIDE, marker="x", ls="", label="collapse")
    _legend(figure, [*_keys({f"S = {lag}": colours[lag] for lag in lags}), collapse])
    return figure


@_styled
def draw_small_rates(cells: Sequence[Cell]) -> Figure:
    """Figure 3: the smallest learning rates over the longest horizon, at the largest S that has them."""
    horizon = max(cell.horizon for cell in cells)
    longest = [cell for cell in cells if cell.horizon == horizon]
    lag = max(cell.max_lag for cell in longest)
    runs = [cell for cell in longest if cell.max_lag == lag]
    rates = sorted({cell.lr for cell in runs})[:SMALLEST]
    figure = _figure(8.5, 2.8)
    colours = _shades("plasma", rates)
    for axes, (label, read) in zip(figure.subplots(1, 3), _TRIO, strict=True):
        for lr in rates:
            of_rate = [cell for cell in runs if cell.lr == lr]
            _draw_runs(axes, of_rate, read, colours[lr], _end(runs))
            if label == _TRIO[0][0]:
                _mark_collapses(axes, of_rate, colours[lr])
        axes.set_xlabel("learner step")
        axes.set_ylabel(label)
    _legend(figure, _keys({f"S = {lag}, η = {lr:g}": colours[lr] for lr in rates}))
    return figure


@_styled
def draw_panels(cells: Sequence[Cell]) -> Figure:
    """Figures 4 and 5: one panel for each S and learning rate, with the reward, the cosine and where runs collapsed."""
    rates, lags = shown_rates(cells), _lags(cells)
    ends = {lr: _end(cell for cell in cells if cell.lr == lr) for lr in rates}
    figure = _figure(1.0 + 1.9 * max(len(rates), 2), 0.9 + 1.35 * len(lags))
    grid = figure.subplots(len(lags), len(rates), squeeze=False, sharex="col", sharey=True)
    for (row, lag), (column, lr) in product(enumerate(lags), enumerate(rates)):
        axes, runs = grid[row][column], [cell for cell in cells if cell.lr == lr and cell.max_lag == lag]
        _draw_runs(axes, runs, _rewards, STABLE, ends[lr])
        _draw_runs(axes, runs, _cosines, GUIDE, ends[lr])
        for cell in runs:
            if cell.collapse_step is not None:
                axes.axvline(cell.collapse_step, color=COLLAPSED, ls="--", lw=0.9)
        if not runs:
            _note(axes, "not run")
        if row == 0:
            axes.set_title(f"η = {lr:g}")
        if column == 0:
            axes.set_ylabel(f"S = {lag}\nreward, cosine")
        if row == len(lags) - 1:
            axes.set_xlabel("learner step")
    collapse = Line2D([], [], color=COLLAPSED, ls="--", lw=0.9, label="collapse")
    _legend(figure, [*_keys({"training reward": STABLE, "Grad CosSim": GUIDE}), collapse])
    return figure


@_styled
def draw_cosines(cells: Sequence[Cell]) -> Figure:
    """Cosine of consecutive updates on the same batch against that across a change of batch, over a run's life and in the mean."""
    figure = _figure(9.0, 3.0)
    same, new, means = figure.subplots(1, 3, sharey=True)
    for axes, title, is_first_use in ((same, "pairs on the same batch", False), (new, "pairs across a change of batch", True)):
        curves = {cell.name: _life(cell, is_first_use) for cell in cells}
        for cell in cells:
            axes.plot(*_columns(curves[cell.name]), color=_outcome_colour(cell), lw=0.5, alpha=0.3)
        for outcome, colour in (("stable", STABLE), ("collapsed", COLLAPSED)):
            of_outcome = [curves[cell.name] for cell in cells if cell.outcome == outcome]
            mean = _mean_curve(of_outcome, 0.05, is_partial=True)
            axes.plot(*_columns(mean), color=colour, lw=1.6)
        if not any(curves.values()):
            _note(axes, "there are no such pairs")
        axes.set(
            title=title, xlabel="share of the run, or of the way to its collapse", ylabel="Grad CosSim", xlim=(0, 1), ylim=(None, 1.05)
        )
    for cell in cells:
        pair = [
            [row.cosine for row in _before_collapse(cell) if row.is_first_use is first and row.cosine is not None]
            for first in (False, True)
        ]
        if all(pair):
            means.plot(fmean(pair[0]), fmean(pair[1]), "o", ms=4, color=_outcome_colour(cell), alpha=0.7)
    if not means.lines:
        _note(means, "no run has both kinds of pairs")
    means.axline((0, 0), slope=1, color=GUIDE, ls=":", lw=0.8)
    means.set(title="mean of each run", xlabel="on the same batch", ylabel="across a change of batch")
    values = [row.cosine for cell in cells for row in _before_collapse(cell) if row.cosine is not None] or [0.0]
    means.set(ylim=(min(values) - 0.05, max(values) + 0.05), xlim=(min(values) - 0.05, max(values) + 0.05))
    means.tick_params(labelleft=True)
    _legend(figure, _keys({"stable": STABLE, "collapsed": COLLAPSED}))
    return figure


@_styled
def draw_phase(cells: Sequence[Cell], law: BoundaryLaw | None = None) -> Figure:
    """The phase diagram: the share of runs that collapsed; of `law` each eta_max, its fit, and the paper's 1/S through their middle."""
    figure = _figure(6.2, 4.2)
    axes = figure.subplots()
    runs: dict[tuple[int, float], list[bool]] = {}
    for cell in cells:
        if cell.max_lag:
            runs.setdefault((cell.max_lag, cell.lr), []).append(cell.outcome == "collapsed")
    axes.set(xlabel="S", ylabel="learning rate η")
    if not runs:
        _note(axes, "every run is synchronous")
        return figure
    shares = [fmean(found) for found in runs.values()]
    lags, rates = [lag for lag, _ in runs], [lr for _, lr in runs]
    axes.scatter(lags, rates, 60, shares, cmap=_OUTCOMES, vmin=0, vmax=1, edgecolors="black", linewidths=0.5, zorder=3)
    for place, found in runs.items():
        label = f"{sum(found)}/{len(found)}"
        axes.annotate(label, place, xytext=(7, 0), textcoords="offset points", va="center", fontsize=6, color=GUIDE)
    _log_axes(axes, sorted(set(lags)), sorted(set(rates)))
    axes.set(xlim=(min(lags) / 1.4, max(lags) * 1.6), ylim=(min(rates) / 1.6, max(rates) * 1.6))
    if law is not None:
        _draw_boundary(axes, law, [min(lags) / 1.4, max(lags) * 1.6])
    dots = {"none collapsed": STABLE, "all collapsed": COLLAPSED}
    keys = [
        Line2D([], [], color=colour, marker="o", ls="", markeredgecolor="black", markeredgewidth=0.5, label=word)
        for word, colour in dots.items()
    ]
    _legend(figure, [*keys, *axes.get_legend_handles_labels()[0]])
    return figure


def _draw_boundary(axes: Any, law: BoundaryLaw, ends: Sequence[float]) -> None:
    """eta_max of each S with its interval, where it is not censored, and the two lines through them."""
    fitted = [(one.max_lag, one.estimate, one.lower, one.upper) for one in law.boundaries if one.estimate is not None and one.max_lag]
    if not fitted:
        return
    lags, middles, lowers, uppers = (list(column) for column in zip(*fitted, strict=True))
    reach = (
        [middle - low for middle, low in zip(middles, lowers, strict=True)],
        [up - middle for middle, up in zip(middles, uppers, strict=True)],
    )
    axes.errorbar(
        [lag / 1.08 for lag in lags], middles, reach, fmt="_", ms=8, color="black", lw=1, capsize=2, label=r"$\eta_\mathrm{max}$", zorder=4
    )
    middle = geometric_mean(lags), geometric_mean(middles)
    lines = [("1/S", 1.0, ":")] if law.exponent is None else [(rf"fit: $S^{{{-law.exponent:.2f}}}$", law.exponent, "-"), ("1/S", 1.0, ":")]
    for label, exponent, style in lines:
        axes.plot(ends, [middle[1] * (end / middle[0]) ** -exponent for end in ends], style, color="black", lw=1, label=label)


@_styled
def draw_collapse_times(cells: Sequence[Cell], law: EscapeLaw | None = None) -> Figure:
    """t_collapse η against S for each run that collapsed (paper, Eq. 34: the same at every S), rates side by side, and the mean of `law`."""
    figure = _figure(6.2, 3.6)
    axes = figure.subplots()
    runs = [cell for cell in cells if cell.collapse_step and cell.max_lag]
    axes.set(xlabel="S", ylabel=r"$t_\mathrm{collapse}\,\eta$")
    if not runs:
        _note(axes, "no run collapsed")
        return figure
    rates = sorted({cell.lr for cell in runs})
    colours = _shades("plasma", rates)
    for place, lr in enumerate(rates):
        aside = 2 ** (0.5 * ((place + 0.5) / len(rates) - 0.5))
        of_rate = [cell for cell in runs if cell.lr == lr]
        times = [(cell.collapse_step or 0) * lr for cell in of_rate]
        axes.plot([cell.max_lag * aside for cell in of_rate], times, "o", ms=4, color=colours[lr], alpha=0.8, label=f"η = {lr:g}")
    if law is not None and law.mean is not None:
        axes.axhline(law.mean, color=GUIDE, lw=0.9, label=f"mean of the fitted {law.mean:.2g}")
    if law is not None and law.mean_interval is not None:
        axes.axhspan(law.mean_interval.lower, law.mean_interval.upper, color=GUIDE, alpha=0.2, lw=0)
    _log_axes(axes, _lags(runs), [])
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


@_styled
def draw_displacement(cells: Sequence[Cell]) -> Figure:
    """Distance from the first weights over the learning rate against the step, log-log: slope 1 is ballistic, 1/2 diffusive (paper, 4.4)."""
    figure = _figure(5.6, 4.0)
    axes = figure.subplots()
    axes.set(xlabel="learner step", ylabel=r"$\Vert\theta_t-\theta_0\Vert\,/\,\eta$")
    starts = []
    for cell in cells:
        moved = _measured(_before_collapse(cell), lambda row: row.displacement)
        logs = _binned([(math.log10(step + 1), math.log10(distance / cell.lr)) for step, distance in moved if distance > 0], 0.05)
        axes.plot(*([10**value for value in column] for column in _columns(logs)), color=_outcome_colour(cell), lw=0.7, alpha=0.5)
        starts += [10 ** logs[0][1]] if logs else []
    if not starts:
        _note(axes, "no run measured it")
        return figure
    start, end = median(starts), max(cell.horizon for cell in cells)
    for power, label in ((1.0, "as t"), (0.5, "as √t")):
        axes.plot([1, end], [start, start * end**power], color=GUIDE, ls=":", lw=1)
        axes.annotate(label, (end, start * end**power), xytext=(3, 0), textcoords="offset points", va="center", color=GUIDE)
    axes.set(xscale="log", yscale="log")
    axes.legend(handles=_keys({"stable": STABLE, "collapsed": COLLAPSED}), loc="upper left", frameon=False)
    return figure


def shown_rates(cells: Iterable[Cell]) -> list[float]:
    """The learning rates of the columns, largest first as in the paper: if there are too many, those around the boundary.

    That is the stretch of MAX_COLUMNS neighbours in which the share of collapsed runs is nearest to a half.
    """
    outcomes: dict[float, list[bool]] = {}
    for cell in cells:
        outcomes.setdefault(cell.lr, []).append(cell.outcome == "collapsed")
    rates = sorted(outcomes, reverse=True)
    stretches = [rates[start : start + MAX_COLUMNS] for start in range(max(1, len(rates) - MAX_COLUMNS + 1))]
    return min(stretches, key=lambda stretch: abs(fmean(fmean(outcomes[lr]) for lr in stretch) - 0.5)) if rates else []


def svg_of(figure: Figure, name: str) -> str:
    """The figure as SVG: text stays text, and the bytes depend on the figure and its name alone."""
    file = io.StringIO()
    with rc_context({**SETTINGS, "svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _PATH.sub(lambda path: _DECIMALS.sub(r"\1", path[0]), file.getvalue())


def png_of(figure: Figure) -> bytes:
    """The figure as PNG."""
    file = io.BytesIO()
    with rc_context(SETTINGS):
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _rewards(cell: Cell) -> Points:
    return _measured(cell.rows, lambda row: row.reward)


def _cosines(cell: Cell) -> Points:
    return _measured(cell.rows, lambda row: row.cosine)


def _validation(cell: Cell) -> Points:
    return [(float(step), reward) for step, reward in cell.validation]


_TRIO: Final[tuple[tuple[str, Read], ...]] = (("training reward", _rewards), ("Grad CosSim", _cosines), ("validation reward", _validation))
"""The three rows of Figures 1 and 2."""


def _measured(rows: Iterable[StepRow], value: Callable[[StepRow], float | None]) -> Points:
    return [(float(row.step), number) for row in rows if (number := value(row)) is not None]


def _before_collapse(cell: Cell) -> list[StepRow]:
    return [row for row in cell.rows if cell.collapse_step is None or row.step < cell.collapse_step]


def _life(cell: Cell, is_first_use: bool) -> Points:
    """The cosines of one kind of pair against the share of the run, or of the way to its collapse."""
    rows = _before_collapse(cell)
    end = rows[-1].step + 1 if rows else 1
    points = [
        (step / end, cosine)
        for step, cosine in _measured([row for row in rows if row.is_first_use is is_first_use], lambda row: row.cosine)
    ]
    return _binned(points, 2 / MAX_POINTS)


def _binned(points: Points, width: float) -> Points:
    """Means over stretches of x of a width, at the middle of what lies in each."""
    bins: dict[int, Points] = {}
    for point in points:
        bins.setdefault(int(point[0] / width), []).append(point)
    return [(fmean(x for x, _ in found), fmean(y for _, y in found)) for _, found in sorted(bins.items())]


_PLAIN: Final = FuncFormatter(lambda value, _: f"{value:g}")
_OUTCOMES: Final = LinearSegmentedColormap.from_list("outcomes", [STABLE, "#f7f7f7", COLLAPSED])


def _mean_curve(curves: Sequence[Points], width: float, *, is_partial: bool = False) -> Points:
    """The mean of curves, over stretches of x of a width: where all of them are, or with `is_partial` where any of them is."""
    binned = [{int(x / width): (x, y) for x, y in curve} for curve in curves]
    shared = set().union(*binned) if is_partial else set.intersection(*map(set, binned)) if binned else set()
    return [
        (fmean(curve[place][0] for curve in binned if place in curve), fmean(curve[place][1] for curve in binned if place in curve))
        for place in sorted(shared)
    ]


def _draw_runs(axes: Any, runs: Sequence[Cell], read: Read, colour: Any, end: int) -> None:
    """Each run as a thin line, and their mean, in a panel that reaches to step `end`.

    Cosines are averaged over whole cycles, since pairs within a batch and across two differ.
    """
    width = math.ceil(end / MAX_POINTS)
    if width > 1 and runs and read is _cosines and runs[0].pipeline == "cycles":
        cycle = max(1, runs[0].max_lag)
        width = math.ceil(width / cycle) * cycle
    curves = [_binned(read(cell), width) for cell in runs]
    for curve in curves:
        axes.plot(*_columns(curve), color=colour, lw=0.5, alpha=0.45)
    mean = _mean_curve(curves, width)
    axes.plot(*_columns(mean), color=colour, lw=1.4, marker="o" if len(mean) == 1 else "", ms=2.5)


def _end(runs: Iterable[Cell]) -> int:
    """The step after the last that any of the runs took, at least 1."""
    return max((cell.rows[-1].step + 1 for cell in runs if cell.rows), default=1)


def _columns(curve: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _mark_collapses(axes: Any, runs: Sequence[Cell], colour: Any) -> None:
    steps = [cell.collapse_step for cell in runs if cell.collapse_step is not None]
    axes.plot(steps, [0.0] * len(steps), "x", color=colour, ms=5, mew=1.2, zorder=3)


def _shades(name: str, values: Sequence[float]) -> dict[float, Any]:
    """Colours for ordered values, from a map that stays readable on white."""
    colours = colormaps[name]
    return {value: colours(0.85 * place / max(1, len(values) - 1)) for place, value in enumerate(values)}


def _lags(cells: Iterable[Cell]) -> list[int]:
    return sorted({cell.max_lag for cell in cells})


def _outcome_colour(cell: Cell) -> str:
    return COLLAPSED if cell.outcome == "collapsed" else STABLE


def _keys(colours: dict[str, Any]) -> list[Line2D]:
    return [Line2D([], [], color=colour, lw=1.6, label=label) for label, colour in colours.items()]


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    num_columns = min(len(handles), int(figure.get_figwidth() / 1.2))
    figure.legend(handles=handles, loc="outside upper center", ncols=num_columns, frameon=False)


def _log_axes(axes: Any, lags: Sequence[int], rates: Sequence[float]) -> None:
    """Logarithmic axes with a tick at each S, and at each learning rate unless there are none."""
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set(major_locator=FixedLocator(lags), major_formatter=_PLAIN, minor_locator=NullLocator())
    if rates:
        axes.yaxis.set(major_locator=FixedLocator(rates), major_formatter=_PLAIN, minor_locator=NullLocator())
    else:
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), major_formatter=_PLAIN, minor_formatter=NullFormatter())


def _note(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GUIDE)
