"""The four claims of the paper (section 4), each judged on the cells of one pipeline and surrogate by a rule that was written before the sweep.

A verdict on a number compares its interval with two bands about the claimed value. `near` holds what is as good as the value, `wide` what could be
taken for it. Supported: the interval meets `near` and lies within `wide`. Not supported: it does not meet `near`. Undecided: it meets `near`
but reaches beyond `wide`, so that the sweep is too small to tell. So an interval that is too wide never supports nor refutes a claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from analysis.cells import Cell
from analysis.laws import (
    BoundaryLaw,
    DriftExponent,
    EscapeLaw,
    Interval,
    Motion,
    boundary_law,
    difference_with_interval,
    escape_law,
    mean_with_interval,
    motion,
    separation,
)

Verdict = Literal["supported", "not supported", "undecided"]
Figure = bool | int | float | str | list[int] | Interval | None

ONE_NEAR, ONE_WIDE = Interval(0.9, 1.1), Interval(2 / 3, 4 / 3)
ZERO_NEAR, ZERO_WIDE = Interval(-0.1, 0.1), Interval(-1 / 3, 1 / 3)
FEWEST_BOUNDARIES = 3
FEWEST_ESCAPES = 6
FEWEST_RUNS = 3
HIGH_COSINE = 0.5
"""Above it two consecutive updates share more than half of their length: the drift is mostly coherent."""
LOW_COSINE = 0.2
FASTER_DRIFT = 0.1
"""Of the difference of 1/2 between the exponents of ballistic and diffusive drift, as much as must be left."""
LATE_SHARE = 0.05
"""The share of runs below the boundary that may collapse late before claim (d) is refuted."""
BUDGET_SPENT = 1.5
"""How many times the mean t eta of a collapse a stable run must have lived to show that its collapse was not merely to come."""


class Claim(Struct, frozen=True):
    """One claim of the paper as this sweep bears on it."""

    name: str
    statement: str
    verdict: Verdict
    reason: str
    figures: dict[str, Figure]


def judge(cells: Sequence[Cell], random: np.random.Generator, drift_exponent: DriftExponent) -> list[Claim]:
    """Claims (a) to (d) on cells of one pipeline and surrogate, such as `laws.arms` gives."""
    escape = escape_law(cells, random)
    motions = [motion(cell, drift_exponent) for cell in cells]
    return [
        judge_boundary(boundary_law(cells, random), escape, smallest_horizon(cells)),
        judge_escape(escape),
        judge_motion(motions, random),
        judge_small_rates(cells, escape, random),
    ]


def smallest_horizon(cells: Sequence[Cell]) -> int:
    return min((cell.horizon for cell in cells), default=0)


def compare(interval: Interval, near: Interval, wide: Interval) -> Verdict:
    """The rule at the head of this file."""
    if not interval.meets(near):
        return "not supported"
    return "supported" if interval.is_within(wide) else "undecided"


def judge_boundary(law: BoundaryLaw, escape: EscapeLaw, horizon: int) -> Claim:
    """(a) eta_max ~ S^-b with b = 1 (section 4.2, Eq. 30).

    By `compare`, near 0.9 to 1.1, wide 2/3 to 4/3. Undecided with fewer than three boundaries that are not censored, and where no power law of the
    fit passes the censored ones. Undecided also where b is found to be too small while at half of the boundaries or more the largest stable learning
    rate had not lived for the mean t eta of a collapse: there the horizon sets eta_max, which by (38) does not depend on S.
    """
    statement = "The largest stable learning rate falls as 1/S: S eta_max is constant."
    fitted = [one for one in law.boundaries if one.estimate is not None and one.max_lag >= 1]
    unspent = [one.max_lag for one in fitted if escape.mean is not None and one.lower * horizon < escape.mean]
    figures: dict[str, Figure] = {
        "exponent": law.exponent,
        "interval": law.interval,
        "num_boundaries": law.num_fitted,
        "censored": law.left_out,
        "constant": law.constant,
        "is_constant": law.is_constant,
        "lags_bound_by_horizon": unspent,
    }
    figures |= {f"product_S{lag}": interval for lag, interval in law.products.items()}

    def claim(verdict: Verdict, reason: str) -> Claim:
        return Claim("a", statement, verdict, reason, figures)

    if law.num_fitted < FEWEST_BOUNDARIES or law.exponent is None or law.interval is None:
        return claim("undecided", f"boundaries within the learning rates tried: {law.num_fitted}, {FEWEST_BOUNDARIES} are needed")
    found = f"b = {_value(law.exponent, law.interval)} from {law.num_fitted} boundaries"
    if law.has_room_for_left_out is False:
        return claim("undecided", f"{found}, but no such power law passes the censored boundaries at S = {law.left_out}")
    verdict = compare(law.interval, ONE_NEAR, ONE_WIDE)
    if verdict == "not supported" and law.exponent < 1 and 2 * len(unspent) >= len(fitted):
        return claim("undecided", f"{found}, but at S = {unspent} the horizon sets the boundary, not staleness (38)")
    return claim(verdict, found)


def judge_escape(law: EscapeLaw) -> Claim:
    """(b) t_collapse ~ eta^-p S^-q with p = 1 and q = 0 (section 4.3, Eq. 34).

    Both by `compare`, p about 1 as in (a), q near -0.1 to 0.1 and wide -1/3 to 1/3. Supported where both are, not supported where either is not,
    otherwise undecided; undecided with fewer than six collapses that can be used, or where S or eta does not vary among them. The variation of
    t eta is reported, not judged.
    """
    statement = "Among collapsing runs t_collapse eta is constant and does not depend on S."
    figures: dict[str, Figure] = dict(msgspec.structs.asdict(law))

    def claim(verdict: Verdict, reason: str) -> Claim:
        return Claim("b", statement, verdict, reason, figures)

    if law.num_fitted < FEWEST_ESCAPES:
        left_out = f"{law.num_coarse} are too coarse, {law.num_mixed} may be cut by the horizon"
        return claim(
            "undecided", f"only {law.num_fitted} of {law.num_collapsed} collapses can be used, {FEWEST_ESCAPES} are needed: {left_out}"
        )
    if law.lr_exponent is None or law.lr_interval is None or law.lag_exponent is None or law.lag_interval is None:
        return claim("undecided", "S and the learning rate do not vary apart from each other among the collapses")
    p, q = compare(law.lr_interval, ONE_NEAR, ONE_WIDE), compare(law.lag_interval, ZERO_NEAR, ZERO_WIDE)
    reason = f"p = {_value(law.lr_exponent, law.lr_interval)} and q = {_value(law.lag_exponent, law.lag_interval)} from {law.num_fitted} collapses"
    return claim(_all_of(p, q), reason)


def judge_motion(motions: Sequence[Motion], random: np.random.Generator) -> Claim:
    """(c) collapsing runs keep a high cosine and drift ballistically, stable runs lose it and diffuse (section 4.4).

    Three parts, each on means over cells with bootstrap intervals. High: the new-batch cosine of collapsed runs before the collapse is above
    0.5. Low: that of stable runs at the end is below 0.2. Faster: the drift exponent of collapsed runs exceeds that of stable ones by 0.1.
    A part holds where its interval lies on the claimed side, fails where it lies on the other, and is open between. Supported: all hold. Not
    supported: one fails. Otherwise undecided, also where fewer than three runs of either outcome have what a part needs. Same-batch pairs are
    reported, but not judged: their cosine is high in part because both updates follow the same samples.
    """
    statement = (
        "Collapsing runs keep consecutive updates aligned and drift as t eta; stable runs lose the alignment and drift as sqrt(t) eta."
    )
    new, same, drift = (_by_outcome(motions, field) for field in ("new_batch", "same_batch", "drift_exponent"))
    figures: dict[str, Figure] = {}
    for name, (collapsed, stable) in {"new_batch": new, "same_batch": same, "drift_exponent": drift}.items():
        for outcome, values in {"collapsed": collapsed, "stable": stable}.items():
            mean = mean_with_interval(values, random)
            figures |= {f"{name}_{outcome}": mean and mean[0], f"{name}_{outcome}_interval": mean and mean[1]}
            figures[f"num_{name}_{outcome}"] = len(values)
        figures[f"{name}_separation"] = separation(collapsed, stable)
    difference = difference_with_interval(*drift, random)
    figures |= {
        "drift_exponent_difference": difference and difference[0],
        "drift_exponent_difference_interval": difference and difference[1],
    }

    def claim(verdict: Verdict, reason: str) -> Claim:
        return Claim("c", statement, verdict, reason, figures)

    fewest = min(len(values) for pair in (new, drift) for values in pair)
    high, low = mean_with_interval(new[0], random), mean_with_interval(new[1], random)
    if fewest < FEWEST_RUNS or high is None or low is None or difference is None:
        counts = f"{len(new[0])} collapsed and {len(new[1])} stable runs have new-batch pairs, {len(drift[0])} and {len(drift[1])} a drift exponent"
        return claim("undecided", f"{counts}; {FEWEST_RUNS} of each are needed")
    parts = [
        _side(high[1], above=HIGH_COSINE),
        _flipped(_side(low[1], above=LOW_COSINE)),
        _side(difference[1], above=FASTER_DRIFT),
    ]
    reason = (
        f"new-batch cosine {_value(*high)} of collapsed and {_value(*low)} of stable runs; "
        f"drift exponents of collapsed runs are larger by {_value(*difference)}"
    )
    return claim(_all_of(*parts), reason)


def judge_small_rates(cells: Sequence[Cell], escape: EscapeLaw, random: np.random.Generator, window: int | None = None) -> Claim:
    """(d) below the boundary runs stay stable for a long time (section 4.4, Fig. 3).

    To call a run small and stable by its end would make the claim true of itself. So boundaries are estimated from what had happened by step
    `window`: by default the smallest horizon, or half of it where no run has twice as much. Looked at are the runs that had not collapsed by
    then, lie at or below the lower end of their boundary, and had at least as long again to go. Not supported: the 95 % Wilson interval of the
    share that collapsed later lies above 0.05. Supported: none did, and at least three lived for 1.5 times the mean t eta of a collapse, so
    that a drift like that of collapsing runs would have ended them. Otherwise undecided.
    """
    statement = "Learning rates below the boundary stay stable over a long horizon."
    shortest = smallest_horizon(cells)
    if window is None:
        window = shortest if max((cell.horizon for cell in cells), default=0) >= 2 * shortest else shortest // 2
    early = [_as_of(cell, window) for cell in cells]
    lower = {one.max_lag: one.lower for one in boundary_law(early, random).boundaries}
    small = [
        cell
        for cell, then in zip(cells, early, strict=True)
        if then.outcome == "stable" and cell.lr <= lower[cell.max_lag] and cell.horizon >= 2 * window
    ]
    late = [cell for cell in small if cell.outcome == "collapsed"]
    spent = [
        cell
        for cell in small
        if escape.mean is not None and cell.outcome == "stable" and cell.lr * cell.horizon >= BUDGET_SPENT * escape.mean
    ]
    share = wilson(len(late), len(small))
    figures: dict[str, Figure] = {
        "window": window,
        "num_small": len(small),
        "num_late": len(late),
        "num_past_budget": len(spent),
        "late_share_interval": share,
        "longest_horizon": max((cell.horizon for cell in small), default=0),
        "budget": escape.mean,
    }

    def claim(verdict: Verdict, reason: str) -> Claim:
        return Claim("d", statement, verdict, reason, figures)

    found = f"{len(late)} of {len(small)} runs below the boundary of the first {window} steps collapsed later"
    if share.lower > LATE_SHARE:
        return claim("not supported", found)
    if escape.mean is None:
        return claim("undecided", f"{found}; without usable collapses there is no time to outlive")
    reason = f"{found}; {len(spent)} stable ones lived for {BUDGET_SPENT} times the mean t eta of a collapse"
    return claim("supported" if not late and len(spent) >= FEWEST_RUNS else "undecided", reason)


def wilson(num_hits: int, num_tries: int) -> Interval:
    """Wilson's 95 % interval of a share; 0 to 1 without tries."""
    if num_tries == 0:
        return Interval(0.0, 1.0)
    z, share = 1.96, num_hits / num_tries
    middle = (share + z * z / (2 * num_tries)) / (1 + z * z / num_tries)
    half = z / (1 + z * z / num_tries) * math.sqrt(share * (1 - share) / num_tries + z * z / (4 * num_tries**2))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def _as_of(cell: Cell, window: int) -> Cell:
    """The cell as it stood at step `window`; of it only the outcome is meant."""
    if cell.collapse_step is None or cell.collapse_step <= window:
        return cell
    return msgspec.structs.replace(cell, outcome="stable", collapse_step=None)


def _by_outcome(motions: Sequence[Motion], field: Literal["new_batch", "same_batch", "drift_exponent"]) -> tuple[list[float], list[float]]:
    """What collapsed and what stable runs have of one field."""
    found: dict[str, list[float]] = {"collapsed": [], "stable": []}
    for one in motions:
        value: float | None = getattr(one, field)
        if value is not None:
            found[one.outcome].append(value)
    return found["collapsed"], found["stable"]


def _side(interval: Interval, *, above: float) -> Verdict:
    if interval.lower > above:
        return "supported"
    return "not supported" if interval.upper < above else "undecided"


def _flipped(verdict: Verdict) -> Verdict:
    flipped: dict[Verdict, Verdict] = {"supported": "not supported", "not supported": "supported", "undecided": "undecided"}
    return flipped[verdict]


def _all_of(*parts: Verdict) -> Verdict:
    if "not supported" in parts:
        return "not supported"
    return "undecided" if "undecided" in parts else "supported"


def _value(estimate: float, interval: Interval) -> str:
    return f"{estimate:.2f} [{interval.lower:.2f}, {interval.upper:.2f}]"
