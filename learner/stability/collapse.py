"""Collapse: the training reward drops to zero and stays there (paper, section 4.1).

Rewards are those of batches, each counted once: a reused batch tells nothing new about the policy. "Zero" is a level of at most ZERO_SHARE of the
best that the run has had, since few rewards are exactly zero for a policy that answers at random.

Invariant: a run has collapsed only if it had a level to fall from, its level was at zero for PATIENCE batches in a row and has not been above
GOOD_SHARE of the best since, and the batches at zero would have brought MIN_REWARDS at the best level, so that chance does not explain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean
from typing import Final

from msgspec import Struct

ZERO_SHARE: Final = 0.25
LEVEL_BATCHES: Final = 4
"""A level is the mean reward of so many batches, or of as many as there are: a run may be at its best at its start."""
PATIENCE: Final = 2
"""Batches in a row after which the level is at zero."""
MIN_REWARDS: Final = 96
"""Runs of sparse rewards have batches without any; at so many expected rewards a healthy run does not look like a collapsed one."""
GOOD_SHARE: Final = 0.5
"""A policy is good while its rewards are above this share of the best level, and one that collapsed has come back above it."""
SMALLEST_LEVEL: Final = 1e-6
"""Below this a run has not begun to be rewarded, and cannot collapse."""


class Collapse(Struct):
    """The state of one run, fed a batch at a time."""

    rewards: list[float] = []
    """Of the last LEVEL_BATCHES batches, and in `steps` their first uses."""
    steps: list[int] = []
    best: float = 0.0
    low_since: int = -1
    """The first use of the batches in a row that brought the level down; -1 before, and once it has come back."""
    num_low: int = 0
    num_expected: float = 0.0
    """Rewards that the batches from `low_since` on would have brought at the best level."""
    last_good: int = 0
    """The step of the last batch whose own reward and level were near the best level."""

    def add(self, step: int, reward: float, num_completions: int) -> None:
        """A batch of `num_completions` with this mean reward was used for the first time at `step`."""
        self.rewards, self.steps = [*self.rewards, reward][-LEVEL_BATCHES:], [*self.steps, step][-LEVEL_BATCHES:]
        self.best = max(self.best, self.level)
        if min(self.level, reward) > GOOD_SHARE * self.best:
            self.last_good = step
        if self.collapsed_at is not None and self.level <= GOOD_SHARE * self.best:
            return
        is_low = self.level <= ZERO_SHARE * self.best and reward <= GOOD_SHARE * self.best
        if self.best <= SMALLEST_LEVEL or not is_low:
            self.low_since, self.num_low, self.num_expected = -1, 0, 0.0
            return
        if self.num_low == 0:
            low = list(takewhile(lambda earlier: earlier <= ZERO_SHARE * self.best, reversed(self.rewards)))
            self.low_since, self.num_expected = self.steps[-max(1, len(low))], (len(low) - 1) * num_completions * self.best
        self.num_low += 1
        self.num_expected += num_completions * self.best

    @property
    def level(self) -> float:
        """The mean reward of the last batches."""
        return fmean(self.rewards) if self.rewards else 0.0

    @property
    def collapsed_at(self) -> int | None:
        """The step from which on the reward has been zero; None while the run has not collapsed."""
        return self.low_since if self.num_low >= PATIENCE and self.num_expected >= MIN_REWARDS else None


def collapse_step(steps: Sequence[int], rewards: Sequence[float], num_completions: int) -> int | None:
    """t_collapse of a recorded run: the step from which on the reward is at zero to the end; None if it is not.

    One reward per batch of `num_completions`, at its first use.
    """
    state = Collapse()
    for step, reward in zip(steps, rewards, strict=True):
        state.add(step, reward, num_completions)
    return state.collapsed_at
