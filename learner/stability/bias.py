"""The staleness bias of the surrogate gradient (paper Eq. 17), estimated from independent rounds, and how it grows (Lemma 1, Theorem 1).

In each round the gradient is estimated twice, from groups of phi and from fresh groups of theta; their difference is d_a = delta + noise. The
square of a mean of noisy differences is too large by the noise, however small delta is. Products of different rounds are not:

    E <d_a, d_b> = |delta|^2 for a != b,

so all squares and products here are means over pairs of different rounds. They may come out below zero, which says that delta is smaller than can be
told. Intervals are those of the jackknife over rounds (95 %, Student's t); pure floats, no gradients: only their inner products come here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

MIN_ROUNDS = 3
"""Without one of them there must still be a pair."""
EXPONENTS = [step / 50 for step in range(-50, 201)]
"""Those that are looked at."""
MAX_HALF_WIDTH = 0.5
"""An exponent known to no more than this does not tell a square root from a line from a square."""

Matrix = Sequence[Sequence[float]]
Growth = Literal["linear", "sublinear", "superlinear", "cannot tell (noise)"]


class RoundProducts(NamedTuple):
    """Inner products between rounds, [a][b]: of the differences d_a, d_b; of d_a with the fresh gradient g_b; of g_a, g_b."""

    bias: Matrix
    cross: Matrix
    fresh: Matrix


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def root(self) -> Estimate:
        """Of a square, what it is the square of; what is below zero becomes zero."""
        return Estimate(*(math.sqrt(max(0.0, bound)) for bound in (self.value, self.low, self.high)))


@dataclass(frozen=True)
class Bias:
    """delta of one phi.

    `squared` is |delta|^2, `size` its root. `noise_floor`: the size that sampling alone gives the mean difference of all rounds.
    `along` is <delta, H_on> / |H_on|^2: -0.3 says that staleness takes 30 % off the fresh gradient. `across` is the size of what is at right angles
    to it, by |H_on|: how far the gradient is turned. Both are None where |H_on| is not told from noise.
    """

    squared: Estimate
    size: Estimate
    noise_floor: float
    along: Estimate | None
    across: float | None

    @property
    def is_clear(self) -> bool:
        """Whether there is a bias, beyond sampling noise."""
        return self.squared.low > 0


@dataclass(frozen=True)
class Fit:
    """|delta| against x (a distance, or a lag) over several phi.

    `slope`: C of |delta| = C x, through the origin (C_stale of Eq. 18 where x is a distance). `exponent`: p of |delta| ~ x^p, with the interval of
    all that the noise leaves open, within EXPONENTS. `growth` says what that comes to; `num_clear` points have a bias that is clear by itself.
    """

    slope: Estimate
    exponent: Estimate
    num_clear: int
    growth: Growth


def staleness_bias(products: RoundProducts) -> Bias:
    """delta from the products of R >= MIN_ROUNDS rounds."""
    num_rounds = len(products.bias)
    squared = _jackknife(lambda kept: _between(products.bias, kept), num_rounds)
    assert squared is not None
    within = sum(products.bias[a][a] for a in range(num_rounds)) / num_rounds
    along = _jackknife(lambda kept: _along(products, kept), num_rounds)
    across = None
    if along is not None:
        across = math.sqrt(max(0.0, squared.value / _between(products.fresh, range(num_rounds)) - along.value**2))
    return Bias(squared, squared.root(), math.sqrt(max(0.0, within - squared.value) / num_rounds), along, across)


def gradient_size(fresh: Matrix) -> Estimate:
    """|H_on|, from the products of the fresh gradients of R >= MIN_ROUNDS rounds."""
    found = _jackknife(lambda kept: _between(fresh, kept), len(fresh))
    assert found is not None
    return found.root()


def fit_growth(xs: Sequence[float], points: Sequence[RoundProducts]) -> Fit:
    """How |delta| grows with x; `points` have the same rounds, which are left out from all of them together.

    The slope is that of squares, C^2 = sum |delta|^2 / sum x^2, in which noise averages out, where roots would make it part of the bias.
    """
    num_rounds = len(points[0].bias)
    scale = sum(x * x for x in xs)
    slope = _jackknife(lambda kept: sum(_between(point.bias, kept) for point in points) / scale if scale else 0.0, num_rounds)
    assert slope is not None
    exponent = _exponent([(x, point.bias) for x, point in zip(xs, points, strict=True) if x > 0], num_rounds)
    return Fit(slope.root(), exponent, sum(staleness_bias(point).is_clear for point in points), _growth(exponent))


def _growth(exponent: Estimate) -> Growth:
    if exponent.high < 1:
        return "sublinear"
    if exponent.low > 1:
        return "superlinear"
    return "linear" if (exponent.high - exponent.low) / 2 <= MAX_HALF_WIDTH else "cannot tell (noise)"


def _exponent(points: Sequence[tuple[float, Matrix]], num_rounds: int) -> Estimate:
    """p of |delta| ~ x^p, from (x, products of the differences); the interval holds every exponent that is not refuted.

    Under the exponent p the squares u = |delta|^2 are as x^(2p), and their sum with the weights log x - m is zero, where m is the mean of log x by
    x^(2p). The sum is linear in the squares, so that noise does not move it; a line through logarithms would have to leave out what is not above
    zero, and see a slower growth in what happens to be.
    """
    logs = [math.log(x) for x, _ in points]
    rounds = range(num_rounds)
    squares = [[_between(bias, [kept for kept in rounds if kept != left_out]) for _, bias in points] for left_out in rounds]
    everything = [_between(bias, rounds) for _, bias in points]
    sums: dict[float, Estimate] = {}
    for exponent in EXPONENTS:
        shares = [math.exp(2 * exponent * log) for log in logs]
        mean = sum(share * log for share, log in zip(shares, logs, strict=True)) / sum(shares) if points else 0.0
        value, *without = (sum((log - mean) * u for log, u in zip(logs, row, strict=True)) for row in (everything, *squares))
        sums[exponent] = _interval(value, without)
    nearest = min(sums, key=lambda exponent: abs(sums[exponent].value))
    left = [exponent for exponent, found in sums.items() if found.low <= 0 <= found.high or exponent == nearest]
    return Estimate(nearest, left[0], left[-1])


def _between(matrix: Matrix, kept: Sequence[int]) -> float:
    """The mean over ordered pairs of different rounds."""
    return sum(matrix[a][b] for a in kept for b in kept if a != b) / (len(kept) * (len(kept) - 1))


def _along(products: RoundProducts, kept: Sequence[int]) -> float | None:
    squared = _between(products.fresh, kept)
    return _between(products.cross, kept) / squared if squared > 0 else None


def _jackknife(statistic: Callable[[Sequence[int]], float | None], num_rounds: int) -> Estimate | None:
    """A statistic of all rounds, with the interval that leaving out each in turn gives; None where it cannot be worked out for all of these."""
    rounds = range(num_rounds)
    value = statistic(rounds)
    without = [statistic([kept for kept in rounds if kept != left_out]) for left_out in rounds]
    known = [each for each in without if each is not None]
    if value is None or len(known) < num_rounds:
        return None
    return _interval(value, known)


def _interval(value: float, without: Sequence[float]) -> Estimate:
    """A statistic with its interval, from its values without each of the rounds."""
    mean, factor = sum(without) / len(without), (len(without) - 1) / len(without)
    reach = student_t(len(without) - 1) * math.sqrt(factor * sum((each - mean) ** 2 for each in without))
    return Estimate(value, value - reach, value + reach)


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t: tabulated up to ten degrees of freedom, beyond by its expansion around the normal one."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
