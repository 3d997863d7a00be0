"""The laws of a sweep: where runs begin to collapse, when they do, and how they move until then, each with an interval.

All functions are pure. Those that draw take a numpy Generator; intervals are bootstrap intervals at `LEVEL`. Cells given together are of one
pipeline and surrogate, `arms` puts them apart. docs/reproduction-method.md says what each estimator is and what it cannot know.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from analysis.cells import Cell, Outcome, Pipeline

Floats = NDArray[np.float64]

LEVEL = 0.95
NUM_DRAWS = 2000
LAST_SHARE = 0.2
"""The share of a run, or of what a collapsed run had before its collapse, over which its cosine is averaged."""
HANDS_OFF = ("off", "warn")
"""The governors that leave a run alone. Others change the learning rate, so that a cell's is not the one that it ran at."""


class Exponent(Protocol):
    """An exponent that was found, whatever else is known of it."""

    @property
    def value(self) -> float: ...


DriftExponent = Callable[[Sequence[int], Sequence[float]], Exponent | None]
"""From numbers of updates and displacements to the power with which they grow, None where it cannot be told; learner.stability.drift has one."""


class Interval(Struct, frozen=True):
    """From lower to upper, both included; lower may be 0 or -inf and upper inf, where nothing bounds that side."""

    lower: float
    upper: float

    def contains(self, value: float) -> bool:
        return self.lower <= value <= self.upper

    def meets(self, other: Interval) -> bool:
        return self.lower <= other.upper and other.lower <= self.upper

    def is_within(self, other: Interval) -> bool:
        return other.lower <= self.lower and self.upper <= other.upper


def arms(cells: Iterable[Cell]) -> dict[tuple[Pipeline, str], list[Cell]]:
    """The cells by pipeline and surrogate, without those whose governor changed their learning rate."""
    found: defaultdict[tuple[Pipeline, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.governor in HANDS_OFF:
            found[cell.pipeline, cell.surrogate].append(cell)
    return dict(found)


# --- the stability boundary: Eq. (30), the first term of (37)

Censoring = Literal["none", "left", "right", "both"]
"""left: collapse begins below the smallest learning rate tried; right: above the largest; both: one learning rate was tried, with either end."""


class Boundary(Struct, frozen=True):
    """eta_max of one S. A censored boundary has no estimate; its lower is 0 or its upper inf, and the other end still holds."""

    max_lag: int
    lower: float
    estimate: float | None
    upper: float
    censoring: Censoring
    num_cells: int
    num_misplaced: int
    """Outcomes on the wrong side of the estimate: a stable run above it or a collapsed one below."""

    @property
    def is_censored(self) -> bool:
        return self.censoring != "none"

    @property
    def interval(self) -> Interval:
        return Interval(self.lower, self.upper)


class BoundaryLaw(Struct, frozen=True):
    """How eta_max depends on S: eta_max ~ S^-exponent, with 1 for the paper's claim (a)."""

    boundaries: list[Boundary]
    """By S."""
    products: dict[int, Interval]
    """S eta_max by S, open to one side where the boundary is censored."""
    constant: float | None
    """The geometric mean of S eta_max over boundaries that are not censored."""
    is_constant: bool | None
    """Whether some one value lies in all of `products`; None with fewer than two."""
    exponent: float | None
    """From boundaries that are not censored; None with fewer than two."""
    interval: Interval | None
    left_out: list[int]
    """Each S whose boundary is censored: not fitted, but compared with the fit."""
    has_room_for_left_out: bool | None
    """Whether the fitted power law, anywhere in its bootstrap, passes all that the censored boundaries allow; None where nothing was left out."""

    @property
    def num_fitted(self) -> int:
        return len(self.boundaries) - len(self.left_out)


def boundary(cells: Sequence[Cell], random: np.random.Generator, num_draws: int = NUM_DRAWS) -> Boundary:
    """eta_max of cells of one S, see `boundary_law`. Raises ValueError without cells or with several S."""
    return _boundary(cells, random, num_draws)[0]


def boundary_law(cells: Sequence[Cell], random: np.random.Generator, num_draws: int = NUM_DRAWS) -> BoundaryLaw:
    """The boundary of each S and their power law.

    A boundary is the step in log eta that puts the fewest outcomes on its wrong side, which is the maximum-likelihood step with an unknown rate of
    odd outcomes; equally good gaps between neighbouring learning rates are averaged, each by its geometric middle. The bootstrap resamples
    the outcomes at each learning rate and then draws a place uniformly within the best gap, so that no interval is narrower than the grid allows.
    """
    found = [_boundary(group, random, num_draws) for _, group in _by_lag(cells)]
    boundaries = [one for one, _ in found]
    products = {one.max_lag: Interval(one.max_lag * one.lower, one.max_lag * one.upper) for one in boundaries if one.max_lag >= 1}
    fitted = [(one, draws) for one, draws in found if one.estimate is not None and one.max_lag >= 1]
    left_out = [one for one in boundaries if one.estimate is None or one.max_lag < 1]
    exponent, interval, has_room = None, None, None
    if len(fitted) >= 2:
        x = np.log([float(one.max_lag) for one, _ in fitted])
        logs = np.log([one.estimate or math.nan for one, _ in fitted])
        slopes, middles = _lines(x, np.stack([draws for _, draws in fitted], axis=1))
        slope, _ = _lines(x, logs[None, :])
        exponent = -float(slope[0])
        interval = _interval(-slopes, exponent)
        allowed = [one for one in left_out if one.max_lag >= 1]
        if allowed:
            passes = np.ones(len(slopes), dtype=bool)
            for one in allowed:
                reach = middles + slopes * (math.log(one.max_lag) - x.mean())
                passes &= (reach >= _log(one.lower)) & (reach <= _log(one.upper))
            has_room = bool(passes.any())
    logs_of_products = [math.log(one.max_lag * one.estimate) for one, _ in fitted if one.estimate is not None]
    return BoundaryLaw(
        boundaries=boundaries,
        products=products,
        constant=math.exp(float(np.mean(logs_of_products))) if logs_of_products else None,
        is_constant=max(i.lower for i in products.values()) <= min(i.upper for i in products.values()) if len(products) >= 2 else None,
        exponent=exponent,
        interval=interval,
        left_out=[one.max_lag for one in left_out],
        has_room_for_left_out=has_room,
    )


def _boundary(cells: Sequence[Cell], random: np.random.Generator, num_draws: int) -> tuple[Boundary, Floats]:
    """The boundary of one S, and draws of log eta_max, those beyond the grid at one gap's width from its end; shape (num_draws,)."""
    lags = {cell.max_lag for cell in cells}
    if len(lags) != 1:
        raise ValueError(f"a boundary is of one S, not of {sorted(lags)}")
    rates = sorted({cell.lr for cell in cells})
    num_cells = np.array([sum(cell.lr == lr for cell in cells) for lr in rates])
    num_collapsed = np.array([sum(cell.lr == lr and cell.outcome == "collapsed" for cell in cells) for lr in rates])
    edges = np.concatenate([[-np.inf], np.log(rates), [np.inf]])

    wrong = _num_misplaced(num_cells, num_collapsed[None, :])[0]
    best = np.flatnonzero(wrong == wrong.min())
    inner = best[(best > 0) & (best < len(rates))]
    chosen = inner if inner.size else best
    middle = None if not inner.size else math.exp(float(np.mean((edges[inner] + edges[inner + 1]) / 2)))

    drawn = random.binomial(num_cells, num_collapsed / num_cells, size=(num_draws, len(rates)))
    score = _num_misplaced(num_cells, drawn) + 0.5 * random.random((num_draws, len(rates) + 1))
    score[:, [0, -1]] += 0.5  # of equally good gaps an inner one is taken, as for the estimate
    gaps = score.argmin(axis=1)
    low, high = edges[gaps], edges[gaps + 1]
    is_inner = np.isfinite(low) & np.isfinite(high)
    place = random.random(num_draws)
    open_ended = np.where(np.isfinite(low), np.inf, -np.inf)
    draws = np.where(is_inner, np.where(is_inner, low, 0.0) * (1 - place) + np.where(is_inner, high, 0.0) * place, open_ended)

    lower, upper = _tails(draws)
    censoring: Censoring = "none"
    if not inner.size:
        censoring = "both" if len(best) > 1 else "left" if best[0] == 0 else "right"
    found = Boundary(
        max_lag=cells[0].max_lag,
        lower=math.exp(min(lower, float(edges[chosen[0]]))),
        estimate=middle,
        upper=_exp(max(upper, float(edges[chosen[-1] + 1]))),
        censoring=censoring,
        num_cells=len(cells),
        num_misplaced=int(wrong.min()),
    )
    widths = np.diff(np.log(rates)) if len(rates) > 1 else np.ones(1)
    return found, np.clip(draws, edges[1] - widths[0], edges[-2] + widths[-1])


def _num_misplaced(num_cells: NDArray[np.int64], num_collapsed: NDArray[np.int64]) -> Floats:
    """For each draw and each gap, from below the grid to above it: collapsed runs below it and stable ones above; shape (draws, rates + 1)."""
    before = [(0, 0), (1, 0)]
    collapsed_below = np.pad(num_collapsed.cumsum(axis=1), before)
    num_stable = num_cells - num_collapsed
    stable_above = num_stable.sum(axis=1, keepdims=True) - np.pad(num_stable.cumsum(axis=1), before)
    found: Floats = (collapsed_below + stable_above).astype(np.float64)
    return found


def _lines(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Slopes and mean heights of least-squares lines through each row of y; x has shape (points,), y (draws, points)."""
    centred = x - x.mean()
    slopes: Floats = y @ centred / (centred @ centred)
    return slopes, y.mean(axis=1)


def _by_lag(cells: Iterable[Cell]) -> list[tuple[int, list[Cell]]]:
    found: defaultdict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        found[cell.max_lag].append(cell)
    return sorted(found.items())


# --- the escape time: Theorem 2, Eq. (34) and (35)


class Escape(Struct, frozen=True):
    """When one collapsed cell did. The reward of a reused batch is known once, so the collapse lies after `after` and not after `step`."""

    name: str
    max_lag: int
    lr: float
    after: int
    step: int

    @property
    def middle(self) -> float:
        return (self.after + self.step) / 2


class EscapeLaw(Struct, frozen=True):
    """t_collapse eta, and t_collapse ~ eta^-lr_exponent S^-lag_exponent: 1 and 0 for the paper's claim (b)."""

    num_collapsed: int
    num_fitted: int
    num_coarse: int
    """Collapsed cells left out because one of the same S and learning rate collapsed at the first sync: that says only that t is in (0, S]."""
    num_mixed: int
    """Collapsed cells left out because one of the same S and learning rate was stable: it may have been cut off by its horizon."""
    recorded_mean: float | None
    """Of t eta over all collapsed cells with t as recorded, the paper's t = M S (11)."""
    recorded_variation: float | None
    """Standard deviation over mean, of the same."""
    mean: float | None
    """Of t eta over the fitted cells with t in the middle of where it can lie."""
    mean_interval: Interval | None
    variation: float | None
    quantum_variation: float | None
    """The variation that rounding to weight syncs alone makes: a smaller one cannot be seen."""
    lr_exponent: float | None
    lr_interval: Interval | None
    lag_exponent: float | None
    lag_interval: Interval | None


def escapes(cells: Iterable[Cell]) -> list[Escape]:
    """Every collapse of a sweep. t is rounded up to a multiple of S in the cycles pipeline, and to a whole step in the queue pipeline."""
    found = []
    for cell in cells:
        if cell.collapse_step is not None:
            quantum = max(1, cell.max_lag) if cell.pipeline == "cycles" else 1
            found.append(Escape(cell.name, cell.max_lag, cell.lr, max(0, cell.collapse_step - quantum), cell.collapse_step))
    return found


def escape_law(cells: Sequence[Cell], random: np.random.Generator, num_draws: int = NUM_DRAWS) -> EscapeLaw:
    """The mean of t eta with a bootstrap over cells, and exponents by least squares in logs with a bootstrap over residuals.

    Each draw also puts every collapse uniformly within the steps where it can lie. Whole groups of one S and learning rate are left out, not single
    cells, since to choose among seeds by how they ended would bias t. An exponent whose variable does not vary is None.
    """
    collapsed = escapes(cells)
    stable_groups = {(cell.max_lag, cell.lr) for cell in cells if cell.outcome == "stable"}
    coarse_groups = {(one.max_lag, one.lr) for one in collapsed if one.after <= 0}
    mixed = [one for one in collapsed if (one.max_lag, one.lr) in stable_groups]
    coarse = [one for one in collapsed if (one.max_lag, one.lr) in coarse_groups - stable_groups]
    fitted = [one for one in collapsed if (one.max_lag, one.lr) not in coarse_groups | stable_groups]
    recorded = np.array([one.step * one.lr for one in collapsed])
    budgets = np.array([one.middle * one.lr for one in fitted])
    mean_interval, quantum_variation = None, None
    if fitted:
        picked = random.integers(len(fitted), size=(num_draws, len(fitted)))
        drawn = np.take_along_axis(_placed(fitted, random, num_draws), picked, axis=1) * np.array([one.lr for one in fitted])[picked]
        mean_interval = _interval(drawn.mean(axis=1), float(budgets.mean()))
        widths = np.array([(one.step - one.after) * one.lr for one in fitted])
        quantum_variation = math.sqrt(float(np.mean(widths**2)) / 12) / float(budgets.mean())
    (p, p_interval), (q, q_interval) = _exponents(fitted, random, num_draws)
    return EscapeLaw(
        num_collapsed=len(collapsed),
        num_fitted=len(fitted),
        num_coarse=len(coarse),
        num_mixed=len(mixed),
        recorded_mean=_mean(recorded),
        recorded_variation=_variation(recorded),
        mean=_mean(budgets),
        mean_interval=mean_interval,
        variation=_variation(budgets),
        quantum_variation=quantum_variation,
        lr_exponent=p,
        lr_interval=p_interval,
        lag_exponent=q,
        lag_interval=q_interval,
    )


def _exponents(fitted: Sequence[Escape], random: np.random.Generator, num_draws: int) -> list[tuple[float | None, Interval | None]]:
    """p and q of t ~ eta^-p S^-q with intervals; None where eta or S does not vary, or only the two together."""
    unknown: list[tuple[float | None, Interval | None]] = [(None, None), (None, None)]
    if len(fitted) < 3:
        return unknown
    columns = [np.log([one.lr for one in fitted]), np.log([float(max(1, one.max_lag)) for one in fitted])]
    varying = [index for index, column in enumerate(columns) if np.ptp(column) > 1e-9]
    design = np.stack([np.ones(len(fitted)), *(columns[index] - columns[index].mean() for index in varying)], axis=1)
    if not varying or np.linalg.matrix_rank(design) < design.shape[1]:
        return unknown
    solve = np.linalg.pinv(design)
    logs = np.log([one.middle for one in fitted])
    found = solve @ logs
    num_spare = len(fitted) - design.shape[1]
    residuals = (logs - design @ found) * math.sqrt(len(fitted) / max(1, num_spare))
    shaken = residuals[random.integers(len(fitted), size=(num_draws, len(fitted)))]
    moved = np.log(_placed(fitted, random, num_draws)) - logs
    draws = (design @ found + shaken + moved) @ solve.T
    answers = list(unknown)
    for place, index in enumerate(varying, start=1):
        exponent = -float(found[place])
        answers[index] = (exponent, _interval(-draws[:, place], exponent))
    return answers


def _placed(fitted: Sequence[Escape], random: np.random.Generator, num_draws: int) -> Floats:
    """Steps of collapse drawn uniformly from where each can lie; shape (num_draws, cells)."""
    after, step = np.array([one.after for one in fitted]), np.array([one.step for one in fitted])
    placed: Floats = step - (step - after) * random.random((num_draws, len(fitted)))
    return placed


# --- how runs move: Grad CosSim and the exponent of the drift, section 4.4


class Motion(Struct, frozen=True):
    """How one cell's weights moved, until its collapse if it had one."""

    name: str
    outcome: Outcome
    same_batch: float | None
    """Mean cosine of consecutive updates on one batch, over the last fifth of such pairs. Partly trivial: both follow the same samples."""
    new_batch: float | None
    """The same where the second update is the first on its batch."""
    num_same_batch: int
    """Pairs that the mean is of."""
    num_new_batch: int
    drift_exponent: float | None
    """1 for ballistic drift, t eta, and 1/2 for diffusive, sqrt(t) eta."""


def motion(cell: Cell, drift_exponent: DriftExponent) -> Motion:
    """Summarise the rows of a cell before its collapse, or all of a stable one's. Rows count steps from 0, and displacements are after the update."""
    rows = [row for row in cell.rows if cell.collapse_step is None or row.step < cell.collapse_step]
    same = _last([row.cosine for row in rows if row.cosine is not None and not row.is_first_use])
    new = _last([row.cosine for row in rows if row.cosine is not None and row.is_first_use])
    moved = [(row.step + 1, row.displacement) for row in rows if row.displacement is not None]
    exponent = drift_exponent([updates for updates, _ in moved], [displacement for _, displacement in moved]) if moved else None
    return Motion(
        name=cell.name,
        outcome=cell.outcome,
        same_batch=_mean(np.array(same)),
        new_batch=_mean(np.array(new)),
        num_same_batch=len(same),
        num_new_batch=len(new),
        drift_exponent=None if exponent is None else exponent.value,
    )


def mean_with_interval(values: Sequence[float], random: np.random.Generator, num_draws: int = NUM_DRAWS) -> tuple[float, Interval] | None:
    """The mean over cells and its bootstrap interval; None without values."""
    if not values:
        return None
    means = _resampled_means(values, random, num_draws)
    return float(np.mean(values)), _interval(means, float(np.mean(values)))


def difference_with_interval(
    values: Sequence[float], others: Sequence[float], random: np.random.Generator, num_draws: int = NUM_DRAWS
) -> tuple[float, Interval] | None:
    """The difference of two means over cells and its bootstrap interval; None where either is without values."""
    if not values or not others:
        return None
    difference = float(np.mean(values) - np.mean(others))
    draws = _resampled_means(values, random, num_draws) - _resampled_means(others, random, num_draws)
    return difference, _interval(draws, difference)


def separation(values: Sequence[float], others: Sequence[float]) -> float | None:
    """The chance that one of `values` exceeds one of `others`, ties counted half: the area under the ROC curve. None where either is empty."""
    if not values or not others:
        return None
    above = np.sign(np.array(values)[:, None] - np.array(others)[None, :])
    return float((above.mean() + 1) / 2)


def _resampled_means(values: Sequence[float], random: np.random.Generator, num_draws: int) -> Floats:
    found: Floats = np.array(values)[random.integers(len(values), size=(num_draws, len(values)))].mean(axis=1)
    return found


def _last(values: list[float]) -> list[float]:
    return values[-math.ceil(LAST_SHARE * len(values)) :] if values else []


# --- intervals


def _interval(draws: Floats, estimate: float) -> Interval:
    """The percentile interval of the draws, widened to the estimate where it is not inside."""
    lower, upper = _tails(draws)
    return Interval(min(lower, estimate), max(upper, estimate))


def _tails(draws: Floats) -> tuple[float, float]:
    """The percentiles that leave LEVEL between them, from among the draws, which may be infinite."""
    tail = (1 - LEVEL) / 2
    return float(np.quantile(draws, tail, method="lower")), float(np.quantile(draws, 1 - tail, method="higher"))


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None


def _variation(values: Floats) -> float | None:
    return float(values.std(ddof=1) / values.mean()) if values.size >= 2 and values.mean() else None


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < math.inf else math.inf
