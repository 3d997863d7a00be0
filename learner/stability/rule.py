"""The two-constraint rule, paper Eq. 37: eta << min{ R_batch(eps) / (S G_upd), R_crit / (T G_upd) }, with calibrated constants.

Invariant: no constant is built in. What was not calibrated is unknown, and unknown or undecided is never reported as inside.

All bounds are in units of learning rate times steps. The batch constraint reads S eta < R_batch/G_upd (31), the horizon constraint
T eta < R_crit/G_upd (35). S is whatever the calibration counted: uses of a batch in the paper's cycles, versions of lag in a queue. S = 0 (or, for
the paper's cycles, nothing to count) means that weights never leave those that sampled: the batch constraint is absent and only the horizon binds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Final, Literal, NamedTuple

from msgspec import Struct

from protocol.errors import ConfigError

Verdict = Literal["inside", "outside", "cannot tell", "unknown"]
Binding = Literal["batch", "horizon"]
Z95: Final = NormalDist().inv_cdf(0.975)
MAX_LAG: Final = 2**40
MAX_SCATTER: Final = 100.0
"""A standard deviation in log space that leaves everything open."""
MAX_SPREAD: Final = 700.0
"""In log space, about what a number holds."""


class Measured(Struct, frozen=True):
    """A positive quantity with its 95 % interval, thought of in logarithms: errors are factors.

    `lower` = 0 where nothing is known below, `upper` = None where nothing is known above. Where only one end is known, `value` is that end.
    Raises ValueError unless 0 <= lower <= value <= upper, 0 < value, all finite.
    """

    value: float
    lower: float
    upper: float | None

    def __post_init__(self) -> None:
        if not (0 <= self.lower <= self.value <= self.ceiling and 0 < self.value < math.inf) or self.upper == math.inf:
            raise ValueError(f"{self.value} with the interval from {self.lower} to {self.upper} is no positive measured quantity")

    @property
    def ceiling(self) -> float:
        """`upper`, or infinity."""
        return math.inf if self.upper is None else self.upper

    @property
    def gaps(self) -> tuple[float, float]:
        """How far down and up the interval reaches from the value, in log space."""
        down = math.log(self.value / self.lower) if self.lower > 0 else math.inf
        return down, math.log(self.ceiling / self.value) if self.upper is not None else math.inf


EXACTLY_ONE: Final = Measured(1.0, 1.0, 1.0)
UNKNOWN_EXPONENT: Final = Measured(1.0, 0.0, 2.0)
"""b where the runs do not show it: the paper's 1 as best guess, from no dependence on S to its square. At S0 it widens nothing."""
FAR_BEYOND: Final = 4
"""Beyond so many times the largest S of the calibrating runs no S is said to be inside: the power law is an extrapolation there."""


class Calibration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured, from which runs, and for what it is valid. Encodes to JSON with msgspec.

    `batch` is R_batch/G_upd, `horizon` R_crit/G_upd, None where not calibrated. Their intervals say how well the middle of the runs is known;
    the scatters are the standard deviations, in log space, of single runs about it, and widen what is said about the next run.

    `lag_exponent` is b where the batch constraint was found to go as S^b eta instead of the paper's S eta: then S counts as
    S0 (S / S0)^b with S0 = `reference_lag`, which keeps the units and is S itself for b = 1.
    """

    batch: Measured | None = None
    horizon: Measured | None = None
    lag_exponent: Measured = EXACTLY_ONE
    reference_lag: float = 1.0
    batch_scatter: float = 0.0
    horizon_scatter: float = 0.0
    g_upd: float | None = None
    """G_upd of the runs it came from, so that another run's can be set against it; None where it was not measured."""
    straightness: float = 1.0
    """Net displacement at the end of runs over T eta G_upd. 1 on a straight path, the worst case that (33) counts with; it falls as T grows
    where updates disagree; for runs longer than those it is kept, which is the cautious side."""
    calibrated_steps: float | None = None
    """How long the runs were that `straightness` is of, in steps: the median. None: not known, and `straightness` is taken for every length."""
    largest_lag_seen: int = 0
    """The largest S among the calibrating runs; 0 where that is not known, or there was no lag."""
    runs: tuple[str, ...] = ()
    valid_for: dict[str, str] = {}
    """Fingerprint of task, policy, optimizer, clip range, pipeline: whatever the constants depend on."""
    notes: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no fit gives."""
        for name, scatter in (("batch_scatter", self.batch_scatter), ("horizon_scatter", self.horizon_scatter)):
            if not 0 <= scatter <= MAX_SCATTER:
                raise ValueError(f"{name} is {scatter}, it lies between 0 and {MAX_SCATTER:g}")
        for name in ("reference_lag", "g_upd", "straightness", "calibrated_steps"):
            size = getattr(self, name)
            if size is not None and not 0 < size < math.inf:
                raise ValueError(f"{name} is {size}, it is a positive number")
        if self.largest_lag_seen < 0:
            raise ValueError(f"largest_lag_seen is {self.largest_lag_seen}, it is 0 or more")

    def bound(self, constraint: Binding) -> Measured | None:
        """The constraint's bound for one more run: the calibrated constant, its interval widened by the scatter between runs."""
        constant, scatter = (self.batch, self.batch_scatter) if constraint == "batch" else (self.horizon, self.horizon_scatter)
        return None if constant is None else spread(constant.value, *(math.hypot(gap, Z95 * scatter) for gap in constant.gaps))

    def effective_horizon(self, num_steps: int) -> Measured:
        """How many steps on a straight path lead as far as `num_steps` steps of a run.

        A run shorter than the calibrating ones goes straighter: as a random walk has it, by the root of how much shorter, and at most straight.
        """
        shorter = 1.0 if self.calibrated_steps is None else max(1.0, math.sqrt(self.calibrated_steps / num_steps))
        straight = num_steps * max(self.straightness, min(1.0, self.straightness * shorter))
        return Measured(straight, straight, straight)

    def effective_lag(self, max_lag: int) -> Measured:
        """S0 (S / S0)^b; `max_lag` is positive."""
        octaves = math.log(max_lag / self.reference_lag)
        exponent = self.lag_exponent
        ends = [octaves * (end - exponent.value) for end in (exponent.lower, exponent.ceiling)] if octaves else [0.0, 0.0]
        return spread(self.reference_lag * math.exp(octaves * exponent.value), -min(ends), max(ends))

    def speed(self, g_upd: float | None) -> float:
        """What bounds are multiplied by for a run with this G_upd of its own, as (37) has them; 1 where one of both is not known."""
        return 1.0 if not g_upd or not self.g_upd else self.g_upd / g_upd

    @property
    def farthest_lag(self) -> int:
        """The largest S of which anything is said to be inside."""
        return FAR_BEYOND * self.largest_lag_seen or MAX_LAG


class Margin(NamedTuple):
    """One constraint: bound over used, above 1 within. `ratio` is None where unknown, and where S = 0 leaves nothing to bound (inside)."""

    ratio: Measured | None
    verdict: Verdict


class Margins(NamedTuple):
    """Both constraints. `binding` is the one with the smaller ratio, None where that is unknown. `verdict` is the worst that is certain."""

    batch: Margin
    horizon: Margin
    binding: Binding | None
    verdict: Verdict


class LargestLag(NamedTuple):
    """The largest S by the batch constraint. With `lower` the verdict is still inside, with anything above `upper` outside (None: no such S).

    `horizon` is the verdict of the horizon constraint, which no S mends.
    """

    value: int
    lower: int
    upper: int | None
    horizon: Verdict


def margins(calibration: Calibration, lr: float, max_lag: int, horizon: int) -> Margins:
    """Where a run of `horizon` steps at `lr` stands. Raises ConfigError for a setting that no run has."""
    _check(lr, max_lag, horizon)
    batch, whole = _batch_margin(calibration, lr, max_lag), _horizon_margin(calibration, lr, horizon)
    verdicts = {batch.verdict, whole.verdict}
    order: tuple[Verdict, ...] = ("outside", "unknown", "cannot tell", "inside")
    return Margins(batch, whole, _binding(batch, whole, max_lag), next(verdict for verdict in order if verdict in verdicts))


def largest_lr(calibration: Calibration, max_lag: int, horizon: int) -> Measured | None:
    """The learning rate at which the first constraint binds; None where a constraint that applies is not calibrated.

    A constraint that is open above, so that no end of it is known, bounds what is certain (`lower`), and not the best guess (`value`).
    """
    _check(1.0, max_lag, horizon)
    batch, whole = calibration.bound("batch"), calibration.bound("horizon")
    if whole is None or (max_lag and batch is None):
        return None
    limits = [divide(whole, calibration.effective_horizon(horizon))]
    if max_lag and batch is not None:
        limits.append(divide(batch, calibration.effective_lag(max_lag)))
    return smallest(limits)


def smallest(limits: Sequence[Measured]) -> Measured:
    """The smallest of some bounds, of which those that are open above say only what is certain."""
    lower, upper = min(limit.lower for limit in limits), min(limit.ceiling for limit in limits)
    value = min(limit.value for limit in ([limit for limit in limits if limit.upper is not None] or limits))
    return Measured(value, lower, None if math.isinf(upper) else upper)


def largest_lag(calibration: Calibration, lr: float, horizon: int) -> LargestLag | None:
    """The largest S at `lr`; None where the batch constraint is not calibrated. 0: no lag at all can be had at this learning rate."""
    _check(lr, 0, horizon)
    if calibration.batch is None:
        return None

    def ratio(max_lag: int) -> Measured:
        found = _batch_margin(calibration, lr, max_lag).ratio
        assert found is not None
        return found

    upper = _largest(lambda max_lag: ratio(max_lag).ceiling >= 1)
    return LargestLag(
        _largest(lambda max_lag: ratio(max_lag).value > 1),
        _largest(lambda max_lag: max_lag <= calibration.farthest_lag and ratio(max_lag).lower > 1),
        None if upper >= MAX_LAG else upper,
        _horizon_margin(calibration, lr, horizon).verdict,
    )


def differences(calibration: Calibration, here: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """What the calibration is valid for and is otherwise `here`, by name: (there, here). Empty: the constants may be used."""
    names = sorted(calibration.valid_for.keys() | here.keys())
    pairs = {name: (calibration.valid_for.get(name), here.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def spread(value: float, down: float, up: float) -> Measured:
    """`value` with an interval that reaches `down` and `up` from it in log space."""
    upper = value * math.exp(up) if up < MAX_SPREAD else math.inf
    return Measured(value, min(value, value * math.exp(-down)), None if math.isinf(upper) else max(value, upper))


def divide(above: Measured, below: Measured) -> Measured:
    """The ratio of two independent quantities: their errors add in squares, in log space."""
    (above_down, above_up), (below_down, below_up) = above.gaps, below.gaps
    return spread(above.value / below.value, math.hypot(above_down, below_up), math.hypot(above_up, below_down))


def _batch_margin(calibration: Calibration, lr: float, max_lag: int) -> Margin:
    bound = calibration.bound("batch")
    if max_lag == 0:
        return Margin(None, "inside")
    margin = _margin(bound, calibration.effective_lag(max_lag), lr)
    is_too_far = margin.verdict == "inside" and max_lag > calibration.farthest_lag
    return margin._replace(verdict="cannot tell") if is_too_far else margin


def _horizon_margin(calibration: Calibration, lr: float, horizon: int) -> Margin:
    return _margin(calibration.bound("horizon"), calibration.effective_horizon(horizon), lr)


def _margin(bound: Measured | None, num_steps: Measured, lr: float) -> Margin:
    if bound is None:
        return Margin(None, "unknown")
    ratio = divide(divide(bound, num_steps), Measured(lr, lr, lr))
    return Margin(ratio, "inside" if ratio.lower > 1 else "outside" if ratio.ceiling < 1 else "cannot tell")


def _binding(batch: Margin, horizon: Margin, max_lag: int) -> Binding | None:
    if max_lag == 0:
        return None if horizon.ratio is None else "horizon"
    if batch.ratio is None or horizon.ratio is None:
        return None
    if (batch.ratio.upper is None) != (horizon.ratio.upper is None):  # one of them has no known end, and cannot be said to bind
        return "batch" if horizon.ratio.upper is None else "horizon"
    return "batch" if batch.ratio.value < horizon.ratio.value else "horizon"


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest lag up to MAX_LAG at which `holds`, which is true up to somewhere and false after; 0 counts as true."""
    low, high = 0, 1
    while high < MAX_LAG and holds(high):
        low, high = high, 2 * high
    if high >= MAX_LAG:
        return MAX_LAG
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _check(lr: float, max_lag: int, horizon: int) -> None:
    if not 0 < lr < math.inf:
        raise ConfigError("lr", lr, "not a learning rate", "give a positive number")
    if max_lag < 0:
        raise ConfigError("max_lag", max_lag, "a lag cannot be negative", "give 0 or more steps")
    if horizon < 1:
        raise ConfigError("horizon", horizon, "a run has at least one step", "give the number of optimizer steps of the whole run")
