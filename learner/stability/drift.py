"""How the weights move away: the exponent alpha of displacement ~ t^alpha, near 1 where updates agree (ballistic), 1/2 where they are independent.

Paper, section 4, claim (c). Displacements of one run at different times share almost all of their path, so the residuals of a log-log fit are
strongly correlated and its textbook interval is far too narrow. The intervals here are made for that; each says below what it rests on.

Invariant: no interval is given without the blocks or octaves that it needs, and a window holds no step older than its width.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import NormalDist, fmean
from typing import Final, NamedTuple

CONFIDENCE: Final = 0.95
NUM_BLOCKS: Final = 8
MIN_POINTS: Final = 6


class Exponent(NamedTuple):
    """alpha with its 95 % interval, and how many steps it was found from."""

    value: float
    lower: float
    upper: float
    num_steps: int


class DriftWindow:
    """The exponent over the last `width` steps, from distances |theta_t - theta_{t-k}| over a handful of lags k (the structure function).

    MSD(k), the mean square distance over lag k, needs no origin: what the run did before the window does not bend it. alpha is half the slope of
    log MSD over log k, each lag weighing the same; lags 1, 2, 4, ... are meant. Where MSD is no power law, as with updates that agree over a few
    steps only, alpha is the mean slope over the lags that are used, not that of the far future.

    The interval is a jackknife over 8 blocks of consecutive steps with Student's t. A lag is used if it is at most half a block, a sixteenth of
    `width`, so that neighbouring blocks are nearly independent: a width of 128 uses lags up to 8, one of 512 up to 32.
    """

    def __init__(self, width: int) -> None:
        """Raises ValueError for a width that holds fewer than two usable lags (below 32)."""
        if width < 4 * NUM_BLOCKS:
            raise ValueError(f"a window of {width} steps holds no two lags to compare; take at least {4 * NUM_BLOCKS}")
        self._block = width // NUM_BLOCKS
        self._squares: deque[dict[int, float]] = deque(maxlen=self._block * NUM_BLOCKS)

    def add(self, distances: Mapping[int, float]) -> None:
        """One more step, with the distances by lag that are known at it; none at all is fine. Lags too long for the window are left out."""
        self._squares.append({lag: distance**2 for lag, distance in distances.items() if 0 < 2 * lag <= self._block})

    def exponent(self) -> Exponent | None:
        """None while the window is not full, where fewer than two lags were seen in each block, and where nothing moves."""
        if len(self._squares) < self._block * NUM_BLOCKS:
            return None
        steps = list(self._squares)
        blocks = [steps[start : start + self._block] for start in range(0, len(steps), self._block)]
        lags = sorted(set.intersection(*({lag for step in block for lag in step} for block in blocks)))
        sums = {lag: [sum(step.get(lag, 0.0) for step in block) for block in blocks] for lag in lags}
        counts = {lag: [sum(lag in step for step in block) for block in blocks] for lag in lags}
        if len(lags) < 2 or any(sum(parts) - max(parts) <= 0 for parts in sums.values()):
            return None

        def without(left_out: int | None) -> float:
            def kept(parts: Sequence[float]) -> float:
                return sum(part for index, part in enumerate(parts) if index != left_out)

            return slope([math.log(lag) for lag in lags], [math.log(kept(sums[lag]) / kept(counts[lag])) / 2 for lag in lags])

        return _jackknife(without, len(steps))


def _jackknife(without: Callable[[int | None], float], num_steps: int) -> Exponent:
    """`without(b)` is the estimate with block b left out, `without(None)` that with all. Corrects its bias to first order."""
    partial = [without(block) for block in range(NUM_BLOCKS)]
    mean = fmean(partial)
    value = NUM_BLOCKS * without(None) - (NUM_BLOCKS - 1) * mean
    error = math.sqrt((NUM_BLOCKS - 1) / NUM_BLOCKS * sum((part - mean) ** 2 for part in partial))
    half = student_t(NUM_BLOCKS - 1) * error
    return Exponent(value, value - half, value + half, num_steps)


def drift_exponent(steps: Sequence[int], displacements: Sequence[float]) -> Exponent | None:
    """alpha from |theta_t - theta_0| alone, as a recorded run has it: the slope of log displacement over log t at points a factor 1.4 apart.

    `steps` count from the run's first weights, ascending. The points are geometric, so that the late steps do not drown the early ones. In log t
    the residuals of a random walk have the correlation s/t of its squares, and those of a straight path with noise sqrt(s/t); the interval takes
    the longer of both, with the size of the residuals and their degrees of freedom estimated from the fit. It is therefore somewhat wide for pure
    diffusion. Cannot know: a run that was ballistic first and diffusive later keeps its early displacement, so alpha over its late steps is
    neither of both. Where distances over lags are at hand, DriftWindow is the better estimate.

    None with fewer than 6 such points (about a factor 6 in t), or where nothing moves. Raises ValueError for steps that do not ascend.
    """
    if len(steps) != len(displacements) or any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError("steps must ascend, with one displacement each")
    known = [(step, displacement) for step, displacement in zip(steps, displacements, strict=True) if step > 0 and displacement > 0]
    times = [step for step, _ in known]
    chosen = _geometric(times)
    if len(chosen) < MIN_POINTS:
        return None
    xs = [math.log(times[index]) for index in chosen]
    ys = [math.log(known[index][1]) for index in chosen]
    value = slope(xs, ys)
    error, freedom = _correlated_error(xs, ys, value)
    half = student_t(freedom) * error
    return Exponent(value, value - half, value + half, times[-1] - times[0] + 1)


def _geometric(times: Sequence[int]) -> list[int]:
    """Indices into ascending `times`, each about a factor 1.4 after the one before, the last included."""
    if not times:
        return []
    octaves = math.log2(times[-1] / times[0])
    num_points = 1 + math.floor(2 * octaves)
    wanted = [times[-1] * 2 ** (-point / 2) for point in reversed(range(num_points))]
    return sorted({min(bisect_left(times, wish - 0.5), len(times) - 1) for wish in wanted})


def _correlated_error(xs: Sequence[float], ys: Sequence[float], fitted: float) -> tuple[float, float]:
    """Standard error of a least-squares slope whose residuals have the correlation exp(-|x - x'| / 2), and its degrees of freedom.

    With M the projection onto residuals and R the correlation, the residuals' sum of squares has mean sigma^2 tr(MR), and the freedom of a
    chi-square with its first two moments is tr(MR)^2 / tr(MRMR).
    """
    size, mean_x, mean_y = len(xs), fmean(xs), fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    correlation = [[math.exp(-abs(a - b) / 2) for b in xs] for a in xs]
    project = [[(i == j) - 1 / size - (xs[i] - mean_x) * (xs[j] - mean_x) / spread for j in range(size)] for i in range(size)]
    product = [[sum(project[i][k] * correlation[k][j] for k in range(size)) for j in range(size)] for i in range(size)]
    trace = sum(product[i][i] for i in range(size))
    trace_of_square = sum(product[i][j] * product[j][i] for i in range(size) for j in range(size))
    squares = sum((y - mean_y - fitted * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    weights = [(x - mean_x) / spread for x in xs]
    variance = sum(weights[i] * correlation[i][j] * weights[j] for i in range(size) for j in range(size))
    return math.sqrt(squares / trace * variance), trace**2 / trace_of_square


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the least-squares line. At least two of `xs` differ."""
    mean_x = fmean(xs)
    return sum((x - mean_x) * y for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def student_t(freedom: float, confidence: float = CONFIDENCE) -> float:
    """The quantile of Student's t for a two-sided interval, by expansion in 1 / freedom: to 1 % from 3 degrees of freedom on."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = [
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    ]
    return sum(term / freedom**power for power, term in enumerate(terms))
