"""What a run knows about its stability while it trains: measures by step, the forecast, early signs, and the learning rate that is let through.

A pure state machine, the same on every rank: `govern` before the optimizer applies an update, `moved` after it.

Invariant: from the same state, measures and calibration follow the same decisions, so a resumed or replayed run repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Final, Literal, NamedTuple

from msgspec import Struct

from learner.stability.collapse import Collapse
from learner.stability.drift import DriftWindow, Exponent
from learner.stability.forecast import Forecast, forecast
from learner.stability.governor import MARGIN, Governor, live_bound, sqrt_ess
from learner.stability.rule import Calibration, margins
from learner.stability.signs import broken, signs
from protocol.config import Config

COLLAPSE: Final = "collapse"
COLLAPSED: Final = "collapsed"
"""How the note of a collapse begins."""
NoteKind = Literal["learning-rate", "warning", "region", "collapse"]
WINDOW: Final = 128
"""Optimizer steps over which the drift exponent and G_2 are taken."""
LOOK_EVERY: Final = 16
"""Optimizer steps between two looks at the drift exponent, which takes a millisecond or two."""
SPEED_STEPS: Final = 32
"""Optimizer steps over which the growth of the displacement is taken."""


class Note(NamedTuple):
    """Something that was decided or seen, for the journal."""

    kind: NoteKind
    text: str
    values: dict[str, float]


class BatchSeen(NamedTuple):
    """A batch at a step that uses it. `lag` is the largest that any of its groups will have at its last use, as the rule counts it;
    `lag_now` what they have at this step, the mean over them; `completion_length` the mean over its completions, in tokens."""

    is_first_use: bool
    reward: float
    num_completions: int
    lag: int
    drift: float | None
    """|theta_t - phi| before the update, the mean over its tokens; None where a sketch is missing."""
    lag_now: float
    completion_length: float


class Signal(NamedTuple):
    """What the batch said to the weights before the update: a mean over its tokens, and the effective sample size as a share of them."""

    kl_behaviour: float
    effective_sample_size: float


class Moved(NamedTuple):
    """What the update did; see learner.displacement."""

    update_norm: float
    cosine: float | None
    displacement: float
    distances: dict[int, float]


class Rollback(Struct, frozen=True):
    """The run went back to `start`, when batches for the steps before `until` had been formed.

    Those steps are done again without a change of the weights; from `until` on the learning rate is `lr_scale` times the schedule's. `level` is
    the best level of reward that the run had had by then, from which it has fallen if it does not come back to it.
    """

    start: int
    until: int
    lr_scale: float
    level: float = 0.0


class State(Struct):
    """What goes into a checkpoint."""

    collapse: Collapse
    governor: Governor
    distances: list[dict[int, float]] = []
    """By lag, for each of the last WINDOW steps."""
    g_upd: list[float] = []
    travelled: list[float] = []
    """|theta_t - theta_0| of the last SPEED_STEPS steps and the one before."""
    held_at: dict[str, int] = {}
    """By sign and broken constraint, the step at which it held last. One that comes back within WINDOW steps is not told again."""
    is_collapse_told: bool = False
    exponent: Exponent | None = None


class Monitor:
    """See the module."""

    def __init__(
        self, config: Config, calibration: Calibration | None, state: State | None = None, rollbacks: Sequence[Rollback] = ()
    ) -> None:
        self._rollbacks = rollbacks
        self._settings, self._num_steps = config.stability, config.run.steps
        self._calibration = calibration or Calibration()
        self.state = state or State(Collapse(), Governor())
        self.state.collapse.best = max([self.state.collapse.best, *(back.level for back in rollbacks)])
        self._window = DriftWindow(WINDOW)
        for distances in self.state.distances:
            self._window.add(distances)
        self.notes: list[Note] = []

    def govern(self, step: int, scheduled: float, seen: BatchSeen, signal: Signal) -> float:
        """The learning rate of this step."""
        if self._is_again(step):
            return 0.0
        state = self.state
        scale = next((back.lr_scale for back in reversed(self._rollbacks) if back.until <= step), 1.0)
        scheduled *= scale
        if self._settings.governor != "hold" or scheduled <= 0:
            return scheduled
        if self._settings.rule == "sqrt-ess":
            return sqrt_ess(scheduled, signal.effective_sample_size)
        bound = live_bound(self._calibration, seen.lag, self._num_steps, self.g_2)
        speed = "" if self.g_2 is None else f" and G_upd {self.g_2:.3g}"
        because = "" if bound is None else f"inside up to {bound.lower:.3g}, held {MARGIN:g} times below, at lag {seen.lag}{speed}"
        held = state.governor.hold(scheduled, bound, step, because, scale)
        if held.reason:
            self.notes.append(Note("learning-rate", held.reason, {"lr": held.lr, "scheduled": scheduled, "lag": float(seen.lag)}))
        return held.lr

    def moved(self, step: int, lr: float, seen: BatchSeen, signal: Signal, moved: Moved) -> dict[str, float]:
        """Take in what the update of this step did. Returns the step's measures by name; decisions are in `notes` (see `take_notes`)."""
        state, found = self.state, {"update_norm": moved.update_norm, "displacement": moved.displacement}
        if self._is_again(step):
            return found
        if lr > 0 and moved.update_norm > 0:  # an update that was skipped says nothing about the size of updates
            state.g_upd = [*state.g_upd, moved.update_norm / lr][-WINDOW:]
        state.travelled = [*state.travelled, moved.displacement][-SPEED_STEPS - 1 :]
        state.distances = [*state.distances, moved.distances][-WINDOW:]
        self._window.add(moved.distances)
        if (step + 1) % LOOK_EVERY == 0:
            state.exponent = self._window.exponent()
        if seen.is_first_use:
            state.collapse.add(step, seen.reward, seen.num_completions)
        if lr > 0:
            found |= {"g_upd": moved.update_norm / lr, "g_2": self.g_2 or 0.0}
        if moved.cosine is not None:
            found["cosine_new_batch" if seen.is_first_use else "cosine_same_batch"] = moved.cosine
        if seen.drift is not None:
            found["drift"] = seen.drift
        if state.exponent is not None:
            found |= dict(zip(("drift_exponent", "drift_exponent_lower", "drift_exponent_upper"), state.exponent[:3], strict=True))
        found |= self._where(lr, seen, signal, step)
        self._look_for_collapse()
        return found

    def _is_again(self, step: int) -> bool:
        """Whether a step's batch was formed before the run went back behind it: it moves nothing, and is of a policy that was given up."""
        return any(back.start <= step < back.until for back in self._rollbacks)

    def _where(self, lr: float, seen: BatchSeen, signal: Signal, step: int) -> dict[str, float]:
        """Margins and forecast as measures, and notes about what has become of them."""
        if lr <= 0:
            return {}
        scale = self._calibration.speed(self.g_2)
        where = margins(self._calibration, lr / scale, seen.lag, self._num_steps)
        ahead = self.ahead(lr, seen.lag)
        found = {
            name: margin.ratio.value for name, margin in (("margin_batch", where.batch), ("margin_horizon", where.horizon)) if margin.ratio
        }
        if ahead.steps_left is not None:
            found["steps_left"] = float(ahead.steps_left)
        if self._settings.governor != "off":
            self._tell(step, "warning", signs(signal.kl_behaviour, seen.completion_length, seen.lag_now), found)
            self._tell(step, "region", broken(where, ahead, self._num_steps - step - 1), found)
        return found

    def _look_for_collapse(self) -> None:
        """Tell a collapse once while it lasts."""
        collapsed = self.state.collapse.collapsed_at
        if collapsed is not None and not self.state.is_collapse_told:
            good = self.state.collapse.last_good
            text = f"{COLLAPSED}: the reward is zero since step {collapsed} and stays there; it was last near its best at step {good}"
            self.notes.append(Note(COLLAPSE, text, {"since": float(collapsed), "last_good": float(good)}))
        self.state.is_collapse_told = collapsed is not None

    def _tell(self, step: int, kind: NoteKind, told: dict[str, str], values: dict[str, float]) -> None:
        """Note what holds at this step, unless it held a short while ago."""
        for name, text in told.items():
            if step - self.state.held_at.get(name, -WINDOW - 1) > WINDOW:
                self.notes.append(Note(kind, text, values))
            self.state.held_at[name] = step

    @property
    def g_2(self) -> float | None:
        """The root mean square of |Delta theta|/eta over the window: G_2 of Appendix A (39, 40)."""
        return math.sqrt(fmean(value**2 for value in self.state.g_upd)) if any(self.state.g_upd) else None

    def ahead(self, lr: float, lag: int) -> Forecast:
        """The forecast at this learning rate and lag."""
        travelled, own = self.state.travelled, self.g_2
        if own is None or not travelled:
            return Forecast(None, None, None, None)
        scale = self._calibration.speed(self.g_2)
        speed = (travelled[-1] - travelled[0]) / (len(travelled) - 1) / own / scale if len(travelled) > 1 else None
        return forecast(self._calibration, lr / scale, lag, travelled[-1] / own / scale, speed, self.state.exponent)

    def take_notes(self) -> list[Note]:
        """What was decided or seen since the last call."""
        taken, self.notes = self.notes, []
        return taken
