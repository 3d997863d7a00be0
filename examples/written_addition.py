"""Addition with its working written out: a task with longer completions, named as `examples.written_addition:WrittenAddition` in [task]."""

from __future__ import annotations

from itertools import zip_longest

from tasks.arithmetic import Arithmetic
from tasks.base import Problem


class WrittenAddition:
    """Prompts such as "478+64=" with the solution "8+4=12,7+6+1=14,4+0+1=5;542": columns from the right, each with its carry, then the sum.

    Only what follows the last semicolon is scored, so the working earns nothing by itself.
    """

    def __init__(self, digits: int = 5, heldout: int = 256, seed: int = 0) -> None:
        """Operands 0..10**digits-1. ConfigError if an option is wrong."""
        self._sums = Arithmetic(digits, "+", heldout, seed)
        self.num_train, self.num_heldout = self._sums.num_train, self._sums.num_heldout

    def train(self, index: int) -> Problem:
        return self._sums.train(index)

    def heldout(self, index: int) -> Problem:
        return self._sums.heldout(index)

    def solution(self, problem: Problem) -> str:
        one, other = problem.prompt.removesuffix("=").split("+")
        columns, carry = [], 0
        for pair in zip_longest(reversed(one), reversed(other), fillvalue="0"):
            total = int(pair[0]) + int(pair[1]) + carry
            columns.append(f"{'+'.join(pair)}{'+1' if carry else ''}={total}")
            carry = total // 10
        return f"{','.join(columns)};{problem.answer}"

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 if the text after the last semicolon is the sum in decimal; otherwise 0.0, as where there is no semicolon."""
        _, semicolon, last = completion.rpartition(";")
        return 1.0 if semicolon and last.strip() == problem.answer else 0.0
