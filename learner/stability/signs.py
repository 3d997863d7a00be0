"""Early signs of a collapse, and constraints that are or will be broken, by name and in words. Pure functions.

What the sign is worth is measured on sweeps, see docs/reproduction.md; those that were tried and left are in docs/LOG.md.
"""

from __future__ import annotations

import math
from typing import Final

from learner.stability.forecast import Forecast
from learner.stability.rule import Margins

FAR_NATS: Final = 1.1
"""Of a completion's divergence from what sampled it, at lag 1; the threshold grows with the square root of the lag."""


def signs(kl_behaviour: float, completion_length: float, lag: float) -> dict[str, str]:
    """The sign that holds at a step, if it does: the policy is far from the one that sampled the batch, for the batch's lag.

    `kl_behaviour` is in nats a token, `completion_length` the batch's mean in tokens, `lag` the mean over its groups at this step. Counted by
    completion, since that is what is rewarded: a policy that is certain of most of its tokens is lost at a tenth of the nats a token.
    """
    far = kl_behaviour * completion_length
    if not far >= FAR_NATS * math.sqrt(max(lag, 1.0)):  # which is also so of what is no number
        return {}
    return {"signal": f"the batch's signal degenerates: a completion is {far:.2g} nats from what sampled it, at lag {lag:.3g}"}


def broken(where: Margins, ahead: Forecast, num_left: int) -> dict[str, str]:
    """Constraints that are broken, or will be before the run ends; `num_left` steps are left."""
    told = {}
    if where.batch.verdict == "outside" and where.batch.ratio is not None:
        told["batch"] = f"too fast for this lag: the learning rate is {1 / where.batch.ratio.value:.2g} times what S allows"
    if ahead.binding == "horizon" and ahead.upper is not None and ahead.upper < num_left:
        told["horizon"] = f"too fast for this long a run: about {ahead.steps_left} steps left of {num_left}"
    return told
