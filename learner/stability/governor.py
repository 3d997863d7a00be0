"""The governor: keeps the learning rate inside the region of the two-constraint rule (paper, Eq. 37), as lag and G_upd are measured.

Invariant: the learning rate used is never above the schedule's, nor above the cap, which is a whole notch; a change by the cap has a reason.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from msgspec import Struct

from learner.stability.rule import Calibration, Measured, divide, smallest

NOTCHES: Final = 4
"""The learning rate is capped at powers of 2^(1/4), whatever the schedule's: a change is worth a line in the journal."""
ROUNDING: Final = 1e-9
"""By which a learning rate may be above its limit, so that a limit that is a notch itself is one."""
MARGIN: Final = 4.0
"""What the rule's "much less" is taken as: runs near the boundary do not collapse, but learn little. On the runs of examples/paper.toml at S = 4 and
32 the reward was within about a tenth of the best at a quarter of the boundary, and down by two fifths at half of it."""
RISE_AFTER: Final = 32
"""Optimizer steps for which a higher learning rate must have been inside before it is raised by a notch."""


class Held(NamedTuple):
    """The learning rate to use, and why it changed; an empty reason where it did not, or changes with every step."""

    lr: float
    reason: str


class Governor(Struct):
    """The state of one run: the cap on its learning rate."""

    cap: int | None = None
    """In notches: the learning rate is at most 2^(cap / NOTCHES), whatever the schedule does; None: as scheduled."""
    roomy_since: int = -1
    """The step since which a higher cap would have been inside; -1 if it would not."""

    def hold(self, scheduled: float, bound: Measured | None, step: int, because: str, scale: float = 1.0) -> Held:
        """Hold `scheduled` MARGIN times below the lower end of `bound`, the largest learning rate that is inside; unknown holds what was held.

        `scale` is that of rollbacks, which the schedule given has in it already and the cap has not.
        """
        scheduled /= scale
        before = self._held(scheduled)
        limit = 0.0 if bound is None else bound.lower / MARGIN / scale
        if limit <= 0:
            return Held(before * scale, "")
        highest = math.floor(NOTCHES * math.log2(limit) + ROUNDING)
        if before > limit * (1 + ROUNDING):
            self.cap, self.roomy_since = highest, -1
            lowered = self._held(scheduled)
            return Held(lowered * scale, f"lowered from {before * scale:.3g} to {lowered * scale:.3g}: {because}")
        if self.cap is None or (highest <= self.cap and scheduled > limit * (1 + ROUNDING)):
            self.roomy_since = -1
        elif self.roomy_since < 0:
            self.roomy_since = step
        elif step - self.roomy_since >= RISE_AFTER:
            # A cap that the schedule stays below is no cap: where it never came back to it, nothing is told.
            self.cap, self.roomy_since = None if _learning_rate(self.cap + 1) >= scheduled else self.cap + 1, step
            raised = self._held(scheduled)
            told = f"raised from {before * scale:.3g} to {raised * scale:.3g}: inside for {RISE_AFTER} steps"
            return Held(raised * scale, told if raised > before else "")
        return Held(before * scale, "")

    def _held(self, scheduled: float) -> float:
        return scheduled if self.cap is None else min(scheduled, _learning_rate(self.cap))


def _learning_rate(num_notches: int) -> float:
    return math.pow(2.0, num_notches / NOTCHES)


def live_bound(calibration: Calibration, lag: int, num_steps: int, g_upd: float | None) -> Measured | None:
    """The largest learning rate for a run of `num_steps` steps at this measured lag, by those constraints that are calibrated; None if none is.

    With a G_upd of its own (and one in the calibration) the calibrated R/G_upd are taken to this run's, as (37) has them.
    """
    batch, whole = calibration.bound("batch"), calibration.bound("horizon")
    # A horizon without a known end is no reason to hold a run: it says how far others have come, not that it was too far.
    limits = [] if whole is None or whole.upper is None else [divide(whole, calibration.effective_horizon(num_steps))]
    if lag and batch is not None:
        limits.append(divide(batch, calibration.effective_lag(lag)))
    if not limits:
        return None
    found = smallest(limits)
    scale = calibration.speed(g_upd)
    return Measured(found.value * scale, found.lower * scale, None if found.upper is None else found.upper * scale)


def sqrt_ess(scheduled: float, effective_sample_size: float) -> float:
    """VCPO's rule (arXiv 2602.17616): the learning rate times the square root of the effective sample size, here as a share of the tokens."""
    return scheduled * math.sqrt(min(1.0, max(0.0, effective_sample_size)))
