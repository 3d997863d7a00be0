"""Early signs of a collapse, and constraints that are or will be broken, by name and in words. Pure functions.

What the sign is worth is measured on sweeps, see docs/reproduction.md, which also has those that were tried and left.
"""

from __future__ import annotations

from typing import Final

from learner.stability.forecast import Forecast
from learner.stability.rule import Margins

CLIPPED_SHARE: Final = {"clip": 0.4, "min-clip": 0.2}
"""By surrogate; min-clip clips a token outside the range on one side only, that of its advantage."""
FAR_NATS: Final = 0.7


def signs(surrogate: str, clip_fraction: float, kl_behaviour: float) -> dict[str, str]:
    """The sign that holds at a step, if it does: the batch's signal degenerates (31), because a large share of its tokens is outside the
    clip range and the policy is far from the one that sampled them."""
    if not (clip_fraction >= CLIPPED_SHARE[surrogate] and kl_behaviour >= FAR_NATS):  # which is also so of what is no number
        return {}
    text = f"the batch's signal degenerates: {clip_fraction:.0%} of its tokens are clipped, {kl_behaviour:.2g} nats a token from what sampled it"
    return {"signal": text}


def broken(where: Margins, ahead: Forecast, num_left: int) -> dict[str, str]:
    """Constraints that are broken, or will be before the run ends; `num_left` steps are left."""
    told = {}
    if where.batch.verdict == "outside" and where.batch.ratio is not None:
        told["batch"] = f"too fast for this lag: the learning rate is {1 / where.batch.ratio.value:.2g} times what S allows"
    if ahead.binding == "horizon" and ahead.upper is not None and ahead.upper < num_left:
        told["horizon"] = f"too fast for this long a run: about {ahead.steps_left} steps left of {num_left}"
    return told
