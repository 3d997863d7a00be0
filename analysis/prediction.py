"""What a calibration is worth: predictions for runs that it has not seen, and warnings against what became of the runs.

A sweep's own runs are the judge. Constants are calibrated on the cells of two values of S; what follows from them for every other S of the same
pipeline and surrogate is compared with what those cells did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from statistics import median

import numpy as np
from msgspec import Struct

from analysis.advise import calibrate_cells, largest_measured_lag
from analysis.cells import Cell
from analysis.laws import arms, boundary
from analysis.sweep_tables import Table
from learner.stability.monitor import BatchSeen, Monitor, Moved, Signal
from learner.stability.rule import EXACTLY_ONE, Measured, Verdict, largest_lr, margins
from protocol.config import Config, parse_config

FACTOR = 2.0
"""A predicted eta_max within this factor of the measured one counts as right."""
CLIP_RANGE = 0.2
VERDICTS: tuple[Verdict, ...] = ("inside", "cannot tell", "outside", "unknown")


class Prediction(Struct, frozen=True):
    """eta_max of one S, as calibrated on two others, and as the cells of that S have it (None where censored)."""

    arm: str
    calibrated_on: tuple[int, int]
    max_lag: int
    predicted: float
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        return None if self.measured is None else self.predicted / self.measured

    @property
    def is_right(self) -> bool | None:
        ratio = self.ratio
        return None if ratio is None else 1 / FACTOR <= ratio <= FACTOR


class Warned(Struct, frozen=True):
    """When one cell would have been warned of, and when it collapsed."""

    arm: str
    max_lag: int
    lr: float
    seed: int
    warning_step: int | None
    collapse_step: int | None

    @property
    def lead(self) -> int | None:
        """Steps from the warning to the collapse; None without a collapse or a warning."""
        return None if self.warning_step is None or self.collapse_step is None else self.collapse_step - self.warning_step


def predict(cells: Sequence[Cell], random: np.random.Generator, lag_exponent: Measured | None = None) -> list[Prediction]:
    """Every pair of values of S as calibration for every other one, with the exponent of S given, or as the pair shows it.

    What is predicted for is the S that runs reached, as calibrations count it: the median over those that were set to the same.
    """
    found = []
    for (pipeline, surrogate), group in sorted(arms(cells).items()):
        lags = sorted({cell.max_lag for cell in group})
        measured = {lag: boundary([cell for cell in group if cell.max_lag == lag], random) for lag in lags}
        reached = {lag: round(median(largest_measured_lag(cell) for cell in group if cell.max_lag == lag)) for lag in lags}
        for pair in combinations(lags, 2):
            calibration = calibrate_cells([cell for cell in group if cell.max_lag in pair], CLIP_RANGE, {}, lag_exponent)
            for lag in lags:
                most = largest_lr(calibration, reached[lag], group[0].horizon)
                if lag not in pair and most is not None:
                    found.append(Prediction(f"{pipeline}, {surrogate}", pair, lag, most.value, measured[lag].estimate))
    return found


def warn(cells: Sequence[Cell]) -> list[Warned]:
    """When the monitor would have warned of each cell by early signs, which need no calibration; cells that did not measure them are left out."""
    return [
        Warned(f"{pipeline}, {surrogate}", cell.max_lag, cell.lr, cell.seed, warning_step(cell), cell.collapse_step)
        for (pipeline, surrogate), group in sorted(arms(cells).items())
        for cell in group
        if _has_sign(cell)
    ]


def warn_as_advised(found: dict[tuple[str, Verdict], list[Cell]]) -> list[Warned]:
    """When somebody knows who has both: advice before the start, which tells of what is outside, and signs, unless advice says inside."""
    return [
        Warned(arm, cell.max_lag, cell.lr, cell.seed, _told(cell, verdict), cell.collapse_step)
        for (arm, verdict), group in found.items()
        for cell in group
        if _has_sign(cell)
    ]


def _told(cell: Cell, verdict: Verdict) -> int | None:
    if verdict == "outside":
        return 0
    return None if verdict == "inside" else warning_step(cell)


def _has_sign(cell: Cell) -> bool:
    """Whether what early signs are made of was recorded."""
    return any(row.completion_length is not None for row in cell.rows)


def advised(cells: Sequence[Cell]) -> dict[tuple[str, Verdict], list[Cell]]:
    """The cells by arm and by what `advise` says of them before they start, calibrated on the smallest and the largest of the other values of S."""
    found: defaultdict[tuple[str, Verdict], list[Cell]] = defaultdict(list)
    for (pipeline, surrogate), group in sorted(arms(cells).items()):
        lags = sorted({cell.max_lag for cell in group})
        for lag in lags:
            others = [other for other in lags if other != lag]
            if len(others) < 2:
                continue
            calibration = calibrate_cells([cell for cell in group if cell.max_lag in (others[0], others[-1])], CLIP_RANGE, {})
            for cell in (cell for cell in group if cell.max_lag == lag):
                found[f"{pipeline}, {surrogate}", margins(calibration, cell.lr, lag, cell.horizon).verdict].append(cell)
    return dict(found)


def warning_step(cell: Cell) -> int | None:
    """The first step at which the monitor, fed what the cell recorded, warns."""
    monitor = Monitor(_config(cell), None)
    for row in cell.rows:
        if row.reward is None or row.g_upd is None or row.displacement is None:
            continue
        length = row.completion_length or 0.0
        seen = BatchSeen(row.is_first_use, row.reward, cell.num_completions, cell.max_lag, row.drift, row.lag, length)
        signal = Signal(row.kl_behaviour or 0.0, row.effective_sample_size or 0.0)
        monitor.moved(row.step, row.lr, seen, signal, Moved(row.g_upd * row.lr, row.cosine, row.displacement, {}))
        if any(note.kind == "warning" for note in monitor.take_notes()):
            return row.step
    return None


def _config(cell: Cell) -> Config:
    reuse = max(1, cell.max_lag) if cell.pipeline == "cycles" else 1
    lag = reuse - 1 if cell.pipeline == "cycles" else cell.max_lag
    policy = {"reuse": reuse, "sync_every": reuse, "max_lag": lag}
    return parse_config({"run": {"steps": cell.horizon}, "policy": policy, "stability": {"governor": "warn", "on_collapse": "continue"}})


# --- tables


def prediction_table(found: Sequence[Prediction], exponent: str) -> Table:
    """Predicted against measured boundaries; `exponent` says by which power of S."""
    rows = [
        [
            one.arm,
            f"S = {one.calibrated_on[0]} and {one.calibrated_on[1]}",
            str(one.max_lag),
            f"{one.predicted:.3g}",
            "censored" if one.measured is None else f"{one.measured:.3g}",
            "-" if one.ratio is None else f"{one.ratio:.2f}",
        ]
        for one in found
    ]
    known = [one for one in found if one.is_right is not None]
    right = sum(one.is_right is True for one in known)
    note = f"{right} of {len(known)} predictions within a factor {FACTOR:g} of the measured boundary; {len(found) - len(known)} not judged."
    return Table(
        f"Predicted boundaries, {exponent}",
        ["pipeline, surrogate", "calibrated on", "S", "predicted η_max", "measured η_max", "ratio"],
        rows,
        note,
    )


def warning_table(found: Sequence[Warned], title: str, note: str) -> Table:
    """How many collapses were warned of before they came, and how many stable runs were warned of for nothing."""
    rows = []
    for arm in [*sorted({one.arm for one in found}), "all"]:
        group = [one for one in found if arm in (one.arm, "all")]
        collapsed, stable = [one for one in group if one.collapse_step is not None], [one for one in group if one.collapse_step is None]
        leads = [lead for one in collapsed if (lead := one.lead) is not None and lead > 0]
        false = sum(one.warning_step is not None for one in stable)
        rows.append([arm, _share(len(leads), len(collapsed)), _share(false, len(stable)), f"{median(leads):.0f}" if leads else "-"])
    return Table(title, ["pipeline, surrogate", "before the collapse", "of stable runs", "median lead, steps"], rows, note)


def advice_table(found: dict[tuple[str, Verdict], list[Cell]]) -> Table:
    """What became of cells, by what was said of them before."""
    rows = []
    for arm in sorted({arm for arm, _ in found}):
        groups = [found.get((arm, verdict), []) for verdict in VERDICTS]
        rows.append([arm, *(_share(sum(cell.outcome == "collapsed" for cell in group), len(group)) for group in groups)])
    header = ["pipeline, surrogate", *(f"collapsed of: {verdict}" for verdict in VERDICTS)]
    return Table("What `advise` said before", header, rows, "Calibrated on the smallest and the largest of the other values of S.")


def _left_out(cells: Sequence[Cell]) -> str:
    """How many runs have no warning because they could not, in words."""
    num_left_out = sum(not _has_sign(cell) for group in arms(cells).values() for cell in group)
    return f" {num_left_out} runs left out: the length of completions was not recorded." if num_left_out else ""


def _share(count: int, total: int) -> str:
    return f"{count} of {total}" + (f" ({count / total:.0%})" if total else "")


def judgement(cells: Sequence[Cell], random: np.random.Generator) -> list[Table]:
    """What this sweep says of the advice and the warnings that come from it."""
    said = advised(cells)
    both = (
        "What `advise` says is outside, from the first step on, and early signs in other runs, unless it says inside. Calibrated as above."
    )
    return [
        prediction_table(predict(cells, random), "exponent of S as calibrated"),
        prediction_table(predict(cells, random, EXACTLY_ONE), "exponent of S the paper's 1"),
        advice_table(said),
        warning_table(warn(cells), "Warnings", "By early signs, without a calibration." + _left_out(cells)),
        *([warning_table(warn_as_advised(said), "Warnings, with a calibration", both)] if said else []),
    ]
