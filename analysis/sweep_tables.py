"""The tables of a sweep's report, as text: the paper's Table 2, the boundary, the escape times, the exponents, and the list of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from analysis.cell_tables import COLUMNS, csv_row, final_reward
from analysis.cells import Cell
from analysis.claims import Claim
from analysis.claims import Figure as Value
from analysis.laws import HANDS_OFF, BoundaryLaw, EscapeLaw, Interval, mean_with_interval

ABSENT = "-"


class Table(NamedTuple):
    """Text in rows; the first column names the row. `note` says what a reader has to know, it may be empty."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str


def verdicts(arms: Sequence[tuple[str, Sequence[Claim]]]) -> Table:
    """The verdict on each claim in each arm."""
    names = [f"({claim.name})" for claim in arms[0][1]]
    return Table("Verdicts", ["pipeline, surrogate", *names], [[title, *(claim.verdict for claim in claims)] for title, claims in arms], "")


def collapses(cells: Sequence[Cell]) -> Table:
    """Table 2 of the paper: M_collapse by S and learning rate, with M S eta in brackets; the last row is t_collapse by learning rate."""
    rates, lags = sorted({cell.lr for cell in cells}, reverse=True), sorted({cell.max_lag for cell in cells})
    unit = 10.0 ** math.floor(math.log10(rates[-1]) + 1e-9)
    rows = []
    for lag in lags:
        row = [[cell for cell in cells if cell.max_lag == lag and cell.lr == lr] for lr in rates]
        rows.append([f"S = {lag}", *(_collapse(runs, unit) for runs in row)])
    steps = [[cell.collapse_step for cell in cells if cell.lr == lr and cell.collapse_step is not None] for lr in rates]
    rows.append(["t_collapse", *(_middle(found) if found else ABSENT for found in steps)])
    note = (
        f"Median [smallest-largest] over the runs that collapsed, (t_collapse·η = M·S·η in units of {unit:g}), and how many of the runs did. "
        "M is the weight sync at which a run collapsed; in the queue pipeline, which syncs at every step, it is t_collapse / S. "
        "The last row is t_collapse over all S."
    )
    return Table("M_collapse (as Table 2)", ["", *(f"η = {lr:g}" for lr in rates)], rows, note)


def _collapse(runs: Sequence[Cell], unit: float) -> str:
    if not runs:
        return ABSENT
    steps = [cell.collapse_step for cell in runs if cell.collapse_step is not None]
    share = f", {len(steps)} of {len(runs)}" if len(runs) > 1 else ""
    if not steps:
        return f"stable{share}"
    is_cycles, lag = runs[0].pipeline == "cycles", max(1, runs[0].max_lag)
    syncs = [step // lag if is_cycles else step / lag for step in steps]
    return f"{_middle(syncs)} ({median(steps) * runs[0].lr / unit:.4g}){share}"


def _middle(values: Sequence[float]) -> str:
    reach = "" if min(values) == max(values) else f" [{min(values):.4g}-{max(values):.4g}]"
    return f"{median(values):.4g}{reach}"


def boundaries(law: BoundaryLaw) -> Table:
    """S eta_max by S (claim a)."""
    rows = [
        [
            f"S = {one.max_lag}",
            *(shown(one.estimate), shown(one.interval)),
            *(shown(None if one.estimate is None else one.max_lag * one.estimate), shown(law.products.get(one.max_lag))),
            *(_CENSORING[one.censoring], f"{one.num_misplaced} of {one.num_cells}"),
        ]
        for one in law.boundaries
    ]
    note = f"S·η_max in the mean: {shown(law.constant)}. One value within all intervals: {shown(law.is_constant)}."
    return Table("Largest stable learning rate", ["", "η_max", "interval", "S·η_max", "interval", "where", "wrong side"], rows, note)


_CENSORING = {
    "none": "within the rates tried",
    "left": "below the smallest rate",
    "right": "above the largest rate",
    "both": "only one rate tried",
}


def escape_times(cells: Sequence[Cell], law: EscapeLaw, random: np.random.Generator) -> Table:
    """t_collapse eta by S (claim b), as recorded, and over the cells that the law is fitted to."""
    rows = []
    for lag in sorted({cell.max_lag for cell in cells}):
        times = [cell.collapse_step * cell.lr for cell in cells if cell.max_lag == lag and cell.collapse_step is not None]
        found = mean_with_interval(times, random)
        reach = Interval(min(times), max(times)) if times else None
        rows.append([f"S = {lag}", str(len(times)), shown(found and found[0]), shown(found and found[1]), shown(reach)])
    rows.append(["all, as recorded", str(law.num_collapsed), shown(law.recorded_mean), ABSENT, ABSENT])
    rows.append(["all, as fitted", str(law.num_fitted), shown(law.mean), shown(law.mean_interval), ABSENT])
    note = (
        f"As fitted, t lies in the middle of its cycle, and collapsed runs are left out of a group (one S and η) of which one collapsed at the first "
        f"sync ({law.num_coarse}) or one stayed stable ({law.num_mixed}). Standard deviation over mean: {shown(law.variation)}, of which rounding "
        f"to syncs alone makes {shown(law.quantum_variation)}."
    )
    return Table("t_collapse·η", ["", "collapsed", "mean", "interval", "smallest, largest"], rows, note)


def exponents(limits: BoundaryLaw, times: EscapeLaw, movement: Claim) -> Table:
    """Every exponent beside what the paper says, and the cosines by outcome."""
    figures = movement.figures
    rows = [
        ["b of η_max ~ S^-b", shown(limits.exponent), shown(limits.interval), "1"],
        ["p of t_collapse ~ η^-p", shown(times.lr_exponent), shown(times.lr_interval), "1"],
        ["q of t_collapse ~ S^-q", shown(times.lag_exponent), shown(times.lag_interval), "0"],
    ]
    for name, words, collapsed, stable in _MOVEMENT:
        for outcome, claimed in (("collapsed", collapsed), ("stable", stable)):
            count = figures[f"num_{name}_{outcome}"]
            key = f"{name}_{outcome}"
            rows.append([f"{words}, {outcome} ({shown(count)} runs)", shown(figures[key]), shown(figures[f"{key}_interval"]), claimed])
    return Table("Exponents and cosines", ["", "found", "interval", "paper"], rows, "")


_MOVEMENT = (
    ("drift_exponent", "displacement ~ t^a", "1", "1/2"),
    ("new_batch", "cosine across batches", "near 1", "near 0"),
    ("same_batch", "cosine on one batch", "near 1", "near 0"),
)


def governors(cells: Sequence[Cell]) -> Table:
    """What became of the runs whose governor changed the learning rate, beside the best that runs without one came to at the same S. Without such
    runs there are no rows."""
    groups: dict[tuple[str, str, str, int], list[Cell]] = {}
    for cell in cells:
        if cell.governor not in HANDS_OFF:
            groups.setdefault((cell.pipeline, cell.surrogate, cell.governor, cell.max_lag), []).append(cell)
    rows = []
    for (pipeline, surrogate, governor, lag), runs in sorted(groups.items()):
        num_survived = sum(run.outcome == "stable" for run in runs)
        free = [
            cell
            for cell in cells
            if (cell.pipeline, cell.surrogate, cell.max_lag) == (pipeline, surrogate, lag) and cell.governor in HANDS_OFF
        ]
        best = max((_reward([cell for cell in free if cell.lr == lr]) for lr in {cell.lr for cell in free}), default=None)
        reached = _reward(runs)
        rows.append(
            [f"{pipeline}, {surrogate}, {governor}, S = {lag}", f"{num_survived} of {len(runs)}", f"{reached:.3f}",
             ABSENT if best is None else f"{best:.3f}"]
        )  # fmt: skip
    note = (
        "Reward: mean of the last 20 steps over all runs of the row, those that collapsed included; beside it the best that a learning rate without "
        "a governor reached at that S. Governed runs are in no other table or figure, since their learning rate is not the one they were given."
    )
    return Table("Runs under a governor", ["pipeline, surrogate, governor", "stable", "reward", "best without"], rows, note)


def _reward(runs: Sequence[Cell]) -> float:
    return fmean(final_reward(run) or 0.0 for run in runs)


def listing(cells: Sequence[Cell]) -> Table:
    """One row for each cell, as in cells.csv."""
    rows = [[ABSENT if value is None else str(value) for value in csv_row(cell)] for cell in cells]
    return Table("Runs", list(COLUMNS), rows, "")


def shown(value: Value) -> str:
    """A number of a law or claim as text, three digits where it is not whole."""
    match value:
        case None:
            return ABSENT
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}"
        case list():
            return ", ".join(map(str, value)) or ABSENT
        case Interval():
            return f"[{value.lower:.3g}, {value.upper:.3g}]" if math.isfinite(value.upper) else f"[{value.lower:.3g}, ∞)"
    return str(value)
