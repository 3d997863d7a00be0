"""The governor: keeps the learning rate inside the region of the two-constraint rule (paper, Eq. 37), as lag and G_upd are measured.

Invariant: the learning rate used is never above the schedule's, and a change by the region rule is a whole number of notches, with a reason.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from msgspec import Struct

from learner.stability.rule import Calibration, Measured, divide, smallest

NOTCHES: Final = 4
"""The learning rate is held at powers of 2^(1/4) below the schedule's: a change is worth a line in the journal."""
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
    """The state of one run: how many notches it holds the learning rate down."""

    num_notches: int = 0
    roomy_since: int = -1
    """The step since which fewer notches would have been inside; -1 if they would not."""

    def hold(self, scheduled: float, bound: Measured | None, step: int, because: str) -> Held:
        """Hold `scheduled` MARGIN times below the lower end of `bound`, the largest learning rate that is inside; unknown holds what was held."""
        if bound is None:
            return Held(self._held(scheduled), "")
        wanted = math.inf if bound.lower <= 0 else max(0, math.ceil(NOTCHES * math.log2(scheduled * MARGIN / bound.lower) - 1e-9))
        if math.isinf(wanted):
            return Held(self._held(scheduled), "")
        before = self._held(scheduled)
        if wanted > self.num_notches:
            self.num_notches, self.roomy_since = int(wanted), -1
            return Held(self._held(scheduled), f"lowered from {before:.3g} to {self._held(scheduled):.3g}: {because}")
        if wanted == self.num_notches:
            self.roomy_since = -1
        elif self.roomy_since < 0:
            self.roomy_since = step
        elif step - self.roomy_since >= RISE_AFTER:
            self.num_notches, self.roomy_since = self.num_notches - 1, step
            return Held(self._held(scheduled), f"raised from {before:.3g} to {self._held(scheduled):.3g}: inside for {RISE_AFTER} steps")
        return Held(self._held(scheduled), "")

    def _held(self, scheduled: float) -> float:
        return scheduled * math.pow(2.0, -self.num_notches / NOTCHES)


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
    scale = 1.0 if not g_upd or not calibration.g_upd else calibration.g_upd / g_upd
    return Measured(found.value * scale, found.lower * scale, None if found.upper is None else found.upper * scale)


def sqrt_ess(scheduled: float, effective_sample_size: float) -> float:
    """VCPO's rule (arXiv 2602.17616): the learning rate times the square root of the effective sample size, here as a share of the tokens."""
    return scheduled * math.sqrt(min(1.0, max(0.0, effective_sample_size)))
