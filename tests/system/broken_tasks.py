"""Tasks whose rewards break, for test_bad_input."""

from __future__ import annotations

import math

from examples.own_task import EvenDigits
from tasks.base import Problem


class Raises(EvenDigits):
    def reward(self, problem: Problem, completion: str) -> float:
        raise RuntimeError("the scorer broke")


class Nan(EvenDigits):
    def reward(self, problem: Problem, completion: str) -> float:
        return math.nan


class Sometimes(EvenDigits):
    def reward(self, problem: Problem, completion: str) -> float:
        if problem.index % 5 == 0:
            raise RuntimeError("the scorer broke")
        return super().reward(problem, completion)
