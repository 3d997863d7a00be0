"""A task of one's own, as a template: name it as `examples.own_task:EvenDigits` in [task].

A task needs two disjoint splits of problems and a reward; see tasks/base.py. This one asks for even digits.
"""

from __future__ import annotations

from protocol.errors import TaskError
from tasks.base import Problem


class EvenDigits:
    """Reward: the share of a completion's `length` characters that are even digits."""

    def __init__(self, num_prompts: int = 64, length: int = 8) -> None:
        self.num_train = self.num_heldout = num_prompts
        self._length = length

    def train(self, index: int) -> Problem:
        return Problem(index, f"{2 * index}=", "")

    def heldout(self, index: int) -> Problem:
        return Problem(index, f"{2 * index + 1}=", "")

    def solution(self, problem: Problem) -> str:
        raise TaskError(f"there is no single solution to {problem.prompt!r}; give a policy by policy.path")

    def reward(self, problem: Problem, completion: str) -> float:
        return sum(character in "02468" for character in completion[: self._length]) / self._length
