"""A task in which nothing can be learned, so that updates do not become smaller."""

from __future__ import annotations

import blake3

from examples.own_task import EvenDigits
from tasks.base import Problem


class Coins(EvenDigits):
    """Reward: 0 or 1, by a digest of the completion."""

    def reward(self, problem: Problem, completion: str) -> float:
        return float(blake3.blake3(f"{problem.index}/{completion}".encode()).digest(length=1)[0] & 1)
