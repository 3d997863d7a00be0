"""The constants of the two-constraint rule (paper, Eq. 37) from runs: what collapsed, how far it had gone by then, how its ratios spread.

Invariant: every estimate says in `notes` what it rests on; where runs do not decide, the interval is open and the notes say so.

Fits are by maximum likelihood of a location m and a scale s, found by golden sections: all likelihoods here are log-concave in (m/s, 1/s), so they
have one peak. Intervals for m are those of the profile likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Final, NamedTuple

from learner.stability.drift import slope, student_t
from learner.stability.rule import EXACTLY_ONE, Z95, Calibration, Measured

SCALES: Final = (math.log(0.001), math.log(5.0))
"""The range of scales looked at, of quantities that are themselves logarithms: from a scatter of 0.1 % to one of e^5."""
MIN_COLLAPSES: Final = 3
MAX_SCATTER: Final = 1.0
"""Where single runs scatter more than this, a factor e, about their median, the median says little of the next run."""
NUM_BLOCKS: Final = 8
STEPS_PER_BLOCK: Final = 3
GOLDEN: Final = (math.sqrt(5) - 1) / 2
COARSE: Final = 15
"""Golden sections of a fit of which only the height of the peak counts."""


class StepMeasure(NamedTuple):
    """What one optimizer step measured. `drift` is |theta_t - phi| before the update, `displacement` |theta - theta_0| after it,
    `g_upd` the norm of the applied update over the learning rate, `kl_behaviour` the mean over tokens of KL from the behaviour policy."""

    step: int
    drift: float | None
    displacement: float | None
    g_upd: float | None
    kl_behaviour: float | None


class RunRecord(NamedTuple):
    """A run and its outcome. `max_lag` is S, `collapse_step` the step from which on the reward is zero."""

    name: str
    max_lag: int
    lr: float
    collapsed: bool
    collapse_step: int | None
    num_steps: int
    steps: Sequence[StepMeasure]
    unseen: int = 0
    """Rewards up to this step are of weights that were trained on nothing but what the first weights sampled; of a queue these are the first 2 S
    steps, S to train them and S until what they sampled is used. At least S counts."""


class HorizonFit(NamedTuple):
    """`constant`: R_crit/G_upd, the median over runs, None without runs. `scatter`: standard deviation of its logarithm from run to run.
    `is_decisive`: false where stable runs went so much farther that displacement cannot be what decides."""

    constant: Measured | None
    scatter: float
    is_decisive: bool
    num_collapsed: int
    num_stable: int
    notes: str


class BatchFit(NamedTuple):
    """`constant`: R_batch/G_upd as the S eta at which half of the runs collapse. `scatter`: the standard deviation, in log space, of that
    threshold from run to run."""

    constant: Measured | None
    scatter: float
    reference_lag: float
    notes: str


class SignalFit(NamedTuple):
    """`constant`: R_batch(eps)/G_upd from the spread of importance ratios. `kappa`: root mean square log-ratio per unit of drift."""

    constant: Measured | None
    kappa: Measured | None
    notes: str


def root_mean_square_update(steps: Sequence[StepMeasure]) -> float | None:
    """G_2 over these steps (paper, Eq. 39, 40), which may stand for G_upd; None if nothing moved."""
    squares = [step.g_upd**2 for step in steps if step.g_upd is not None]
    return math.sqrt(fmean(squares)) if any(squares) else None


def travelled(run: RunRecord) -> tuple[float, float] | None:
    """Between which displacements over G_2 the run collapsed, in learning rate times steps; up to infinity for a stable run.

    Weights that gave the first reward of zero are up to S steps older than the step that saw it, and rewards of a reused batch tell nothing new:
    so the lower end is the displacement S steps before, and 1 % less than the upper at least. On the straight path it is eta t, on any other less.
    None where the run did not measure it.
    """
    end = max(1, run.collapse_step) if run.collapsed and run.collapse_step is not None else run.num_steps
    before = [step for step in run.steps if step.step < end]
    scale = root_mean_square_update(before)
    known = [(step.step, step.displacement) for step in before if step.displacement is not None]
    if scale is None or not known:
        return None
    if not run.collapsed:
        return max(displacement for _, displacement in known) / scale, math.inf
    earlier = [displacement for step, displacement in known if step < end - max(1, run.max_lag)]
    high = known[-1][1] / scale
    return min(earlier[-1] / scale if earlier else 0.0, 0.99 * high), high


def straightness(run: RunRecord) -> float | None:
    """Net displacement at the end of a stable run over T eta G_2: 1 on a straight path. None for a run that collapsed, or did not measure it."""
    scale = root_mean_square_update(run.steps)
    known = [step.displacement for step in run.steps if step.displacement is not None]
    if run.collapsed or scale is None or not known or known[-1] <= 0:
        return None
    return known[-1] / scale / (run.num_steps * run.lr)


def fit_horizon(runs: Sequence[RunRecord]) -> HorizonFit:
    """R_crit/G_upd: a log-normal displacement at collapse, of which stable runs give lower bounds (right-censored) and collapsed ones brackets.

    The interval is of the median over runs, from the profile likelihood with the cut-off that is exact for few uncensored values.
    Knows: how far runs like these went before they collapsed. Cannot know: whether displacement was the cause. If a mixture in which a share of
    the runs never collapses fits significantly better (likelihood ratio above 2.71, 5 % at the boundary), or runs scatter by more than
    MAX_SCATTER, displacement does not decide: what is left is how far stable runs went, open above, and a run beyond it is not called outside.
    So it is with fewer than 3 collapses. Runs that collapsed within their first S steps are left out: all they trained on was sampled by the first
    weights, so that the batch constraint broke them, before any horizon could.
    """
    late = [run for run in runs if run.collapse_step is None or run.collapse_step > max(run.max_lag, run.unseen)]
    found = [(run, ends) for run in late if (ends := travelled(run)) is not None and ends[1] > 0]
    collapsed = [(_log(low), math.log(high)) for run, (low, high) in found if run.collapsed]
    stable = [(math.log(low), math.inf) for run, (low, _) in found if not run.collapsed and low > 0]
    counts = (len(collapsed), len(stable))
    if not collapsed and not stable:
        return HorizonFit(None, 0.0, False, *counts, "no run measured a displacement")
    if not collapsed:
        farthest = math.exp(max(low for low, _ in stable))
        return HorizonFit(Measured(farthest, farthest, None), 0.0, False, *counts, "no run collapsed: a lower bound only")
    middle = fmean(high for _, high in collapsed)
    if len(collapsed) < MIN_COLLAPSES:
        notes = f"{len(collapsed)} collapsed after their first S steps: too few for an interval"
        if stable:
            return _undecided(stable, counts, notes)
        return HorizonFit(Measured(math.exp(middle), 0.0, None), 0.0, False, *counts, notes)

    observed = collapsed + stable
    span = [end for ends in observed for end in ends if math.isfinite(end)]
    plain = _Profile(lambda m, s: _brackets(observed, m, s), min(span) - 3, max(span) + 5)
    freedom = len(collapsed) - 1
    cutoff = len(collapsed) * math.log1p(student_t(freedom) ** 2 / freedom)
    farther = sum(low > max(high for _, high in collapsed) for low, _ in stable)
    if farther and _with_survivors(collapsed, stable).peak - plain.peak > 2.71 / 2:
        notes = f"{farther} of {len(stable)} stable runs went farther than the farthest collapse: displacement alone does not decide"
        return _undecided(stable, counts, notes)
    scatter = plain.scale * math.sqrt(len(collapsed) / freedom)
    if stable and scatter > MAX_SCATTER:
        notes = f"displacement at collapse scatters by a factor {math.exp(scatter):.1f} from run to run: displacement alone does not decide"
        return _undecided(stable, counts, notes)
    return HorizonFit(plain.measured(cutoff), scatter, True, *counts, "log-normal displacement at collapse, stable runs censored")


def _undecided(stable: Sequence[tuple[float, float]], counts: tuple[int, int], notes: str) -> HorizonFit:
    """What is left where displacement does not decide: stable runs went so far, and nothing is known beyond."""
    farthest = math.exp(max(low for low, _ in stable))
    return HorizonFit(Measured(farthest, farthest, None), 0.0, False, *counts, notes)


def fit_batch(runs: Sequence[RunRecord], lag_exponent: Measured = EXACTLY_ONE) -> BatchFit:
    """R_batch/G_upd from outcomes: where, in log(S^b eta), half of the runs collapse; `lag_exponent` is b. Runs without lag say nothing.

    Where one value divides the stable from the collapsed, the interval is the gap between them, which is all that is known if the product alone
    decides. Else a logistic regression with the interval of its profile likelihood. Knows: the outcome of runs as long as these. Cannot know
    which constraint broke a run: one that ended by the horizon counts here too, so use runs of about the same T eta, or the constant is too low.
    Where products do not tell the outcomes apart (likelihood ratio below 3.84), the interval is open on both sides.
    Simulated sweeps of 60 runs have the constant in the regression's interval in 92 of 100.
    """
    lagged = [run for run in runs if run.max_lag > 0]
    if not lagged:
        return BatchFit(None, 0.0, 1.0, "no run had any lag")
    reference = math.exp(fmean(math.log(run.max_lag) for run in lagged))
    tallies = _tallies(lagged, lag_exponent.value, reference)
    stable, collapsed = [tally.x for tally in tallies if tally.num_good], [tally.x for tally in tallies if tally.num_bad]
    if not collapsed:
        most = math.exp(max(stable))
        return BatchFit(Measured(most, most, None), 0.0, reference, "no run collapsed: a lower bound only")
    if not stable:
        least = math.exp(min(collapsed))
        return BatchFit(Measured(least, 0.0, least), 0.0, reference, "every run collapsed: an upper bound only")
    if max(stable) < min(collapsed):
        gap = (max(stable), min(collapsed))
        constant = Measured(math.exp(fmean(gap)), math.exp(gap[0]), math.exp(gap[1]))
        return BatchFit(constant, 0.0, reference, "one value of the product divides stable from collapsed runs: the interval is the gap")
    fit = _Profile(lambda m, s: _logistic(tallies, m, s), tallies[0].x - 2, tallies[-1].x + 2)
    num_bad = sum(tally.num_bad for tally in tallies)
    if fit.peak - _constant_share(num_bad, len(lagged) - num_bad) < Z95**2 / 2:
        middle = math.exp(fmean(tally.x for tally in tallies))
        return BatchFit(Measured(middle, 0.0, None), 0.0, reference, "the product does not tell stable from collapsed runs")
    scatter = fit.scale * math.pi / math.sqrt(3)
    return BatchFit(fit.measured(Z95**2), scatter, reference, "logistic regression of the outcome on the log of the product")


def fit_lag_exponent(runs: Sequence[RunRecord]) -> Measured | None:
    """b of the collapse boundary S^b eta = constant, which the paper has as 1; None where the outcomes leave it open on both sides.

    Where some b divides stable from collapsed runs without exception, the interval holds every such b, and no more is known: coarse grids of
    S and eta leave it wide. Else it is the profile likelihood's. Needs stable and collapsed runs at two values of S or more.
    """
    lagged = [run for run in runs if run.max_lag > 0]
    low, high = 0.0, math.inf
    is_divided = True
    for good in (run for run in lagged if not run.collapsed):
        for bad in (run for run in lagged if run.collapsed):
            steps, rates = math.log(bad.max_lag / good.max_lag), math.log(good.lr / bad.lr)
            if steps > 0:
                low = max(low, rates / steps)
            elif steps < 0:
                high = min(high, rates / steps)
            else:
                is_divided &= rates < 0
    if is_divided and low < high:
        return _known_ends(low, high)
    return _exponent_by_likelihood(lagged)


def fit_signal(run: RunRecord, clip_range: float) -> SignalFit:
    """R_batch(eps) = log(1 + eps) / kappa over G_2, from one run without any collapse.

    kappa is the slope, through the origin, of the root mean square log-ratio of tokens, sqrt(2 KL), over the drift |theta_t - phi|: the median
    of their quotients over steps of at least the median drift, where a floor in KL (its median at no drift: engines that differ in arithmetic)
    matters least and is taken off. Interval: Student's t over 8 blocks of consecutive steps. Knows: at which drift a typical token's ratio
    leaves the clip range, so that the batch's signal degenerates (31). Cannot know: whether the run would collapse there. The interval is of the
    slope alone, and drift beyond what this run reached is extrapolated.
    """
    known = [(s.drift, s.kl_behaviour) for s in run.steps if s.drift is not None and s.kl_behaviour is not None]
    still = [kl for drift, kl in known if drift == 0]
    floor = median(still) if still else 0.0
    moved = [(drift, math.sqrt(2 * max(kl - floor, 0.0))) for drift, kl in known if drift > 0]
    scale = root_mean_square_update(run.steps)
    if scale is None or len(moved) < 2 * NUM_BLOCKS * STEPS_PER_BLOCK:
        return SignalFit(None, None, "too few steps with lag that measured drift, KL and the update")
    least = median(drift for drift, _ in moved)
    quotients = [spread / drift for drift, spread in moved if drift >= least]
    bounds = [round(block * len(quotients) / NUM_BLOCKS) for block in range(NUM_BLOCKS + 1)]
    medians = [median(quotients[bounds[block] : bounds[block + 1]]) for block in range(NUM_BLOCKS)]
    if min(medians) <= 0:
        return SignalFit(None, None, "KL does not rise above its floor with drift")
    logs = [math.log(value) for value in medians]
    middle = fmean(logs)
    half = student_t(NUM_BLOCKS - 1) * math.sqrt(sum((value - middle) ** 2 for value in logs) / (NUM_BLOCKS - 1) / NUM_BLOCKS)
    kappa = Measured(math.exp(middle), math.exp(middle - half), math.exp(middle + half))
    width = math.log1p(clip_range) / scale
    constant = Measured(width / kappa.value, width / kappa.ceiling, width / kappa.lower)
    return SignalFit(constant, kappa, _straightness(moved))


def calibrate(
    runs: Sequence[RunRecord], clip_range: float, valid_for: Mapping[str, str], lag_exponent: Measured = EXACTLY_ONE
) -> Calibration:
    """Both constants from `runs`, with their provenance. The batch constant is that of the outcomes where runs both collapsed and did not, else
    that of the ratios' spread in the longest stable run that shows it, else the bound that the outcomes give."""
    batch = fit_batch(runs, lag_exponent)
    horizon = _fit_horizon_beside(batch, runs, lag_exponent)
    constant, notes = batch.constant, f"batch: {batch.notes}"
    if len({run.collapsed for run in runs if run.max_lag > 0}) < 2:
        for run in sorted((run for run in runs if not run.collapsed), key=lambda run: -run.num_steps):
            signal = fit_signal(run, clip_range)
            if signal.constant is not None:
                constant, notes = signal.constant, f"batch: spread of importance ratios in {run.name}; {signal.notes}"
                break
    return Calibration(
        batch=constant,
        horizon=horizon.constant,
        lag_exponent=lag_exponent,
        reference_lag=batch.reference_lag,
        batch_scatter=batch.scatter,
        horizon_scatter=horizon.scatter,
        largest_lag_seen=max((run.max_lag for run in runs), default=0),
        runs=tuple(run.name for run in runs),
        valid_for=dict(valid_for),
        notes=f"{notes}. horizon: {horizon.notes}.",
    )


def _fit_horizon_beside(batch: BatchFit, runs: Sequence[RunRecord], lag_exponent: Measured) -> HorizonFit:
    """The horizon, where two constraints may have broken a run: the one that divides more sharply has the say.

    Unless displacement at collapse scatters less from run to run than it is unknown where the product divides stable from collapsed runs, a
    collapse beyond that product is the batch constraint's and says nothing of the horizon, like those within their first S steps. Runs beyond it
    that came through are left out with them: alone they would be the lucky ones. In runs of one length a horizon that is no sharper than that
    cannot be seen; what is left is how far stable runs below the product went.
    """
    fit, resolution = fit_horizon(runs), _resolution(batch)
    if math.isinf(resolution) or (fit.is_decisive and fit.scatter <= resolution):
        return fit
    below = [run for run in runs if not _is_beyond(batch, run, lag_exponent)]
    if len(below) == len(runs) or (beside := fit_horizon(below)).constant is None:
        return fit
    return beside._replace(notes=f"{beside.notes}; runs beyond the batch constraint, which is the sharper one, are left out")


def _resolution(batch: BatchFit) -> float:
    """How sharply the product is known to divide stable from collapsed runs, in log space; infinite where it does not."""
    if batch.constant is None or batch.constant.upper is None or batch.constant.lower == 0:
        return math.inf
    return max(batch.scatter, *batch.constant.gaps)


def _is_beyond(batch: BatchFit, run: RunRecord, lag_exponent: Measured) -> bool:
    """Whether more than half of the runs with this product collapse."""
    if batch.constant is None or not run.max_lag:
        return False
    return _log_product(run, lag_exponent.value, batch.reference_lag) > math.log(batch.constant.value)


class _Profile:
    """The profile over m of a log-likelihood of (m, s): its peak, where it is (the middle, if it is flat), the scale there, and intervals."""

    def __init__(self, likelihood: Callable[[float, float], float], low: float, high: float) -> None:
        self._likelihood, self._low, self._high = likelihood, low, high
        top, self.peak = _golden(self._over_scales, low, high)
        self.value = top
        self.value = fmean(self._ends(1e-4))
        self.scale = math.exp(_golden(lambda log_s: likelihood(self.value, math.exp(log_s)), *SCALES)[0])

    def measured(self, cutoff: float) -> Measured:
        """exp(m) where twice the log-likelihood falls by less than `cutoff`; open on a side where it nowhere does."""
        low, high = self._ends(cutoff)
        lower = 0.0 if low <= self._low else math.exp(low)
        return Measured(math.exp(self.value), lower, None if high >= self._high else math.exp(high))

    def _ends(self, cutoff: float) -> tuple[float, float]:
        return self._end(self._low, cutoff), self._end(self._high, cutoff)

    def _end(self, outer: float, cutoff: float) -> float:
        def is_within(m: float) -> bool:
            return 2 * (self.peak - self._over_scales(m)) < cutoff

        if is_within(outer):
            return outer
        inner = self.value
        for _ in range(24):
            middle = (inner + outer) / 2
            inner, outer = (middle, outer) if is_within(middle) else (inner, middle)
        return inner

    def _over_scales(self, m: float) -> float:
        return _golden(lambda log_s: self._likelihood(m, math.exp(log_s)), *SCALES)[1]


def _golden(function: Callable[[float], float], low: float, high: float, num_rounds: int = 21) -> tuple[float, float]:
    """Where a function with one peak has it, to 0.618^num_rounds of the range (3e-5), and how high it is; the ends count."""
    start, stop = low, high
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(num_rounds):
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = function(right)
        else:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = function(left)
    return max([(left, at_left), (right, at_right), (start, function(start)), (stop, function(stop))], key=lambda pair: pair[1])


def _brackets(observed: Sequence[tuple[float, float]], m: float, s: float) -> float:
    """Log-likelihood of values known to lie between the ends given, of a normal distribution."""
    return sum(_log_between((low - m) / s, (high - m) / s) for low, high in observed)


def _log_between(low: float, high: float) -> float:
    """Log of the standard normal probability between two values, by the tail that keeps its digits."""
    if low + high > 0:
        low, high = -high, -low
    probability = (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2))) / 2
    return math.log(probability) if probability > 1e-290 else -(high**2) / 2 - math.log(2 + abs(high))


class _Mixture(NamedTuple):
    value: float
    scale: float
    peak: float


def _with_survivors(collapsed: Sequence[tuple[float, float]], stable: Sequence[tuple[float, float]]) -> _Mixture:
    """The fit in which a share of the runs collapses, log-normally, and the others never do."""
    highs = [high for _, high in collapsed]

    def likelihood(m: float, s: float) -> float:
        reach = [math.exp(_log_between((low - m) / s, math.inf)) for low, _ in stable]

        def with_share(share: float) -> float:
            survived = sum(math.log(1 - share + share * part) for part in reach)
            return survived + len(collapsed) * math.log(share)

        return _brackets(collapsed, m, s) + _golden(with_share, 0.001, 0.999, COARSE)[1]

    def best_scale(m: float) -> tuple[float, float]:
        return _golden(lambda log_s: likelihood(m, math.exp(log_s)), *SCALES, COARSE)

    value, peak = _golden(lambda m: best_scale(m)[1], min(highs) - 1, max(highs) + 1, COARSE)
    return _Mixture(value, math.exp(best_scale(value)[0]), peak)


class _Tally(NamedTuple):
    """How many runs with the same log of the product collapsed, and did not."""

    x: float
    num_bad: int
    num_good: int


def _tallies(runs: Sequence[RunRecord], exponent: float, reference: float) -> list[_Tally]:
    """The outcomes by the log of the product, ascending."""
    counts: dict[float, list[int]] = {}
    for run in runs:
        counts.setdefault(_log_product(run, exponent, reference), [0, 0])[run.collapsed] += 1
    return [_Tally(x, num_bad, num_good) for x, (num_good, num_bad) in sorted(counts.items())]


def _log_product(run: RunRecord, exponent: float, reference: float) -> float:
    """log(S0 (S / S0)^b eta); products that differ by rounding only are the same."""
    return round(math.log(reference * run.lr) + exponent * math.log(run.max_lag / reference), 9)


def _logistic(tallies: Sequence[_Tally], m: float, s: float) -> float:
    """Log-likelihood of outcomes whose odds of collapse are exp((x - m) / s)."""
    return -sum(num_bad * _softplus((m - x) / s) + num_good * _softplus((x - m) / s) for x, num_bad, num_good in tallies)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _constant_share(num_bad: int, num_good: int) -> float:
    """Log-likelihood if every run has the same odds."""
    total = num_bad + num_good
    return sum(count * math.log(count / total) for count in (num_bad, num_good) if count)


def _exponent_by_likelihood(runs: Sequence[RunRecord]) -> Measured | None:
    """The b at which the logistic regression of `fit_batch` is likeliest, from 1/8 to 8; None unless the interval ends inside on some side."""
    if len({run.collapsed for run in runs}) < 2 or len({run.max_lag for run in runs}) < 2:
        return None
    reference = math.exp(fmean(math.log(run.max_lag) for run in runs))

    def peak(log_b: float) -> float:
        tallies = _tallies(runs, math.exp(log_b), reference)

        def over_scales(m: float) -> float:
            return _golden(lambda log_s: _logistic(tallies, m, math.exp(log_s)), *SCALES, COARSE)[1]

        return _golden(over_scales, tallies[0].x - 2, tallies[-1].x + 2, COARSE)[1]

    grid = [math.log(8) * step / 18 for step in range(-18, 19)]
    heights = [peak(log_b) for log_b in grid]
    falls = [2 * (max(heights) - height) for height in heights]
    within = [index for index, fall in enumerate(falls) if fall < Z95**2]
    first, last = within[0], within[-1]
    if first == 0 and last == len(grid) - 1:
        return None

    def crossing(inside: int, outside: int) -> float:
        """Where the fall reaches the cut-off, between two neighbours of the grid."""
        part = (Z95**2 - falls[inside]) / (falls[outside] - falls[inside])
        return math.exp(grid[inside] + part * (grid[outside] - grid[inside]))

    return Measured(
        math.exp(grid[falls.index(min(falls))]),
        0.0 if first == 0 else crossing(first, first - 1),
        None if last == len(grid) - 1 else crossing(last, last + 1),
    )


def _known_ends(low: float, high: float) -> Measured | None:
    """An exponent known to lie between two ends and no better."""
    if low > 0 and math.isfinite(high):
        return Measured(math.sqrt(low * high), low, high)
    if low > 0:
        return Measured(low, low, None)
    return Measured(high / 2, 0.0, high) if math.isfinite(high) else None


def _straightness(moved: Sequence[tuple[float, float]]) -> str:
    """Whether the log-ratios grow in proportion to drift, in words."""
    points = [(math.log(drift), math.log(spread)) for drift, spread in moved if spread > 0]
    xs = [x for x, _ in points]
    if len(points) < 2 or max(xs) - min(xs) < math.log(2):
        return "drift varied too little to see whether log-ratios grow in proportion to it"
    power = slope(xs, [y for _, y in points])
    return f"log-ratios grow as drift^{power:.2f}" + ("" if abs(power - 1) < 0.25 else ": not in proportion, so do not extrapolate")


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
