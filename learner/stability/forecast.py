"""How many steps are left, at the present learning rate, until the horizon constraint binds (paper, Eq. 34, 35). A pure function."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from learner.stability.drift import Exponent
from learner.stability.rule import Binding, Calibration, margins

MAX_STEPS: Final = 2**53
"""Beyond this a number of steps says no more than never."""
SLOWEST: Final = 0.01


class Forecast(NamedTuple):
    """Optimizer steps left, rounded down; None where unknown, and for `upper` where there may be no end.

    `lower` is the worst case: a straight path at full speed from now on, to the nearest horizon that the calibration allows.
    `binding`: batch if the batch constraint is broken already, by its best value (no steps are left then), else horizon; None where unknown.
    """

    steps_left: int | None
    lower: int | None
    upper: int | None
    binding: Binding | None


def forecast(
    calibration: Calibration, lr: float, max_lag: int, distance: float, speed: float | None, exponent: Exponent | None
) -> Forecast:
    """Extrapolates the displacement D(t + n) = D (1 + n / tau)^alpha with tau = alpha D / speed, which has the present value, speed and law.

    `distance` is D = |theta_t - theta_0| / G_upd and `speed` its growth per step, both in learning rate times steps, so `speed` is at most `lr`
    and is `lr` on a straight path. Where the speed or the exponent is not known, or D is 0, the path counts as straight, `upper` stays open. A
    displacement that does not grow has an open `steps_left` too. `upper` takes the far end of the horizon and the low end of alpha.
    With the batch constraint not calibrated, the forecast is of the horizon alone. Raises ConfigError for settings that no run has.
    """
    batch = margins(calibration, lr, max_lag, 1).batch
    bound = calibration.bound("horizon")
    if batch.ratio is not None and batch.ratio.value < 1:
        never = None if bound is None else _straight(bound.ceiling, distance, lr)
        return Forecast(0, 0, 0 if batch.verdict == "outside" else never, "batch")
    if bound is None:
        return Forecast(None, None, None, None)
    lower = _straight(bound.lower, distance, lr)
    if speed is None or exponent is None or distance <= 0:
        return Forecast(_straight(bound.value, distance, lr), lower, None, "horizon")
    middle = _along(bound.value, distance, speed, exponent.value)
    upper = _along(bound.ceiling, distance, speed, exponent.lower)
    return Forecast(
        None if middle is None else max(middle, lower or 0), lower, None if upper is None else max(upper, lower or 0), "horizon"
    )


def _straight(bound: float, distance: float, lr: float) -> int | None:
    """Steps to `bound` on a straight path at full speed."""
    return _whole(max(bound - distance, 0.0) / lr)


def _along(bound: float, distance: float, speed: float, alpha: float) -> int | None:
    """Steps to `bound` along D (1 + n speed / (alpha D))^alpha; None if it is not reached."""
    if distance >= bound:
        return 0
    if speed <= 0 or math.isinf(bound):
        return None
    power = max(alpha, SLOWEST)
    log_ratio = math.log(bound / distance) / power
    return None if log_ratio > 700 else _whole(power * distance / speed * math.expm1(log_ratio))


def _whole(steps: float) -> int | None:
    return math.floor(steps) if steps < MAX_STEPS else None
