"""A task whose reward does what the completion says, for test_scoring."""

from __future__ import annotations

import os

from tasks.base import Problem


class Treacherous:
    """The reward is how often `best` is in the completion."""

    num_train = num_heldout = 8

    def __init__(self, best: int = 3) -> None:
        self._best = str(best)

    def train(self, index: int) -> Problem:
        return Problem(index, f"p{index}", "")

    heldout = train

    def solution(self, problem: Problem) -> str:
        return self._best

    def reward(self, problem: Problem, completion: str) -> float:
        if completion == "loop":
            while True:
                pass
        if completion == "arithmetic":
            return float(len(str(9 ** (9**9))))
        if completion == "raise":
            raise ValueError("as asked")
        if completion == "exit":
            os._exit(7)
        if completion.startswith("print"):
            print("a task may print", flush=True)  # noqa: T201
        return float("nan") if completion == "nan" else float(completion.count(self._best))
