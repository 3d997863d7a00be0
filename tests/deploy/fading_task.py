"""A task whose reward goes to zero after a while, whatever the policy does: a run that collapses."""

from __future__ import annotations

from examples.own_task import EvenDigits
from tasks.base import Problem


class Fades(EvenDigits):
    """Rewards of one scorer: half of the first `num_rewarded` are 1, all after them 0."""

    def __init__(self, num_rewarded: int = 64) -> None:
        super().__init__()
        self._num_left = num_rewarded

    def reward(self, problem: Problem, completion: str) -> float:
        self._num_left -= 1
        return float(self._num_left >= 0 and self._num_left % 2 == 0)
