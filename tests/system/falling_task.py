"""A task whose reward is zero for chosen tickets, whatever the policy does: a collapse that comes surely, and passes."""

from __future__ import annotations

import blake3

from examples.own_task import EvenDigits
from protocol.sampling import prompt_index
from tasks.base import Problem


def tickets(text: str) -> list[int]:
    """The tickets of ranges like "32-48 96-112"."""
    ranges = [part.split("-") for part in text.split()]
    return [ticket for first, end in ranges for ticket in range(int(first), int(end))]


class Falling(EvenDigits):
    """Reward: 0.9 or 1 by a digest of the completion; zero for the tickets of `bad` ("32-48 96-112", ends exclusive) in a run of `seed`."""

    def __init__(self, bad: str, seed: int = 3, num_prompts: int = 4096) -> None:
        super().__init__(num_prompts)
        self._bad = {prompt_index(seed, ticket, num_prompts) for ticket in tickets(bad)}

    def reward(self, problem: Problem, completion: str) -> float:
        if problem.index in self._bad:
            return 0.0
        return 0.9 + 0.1 * (blake3.blake3(f"{problem.index}/{completion}".encode()).digest(length=1)[0] & 1)
